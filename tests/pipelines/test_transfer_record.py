"""What a transfer leaves in its folder and on its pretraining run, without Ray and MLflow."""

import csv
import json
import os

import numpy as np
import pytest

from mae_core.names import printable
from pipelines import transfer_record
from pipelines.config import identity_hash
from pipelines.spool import Spool
from pipelines.storage import Store
from pipelines.tracking import Sent
from pipelines.training.runfolder import RunFolder
from pipelines.training.scores import interval, write_scored
from pipelines.transfer_config import Transfer, TransferData
from pipelines.transfer_record import finish, note_missing, note_on_parent, read_result, write_confusion

KEY = "transfer/cells/linear_top1"
CLASSES = ("a", "b")


@pytest.fixture(autouse=True)
def _no_mlflow(monkeypatch):
    monkeypatch.setattr(transfer_record, "send", lambda *_, **__: Sent())


def unit(*seeds):
    return Transfer(
        protocol="linear",
        seeds=seeds,
        random_baseline=False,
        data=TransferData(name="cells"),
        train={"epochs": 90.0},  # type: ignore[arg-type]
    )


def score(store, seed, right):
    """A seed with so many of 10 right."""
    confusion = [[10 * right, 100 - 10 * right], [100 - 10 * right, 10 * right]]
    write_scored(store, {"seed": seed, "val": confusion, "test": confusion, "seconds": 1.0, "chosen": {},
                         "unreadable": [["train-000000.tar", "x"]]})  # fmt: skip


def points(store, key):
    lines = RunFolder(store).read_lines("metrics.jsonl")
    return [(line["step"], line["metrics"][key]) for line in lines if key in line.get("metrics", {})]


def transfer_of(parent, name, right, *, step=8, base_lr=0.1):
    store = parent.child("transfer").child(name)
    store.write("identity.json", json.dumps({"step": step, "train.base_lr": base_lr}))
    score(store, 0, right)
    finish(unit(0), store, CLASSES)
    return store


def end(parent, step=8):
    """The pretraining run has finished."""
    identity = {"run.seed": 0}
    parent.write("identity.json", json.dumps(identity))
    parent.write("result.json", json.dumps({"step": step, "identity": identity_hash(identity)}))


def test_a_result_is_made_anew_over_the_seeds_asked_for(tmp_path):
    store = Store(str(tmp_path))
    for seed, right in enumerate((6, 8, 9)):
        score(store, seed, right)
    assert finish(unit(0), store, CLASSES)["scores"]["test/top1"] == 60
    # A driver that was killed after the record was written does it again.
    (tmp_path / "result.json").unlink()
    assert finish(unit(0), store, CLASSES)["scores"]["test/top1_interval"] is None
    assert read_result(store, unit(0, 1)) is None
    result = finish(unit(0, 1, 2), store, CLASSES)
    assert read_result(store, unit(2, 1, 0)) == result
    assert result["scores"]["test/top1"] == pytest.approx(230 / 3)
    assert result["scores"]["test/top1_interval"] == pytest.approx(interval([60, 80, 90]))
    assert result["unreadable"] == 1
    assert points(store, "test/top1") == [(0, 60), (1, pytest.approx(230 / 3))]
    assert [step for step, _ in points(store, "test/top1_interval")] == [1]
    lines = RunFolder(store).read_lines("metrics.jsonl")
    assert [line["tags"]["mae.seeds"] for line in lines if "tags" in line] == ["0", "0", "0 1 2"]
    assert lines[-1]["status"] == "FINISHED"


@pytest.mark.parametrize("num", [1, 3, 150])
def test_files_tell_of_any_number_of_classes(tmp_path, num):
    confusion_CC = np.arange(num**2).reshape(num, num)
    values = [50.0] * (num - 1) + [None]
    result = {"protocol": "segment", "confusion": confusion_CC.tolist(), "per_class": values}
    classes = [f"class, {i}" for i in range(num)]
    # Such as folders may have: bytes that are not UTF-8, line breaks, what others take for a formula.
    classes[:2] = [os.fsdecode(b"caf\xe9, 0"), 'a\n"$x$" | 100 % 🐈'][:num]
    names = write_confusion(tmp_path, result, classes)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert ("confusion.png" in names) == (num == 3)
    assert np.array_equal(np.load(tmp_path / "confusion.npy"), confusion_CC)
    with (tmp_path / "per_class.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["class", "pixels", "iou"]
    assert len(rows) == num
    assert [row[0] for row in rows] == [printable(name) for name in classes]
    assert rows[0][0] == "caf\\xe9, 0"
    assert rows[-1][1:] == [str(confusion_CC[-1].sum()), ""]


def test_a_score_made_before_the_run_has_finished_is_noted_afterwards(tmp_path, capsys):
    parent = Store(str(tmp_path / "run"))
    store = transfer_of(parent, "cells-linear-1", 6)
    note_on_parent(parent, store)
    assert "has not finished" in capsys.readouterr().out
    assert points(parent, KEY) == []
    end(parent)
    note_on_parent(parent, store)
    assert f"{KEY} is 60.00 % on the pretraining run now" in capsys.readouterr().out
    note_on_parent(parent, store)
    assert capsys.readouterr().out == ""
    assert points(parent, KEY) == [(0, 60)]


def test_a_run_that_has_gone_on_does_not_take_the_score(tmp_path, capsys):
    parent = Store(str(tmp_path / "run"))
    store = transfer_of(parent, "cells-linear-1", 6, step=4)
    end(parent)
    note_on_parent(parent, store)
    assert "score of step 4, and the pretraining run has gone on to 8" in capsys.readouterr().out
    assert note_missing(parent) == []
    assert points(parent, KEY) == []


def test_the_newest_stands_and_it_is_said_what_it_replaces(tmp_path, capsys):
    parent = Store(str(tmp_path / "run"))
    end(parent)
    first = transfer_of(parent, "cells-linear-1", 6, base_lr=0.1)
    second = transfer_of(parent, "cells-linear-2", 8, base_lr=0.3)
    note_on_parent(parent, first)
    note_on_parent(parent, second)
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"{KEY} is 80.00 % on the pretraining run now, instead of 60.00 % of cells-linear-1")
    assert told.endswith("(train.base_lr 0.3, was 0.1)")
    # More seeds of the same transfer replace nothing.
    score(second, 1, 9)
    finish(unit(0, 1), second, CLASSES)
    note_on_parent(parent, second)
    assert "instead" not in capsys.readouterr().out
    assert points(parent, KEY) == [(0, 60), (1, 80), (2, 85)]


def test_what_is_missing_is_noted_once(tmp_path):
    parent = Store(str(tmp_path / "run"))
    assert note_missing(parent) == []
    transfer_of(parent, "cells-linear-2", 6)
    newest = transfer_of(parent, "cells-linear-1", 8)
    assert note_missing(parent) == [], "of a file of weights"
    parent.write("run.json", "{}")
    assert note_missing(parent) == ["the run has not finished: the scores of its transfers are noted on it then"]
    end(parent)
    assert note_missing(parent) == [f"{KEY} is 80.00 % on the pretraining run now"]
    assert note_missing(parent) == []
    # What stands there stays, but for a newer result of the same transfer.
    transfer_of(parent, "cells-linear-3", 9)
    assert note_missing(parent) == []
    score(newest, 1, 9)
    finish(unit(0, 1), newest, CLASSES)
    assert note_missing(parent) == [f"{KEY} is 85.00 % on the pretraining run now"]


def test_a_score_from_before_scores_said_whose_they_are_stays(tmp_path):
    parent = Store(str(tmp_path / "run"))
    end(parent)
    spool = Spool(parent.local())
    spool.metrics(0, {KEY: 70.0})
    spool.close()
    transfer_of(parent, "cells-linear-1", 6)
    assert note_missing(parent) == []
