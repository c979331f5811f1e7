"""Measures what stopping poor trials early is worth: ``python -m benchmarks.search --data SHARDS --json OUT``.

The same configurations are searched twice, with ASHA and without, each by the whole command in processes of its own.
What a trial costs beyond its training is the time from when its place was free to its last score, less that of its
optimiser steps: start, reading, probes, record.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import ray
import torch
import tyro
from pydantic import BaseModel, ConfigDict, Field

from pipelines.cli import parse
from pipelines.errors import run_command
from pipelines.spool import SPOOL_FILE, read_spool
from pipelines.storage import Store
from tune.journal import FILE, Journal

ARMS = ("asha", "none")


class Search(BaseModel):
    """Measures how much faster ASHA finds the best configuration, and what a trial costs beyond its training."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: str
    """Labelled shards."""
    config: str = "pipelines/recipes/cifar10_search.toml"
    """Recipe of the trials."""
    space: str = "tune/spaces/mask_ratio_narrow_decoder.toml"
    """What varies."""
    samples: int = Field(default=16, ge=2)
    """Configurations."""
    reduction: int = Field(default=4, ge=2)
    """ASHA's; 4 is that of its paper."""
    scheduler: Literal["both", "asha", "none"] = "both"
    """With ASHA, without, or both, one after the other."""
    epochs: float = Field(default=1.0, gt=0)
    """Of a whole trial."""
    storage: str = ""
    """Folder for the runs; empty: one that is deleted."""
    output: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the numbers; empty: none."""


@dataclass(frozen=True)
class Cost:
    """What a trial took.

    Args:
        whole_s: From when its place was free to its last score.
        training_s: Its optimiser steps.
        reports: Its probes.
    """

    whole_s: float
    training_s: float
    reports: int

    @property
    def overhead_s(self) -> float:
        """Seconds beyond the optimiser steps."""
        return self.whole_s - self.training_s


def training_seconds(spool: Path, images_a_step: int) -> float:
    """Seconds of a run's optimiser steps, without their waiting for data: from the windows of its progress lines."""
    before, seconds = 0, 0.0
    for line, _ in read_spool(spool):
        metrics = (line or {}).get("metrics", {})
        if line and "perf/images_per_s" in metrics:
            steps, before = line["step"] - before, line["step"]
            seconds += steps * (images_a_step / metrics["perf/images_per_s"] - metrics["data/wait_s"])
    return seconds


def costs(folder: Path, images_a_step: int) -> list[Cost]:
    """What each trial of a search took, in the order in which they were begun."""
    began: dict[str, float] = {}
    ended: dict[str, float] = {}
    for text in (folder / FILE).read_text().splitlines():
        line = json.loads(text)
        began.setdefault(line["trial"], line["time"])
        ended[line["trial"]] = line["time"]
    trials = Journal(Store(str(folder))).trials
    return [
        Cost(
            ended[name] - began[name],
            training_seconds(folder / "trials" / name / SPOOL_FILE, images_a_step),
            len(trials[name].scores),
        )
        for name in began
    ]


def _search(args: Search, arm: str, storage: Path) -> dict[str, Any]:
    where = ["--run.storage", str(storage), "--run.name", arm, "--data.train", args.data, "--probe.train", args.data]
    asked = ["--samples", str(args.samples), "--train.epochs", str(args.epochs), "--reduction", str(args.reduction)]
    command = [sys.executable, "-m", "tune.search", "--config", args.config, "--space", args.space]
    began = time.perf_counter()
    subprocess.run([*command, *where, *asked, "--scheduler", arm], check=True)
    seconds = time.perf_counter() - began
    trials = Journal(Store(str(storage / arm))).trials.values()
    finished = [trial for trial in trials if trial.state == "finished" and trial.score is not None]
    best = max(finished, key=lambda trial: trial.score or 0.0)
    batch = json.loads((storage / arm / "trials" / best.name / "config.json").read_text())["batch"]["global_size"]
    each = costs(storage / arm, batch)
    # The first ones at once start the processes that those after them find warm.
    overheads = [cost.overhead_s for cost in each]
    return {
        "seconds": seconds,
        "best": best.score,
        "best_values": best.values,
        "finished": len(finished),
        "flops": sum(trial.flops for trial in trials),
        "overhead_s": statistics.median(overheads),
        "overheads_s": overheads,
        "reports": [cost.reports for cost in each],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(Search, prog="python -m benchmarks.search", argv=argv)
    with tempfile.TemporaryDirectory() as temporary:
        asked = [arm for arm in ARMS if args.scheduler in ("both", arm)]
        found = {arm: _search(args, arm, Path(args.storage or temporary)) for arm in asked}
    result = {
        **{f"best_{arm}": one["best"] for arm, one in found.items()},
        **{f"overhead_s_{arm}": one["overhead_s"] for arm, one in found.items()},
        "details": {**found, "arguments": args.model_dump(), "python": platform.python_version(),
                    "torch": torch.__version__, "ray": ray.__version__},
    }  # fmt: skip
    print()
    for arm, one in found.items():
        print(
            f"{arm}: {one['seconds']:.0f} s, best score {one['best']:.2f} %; a trial beyond its training: "
            f"{one['overhead_s']:.1f} s (median; {max(one['overheads_s']):.1f} s at most)"
        )
    if args.scheduler == "both":
        asha, none = found["asha"], found["none"]
        result |= {
            "asha_speedup": none["seconds"] / asha["seconds"],
            "flops_saved": 1 - asha["flops"] / none["flops"],
        }
        print(f"with ASHA {result['asha_speedup']:.2f} times as fast")
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
