"""The record of a transfer: a child run of its own, and its score on the pretraining run."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae_core.names import printable
from mae_core.sheets import confusion_picture
from pipelines import provenance
from pipelines.commands import command_line
from pipelines.config import flat
from pipelines.data.shards import Manifest
from pipelines.runs import final_step
from pipelines.spool import Spool
from pipelines.storage import Store
from pipelines.tracking import RUN_FILE, RunDescription, RunRecord, send
from pipelines.training.runfolder import RunFolder
from pipelines.training.scores import SHEET, read_random, read_scored, summarise
from pipelines.transfer_config import Transfer, metric, with_random
from pipelines.transfer_identity import dataset_name, score_key, score_name, source_name
from pipelines.weights_file import shown

_RESULT = "result.json"
_MOST_TOLD = 3


def describe(unit: Transfer, data: Mapping[str, Manifest], parent: Store | None) -> RunDescription:
    """What MLflow is told: a child of the pretraining run. Of which seeds it is, ``finish`` tells."""
    record = RunRecord.read(RunFolder(parent).path) if parent is not None and parent.exists(RUN_FILE) else None
    return RunDescription(
        experiment=record.experiment if record else unit.experiment,
        name=f"{printable(source_name(unit))} {dataset_name(unit)} {score_name(unit)}",
        params={
            key: shown(value) if key == "weights" else _printable(value)
            for key, value in flat(unit).items()
            if key != "seeds"
        },
        tags={"mae.kind": "transfer", "mae.pretraining": unit.run or shown(unit.weights), **provenance.tags()},
        datasets=provenance.dataset_inputs(dict(data)),
        parent_run_id=record.mlflow_run_id if record else None,
    )


def _printable(value: Any) -> Any:
    """A parameter as a database takes it."""
    if isinstance(value, str):
        return printable(value)
    return tuple(map(_printable, value)) if isinstance(value, tuple) else value


def read_result(store: Store, unit: Transfer) -> dict[str, Any] | None:
    """A transfer's result as it is asked for; None where there is none, or one over other seeds or other names.

    One that is asked for a random encoder's score is none without.
    """
    if not store.exists(_RESULT):
        return None
    result = json.loads(store.read(_RESULT))
    names, asked = result.get("class_names"), list(unit.data.class_names)
    if {one["seed"] for one in result["seeds"]} != set(unit.seeds) or (asked and names != asked):
        return None
    has_random = f"test/random_{metric(unit)}" in result["scores"]
    return result if has_random or not with_random(unit) else None


def finish(unit: Transfer, store: Store, classes: Sequence[str]) -> dict[str, Any]:
    """Makes the result over the seeds asked for, all of which have been scored, in the folder and in the record.

    The scores of a result are one step in MLflow: over other seeds they stand at the next step.
    """
    scored = [one for seed in unit.seeds if (one := read_scored(store, seed))]
    result = {**summarise(unit, scored, read_random(store)), "key": score_key(unit)}
    if unit.data.class_names:
        result["class_names"] = list(unit.data.class_names)
    folder = RunFolder(store)
    scores = {key: value for key, value in result["scores"].items() if value is not None}
    told = [line for line in folder.read_lines("metrics.jsonl") if scores.keys() & line.get("metrics", {}).keys()]
    spool = Spool(folder.path)
    # A driver that was killed here may have written them.
    if not told or told[-1]["metrics"] != scores:
        spool.metrics(max((line["step"] + 1 for line in told), default=0), scores)
    spool.tags({"mae.seeds": " ".join(map(str, unit.seeds)), "mae.at_chance": _word(result["at_chance"])})
    drawn = [SHEET] if (folder.path / SHEET).exists() else []
    for name in (*write_confusion(folder.path, result, classes), *drawn, "config.toml", _RESULT):
        if name == _RESULT or (folder.path / name).exists():
            spool.artifact(name)
    spool.status("FINISHED")
    spool.close()
    folder.write(_RESULT, json.dumps(result, indent=2))
    folder.push()
    left = send(folder.path, timeout_s=30.0)
    folder.push()
    if left.left:
        print(f"{left.left} lines of the record are not in MLflow yet: {left.problem}", file=sys.stderr)
    return result


def write_confusion(folder: Path, result: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """Writes a result's confusion matrix, and what each class comes to; returns the files' names.

    ``confusion.npy`` holds int64 [C, C], rows true; the picture of more than 100 classes could not be read.
    """
    confusion_CC, classes = np.array(result["confusion"]), [printable(name) for name in classes]
    np.save(folder / "confusion.npy", confusion_CC)
    counted, score = ("pixels", "iou") if result["protocol"] == "segment" else ("images", "top1")
    with (folder / "per_class.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", counted, score])
        # What has no score is left empty.
        writer.writerows(zip(classes, confusion_CC.sum(axis=1), result["per_class"], strict=True))
    names = ["confusion.npy", "per_class.csv"]
    if 2 <= len(classes) <= 100:
        confusion_picture(torch.from_numpy(confusion_CC), classes).save(folder / "confusion.png")
        names.append("confusion.png")
    return names


def note_on_parent(parent: Store, store: Store) -> None:
    """Writes a transfer's score on its pretraining run, where the MLflow UI compares runs by it, and says so."""
    folder = RunFolder(parent)
    last, step = final_step(parent), _step(store)
    if last is None:
        sync = _sync(parent)
        print(f"the pretraining run has not finished: its scores are noted there by this command or by "
              f"{sync}, once it has")  # fmt: skip
        return
    if step not in (None, last):
        print(f"this is the score of step {step:,}, and the pretraining run has gone on to {last:,}: not noted there")
        return
    if line := _note(folder, store):
        print(line)
        left = send(folder.path, timeout_s=30.0)
        folder.push()
        if left.left:
            print(
                f"the score is not in MLflow yet ({left.problem}): {_sync(parent)}",
                file=sys.stderr,
            )


def _sync(parent: Store) -> str:
    """The command that sends what MLflow lacks of a run."""
    return command_line("pipelines.sync", _name(parent), storage=parent.location.rpartition("/")[0])


def note_missing(parent: Store) -> list[str]:
    """Writes on a pretraining run the scores of its transfers that are missing there; nothing is sent yet.

    A score of the same name that stands there stays, unless it is an older one of the same transfer. Of several the
    newest is taken; one of another step than the run's last is none of them.

    Args:
        parent: A local folder.

    Returns:
        A line for each.
    """
    above = parent.child("transfer")
    stores = [above.child(name) for name in above.names() if above.child(name).exists(_RESULT)]
    stores = [store for store in stores if "key" in json.loads(store.read(_RESULT))]
    last = final_step(parent)
    if last is None:
        # Above the transfers of a file of weights there is no run.
        waiting = stores and parent.exists(RUN_FILE)
        return ["the run has not finished: the scores of its transfers are noted on it then"] if waiting else []
    folder = RunFolder(parent)
    newest: dict[str, Store] = {}
    for store in sorted(stores, key=_time):
        key = json.loads(store.read(_RESULT))["key"]
        value, name = _standing(folder, key)
        if _step(store) in (None, last) and (value is None or name == _name(store)):
            newest[key] = store
    return [line for store in newest.values() if (line := _note(folder, store))]


def _note(folder: RunFolder, store: Store) -> str:
    """Writes a score into the spool of a pretraining run, and says so; empty where it stands there already."""
    result, name = json.loads(store.read(_RESULT)), _name(store)
    key = result["key"]
    value = result["scores"][f"test/{key.rpartition('_')[2]}"]
    old, by = _standing(folder, key)
    if old == value and by == name:
        return ""
    spool = Spool(folder.path)
    if old != value:
        # A point at a step that there is already would be dropped.
        steps = [line["step"] for line in folder.read_lines("metrics.jsonl") if key in line.get("metrics", {})]
        spool.metrics(max(steps, default=-1) + 1, {key: value})
    spool.tags({_tag(key): name, f"{_tag(key)}_at_chance": _word(result.get("at_chance", False))})
    spool.close()
    told = f"{key} is {value:.2f} % on the pretraining run now{', at chance level' * result.get('at_chance', False)}"
    if old is None or by == name:
        return told
    return f"{told}, instead of {old:.2f} %{_of_whom(store, by) if by else ''}"


def _standing(folder: RunFolder, key: str) -> tuple[float | None, str]:
    """The score that stands on a pretraining run, and the folder's name of the transfer that it is of."""
    value, name = None, ""
    for line in folder.read_lines("metrics.jsonl"):
        value = line.get("metrics", {}).get(key, value)
        name = line.get("tags", {}).get(_tag(key), name)
    return value, name


def _of_whom(store: Store, other: str) -> str:
    """In what another transfer of the same name differs from one."""
    beside = Store(store.location.rpartition("/")[0]).child(other)
    if not beside.exists("identity.json"):
        return f" of {other}"
    mine, theirs = (json.loads(one.read("identity.json")) for one in (store, beside))
    keys = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    told = [f"{key} {mine.get(key)}, was {theirs.get(key)}" for key in keys[:_MOST_TOLD]]
    more = f"; {len(keys) - _MOST_TOLD} more" if len(keys) > _MOST_TOLD else ""
    return f" of {other} ({'; '.join(told)}{more})"


def _word(value: bool) -> str:
    return "true" if value else "false"


def _tag(key: str) -> str:
    return f"mae.{key}"


def _name(store: Store) -> str:
    return store.location.rpartition("/")[2]


def _step(store: Store) -> int | None:
    """The pretraining step that was scored; None where none was."""
    return json.loads(store.read("identity.json")).get("step")


def _time(store: Store) -> float:
    return max((line["time"] for line in RunFolder(store).read_lines("metrics.jsonl")), default=0.0)
