"""One name, one kind of thing: every command refuses a folder that another kind has, before it writes or starts."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from pipelines.errors import UserError
from pipelines.kinds import Kind, kind_of, refuse_other
from pipelines.lease import hold
from pipelines.pretrain import Images, describe, open_run, read_config
from pipelines.pretrain import main as pretrain
from pipelines.runs import find_run
from pipelines.storage import Store
from pipelines.tracking import write_record
from pipelines.transfer import main as transfer
from tests.stores import moto_server, put, s3_environment
from tests.tune.searches import RECIPE, arguments
from tune.ablate import describe as describe_ablation
from tune.ablate import main as ablate
from tune.ablate import read_ablation
from tune.search import definition, open_search, read_search
from tune.search import main as search

KINDS: tuple[Kind, ...] = get_args(Kind)
# What lies in a folder of each kind, at two moments: ended before it had a record, and with one.
BEGUN: dict[Kind, dict[str, str]] = {
    "run": {"config.json": "{}"},
    "search": {"search.json": "{}"},
    "ablation": {"ablation.json": "{}"},
    "trial": {"config.json": "{}"},
    "transfer": {"config.json": "{}"},
    "weights": {"transfer/set-knn-1/config.json": "{}"},
}


def place(root: str, kind: Kind) -> Store:
    """Where a folder of a kind lies: a trial's and a transfer's place is below another's folder."""
    below = {"trial": "found/trials/weights-x", "transfer": "digits/transfer/weights-x"}
    return Store(f"{root}/{below.get(kind, 'weights-x')}")


def fill(store: Store, kind: Kind, *, recorded: bool) -> None:
    for name, text in BEGUN[kind].items():
        store.write(name, text)
    if recorded and kind != "weights":
        store.write("run.json", json.dumps({"tags": {} if kind == "run" else {"mae.kind": kind}}))


@pytest.fixture(scope="module")
def moto():
    with moto_server() as address:
        yield address


_numbers = itertools.count()


@pytest.fixture(params=["disk", "s3"])
def root(request, tmp_path, monkeypatch) -> str:
    if request.param == "disk":
        return str(tmp_path)
    moto = request.getfixturevalue("moto")
    for name, value in s3_environment(moto).items():
        monkeypatch.setenv(name, value)
    bucket = f"kinds-{next(_numbers)}"
    put(moto, bucket)
    return f"s3://{bucket}/runs"


@pytest.mark.parametrize("recorded", [False, True])
def test_every_kind_is_refused_for_every_other(root, recorded):
    for there in KINDS:
        store = place(f"{root}/{there}", there)
        assert kind_of(store) is None
        fill(store, there, recorded=recorded)
        before = store.names()
        assert kind_of(store) == there
        for wanted in KINDS:
            if wanted == there:
                refuse_other(store, wanted)
                continue
            with pytest.raises(UserError) as told, hold(store, "it", wanted):
                pass
            assert "\n" not in str(told.value)
            assert "weights-x is a" in str(told.value) or "weights-x is the folder of" in str(told.value)
            assert any(way in str(told.value) for way in ("choose another", "move it away")), told.value
        assert store.names() == before, "nothing is written"


def test_nothing_else_begins_among_trials(root):
    fill(Store(f"{root}/found"), "search", recorded=False)
    for wanted in ("run", "search", "ablation", "weights"):
        with pytest.raises(UserError, match=r"found/trials is for the trials of a search, not for .* 'mine'"):
            refuse_other(Store(f"{root}/found/trials/mine"), wanted)
    refuse_other(Store(f"{root}/found/trials/mine"), "trial")
    # A folder of that name is no search's by itself.
    refuse_other(Store(f"{root}/trials/mine"), "run")


def test_a_search_is_named_where_a_run_is_asked_for(root):
    fill(Store(f"{root}/found"), "search", recorded=True)
    with pytest.raises(UserError, match=r"'found' in .* is a search, .*: its trials are runs of --storage .*found/tri"):
        find_run(root, "found")


@pytest.fixture
def commands(shards, tmp_path) -> dict[Kind, tuple[str, Callable[[], int]]]:
    """By what it makes: the folder of each command, and the command."""
    asked = arguments(tmp_path, shards, name="weights-x", space='["model.mask_ratio"]\nvalues = [0.25, 0.5]\n')
    space = asked.index("--space")
    recipe = [*asked[:space], *asked[space + 2 :]]
    weights = ["--weights", str(tmp_path / "x.pth"), "--data.train", shards["train"], "--data.test", shards["test"]]
    return {
        "run": ("weights-x", lambda: pretrain(recipe)),
        "search": ("weights-x", lambda: search(asked)),
        "ablation": ("ablate-weights-x", lambda: ablate([*recipe, "--table", "1f"])),
        "weights": ("weights-x", lambda: transfer([*weights, "--storage", str(tmp_path / "runs")])),
    }


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("there", KINDS)
def test_every_command_leaves_what_it_refuses_alone(commands, there, tmp_path, monkeypatch):
    def started(**_):
        raise AssertionError("Ray is started")

    monkeypatch.setattr("pipelines.ray_session.connect", started)
    for wanted, (name, command) in commands.items():
        if wanted == there:
            continue
        store = Store(str(tmp_path / "runs")).child(name)
        if wanted == "ablation" and there == "weights":
            continue  # such a folder is never called so
        fill(store, there, recorded=there in ("trial", "transfer"))
        before = tree(tmp_path / "runs")
        with pytest.raises(UserError, match=f"{name} is (a|an|the) "):
            command()
        assert tree(tmp_path / "runs") == before
        store.delete()


def test_table2_leaves_a_search_alone(tmp_path):
    fill(Store(str(tmp_path)).child("ablate-x"), "search", recorded=True)
    with pytest.raises(UserError, match="ablate-x is a search, not an ablation: choose another --run"):
        ablate(["--table", "table2", "--run.storage", str(tmp_path), "--run.name", "x"])


def test_what_lies_in_a_trials_place_is_found_before_the_search_begins(shards, tmp_path):
    asked = arguments(tmp_path, shards, "--sampler", "grid")
    runs = Store(str(tmp_path / "runs"))
    trial = read_search(asked).cells[0].name
    mine = runs.child("found").child("trials").child(trial)
    fill(mine, "run", recorded=True)
    with pytest.raises(UserError, match=f"{trial} is a pretraining run, not a trial"):
        search(asked)
    assert runs.child("found").names() == ["trials"]
    mine.delete()
    fill(runs.child("found-final"), "search", recorded=True)
    with pytest.raises(UserError, match="found-final is a search, not a pretraining run"):
        search([*asked, "--final", "--probe.test", shards["test"]])
    assert "search.json" not in runs.child("found").names()


def test_what_the_commands_write_first_says_their_kind(shards, tmp_path):
    """The files of the tables above are those that are really written."""
    runs = Store(str(tmp_path / "runs"))
    asked = arguments(tmp_path, shards)
    ready = read_search(asked)
    open_search(runs.child("found"), ready.search, definition(ready.search, ready.space, ready.images))
    assert kind_of(runs.child("found")) == "search"
    (tmp_path / "recipe.toml").write_text(RECIPE)
    config = read_config(["--config", str(tmp_path / "recipe.toml"), "--run.storage", str(tmp_path / "runs"),
                          "--run.name", "plain", "--data.train", shards["train"]])  # fmt: skip
    open_run(config, "digest")
    assert kind_of(runs.child("plain")) == "run"
    images = Images(ready.images.train, None, None)
    write_record(tmp_path / "runs" / "plain", describe(config, images), tracking_uri="sqlite:///x.db")
    assert kind_of(runs.child("plain")) == "run"
    ablation = read_ablation(["--table", "table2", "--run.storage", str(tmp_path / "runs"), "--run.name", "x"])
    write_record(tmp_path / "runs" / "ablate-x", describe_ablation(ablation), tracking_uri="sqlite:///x.db")
    assert kind_of(runs.child("ablate-x")) == "ablation"
