"""Spaces: files into points, and every mistake into one line before anything runs."""

from pathlib import Path

import pytest

from pipelines.cli import load_toml
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.storage import Store
from tune.journal import Cell, Journal
from tune.running import optuna
from tune.space import Axis, Space, check_points, load_space, with_values

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "pipelines/recipes").glob("*.toml"))
SPACES = sorted((ROOT / "tune/spaces").glob("*.toml"))
SMALL = Config.model_validate({
    "data": {"image_size": (8, 8)},
    "model": {"arch": "vit_tiny_patch16_224", "patch_size": 4, "width": 12, "depth": 1, "heads": 3}
    | {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 4},
})  # fmt: skip
RATIO = '["model.mask_ratio"]\nlow = 0.3\nhigh = 0.9\nstep = 0.05\n'
WIDTH = '["model.decoder_width"]\nvalues = [32, 64, 128]\n'


def read(tmp_path: Path, text: str, config: Config = SMALL) -> Space:
    path = tmp_path / "space.toml"
    path.write_text(text)
    return load_space(str(path), config)


@pytest.mark.parametrize("space", SPACES, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_spaces_fit_the_recipes(space, recipe):
    config = load_toml(Config, str(recipe))
    read = load_space(str(space), config)
    points = read.grid(2)
    # The extremes; a test of all of them would build every model of the space.
    check_points(config, [points[0], points[-1]])
    heads = config.model.decoder_heads
    assert all(point.get("model.decoder_width", heads) % heads == 0 for point in points)


def test_a_lattice_holds_the_numbers_as_they_are_written(tmp_path):
    space = read(tmp_path, RATIO)
    ratios = [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9]
    assert [point["model.mask_ratio"] for point in space.grid()] == ratios
    assert space.size == 13
    assert space.snapped({"model.mask_ratio": 0.6000000000000001}) == {"model.mask_ratio": 0.6}


def test_points_have_the_types_of_the_schema(tmp_path):
    space = read(tmp_path, '["model.decoder_width"]\nvalues = [64.0, 32]\n["optim.warmup_epochs"]\nlow = 0\nhigh = 2\n'
                           '["model.depth"]\nlow = 1\nhigh = 9\nlog = true\n')  # fmt: skip
    for point in [*space.grid(3), *space.random(8, seed=0)]:
        assert {key: type(value) for key, value in point.items()} == {
            "model.decoder_width": int,
            "optim.warmup_epochs": float,
            "model.depth": int,
        }
    assert [point["model.depth"] for point in Space(space.axes[2:]).grid(3)] == [1, 3, 9]


def test_a_grid_cuts_ranges_without_a_step(tmp_path):
    axis = '["optim.base_lr"]\nlow = 1e-4\nhigh = 1e-2\n'
    assert [point["optim.base_lr"] for point in read(tmp_path, axis + "log = true\n").grid(3)] == [1e-4, 1e-3, 1e-2]
    assert [point["optim.base_lr"] for point in read(tmp_path, axis).grid(3)] == [1e-4, 5.05e-3, 1e-2]
    assert len(read(tmp_path, axis + RATIO + WIDTH).grid()) == 5 * 13 * 3


def test_random_points_are_distinct_repeatable_and_grow_without_changing(tmp_path):
    space = read(tmp_path, RATIO + WIDTH)
    assert space.random(5, seed=1) == space.random(9, seed=1)[:5]
    assert space.random(5, seed=1) != space.random(5, seed=2)
    everything = space.random(1000, seed=0)
    assert len(everything) == space.size == 39
    assert {tuple(sorted(point.items())) for point in everything} == {
        tuple(sorted(point.items())) for point in space.grid()
    }


def test_random_points_of_a_range_cover_its_decades(tmp_path):
    space = read(tmp_path, '["optim.base_lr"]\nlow = 1e-4\nhigh = 1e-2\nlog = true\n')
    drawn = [point["optim.base_lr"] for point in space.random(400, seed=0)]
    assert space.size is None
    assert 1e-4 <= min(drawn) < 1.1e-4
    assert 0.9e-2 < max(drawn) <= 1e-2
    assert 160 < sum(rate < 1e-3 for rate in drawn) < 240


def test_order_and_comments_change_neither_digest_nor_points(tmp_path):
    one = read(tmp_path, RATIO + WIDTH)
    other = read(tmp_path, "# why\n" + WIDTH.replace("32, 64, 128", "128, 32, 64") + RATIO)
    for named in (other.axes[0].key, next(iter(other.grid()[0])), next(iter(other.random(1, seed=0)[0]))):
        assert named == "model.decoder_width"  # as the file has it: for those who read it
    assert one.digest == other.digest
    assert one.random(6, seed=0) == other.random(6, seed=0)
    assert one.digest != read(tmp_path, RATIO).digest
    assert one.digest != read(tmp_path, RATIO + WIDTH.replace("128", "256")).digest


def test_optuna_draws_points_of_the_space(tmp_path):
    from optuna import create_study
    from optuna.samplers import RandomSampler

    space = read(tmp_path, RATIO + WIDTH + '["optim.base_lr"]\nlow = 1e-4\nhigh = 1e-2\nlog = true\n'
                                           '["model.depth"]\nlow = 2\nhigh = 6\nstep = 2\n')  # fmt: skip
    study = create_study(sampler=RandomSampler(seed=0))
    grid = {tuple(point[key] for key in ("model.mask_ratio", "model.decoder_width")) for point in space.grid(2)}
    for _ in range(20):
        point = space.snapped(study.ask(space.optuna()).params)
        assert (point["model.mask_ratio"], point["model.decoder_width"]) in grid
        assert point["model.depth"] in (2, 4, 6)
        assert 1e-4 <= point["optim.base_lr"] <= 1e-2


def test_optuna_suggests_no_point_twice_and_goes_on_after_those_that_are_known(tmp_path):
    space = read(tmp_path, '["model.mask_ratio"]\nlow = 0.3\nhigh = 0.9\nstep = 0.1\n')
    assert space.size == 7

    def suggested(journal):
        search = optuna(space, journal, seeds=1, seed=0)
        for place in range(7):
            values = search.suggest(f"t{place}")
            assert values is not None
            found = space.snapped(values)
            yield found
            search.on_trial_result(f"t{place}", {"score": 1.0, "training_iteration": 1})
            # That one ratio is the best draws the sampler to it.
            search.on_trial_complete(f"t{place}", {"score": -abs(found["model.mask_ratio"] - 0.6)})

    journal = Journal(Store(str(tmp_path)))
    points = list(suggested(journal))
    assert sorted(point["model.mask_ratio"] for point in points) == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    for point in points[:3]:
        journal.begin(Cell(point, 0))
    again = list(suggested(journal))
    assert again[:3] == points[:3]
    assert sorted(point["model.mask_ratio"] for point in again) == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "nothing varies"),
        ("[", "not a TOML file"),
        ('["model.mask_ration"]\nlow = 0.1\nhigh = 0.2', "no such key; did you mean model.mask_ratio or"),
        ("[model.mask_ratio]\nlow = 0.1\nhigh = 0.2", 'put the key in quotes, such as ["model.mask_ratio"]'),
        ('["run.seed"]\nvalues = [0, 1]', "--seeds"),
        ('["run.init_from"]\nvalues = ["a", "b"]', "run.init_from may not vary"),
        ('["probe.knn_k"]\nvalues = [5, 20]', "probe.knn_k may not vary"),
        ('["scale.workers"]\nvalues = [1, 2]', "scale.workers may not vary"),
        ('["data.train"]\nvalues = ["a", "b"]', "data.train may not vary"),
        ('["data.deadline_s"]\nvalues = [1, 2]', "data.deadline_s may not vary"),
        ('["batch.micro_size"]\nvalues = [1, 2]', "batch.micro_size may not vary"),
        ('["optim.betas"]\nvalues = [[0.9, 0.95], [0.9, 0.99]]', "it is a list"),
        ('"model.mask_ratio" = 0.5', "expected a table"),
        ('["model.mask_ratio"]\nlow = 0.9\nhigh = 0.9', "low must be below high, found 0.9 and 0.9"),
        ('["model.mask_ratio"]\nlow = 0.9\nhigh = 1.0', "model.mask_ratio: Input should be less than 1, found 1.0"),
        ('["model.mask_ratio"]\nvalues = [0.5, 1.5]', "model.mask_ratio: Input should be less than 1, found 1.5"),
        ('["data.channels"]\nvalues = [1, 3]', "data.channels 1: data.mean and data.std need one value"),
        ('["model.target"]\nvalues = ["raw", "dvae"]', "model.target: Input should be 'raw', 'normalized' or 'pca'"),
        ('["model.target"]\nlow = 0\nhigh = 1', "model.target has no range"),
        ('["data.flip"]\nlow = 0\nhigh = 1', "data.flip has no range"),
        ('["model.depth"]\nlow = 1.5\nhigh = 3', "model.depth: Input should be a valid integer"),
        ('["model.depth"]\nlow = 1\nhigh = 3\nstep = 0.5', "the key takes whole numbers"),
        ('["model.mask_ratio"]\nlow = 0.3\nhigh = 0.9\nstep = 0.07', "step 0.07 does not fit"),
        ('["model.mask_ratio"]\nlow = 0.3\nhigh = 0.9\nstep = 0', "step 0 does not fit"),
        ('["model.mask_ratio"]\nlow = 0.3\nhigh = "0.9"', "high must be a finite number, found '0.9'"),
        ('["optim.base_lr"]\nlow = 0.1\nhigh = inf', "high must be a finite number, found inf"),
        ('["optim.base_lr"]\nvalues = [0.1, inf]', "inf is no finite number"),
        ('["optim.weight_decay"]\nlow = 0\nhigh = 0.1\nlog = true', "log needs a low above 0, found 0.0"),
        ('["optim.base_lr"]\nlow = 0.1\nhigh = 0.2\nlog = 1', "log must be true or false"),
        ('["optim.base_lr"]\nlow = 0.1\nhigh = 0.2\nstep = 0.1\nlog = true', "step and log exclude each other"),
        ('["optim.base_lr"]\nlow = 0.1\nhigh = 0.2\nmean = 3', "no field 'mean'"),
        ('["optim.base_lr"]\nlow = 0.1', "give values, or low and high"),
        ('["optim.base_lr"]\nvalues = [0.1, 0.2]\nlog = true', "values and log exclude each other"),
        ('["optim.base_lr"]\nvalues = 0.1', "values must be a list"),
        ('["optim.base_lr"]\nvalues = [0.1]', "an axis needs two or more"),
        ('["optim.weight_decay"]\nvalues = [0, 0.0]', "values has 0.0 twice"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(tmp_path, text, told):
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert told in str(error.value)
    assert "space.toml: " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no space file '.*none.toml'"):
        load_space(str(tmp_path / "none.toml"), SMALL)


def test_epochs_do_not_vary_under_given_steps(tmp_path):
    text = '["train.epochs"]\nvalues = [1, 2]\n'
    steps = SMALL.model_copy(update={"train": SMALL.train.model_copy(update={"steps": 7})})
    assert read(tmp_path, text).size == 2
    with pytest.raises(UserError, match=r"train.epochs has no effect: the configuration gives train.steps, 7"):
        read(tmp_path, text, steps)


def test_values_go_into_the_configuration():
    changed = with_values(SMALL, {"model.mask_ratio": 0.5, "optim.base_lr": 0.01})
    assert (changed.model.mask_ratio, changed.optim.base_lr, changed.model.width) == (0.5, 0.01, 12)
    assert SMALL.model.mask_ratio == 0.75
    with pytest.raises(UserError, match=r"model.mask_ratio: Input should be less than 1, found 2"):
        with_values(SMALL, {"model.mask_ratio": 2.0})
    with pytest.raises(UserError, match=r"^model.mask_ratio 0.5, model.decoder_width 18: .*width 18 is not divisible"):
        with_values(SMALL, {"model.mask_ratio": 0.5, "model.decoder_width": 18})


def test_points_that_no_model_takes_are_found_before_a_trial():
    space = Space((Axis("model.decoder_width", values=(16, 20)), Axis("model.decoder_heads", values=(4, 8))))
    check_points(SMALL, Space(space.axes[:1]).grid())
    with pytest.raises(UserError, match=r"_width 20, model.decoder_heads 8: 8 decoder heads do not divide the"):
        check_points(SMALL, space.grid())
