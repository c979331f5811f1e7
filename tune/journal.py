"""What a search has found so far: every report of every trial, one a line, in the search's folder.

    {"trial": "mask_ratio_0.75-s0-1f2e3d", "values": {"model.mask_ratio": 0.75}, "seed": 0, "step": 586, "score": 41.2,
     "probes": {"probe/linear_top1": 41.2, "probe/knn_top1": 33.0}, "seconds": 61.3, "flops": 1.2e15,
     "state": "running", "time": 1795190000.1}

A line without ``step`` tells only how a trial ended. The first report of a trial that scored its encoder before the
first step has those scores too, as ``random``. A search that was killed reads its journal and goes on from there.
"""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.storage import Store
from tune.trial import State, Trial

FILE = "journal.jsonl"


@dataclass(frozen=True)
class Cell:
    """What one trial trains.

    Args:
        values: Those of the configuration's keys that vary, by their dotted names.
        seed: The run's seed.
    """

    values: Mapping[str, Any]
    seed: int

    @property
    def name(self) -> str:
        """The name of its run: the same values and seed, the same name."""
        digest = hashlib.sha256(json.dumps([dict(self.values), self.seed], sort_keys=True).encode()).hexdigest()[:6]
        words = [f"{key.split('.')[-1]}_{shown(value)}" for key, value in sorted(self.values.items())]
        told = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words))[:80].strip("-_.")
        return f"{told or 'trial'}-s{self.seed}-{digest}"


def shown(value: Any) -> str:
    """A value as names and tables show it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Journal:
    """The append side and the memory of ``journal.jsonl``; the search's driver alone writes it.

    Args:
        store: The search's folder.
    """

    def __init__(self, store: Store):
        self._store = store
        self._lines = store.read(FILE).decode().splitlines(keepends=True) if store.exists(FILE) else []
        if self._lines and not self._lines[-1].endswith("\n"):
            self._lines.pop()
        self.trials: dict[str, Trial] = {}
        """What is known of each trial, by the name of its run, in the order in which they were begun."""
        for line in self._lines:
            self._learn(json.loads(line))

    def report(
        self,
        cell: Cell,
        step: int,
        score: float,
        seconds: float,
        flops: float,
        state: State,
        probes: Mapping[str, float],
        random: Mapping[str, float] | None = None,
    ) -> None:
        """Notes a probe's score, and what is decided about the trial.

        Args:
            cell: The trial.
            step: Optimiser steps done.
            score: Percent.
            seconds: Of training and probing so far.
            flops: Of training so far.
            state: ``running`` where it goes on.
            probes: All scores, by their names in the record.
            random: Those of the encoder before its first step, where they are new.
        """
        told: dict[str, Any] = {"step": step, "score": score, "probes": dict(probes)}
        told |= {"seconds": seconds, "flops": flops} | ({"random": dict(random)} if random else {})
        self._add(cell, state, told)

    def begin(self, cell: Cell) -> None:
        """Notes that a trial has begun, or begins again."""
        self._add(cell, "running", {})

    def fail(self, cell: Cell, reason: str) -> None:
        """Notes that a trial has failed, and why."""
        self._add(cell, "failed", {"reason": reason})

    def forget_failed(self) -> None:
        """Takes failed trials for new ones, which are trained again."""
        for trial in list(self.trials.values()):
            if trial.state == "failed":
                self.begin(Cell(trial.values, trial.seed))

    def _add(self, cell: Cell, state: State, more: dict[str, Any]) -> None:
        line = {"trial": cell.name, "values": dict(cell.values), "seed": cell.seed, **more, "state": state}
        self._learn(line)
        self._lines.append(json.dumps({**line, "time": time.time()}) + "\n")
        self._store.write(FILE, "".join(self._lines))

    def _learn(self, line: dict[str, Any]) -> None:
        name = line["trial"]
        trial = self.trials.get(name) or Trial(name, line["values"], line["seed"], (), "running", 0.0, 0.0)
        changes: dict[str, Any] = {"state": line["state"], "reason": line.get("reason", "")}
        if "step" in line:
            changes |= {key: line[key] for key in ("seconds", "flops")}
            changes["scores"] = (*trial.scores, (line["step"], line["score"]))
            changes["probes"] = line.get("probes", {})
            changes["random"] = line.get("random", trial.random)
        self.trials[name] = dataclasses.replace(trial, **changes)
