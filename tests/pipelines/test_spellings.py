"""One spelling for one thing: what a flag is called in one command, it is called in every other that takes it."""

import contextlib
import io
from typing import Any

import pytest
from pydantic import BaseModel

from pipelines import check_shards, compare, make_shards, reconstruct, sync
from pipelines.cli import flag_names, load_toml, parse
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.estimate import Args as Estimate
from pipelines.transfer_config import Transfer
from tune.ablate import Ablation
from tune.search import Search

COMMANDS: dict[str, type[BaseModel]] = {
    "pretrain": Config,
    "estimate": Estimate,
    "transfer": Transfer,
    "reconstruct": reconstruct.Reconstruct,
    "compare": compare.Args,
    "sync": sync.Args,
    "search": Search,
    "ablate": Ablation,
    "make_shards": make_shards.MakeShards,
    "check_shards": check_shards.CheckShards,
}
NEEDED = {"make_shards": ["--source", "a", "--out", "b"], "check_shards": ["a"]}
RUN_COMMANDS = ("pretrain", "estimate", "transfer", "reconstruct", "sync", "search", "ablate")
# Spellings of one thing, a value, and the commands that take it.
THINGS = [
    (("--storage", "--run.storage"), "elsewhere", (*RUN_COMMANDS, "compare")),
    (("--run", "--run.name"), "cells", RUN_COMMANDS),
    (("--experiment", "--run.experiment"), "mine", ("pretrain", "estimate", "transfer", "search", "ablate")),
    (("--data.train",), "shards", ("pretrain", "estimate", "transfer", "reconstruct", "search", "ablate")),
    (("--data.image-size",), "48", ("pretrain", "estimate", "transfer", "search", "ablate")),
    (("--probe.pool",), "cls", ("pretrain", "estimate", "transfer", "search", "ablate")),
    (("--probe.knn-k",), "7", ("pretrain", "estimate", "transfer", "search", "ablate")),
    (("--log.every",), "7", ("pretrain", "estimate", "transfer", "search", "ablate")),
    (("--checkpoint.every-minutes",), "7.5", ("pretrain", "estimate", "transfer", "search", "ablate")),
    (("--batch.global-size",), "48", ("pretrain", "estimate", "transfer", "search", "ablate")),
    (("--batch.micro-size",), "48", ("pretrain", "estimate", "transfer", "search", "ablate")),
    (("--optim.base-lr",), "0.01", ("pretrain", "estimate", "transfer", "search", "ablate")),
    (("--optim.weight-decay",), "0.01", ("pretrain", "estimate", "transfer", "search", "ablate")),
    (("--optim.warmup-epochs",), "2.5", ("pretrain", "estimate", "transfer", "search", "ablate")),
    (("--scale.workers",), "2", ("pretrain", "estimate", "transfer", "search", "ablate")),
]


def read(command, *flags) -> Any:
    return parse(COMMANDS[command], prog=command, argv=[*NEEDED.get(command, []), *flags])


def leaves(values, prefix=""):
    for key, value in values.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def values(command, *flags):
    return dict(leaves(read(command, *flags).model_dump()))


@pytest.mark.parametrize("command", COMMANDS)
def test_one_thing_is_spelt_alike_in_all_commands(command):
    mine = [(flags, value) for flags, value, commands in THINGS if command in commands]
    before = values(command)
    first, last = (values(command, *(word for flags, value in mine for word in (flags[i], value))) for i in (0, -1))
    assert first == last
    set_to = sorted(str(value) for key, value in first.items() if value != before[key])
    assert set_to == sorted("(48, 48)" if flags == ("--data.image-size",) else value for flags, value in mine)


def switches(schema):
    """The flags of the keys that are on or off, without dashes, each with what turns it off."""
    for name in flag_names(schema):
        *sections, last = name.split(".")
        kind = schema
        for section in sections:
            kind = kind.model_fields[section].annotation
        if kind.model_fields[last].annotation is bool:
            off = ".".join([*sections, f"no-{last}"])
            yield name.replace("_", "-"), f"--{off.replace('_', '-')}"


def hint(command, *given):
    with pytest.raises(UserError) as caught:
        read(command, *given)
    return str(caught.value).partition(" (see")[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_switch_says_how_it_is_spelt(command):
    # Those of pretraining are not read once more for each command that takes them all.
    known = dict(switches(Config)) if command != "pretrain" else {}
    own = {flag: off for flag, off in switches(COMMANDS[command]) if flag not in known}
    for flag, off in own.items():
        assert hint(command, f"--{flag}", "False").endswith(f"found 'false': write {off}")
        if "." in flag:
            assert hint(command, f"--no-{flag}").endswith(f"did you mean {off}?")
    # What is hinted at is taken.
    read(command, *own.values())


@pytest.mark.parametrize(
    ("given", "right"),
    [
        (("--probe.at-start=False",), "--probe.no-at-start"),
        (("--probe.at_start", "no"), "--probe.no-at-start"),
        (("--probe.at-start", "True"), "--probe.at-start"),
        (("--probe.no-at-start", "0"), "--probe.at-start"),
        (("--scale.gpu", "1", "--scale.workers", "2"), "--scale.gpu"),
        (("--profile", "off"), "--log.no-profile"),
    ],
)
def test_a_switch_takes_no_value(given, right):
    assert hint("pretrain", *given).endswith(f": write {right}")
    read("pretrain", right)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_spelling(command):
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
        read(command, "--help")
    for flags, _, commands in THINGS:
        if command in commands:
            assert all(flag in told.getvalue() for flag in flags), flags


def test_one_number_is_a_square(tmp_path):
    for command in ("pretrain", "transfer"):
        assert read(command, "--data.image-size", "224").data.image_size == (224, 224)
        assert read(command, "--data.image-size=48").data.image_size == (48, 48)
        assert read(command, "--data.image-size", "32", "48").data.image_size == (32, 48)
        for wrong in ([], ["1", "2", "3"], ["x"], ["2.5"]):
            with pytest.raises(UserError, match=r"^Error parsing --data.image-size: takes one number .*found"):
                read(command, "--data.image-size", *wrong)
    for text, size in (("224", (224, 224)), ("[48]", (48, 48)), ("[32, 48]", (32, 48))):
        (tmp_path / "a.toml").write_text(f"[data]\nimage_size = {text}\n")
        assert load_toml(Config, str(tmp_path / "a.toml")).data.image_size == size
        assert load_toml(Transfer, str(tmp_path / "a.toml")).data.image_size == size
