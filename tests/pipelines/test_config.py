"""Files and flags into a configuration, and mistakes into one line."""

import os

import pytest

from pipelines.cli import flag_names, load_toml, to_toml
from pipelines.config import Config, Scale, flat, identity, identity_hash, total_steps, worker_cpus
from pipelines.errors import UserError
from pipelines.pretrain import read_config, resolve
from pipelines.transfer_config import Transfer


def write(path, text):
    path.write_text(text)
    return str(path)


def test_flags_go_over_the_file(tmp_path):
    file = write(tmp_path / "a.toml", "[model]\nmask_ratio = 0.6\n[optim]\nbase_lr = 1e-4\n")
    config = read_config(["--config", file, "--model.mask-ratio", "0.5", "--data.image-size", "32", "48"])
    assert config.model.mask_ratio == 0.5
    assert config.optim.base_lr == 1e-4
    assert config.data.image_size == (32, 48)
    assert read_config([f"--config={file}"]).model.mask_ratio == 0.6


def test_the_resolved_configuration_can_be_fed_back(tmp_path):
    config = resolve(read_config(["--data.train", "shards", "--run.name", 'a-"b'.replace('"', ""), "--data.no-flip"]))
    assert load_toml(Config, write(tmp_path / "back.toml", to_toml(config, "title"))) == config
    assert config.data.train.startswith("/")
    assert config.run.storage.startswith("/")


def test_every_recipe_is_valid():
    from pathlib import Path

    folder = Path(__file__).parents[2] / "pipelines" / "recipes"
    recipes, transfers = sorted(folder.glob("*.toml")), sorted(folder.glob("transfer/*.toml"))
    assert recipes
    assert transfers
    for recipe in recipes:
        assert load_toml(Config, str(recipe)).run.name
    for recipe in transfers:
        assert load_toml(Transfer, str(recipe)).run


def test_one_dotted_name_for_each_key():
    assert set(flag_names(Config)) == set(flat(Config()))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model.mask-ration", "0.5"], "did you mean --model.mask-ratio"),
        (["--model.mask-ratio", "1.5"], "model.mask_ratio: Input should be less than 1, found 1.5"),
        (["--model.mask-ratio", "x"], "model.mask-ratio"),
        (["--data.channels", "2"], "data.channels"),
        (["--run.name", "a/b"], "run.name"),
        (["--train.epochs", "0"], "give train.epochs or train.steps"),
        (["--data.crop-scale", "0.5", "0.2"], "data.crop_scale must rise"),
        (["--data.mean", "0.5"], "one value for each of the 3"),
        (["--config"], "needs a TOML file"),
        (["--config", "nowhere.toml"], "no configuration file"),
    ],
)
def test_wrong_flags_are_one_line(arguments, told):
    with pytest.raises(UserError) as caught:
        read_config(arguments)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[model]\nmask_ratoi = 0.5\n", "model.mask_ratoi"),
        ("[model]\nmask_ratio = 'high'\n", "model.mask_ratio"),
        ("[model\n", "not a TOML file"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, text, told):
    with pytest.raises(UserError) as caught:
        read_config(["--config", write(tmp_path / "a.toml", text)])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_identity_is_what_defines_the_result():
    base = identity_hash(identity(Config(), "d"))

    def changed(*arguments):
        return identity_hash(identity(read_config(list(arguments)), "d")) != base

    assert not changed("--scale.workers", "7", "--log.every", "3", "--batch.micro-size", "8", "--data.train", "x")
    assert not changed("--profile", "--train.checkpoint-activations", "--batch.micro-size", "0")
    assert not changed("--run.storage", "elsewhere", "--checkpoint.keep", "9", "--train.compile")
    assert changed("--run.seed", "1")
    assert changed("--batch.global-size", "8")
    assert changed("--model.mask-ratio", "0.5")
    assert changed("--train.precision", "bfloat16")
    assert identity_hash(identity(Config(), "other data")) != base


def test_total_steps_round_up():
    config = read_config(["--train.epochs", "2.5", "--batch.global-size", "64"])
    assert total_steps(config, 100) == 4
    assert total_steps(read_config(["--train.steps", "9"]), 100) == 9


@pytest.mark.parametrize(
    ("workers", "nodes", "claimed"),
    [
        (1, [2.0], 1.0),
        (2, [2.0], 0.67),
        (1, [1.0], 0.34),
        (2, [16.0], 1.0),
        (16, [16.0], 0.95),
        (4, [2.0, 2.0], 0.67),
        (2, [0.0, 2.0, 2.0], 1.0),
        (1, [0.5], 1.0),
    ],
)
def test_a_worker_claims_what_leaves_room_for_reading(workers, nodes, claimed):
    reading = Config().data.cpus_per_task
    assert worker_cpus(Scale(workers=workers), reading, nodes) == claimed
    assert worker_cpus(Scale(workers=workers, cpus_per_worker=3), reading, nodes) == 3
    for packed in range(min(workers, int(nodes[-1] / claimed)) + 1):
        # However many of them Ray puts on the last node, a reading task has room somewhere.
        left = [*nodes[:-1], nodes[-1] - packed * claimed]
        for i, cpus in enumerate(left[:-1]):
            here = min(workers - packed, int(cpus / claimed))
            packed, left[i] = packed + here, cpus - here * claimed
        assert packed < workers or max(left) >= reading - 1e-6 or max(nodes) < reading


def test_more_workers_than_cpus_are_not_pressed_together():
    assert [worker_cpus(Scale(workers=num), 0.66, [4.0]) for num in (4, 5, 8, 99)] == [0.83, 1.0, 1.0, 1.0]


def test_elastic_workers_leave_room_on_every_node():
    claimed = worker_cpus(Scale(workers=2, min_workers=1), 0.66, [2.0, 1.5])
    assert claimed == 0.42
    for cpus in (2.0, 1.5):
        assert cpus - min(2, int(cpus / claimed)) * claimed >= 0.66 - 1e-4


NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("key", ["data.train", "probe.train", "probe.test", "run.storage", "run.init_from"])
def test_an_address_that_no_configuration_file_can_hold_is_one_line(key):
    section, name = key.split(".")
    given = {section: {name: NOT_UTF8}} if key != "probe.test" else {"probe": {"train": "x", "test": NOT_UTF8}}
    config = Config.model_validate(given)
    with pytest.raises(UserError, match=f"{key}: '.*' is not UTF-8, so that neither a configuration file nor MLflow"):
        resolve(config)


@pytest.mark.parametrize("flag", ["--storage", "--data.train", "--data.test", "--data.val"])
def test_so_it_is_for_a_transfer(flag):
    from pipelines.transfer import read_transfer

    given = {"--storage": "runs", "--data.train": "shards", "--data.test": "shards", flag: NOT_UTF8}
    with pytest.raises(UserError, match=f"{flag[2:]}: '.*' is not UTF-8"):
        read_transfer(["--run", "cells", *(word for pair in given.items() for word in pair)])
