"""What a transfer is called, and which commands ask for the same one."""

import math

import pytest

from pipelines.config import Config
from pipelines.transfer import read_transfer
from pipelines.transfer_config import Transfer, TransferData, recipe, units
from pipelines.transfer_identity import as_pretrained, dataset_name, identity, score_name

GIVEN = ["--run", "x", "--data.train", "/a/cells/train", "--data.test", "/a/cells/test"]
DIGESTS = {"train": "a", "test": "b"}


def asked(protocol, *flags):
    """The transfers of a command, for an encoder of 12 blocks."""
    return units(as_pretrained(read_transfer([*GIVEN, "--protocol", protocol, *flags]), Config()), 12)


def told(protocol, *flags, step=7):
    (unit,) = asked(protocol, *flags)
    return identity(unit, step, DIGESTS)


def test_each_protocol_begins_with_its_recipe():
    linear = read_transfer([*GIVEN, "--protocol", "linear"])
    assert (linear.train.optimizer, linear.train.base_lr, linear.train.epochs) == ("lars", 0.1, 90)
    finetune = read_transfer([*GIVEN, "--protocol=finetune", "--train.mixup", "0"])
    assert (finetune.train.layer_decay, finetune.train.mixup, finetune.train.cutmix) == (0.65, 0, 1)
    assert (finetune.data.auto_augment, finetune.train.erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    scratch = read_transfer([*GIVEN, "--protocol", "scratch"])
    assert (scratch.train.weight_decay, scratch.train.ema, scratch.train.erasing) == (0.3, 0.9999, 0)
    assert dataset_name(finetune) == "cells"
    assert dataset_name(Transfer(data=TransferData(train="s3://b/shards/x-{0..3}.tar"))) == "b"


@pytest.mark.parametrize(
    ("protocol", "flags", "name"),
    [
        ("knn", [], "knn"),
        ("knn", ["--knn-k", "10", "--pool", "cls"], "knn_cls_k10"),
        ("linear", ["--knn-k", "10", "--train.base-lr", "0.3", "--train.epochs", "90"], "linear"),
        ("linear", ["--train.epochs", "5"], "linear_5_epochs"),
        ("linear-fast", ["--train.epochs", "5", "--visible", "0.25"], "linear_fast_visible_0.25"),
        ("linear-fast", ["--data.image-size", "224", "224"], "linear_fast"),
        ("linear-fast", ["--data.image-size", "64", "32"], "linear_fast_64x32"),
        ("partial", ["--blocks", "0.5"], "partial_0.5"),
        ("partial", ["--blocks", "12"], "partial_12"),
        ("partial", ["--blocks", "all"], "finetune"),
        ("finetune", ["--data.label-fraction", "0.01", "--pool", "cls"], "finetune_labels_0.01_cls"),
        ("scratch", ["--train.epochs", "100"], "scratch_100_epochs"),
        ("segment", ["--pool", "cls"], "segment"),
    ],
)
def test_names_tell_what_changes_the_meaning(protocol, flags, name):
    (unit,) = asked(protocol, *flags)
    assert score_name(unit) == name


def test_one_command_asks_for_several_transfers():
    sweep = asked("partial", "--sweep")
    assert [unit.blocks[0] for unit in sweep[:-1]] == [0, 0.5, 1, 2, 4, 8, 12]
    assert sweep[-1].protocol == "finetune"
    several = asked("finetune", "--against-scratch", "--data.label-fraction", "0.1", "1")
    assert [score_name(unit) for unit in several] == [
        "finetune_labels_0.1", "scratch_labels_0.1_100_epochs", "finetune", "scratch_100_epochs",
    ]  # fmt: skip


def test_all_is_a_number_of_blocks_in_flags_and_files():
    assert Transfer.model_validate({"protocol": "partial", "blocks": ["all", 2]}).blocks == (math.inf, 2)
    assert [score_name(unit) for unit in asked("partial", "--blocks", "2", "all")] == ["partial_2", "finetune"]
    # What lies in a transfer's folder says how many there are.
    assert all(Transfer.model_validate_json(unit.model_dump_json()) == unit for unit in asked("partial", "--sweep"))


@pytest.mark.parametrize(
    ("protocol", "flags"),
    [
        ("knn", ["--train.epochs", "5", "--blocks", "2", "--data.no-flip", "--train.micro-size", "7", "--seeds", "3"]),
        ("linear-fast", ["--knn-k", "5", "--train.optimizer", "lars", "--data.crop-scale", "0.5", "1"]),
        ("linear", ["--train.layer-decay", "0.5", "--train.drop-path", "0.1", "--train.weight-decay", "1"]),
        ("partial", ["--knn-k", "5", "--seeds", "0", "1", "2"]),
        ("finetune", ["--blocks", "1", "--log-every", "3", "--scale.workers", "2", "--data.name", "other"]),
        ("scratch", ["--blocks", "1", "--data.image-size", "224", "224", "--data.mean", "0.485", "0.456", "0.406"]),
        ("segment", ["--pool", "cls", "--train.drop-path", "0.1", "--train.layer-decay", "0.5"]),
    ],
)
def test_what_a_protocol_does_not_use_makes_no_other_transfer(protocol, flags):
    assert told(protocol, *flags) == told(protocol)


@pytest.mark.parametrize(
    ("protocol", "flags"),
    [
        ("knn", ["--knn-k", "5"]),
        ("knn", ["--train.precision", "bfloat16"]),
        ("linear-fast", ["--visible", "0.5"]),
        ("linear-fast", ["--pool", "cls"]),
        ("linear-fast", ["--data.val-share", "0.2"]),
        ("linear", ["--train.micro-size", "32"]),
        ("linear", ["--data.mean", "0.5", "0.5", "0.5"]),
        ("partial", ["--blocks", "2"]),
        ("finetune", ["--train.layer-decay", "0.75"]),
        ("finetune", ["--data.auto-augment", ""]),
        ("finetune", ["--train.base-lrs", "0.1", "0.2"]),
        ("segment", ["--train.weight-decay", "0"]),
        ("segment", ["--data.image-size", "64", "64"]),
    ],
)
def test_what_a_protocol_uses_does(protocol, flags):
    assert told(protocol, *flags) != told(protocol)


def test_a_sweep_ends_with_the_fine_tuning_that_is_asked_for_alone():
    *_, last = asked("partial", "--sweep")
    assert identity(last, 7, DIGESTS) == told("finetune") == told("partial", "--blocks", "all")
    assert told("partial", "--blocks", "12") != told("finetune")


def test_only_random_weights_have_no_step():
    assert told("finetune", step=7) != told("finetune", step=8)
    assert told("scratch", step=7) == told("scratch", step=8)


def test_seeds_are_kept_where_they_change_something():
    assert asked("knn", "--seeds", "1", "2")[0].seeds == (0,)
    assert asked("knn", "--seeds", "1", "2", "--data.label-fraction", "0.1")[0].seeds == (1, 2)
    assert asked("knn", "--seeds", "1", "2", "--visible", "0.5")[0].seeds == (1, 2)
    assert asked("linear-fast", "--seeds", "1", "2")[0].seeds == (1, 2)


def test_a_file_s_identity_can_be_read_back():
    values = recipe("finetune")
    assert identity(Transfer.model_validate(values), 0, {})["train.base_lr"] == 5e-4
