"""Measures the probes on cached features: ``python -m benchmarks.probes``.

The features are random ones with a planted class, so that there is something to learn and nothing to wait for: no
image is read, no encoder runs.
"""

import json
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.meter import summary
from mae_core.probes import LEARNING_RATES, knn_predict, linear_probe, top1
from pipelines.cli import parse
from pipelines.errors import run_command


class Probes(BaseModel):
    """Measures how long the linear probe, at its ten learning rates, and the nearest neighbours take."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num: int = Field(default=50_000, ge=10)
    """Features to learn from; a tenth of them is held out to choose the learning rate."""
    queries: int = Field(default=10_000, ge=1)
    """Features that the nearest neighbours classify."""
    width: int = Field(default=192, ge=1)
    """Of the features."""
    num_classes: int = Field(default=10, ge=2)
    """Classes."""
    rounds: int = Field(default=1, ge=1)
    """How often each has its turn."""
    output: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the numbers; empty: none."""


def planted(args: Probes) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [num + queries, width] with their labels: noise around a centre for each class."""
    generator = torch.Generator().manual_seed(0)
    centre_CD = torch.randn(args.num_classes, args.width, generator=generator)
    label_N = torch.randint(args.num_classes, (args.num + args.queries,), generator=generator)
    return centre_CD[label_N] + 4 * torch.randn(len(label_N), args.width, generator=generator), label_N


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(Probes, prog="python -m benchmarks.probes", argv=argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    (known_ND, query_MD), (label_N, query_label_M) = (each.split([args.num, args.queries]) for each in planted(args))
    learn = args.num - args.num // 10

    def linear() -> torch.Tensor:
        held = known_ND[learn:], label_N[learn:]
        return linear_probe(known_ND[:learn], label_N[:learn], *held, num_classes=args.num_classes, seed=0).predict(
            query_MD
        )

    def knn() -> torch.Tensor:
        return knn_predict(known_ND, label_N, query_MD, num_classes=args.num_classes)

    arms: dict[str, Callable[[], torch.Tensor]] = {"linear": linear, "knn": knn}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    accuracy: dict[str, float] = {}
    for _ in range(args.rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            predicted_M = arm()
            seconds[name].append(time.perf_counter() - start)
            accuracy[name] = top1(predicted_M, query_label_M)
    # On Linux in KiB.
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times = {name: summary(found) for name, found in seconds.items()}
    for name, time_s in times.items():
        print(f"{name}_s {time_s['median']:.2f} ({time_s['low']:.2f} to {time_s['high']:.2f}), {accuracy[name]:.1f} %")
    print(f"peak {peak_mib:.0f} MiB; {args.num:,} features of width {args.width}, {len(LEARNING_RATES)} learning rates")
    if args.output:
        result: dict[str, Any] = {
            **{f"{name}_s": time_s["median"] for name, time_s in times.items()},
            "peak_mib": peak_mib,
            "details": {"seconds": seconds, "top1": accuracy, "threads": torch.get_num_threads(),
                        "arguments": args.model_dump(), "python": platform.python_version(),
                        "torch": torch.__version__},
        }  # fmt: skip
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
