"""Measures feature extraction beside a bare forward loop: ``python -m benchmarks.features --data SHARDS``.

Both encode the same pixels with the same encoder on the same threads. The pipeline reads and decodes them meanwhile,
and its time counts from the call to the last feature; the loop has them in memory.
"""

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.meter import summary
from mae_core.images import normalize
from pipelines.cli import load_toml, parse
from pipelines.config import Config
from pipelines.data.feed import Crew, Feed, join_crew
from pipelines.data.plan import Cut, Plan
from pipelines.data.readers import Stream, View
from pipelines.data.shards import Manifest, load_manifest
from pipelines.errors import run_command
from pipelines.ray_session import connect
from pipelines.training.build import build_model
from pipelines.training.probing import Prober


class Features(BaseModel):
    """Measures the rate at which features are extracted from shards, over that of a bare loop on pixels in memory."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: str
    """Labelled shards."""
    config: str = "pipelines/recipes/cifar10_cpu.toml"
    """Recipe of the encoder, whose weights stay random."""
    micro_size: int = Field(default=64, ge=1)
    """Images a forward pass."""
    rounds: int = Field(default=5, ge=1)
    """How often each has its turn."""
    output: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the numbers; empty: none."""


def in_memory(config: Config, manifest: Manifest, crew: Crew) -> list[torch.Tensor]:
    """The images of a data set in order, as the prober crops them: uint8 [B, H, W, C] each."""
    rows = config.batch.micro_size
    view = View(config.data.image_size, config.data.channels, crop_share=config.probe.crop_share)
    plan = Plan(manifest.num_samples, seed=0, end=manifest.num_samples, shuffle=False)
    stream = Stream(manifest, plan, Cut(rows, rows, 1), view)
    feed = Feed(stream, (0, -(-manifest.num_samples // rows)), crew=crew)
    return [torch.from_numpy(batch.images_BHWC.copy()) for batch in feed]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(Features, prog="python -m benchmarks.features", argv=argv)
    config = load_toml(Config, args.config)
    values = config.model_dump()
    values["batch"]["micro_size"] = args.micro_size
    config = Config.model_validate(values)
    manifest = load_manifest(args.data)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = build_model(config).eval()

    @torch.inference_mode()
    def bare(batches: list[torch.Tensor]) -> torch.Tensor:
        found = [
            model.features(normalize(images_BHWC, config.data.mean, config.data.std), config.probe.pool)
            for images_BHWC in batches
        ]
        return torch.cat(found)[: manifest.num_samples]

    seconds: dict[str, list[float]] = {"pipeline": [], "bare": []}
    with connect():
        crew = join_crew(0, 1, num_cpus=config.data.cpus_per_task)
        prober = Prober(config, crew, torch.device("cpu"), lambda: torch.autocast("cpu", torch.bfloat16, enabled=False))
        batches = in_memory(config, manifest, crew)
        for _ in range(args.rounds):
            start = time.perf_counter()
            (features,) = prober.extract([model], manifest) or []
            seconds["pipeline"].append(time.perf_counter() - start)
            start = time.perf_counter()
            expected = bare(batches)
            seconds["bare"].append(time.perf_counter() - start)
            if not torch.equal(features.features_ND, expected):
                raise RuntimeError("the pipeline's features are not those of the bare loop")
            print(
                f"pipeline {manifest.num_samples / seconds['pipeline'][-1]:,.0f} images/s, "
                f"bare loop {manifest.num_samples / seconds['bare'][-1]:,.0f}",
                flush=True,
            )
    ratio = summary([loop / whole for whole, loop in zip(seconds["pipeline"], seconds["bare"], strict=True)])
    print(f"over_bare {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}, {args.rounds} rounds)")
    if args.output:
        result: dict[str, Any] = {
            "over_bare": ratio["median"],
            "details": {"ratio": ratio, "seconds": seconds, "images": manifest.num_samples,
                        "arguments": args.model_dump(), "python": platform.python_version(),
                        "torch": torch.__version__},
        }  # fmt: skip
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
