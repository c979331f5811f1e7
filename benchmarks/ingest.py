"""Measures how fast images come out of shards: ``python -m benchmarks.ingest --source photos.tar [--json OUT]``.

The arms take turns, so that what else the machine does meets them alike, and a ratio is taken within each round.
All run on the same cores, with one thread a process, on files that lie in the page cache; the time counts from the
first batch on, and the consumer does nothing but take the batch.
"""

import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from pipelines.cli import parse
from pipelines.errors import UserError, run_command

if TYPE_CHECKING:
    from benchmarks.ingest_data import Images
    from benchmarks.ingest_turns import Turns
    from benchmarks.meter import Turn

Part = Literal[
    "raw", "ours", "read_webdataset", "read_webdataset_default", "webloader", "dataloader", "first_batch", "memory"
]
PARTS: tuple[Part, ...] = Part.__args__  # type: ignore[attr-defined]
ARMS = PARTS[:6]
# These have a Ray of their own, with ours once more beside them: in one Ray our reading tasks run in processes, and our
# blocks lie in an object store, in which another way of reading has left its traces.
FOREIGN_ON_RAY: tuple[Part, ...] = ("read_webdataset", "read_webdataset_default")
TINY_ARMS = ("raw", "ours", "webloader")
# What the arms are there for: this key is ours over that arm, in the same round.
RATIOS = {"over_" + name: name for name in ARMS if name != "ours"}
TINY_RATIOS = {"tiny_over_" + name: name for name in TINY_ARMS if name != "ours"}
FOREIGN_LIMIT = 0.05  # share of the cores' time that somebody else may have had in a round that counts
NUM_FIRST = 3
MORE_SHARDS = 8  # 128 for 16


class Ingest(BaseModel):
    """Measures the pipeline beside its limit and other loaders: images/s, CPU time, first batch, memory."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str
    """A .tar of photos."""
    tiny: str = ""
    """A folder of shards of tiny images; empty: cifar10/train.tar.gz beside the source, if it is there."""
    copies: int = Field(default=32, ge=1)
    """How often the photos are packed, under other names."""
    only: tuple[Part, ...] = ()
    """Measure only these; none: all."""
    rounds: int = Field(default=5, ge=1)
    """How often each arm has its turn."""
    repeats: int = Field(default=5, ge=0)
    """How many rounds may be repeated because others had the cores."""
    seconds: float = Field(default=5.0, gt=0)
    """How long a turn is, from its first batch on; on Ray twice as long."""
    batch: int = Field(default=64, ge=1)
    """Photos a batch."""
    tiny_batch: int = Field(default=256, ge=1)
    """Tiny images a batch."""
    image_size: int = Field(default=224, ge=1)
    """Pixels a side of a photo's crop."""
    tiny_size: int = Field(default=32, ge=1)
    """Pixels a side of a tiny image's crop."""
    cores: int = Field(default=2, ge=1)
    """Cores that everything runs on."""
    memory_batches: int = Field(default=200, ge=1)
    """Batches read for the measurement of memory."""
    output: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the numbers; empty: none."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code.

    Raises:
        UserError: The source is no tar of images, or the machine has too few cores.
    """
    args = parse(Ingest, prog="python -m benchmarks.ingest", argv=argv)
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    if len(cores) < args.cores:
        raise UserError(f"--cores {args.cores}: this process may use {len(cores)}")
    os.sched_setaffinity(0, cores)
    # Before anything that would start threads is imported, here and in all processes to come.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    with tempfile.TemporaryDirectory(prefix="ingest-") as folder:
        result = run(args, cores, Path(folder))
    show(result)
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    return 0


def run(args: Ingest, cores: Sequence[int], folder: Path) -> dict[str, Any]:
    """Prepares the images, measures, and gives all numbers."""
    from benchmarks.ingest_data import load_tiny, make_photos, multiply
    from benchmarks.ingest_host import Host
    from benchmarks.ingest_memory import memory_of
    from benchmarks.ingest_on_ray import local_ray
    from benchmarks.ingest_turns import Turns

    photos = make_photos(args.source, args.copies, folder, args.image_size, args.batch)
    asked = args.only or PARTS
    groups = {"photos": (photos, [arm for arm in ARMS if arm in asked and arm not in FOREIGN_ON_RAY])}
    if tiny_shards := args.tiny or pack_tiny(args.source, folder):
        tiny = load_tiny(tiny_shards, args.tiny_size, args.tiny_batch)
        groups["tiny"] = (tiny, [arm for arm in TINY_ARMS if arm in asked])
    on_ray = {"photos_on_ray": (photos, [arm for arm in ("ours", *FOREIGN_ON_RAY) if arm in asked])}
    for name, (images, _) in groups.items():
        manifest = images.manifest
        print(f"{name}: {manifest.num_samples:,} images in {len(manifest.shard_names)} shards", flush=True)

    details: dict[str, Any] = {"conditions": conditions(args, cores), "pixels": {}}
    numbers: dict[str, float] = {}
    rounds: dict[str, Any] = {}
    with Host(cores) as host:
        for part in (groups, on_ray if set(asked) & set(FOREIGN_ON_RAY) else {}):
            if any(names for _, names in part.values()):
                with local_ray(cores):
                    turns = Turns(cores, host)
                    details["pixels"] |= check(turns, part)
                    rounds |= measure_rounds(turns, part, args)
        if "first_batch" in asked:
            with local_ray(cores):
                check(Turns(cores, host), {"photos": (photos, ["ours"])})
                details["first_batch"] = first_batches(photos)
    for name, ratios in (("photos", RATIOS), ("photos_on_ray", RATIOS), ("tiny", TINY_RATIOS)):
        if name in rounds:
            details[name] = arms_of(rounds[name])
            details[name]["ratios"] = ratios_of(rounds[name]["kept"], ratios)
            numbers |= {key: ratio["median"] for key, ratio in details[name]["ratios"].items()}
    if "first_batch" in details:
        numbers |= {key: value["median"] for key, value in details["first_batch"].items()}
    if "memory" in (args.only or PARTS):
        (folder / "many").mkdir()
        many = multiply(photos, MORE_SHARDS, folder / "many")
        few, many = (memory_of(images, args.memory_batches, cores) for images in (photos, many))
        details["memory"] = {"few": few, "many": many}
        numbers["memory_growth"] = many["peak_mib"] / few["peak_mib"]
    return {**numbers, "details": details}


def pack_tiny(source: str, folder: Path) -> str:
    """Packs the CIFAR-10 that lies beside the photos; returns its shards, or nothing where there is none."""
    from pipelines.make_shards import main as make_shards

    beside = Path(source).parent / "cifar10" / "train.tar.gz"
    if not beside.is_file():
        return ""
    make_shards(["--source", str(beside), "--out", str(folder / "tiny")])
    return str(folder / "tiny")


def check(turns: "Turns", groups: dict[str, tuple["Images", list[str]]]) -> dict[str, dict[str, float]]:
    """Holds each arm's pixels against the reference before anything is measured; warms files and workers up."""
    found = {group: {name: turns.check(name, images) for name in names} for group, (images, names) in groups.items()}
    for differences in found.values():
        for name, difference in differences.items():
            # Pillow resamples in other steps; the same crop all the same.
            if difference > (2.0 if name == "read_webdataset_default" else 0.0):
                raise RuntimeError(
                    f"arm {name} does not deliver the same pixels: they differ by {difference:.2f} levels"
                )
    return found


def measure_rounds(
    turns: "Turns", groups: dict[str, tuple["Images", list[str]]], args: Ingest
) -> dict[str, dict[str, list[dict[str, "Turn"]]]]:
    """Lets all arms have their turns, round after round; disturbed rounds are repeated."""
    rounds: dict[str, dict[str, list[dict[str, Turn]]]] = {
        group: {"kept": [], "discarded": []} for group, (_, names) in groups.items() if names
    }
    for number in range(args.rounds + args.repeats):
        for group, done in rounds.items():
            if len(done["kept"]) == args.rounds:
                continue
            images, names = groups[group]
            one = {name: turns.turn(name, images, args.seconds) for name in names}
            foreign = max(turn.foreign for turn in one.values())
            done["discarded" if foreign > FOREIGN_LIMIT else "kept"].append(one)
            told = ", ".join(f"{name} {turn.images_per_s:,.0f}" for name, turn in one.items())
            disturbed = f" (discarded: others had {foreign:.0%} of the cores)" if foreign > FOREIGN_LIMIT else ""
            print(f"{group} round {number + 1}: {told} images/s{disturbed}", flush=True)
    for group, done in rounds.items():
        if not done["kept"]:
            print(
                f"warning: every round of {group} was disturbed; the numbers are of disturbed rounds", file=sys.stderr
            )
            done["kept"] = done["discarded"]
    return rounds


def arms_of(rounds: dict[str, list[dict[str, "Turn"]]]) -> dict[str, Any]:
    """What each arm did: medians and ranges over the rounds that count."""
    from benchmarks.meter import summary

    kept = rounds["kept"]
    fields = ("images_per_s", "cpu_s_per_1000", "first_batch_s", "foreign")
    arms = {name: {field: summary([getattr(one[name], field) for one in kept]) for field in fields} for name in kept[0]}
    return {
        "arms": arms,
        "rounds": len(kept),
        "discarded": len(rounds["discarded"]),
        "disturbed": kept is rounds["discarded"],
    }


def ratios_of(kept: list[dict[str, "Turn"]], ratios: dict[str, str]) -> dict[str, dict[str, float]]:
    """The pipeline over the others, within each round."""
    from benchmarks.meter import summary

    return {
        key: summary([one["ours"].images_per_s / one[name].images_per_s for one in kept])
        for key, name in ratios.items()
        if {"ours", name} <= set(kept[0])
    }


def first_batches(images: "Images") -> dict[str, dict[str, float]]:
    """Seconds from calling the pipeline to its first batch, from the beginning and in the middle of an epoch."""
    import time

    from benchmarks.ingest_on_ray import crew, ours
    from benchmarks.meter import summary

    steps = {"first_batch_s": 0, "first_batch_middle_s": images.manifest.num_samples // images.batch // 2}
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(NUM_FIRST):
        for key, step in steps.items():
            crew.cache_clear()  # calling the pipeline is also making what its workers meet at
            called = time.perf_counter()
            batches = ours(images, 4 * images.batch, step)
            next(batches)
            seconds[key].append(time.perf_counter() - called)
            for _ in batches:
                pass
    return {key: summary(values) for key, values in seconds.items()}


def conditions(args: Ingest, cores: Sequence[int]) -> dict[str, Any]:
    """What the numbers hold for."""
    packages = ("ray", "torch", "webdataset", "numpy", "pillow", "simplejpeg", "pyarrow")
    return {
        "arguments": args.model_dump(),
        "cores": list(cores),
        "machine": platform.processor() or platform.machine(),
        "page_cache": "warm",
        "threads_a_process": 1,
        "ray": "one local Ray, idle while the others are measured; its workers run at nice 15",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    details = result["details"]
    for group in ("photos", "photos_on_ray", "tiny"):
        if group not in details:
            continue
        told = details[group]
        print(f"\n{group}, {told['rounds']} rounds, {told['discarded']} discarded" + " DISTURBED" * told["disturbed"])
        print(f"  {'arm':24} {'images/s':>9} {'range':>17} {'CPU-s/1000':>11} {'first batch':>12}")
        for name, arm in told["arms"].items():
            rate = arm["images_per_s"]
            between = f"{rate['low']:,.0f} to {rate['high']:,.0f}"
            cpu, first = arm["cpu_s_per_1000"]["median"], arm["first_batch_s"]["median"]
            print(f"  {name:24} {rate['median']:9,.0f} {between:>17} {cpu:11.3f} {first:10.2f} s")
        for key, ratio in told["ratios"].items():
            print(f"  {key:32} {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
    if "tiny" not in details["pixels"]:
        print("\ntiny images were left out: no --tiny, and no cifar10/train.tar.gz beside the source")
    for key, value in details.get("first_batch", {}).items():
        print(f"{key:34} {value['median']:.2f} s ({value['low']:.2f} to {value['high']:.2f})")
    if "memory" in details:
        few, many = details["memory"]["few"], details["memory"]["many"]
        print(
            f"{'memory_growth':34} {result['memory_growth']:.3f} ({few['shards']} shards {few['peak_mib']:,.0f} MiB, "
            f"{many['shards']} shards {many['peak_mib']:,.0f} MiB, {few['batches']} batches each, "
            f"{few['spilled_bytes'] + many['spilled_bytes']} bytes spilled)"
        )


if __name__ == "__main__":
    run_command(main)
