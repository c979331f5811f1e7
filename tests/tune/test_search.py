"""Whole searches, for real: trials, their record, seeds and the final run, and what is refused."""

import json
import tomllib
from pathlib import Path

import pytest

from pipelines.config import Scale, total_steps
from pipelines.errors import UserError
from pipelines.make_shards import main as make_shards
from pipelines.pretrain import read_config
from pipelines.spool import read_spool
from tests.conftest import write_images
from tests.tune.searches import SPACE, arguments, journal, left_over
from tune.running import places
from tune.search import main, read_search

# At the larger rate nothing is finite for long.
HALF_BROKEN = """
["model.mask_ratio"]
values = [0.5, 0.75]
["optim.base_lr"]
values = [1e-2, 1e30]
"""


@pytest.fixture
def command(shards, tmp_path):
    """Arguments of a search."""

    def write(*more, **options):
        return arguments(tmp_path, shards, *more, **options)

    return write


@pytest.fixture
def doubtful(shards, tmp_path):
    """Labelled shards a part of whose labels is wrong, so that no score is 100 %."""
    write_images(tmp_path / "images", 300, seed=2)
    for i in range(0, 300, 2):
        name, wrong = f"{i:04d}.jpg", f"class{i // 2 % 3}"
        (tmp_path / "images" / f"class{i % 3}" / name).rename(tmp_path / "images" / wrong / name)
    where = str(tmp_path / "doubtful")
    assert make_shards(["--source", str(tmp_path / "images"), "--out", where, "--split", "train"]) == 0
    return where


def test_a_search_finds_a_recipe_and_leaves_nothing_behind(command, tmp_path, capfd):
    from mlflow import MlflowClient

    def asked(*more):
        # One at once: a second process would take as long to start as all trials take.
        return command("--sampler", "grid", "--reports", "4", "--concurrent", "1", *more, space=HALF_BROKEN)

    assert main(asked()) == 0
    out = capfd.readouterr().out
    folder = tmp_path / "runs" / "found"
    trials = journal(folder)
    assert len(trials) == 4
    broken = {name: trials.pop(name) for name, one in list(trials.items()) if one["values"]["optim.base_lr"] == 1e30}
    assert len(broken) == 2
    for one in broken.values():
        # It goes on without them, and says why.
        assert one["state"] == "failed"
        assert "not finite in 216 of 216 samples" in one["reason"]
        assert f"failed: {one['reason']}" in out
    assert "finished" in {one["state"] for one in trials.values()} <= {"finished", "stopped"}
    for one in trials.values():
        # Every report of a trial once, in order; one that was stopped has not trained on.
        assert one["steps"] == [6, 12, 18, 24][: len(one["steps"])]
        assert (one["steps"][-1] == 24) == (one["state"] == "finished")
    assert left_over() == []

    # The best is a recipe, and it is what the table has first.
    best = tomllib.loads((folder / "best.toml").read_text())
    scores = {}
    for line in (folder / "journal.jsonl").read_text().splitlines():
        value = json.loads(line)
        if value["state"] == "finished":
            scores[value["trial"]] = value["score"]
    first = max(scores, key=lambda name: scores[name])
    assert scores[first] == max(scores.values())
    found = {key: best[key.split(".")[0]][key.split(".")[1]] for key in trials[first]["values"]}
    assert scores[first] in [s for n, s in scores.items() if trials[n]["values"] == found]
    assert best["run"]["name"] == "found-best"
    assert best["scale"]["reading_cpus"] == 0, "a share of this search is none of the recipe"
    assert "best.toml" in out

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'mae-on-ray'")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags["mae.kind"] == "search"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in children} == {*trials, *broken}
    assert {run.info.run_name for run in runs if run.info.status == "FAILED"} == set(broken)
    for run in children:
        if run.info.run_name in broken:
            continue
        assert run.info.status == "FINISHED"
        told = trials[run.info.run_name]
        assert run.data.params["model.mask_ratio"] == str(told["values"]["model.mask_ratio"])
        history = client.get_metric_history(run.info.run_id, "probe/linear_top1")
        assert [point.step for point in history if point.step] == told["steps"]
    # One best score: in the table, in the record, in the recipe and in the picture.
    table = (folder / "table.txt").read_text()
    assert table in out
    assert f" {scores[first]:.2f} %" in table.splitlines()[1]
    assert parent.data.metrics["search/best"] == scores[first]
    # Every score is a number of whole images of the split whose size is said; one image of the fixture is broken.
    num = int(table.rpartition("n = ")[2].split()[0].strip(";"))
    images = [score * num / 100 for score in scores.values()]
    assert images == pytest.approx([round(one) for one in images])
    assert f"{scores[first]:.2f} % on its validation split, n = {num}." in (folder / "best.toml").read_text()
    last = {value["trial"]: value["score"] for line in (folder / "journal.jsonl").read_text().splitlines()
            if "score" in (value := json.loads(line)) and value["trial"] in trials}  # fmt: skip
    ties = sum(scores[first] - score < 100.01 / num for score in last.values())
    assert f"{ties} of {len(trials)} within one image of the best" in table
    # The untrained encoder, which all share, was scored by one of them.
    (untrained,) = [line for line in table.splitlines() if line.lstrip().startswith("- ")]
    assert untrained.endswith("random encoder")
    assert untrained.split()[:3] == ["-", "any", "any"]
    (random,) = [value["random"] for line in (folder / "journal.jsonl").read_text().splitlines()
                 if "random" in (value := json.loads(line))]  # fmt: skip
    assert f"{random['probe/linear_top1']:.2f} %" in untrained
    # Its place in the table and its state stand on each trial, where the UI can sort by them.
    places = {line.split()[1]: line.split() for line in table.splitlines()[1:3]}  # behind them are those that failed
    for run in children:
        name = run.info.run_name
        assert run.data.tags["mae.state"] == (trials | broken)[name]["state"]
        row = places[run.data.params["model.mask_ratio"]] if name in trials else None
        assert run.data.tags.get("mae.rank") == (row[0] if row else None)
    pictures = {Path(file.path).name for file in client.list_artifacts(parent.info.run_id, "pictures")}
    assert {"heat-map.png", "cost.png", "stopping.png", "over-model.mask_ratio.png"} <= pictures

    # The same name again is no second search, and another space is no continuation.
    with pytest.raises(UserError, match="exists: go on with it with --resume"):
        main(asked())
    with pytest.raises(UserError, match="begun with another space"):
        main(
            command(
                "--sampler", "grid", "--reports", "4", "--resume", space='["model.mask_ratio"]\nvalues = [0.25, 0.5]\n'
            )
        )
    with pytest.raises(UserError, match=r"begun with another probe.samples: 0, now 100"):
        main(asked("--resume", "--probe.samples", "100"))


@pytest.mark.chaos  # for its minute alone
def test_trials_of_several_workers_leave_no_place_behind(command, doubtful, tmp_path):
    # Ray Train runs inside of these, with a placement group of its own; one of a reduction of 4 goes on.
    space = '["optim.base_lr"]\nvalues = [1e-2, 1e-3, 1e-4, 1e30]\n'
    how = ["--sampler", "grid", "--reports", "4", "--reduction", "4", "--probe.train", doubtful]
    workers = ["--scale.workers", "2", "--scale.cpus-per-worker", "0.4"]
    assert main(command(*how, *workers, space=space)) == 0
    trials = journal(tmp_path / "runs" / "found").values()
    assert {one["state"] for one in trials} == {"finished", "stopped", "failed"}
    assert all(one["steps"] == [6, 12, 18, 24][: len(one["steps"])] for one in trials)
    assert left_over() == []


@pytest.mark.chaos  # for its minute alone
def test_seeds_are_ranked_by_their_mean_and_the_best_reads_the_test_set_once(
    command, doubtful, shards, tmp_path, capfd
):
    from mlflow import MlflowClient

    def asked(*more):
        how = ["--sampler", "grid", "--scheduler", "none", "--seeds", "2", "--reports", "2"]
        final = ["--final", "--final-factor", "2", "--probe.test", shards["test"]]
        return command(
            *how, *final, "--probe.train", doubtful, *more, space='["model.mask_ratio"]\nvalues = [0.25, 0.75]\n'
        )

    assert main(asked()) == 0
    out = capfd.readouterr().out
    folder = tmp_path / "runs" / "found"
    trials = journal(folder)
    assert len(trials) == 4
    assert all((one["state"], one["steps"]) == ("finished", [12, 24]) for one in trials.values())
    scores = {0.25: {}, 0.75: {}}
    for line in (folder / "journal.jsonl").read_text().splitlines():
        value = json.loads(line)
        if value["state"] == "finished":
            scores[value["values"]["model.mask_ratio"]][value["seed"]] = value["score"]
    assert [sorted(by_seed) for by_seed in scores.values()] == [[0, 1], [0, 1]]

    means = {ratio: (by_seed[0] + by_seed[1]) / 2 for ratio, by_seed in scores.items()}
    ranked = sorted(means, key=lambda ratio: -means[ratio])
    rows = [line.split() for line in (folder / "table.txt").read_text().splitlines()[1:3]]
    for place, (row, ratio) in enumerate(zip(rows, ranked, strict=True), 1):
        # Student's t of one degree of freedom: 12.706, and the standard error of two is half their distance.
        half = 12.706 * abs(scores[ratio][0] - scores[ratio][1]) / 2
        assert row[:2] == [str(place), str(ratio)]
        assert float(row[2]) == pytest.approx(means[ratio], abs=0.01)
        assert float(row[5]) == pytest.approx(half, abs=0.01)
        assert row[6] == "2"

    best, final = (read_config(["--config", str(folder / name)]) for name in ("best.toml", "final.toml"))
    assert best.model.mask_ratio == final.model.mask_ratio == ranked[0]
    assert (total_steps(best, 300), total_steps(final, 300)) == (24, 48)
    assert best.probe.test == final.probe.test == shards["test"]
    assert (best.run.name, final.run.name) == ("found-best", "found-final")

    # Of the test set there is one score, that of the final run.
    seen = {}
    for spool in (tmp_path / "runs").rglob("metrics.jsonl"):
        values = [line["metrics"] for line, _ in read_spool(spool) if line and "metrics" in line]
        seen[spool.parent.name] = sum("test/linear_top1" in metrics for metrics in values)
    assert seen == {"found": 0, "found-final": 1, **dict.fromkeys(trials, 0)}
    result = json.loads((tmp_path / "runs" / "found-final" / "result.json").read_text())
    assert result["step"] == 48
    assert f"{result['scores']['test/linear_top1']:.1f} %" in out
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'mae-on-ray'")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs["found-final"].data.metrics["test/linear_top1"] == result["scores"]["test/linear_top1"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    capfd.readouterr()
    before = (folder / "journal.jsonl").read_text()
    assert main(asked("--resume")) == 0
    assert (folder / "journal.jsonl").read_text() == before, "what is known is not trained again"
    assert "'found-final' has finished already" in capfd.readouterr().out
    assert left_over() == []


@pytest.mark.parametrize(
    ("more", "space", "told"),
    [
        (["--objective", "loss"], SPACE, "the reconstruction loss cannot rank configurations"),
        (["--objective", "top5"], SPACE, "objective must be one of linear, knn"),
        (["--final"], SPACE, "--final reads the test set once: give it with --probe.test"),
        (["--probe.train", ""], SPACE, "a search is scored by a probe"),
        ([], '["model.mask_ration"]\nvalues = [0.5, 0.6]\n', "did you mean model.mask_ratio"),
        ([], '["model.mask_ratio"]\nvalues = [0.5, 1.5]\n', "model.mask_ratio"),
        ([], '["model.mask_ratio"]\nvalues = [0.5]\n', "an axis needs two or more"),
        ([], '["model.decoder_width"]\nvalues = [16, 17]\n', "model.decoder_width 17"),
    ],
)
def test_bad_input_is_one_line(command, more, space, told):
    with pytest.raises(UserError) as error:
        read_search(command(*more, space=space))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_what_never_fits_is_said_at_once(command):
    with pytest.raises(UserError, match="no trial fits: one needs 16 CPUs to train and"):
        main(command("--scale.workers", "16", "--scale.cpus-per-worker", "1", name="large"))
    with pytest.raises(UserError, match="no search 'nowhere' to resume"):
        main(command("--resume", name="nowhere"))


def test_a_worker_has_its_place_on_one_node():
    small, large = {"CPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}
    scale = Scale(cpus_per_worker=4)
    assert [places(node, scale) for node in (small, large)] == [0, 2]
    # The rest of two GPUs is no GPU.
    assert places(large, Scale(cpus_per_worker=1, gpu=True, gpu_share=0.6)) == 2
    assert places(large, Scale(cpus_per_worker=1, gpu=True, gpu_share=0.25)) == 8
    assert places(small, Scale(gpu=True)) == 0
