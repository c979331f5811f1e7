"""What pretraining runs say of themselves, and what of it may be compared: read from their folders, not from MLflow."""

import itertools
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import identity_hash, younger_defaults
from pipelines.errors import UserError
from pipelines.runs import CONFIG, find_run
from pipelines.spool import SPOOL_FILE, read_spool, redact
from pipelines.storage import Store

CURVES = {
    "train/loss": "Training loss",
    "probe/knn_top1": "kNN probe, top-1 in %",
    "probe/linear_top1": "Linear probe, top-1 in %",
    "train/lr": "Learning rate",
}
SCORES = ("test/", "transfer/", "probe/")
NO_POINTS = "no points yet"
# Where a run stands: no two runs share it, and it says nothing of them.
OWN_KEYS = ("run.name", "run.storage")
# What a loss measures: runs that differ here predict something else, or from something else.
_LOSS_KEYS = re.compile(
    r"model\.(target\w*|mask\w*|loss_on|patch_size)|mask\..*|data\.(image_size|channels|mean|std|augment|crop_scale|digest)"
)
_PERCENT = ("_top1", "_miou")
_LARGEST = 1e300
_BUCKETS = 150

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """What a run's folder says.

    Attributes:
        name: Of the run.
        config: Its configuration and the digest of its data, by dotted names.
        defining: The names among them that define the result.
        curves: The finite points of each metric, by step.
        nonfinite: How many points of ``CURVES`` are no finite number.
        step: Optimiser steps done.
        state: What it is doing, in words.
        picture: Step and PNG of its newest reconstructions; None where there are none.
    """

    name: str
    config: dict[str, Any]
    defining: frozenset[str]
    curves: dict[str, Points]
    nonfinite: int
    step: int
    state: str
    picture: tuple[int, bytes] | None

    def score(self, key: str) -> str:
        """The newest value of a score, with its step where the run has gone on since."""
        points = self.curves.get(key)
        if not points:
            return "–"
        step, value = points[-1]
        # A transfer's score has no step of training: it counts how often it was measured.
        old = f" at step {step:,}" if step != self.step and not key.startswith("transfer/") else ""
        return number(key, value) + old


def read_run(storage: str, name: str) -> Run:
    """Reads a run's folder.

    Raises:
        UserError: There is no such run, or its files are damaged.
    """
    store = find_run(storage, name)
    sections = _json(store, CONFIG)
    if not isinstance(sections.get("model"), dict):
        raise UserError(f"'{name}' is no pretraining run: {store.shown(CONFIG)} has no section 'model'")
    identity = _json(store, "identity.json")
    config = younger_defaults() | _flat(sections) | {key: identity[key] for key in ("data.digest",) if key in identity}
    curves: dict[str, Points] = {}
    nonfinite, status = 0, ""
    for line in _spool(store):
        step, values = line.get("step"), line.get("metrics")
        status = str(line.get("status", status))
        if not isinstance(step, int) or not isinstance(values, dict):
            continue
        for key, value in values.items():
            # NaN is below nothing, too.
            if isinstance(value, int | float) and abs(value) < _LARGEST:
                curves.setdefault(key, []).append((step, float(value)))
            else:
                nonfinite += key in CURVES
    step = max((points[-1][0] for key, points in curves.items() if not key.startswith("transfer/")), default=0)
    result = _json(store, "result.json")
    state = f"{step:,} steps" if curves else NO_POINTS
    # The result of an earlier configuration, which this run went on from, is not this one's.
    if result and result.get("identity") == identity_hash(identity):
        state = f"finished, {state}"
    elif status in ("FAILED", "KILLED"):
        state = f"{status.lower()}, {state}"
    return Run(name, config, frozenset(identity), curves, nonfinite, step, state, _newest_picture(store))


def _json(store: Store, name: str) -> dict[str, Any]:
    """A file's object; empty where there is no such file."""
    try:
        value = json.loads(store.read(name))
    except FileNotFoundError:
        return {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{store.shown(name)} is damaged: expected a JSON object")
    return value


def _spool(store: Store) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="mae-compare-") as folder:
        path = Path(folder) / SPOOL_FILE
        try:
            path.write_bytes(store.read(SPOOL_FILE))
        except FileNotFoundError:
            return []
        return [line for line, _ in read_spool(path) if line is not None]


def _newest_picture(store: Store) -> tuple[int, bytes] | None:
    pictures = store.child("pictures")
    found = [(int(match[1]), name) for name in pictures.names() if (match := re.fullmatch(r"[\w-]*?(\d+)\.png", name))]
    for step, name in sorted(found, reverse=True):
        data = pictures.read(name)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return step, data
    return None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The configuration keys in which runs differ, with the value of each run; those that define the result first."""
    defining = frozenset().union(*(run.defining for run in runs))
    keys = dict.fromkeys(itertools.chain.from_iterable(run.config for run in runs))
    rows = [(key, [shown(run.config, key) for run in runs]) for key in keys if key not in OWN_KEYS]
    return sorted((row for row in rows if len(set(row[1])) > 1), key=lambda row: row[0] not in defining)


def loss_groups(runs: Sequence[Run]) -> dict[tuple[tuple[str, str], ...], list[int]]:
    """Numbers of the runs whose losses measure the same, by the keys and values in which these groups differ."""
    measured = [_measured(run) for run in runs]
    keys = dict.fromkeys(itertools.chain.from_iterable(measured))
    differ = [key for key in keys if len({one.get(key) for one in measured}) > 1]
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for i, one in enumerate(measured):
        groups.setdefault(tuple((key, one.get(key, "–")) for key in differ), []).append(i)
    return groups


def _measured(run: Run) -> dict[str, str]:
    found = {key: shown(run.config, key) for key in run.config if _LOSS_KEYS.fullmatch(key)}
    if found.get("model.patch_size") == "0":
        arch = re.search(r"_patch(\d+)", shown(run.config, "model.arch"))
        found["model.patch_size"] = arch[1] if arch else "0"
    return found


def score_rows(runs: Sequence[Run]) -> list[tuple[str, list[str], set[int]]]:
    """Every score that a run has, its value in each run, and the runs with the highest (of two or more)."""
    keys = sorted({key for run in runs for key in run.curves if key.startswith(SCORES)}, key=_score_order)
    rows = []
    for key in keys:
        values = {i: run.curves[key][-1][1] for i, run in enumerate(runs) if key in run.curves}
        ranks = len(values) > 1 and key.endswith(_PERCENT) and "random_" not in key
        best = {i for i, value in values.items() if ranks and value == max(values.values())}
        rows.append((key, [run.score(key) for run in runs], best))
    return rows


def _score_order(key: str) -> tuple[int, bool, str]:
    return next(i for i, prefix in enumerate(SCORES) if key.startswith(prefix)), "random_" in key, key


def shown(config: dict[str, Any], key: str) -> str:
    """A value of the configuration, without the passwords and signatures that an address may hold."""
    if key not in config:
        return "–"
    value = config[key]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return redact(text.partition("?")[0] if "://" in text else text) or "(empty)"


def number(key: str, value: float) -> str:
    """A metric's value as a person reads it."""
    return f"{value:.2f} %" if key.endswith(_PERCENT) else f"{value:.4g}"


def thin(points: Points) -> Points:
    """Some hundred points of a curve, none of them made up: the lowest and highest of each stretch, and both ends."""
    if len(points) <= 2 * _BUCKETS:
        return points
    kept = {0, len(points) - 1}
    for bucket in range(_BUCKETS):
        stretch = range(bucket * len(points) // _BUCKETS, (bucket + 1) * len(points) // _BUCKETS)
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]
