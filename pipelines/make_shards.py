"""Packs images into shards: ``python -m pipelines.make_shards --source photos/ --out shards/``."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mae_core.names import printable
from pipelines.cli import parse
from pipelines.commands import command_line
from pipelines.data.index import index_name, read_index
from pipelines.data.next_step import next_step
from pipelines.data.packing import Packing, PackingOptions, ShardPlan, group_shards, plan_packing, plan_splits
from pipelines.data.shards import INFO, ONE_CLASS, STATE, Manifest, encode_info, file_sizes, load_manifest, read_classes
from pipelines.data.sources import (
    Listing,
    Masks,
    Source,
    close_archive,
    counted,
    extension_of,
    find_source,
    image_extension,
    list_images,
    list_masks,
    read_images,
)
from pipelines.data.writing import write_shards
from pipelines.errors import UserError, run_command
from pipelines.storage import Store, absolute

PROG = command_line("pipelines.make_shards")
_SKIPPED = "skipped.jsonl"
_REPORT_EVERY_S = 3.0
_STOP_WITHIN_S = 10.0
_READ_AHEAD = 16
_TRIED = 16  # images of each kind that are decoded before packing
# What one process has packed before Ray has started.
_FEW_IMAGES, _FEW_BYTES, _FEW_BYTES_DECODED = 20_000, 1 << 30, 64 << 20


class MakeShards(BaseModel):
    """Packs a folder, a .tar, .tar.gz or .zip of images into WebDataset shards with an index and a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """A folder of class folders or of images, an archive of either, or 'digits'."""
    out: str
    """Folder or s3:// address of the shards; one folder holds one split."""
    split: str = Field("train", pattern=r"^([A-Za-z0-9_-]+|0?\.\d+(,0?\.\d+){1,2})$")
    """Name of the split, and the beginning of each shard's name. Two shares, 0.9,0.1, divide the source into OUT/train
    and OUT/test, three into OUT/train, OUT/val and OUT/test, by a hash of each image's key."""
    shard_mib: int = Field(256, ge=1)
    """About how large a shard may grow; a small data set is cut into 8 shards or so all the same."""
    seed: int = Field(0, ge=0, lt=1 << 63)
    """Seed of the order in which samples are scattered over the shards."""
    resize: int = Field(0, ge=0)
    """Shorter side in pixels of what is larger; 0 stores every file as it is, byte for byte."""
    quality: int = Field(90, ge=1, le=100)
    """JPEG quality of images that --resize makes smaller."""
    labels: Literal["auto", "none"] = "auto"
    """Whether class folders become labels."""
    classes: str = ""
    """Number the class folders as these do: shards, or a text file with a class name a line, the first is label 0."""
    masks: str = ""
    """Folder of segmentation masks, a .png of the same relative path for each image: 8-bit grey or a palette, whose
    indices are the classes, 255 where a pixel does not count. Images that cannot be decoded are left out then."""
    mask_255: int = Field(255, ge=0, le=255)
    """What a mask's value 255 becomes; 255 is a pixel that does not count. 1 for masks of 0 and 255."""
    workers: int = Field(0, ge=0)
    """Tasks at once; 0: as many as there are CPUs, or none beside this process where that is faster."""
    overwrite: bool = False
    """Replace the shards that another packing left in the folder."""


@dataclass
class _Progress:
    """A line every few seconds."""

    images: int
    done: int = 0
    read: int = 0

    def __post_init__(self) -> None:
        self._last = time.monotonic()
        self._first: tuple[float, int, int] | None = None

    def add(self, images: int, size: int) -> None:
        self.done += images
        self.read += size
        now = time.monotonic()
        if self._first is None:
            # The first images come with the start of a worker: no rate is in them.
            self._first = (now, self.done, self.read)
        if now - self._last < _REPORT_EVERY_S:
            return
        self._last = now
        start, done, read = self._first
        line = f"{self.done:,} of {self.images:,} images"
        if now > start and self.done > done:
            images_per_s = (self.done - done) / (now - start)
            line += f", {images_per_s:,.0f} images/s, {(self.read - read) / (now - start) / 1e6:.1f} MB/s"
            line += f", {(self.images - self.done) / images_per_s:.0f} s left"
        print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Raises:
        UserError: The source or the folder is not as it must be.
    """
    args = parse(MakeShards, prog=PROG, argv=argv)
    try:
        return _make(args)
    finally:
        close_archive()


def _make(args: MakeShards) -> int:
    start = time.monotonic()
    shares, splits = _shares(args)
    options = PackingOptions(
        split=args.split if not shares else "",
        shard_bytes=args.shard_mib << 20,
        seed=args.seed,
        resize=args.resize,
        quality=args.quality,
        labels=args.labels == "auto",
        classes=read_classes(args.classes) if args.classes else (),
        mask_255=args.mask_255,
        shares=shares,
    )
    listing = list_images(find_source(args.source), args.split, _say_listed())
    masks = list_masks(listing, args.masks) if args.masks else None
    packings = plan_splits(listing, options, splits, masks) if shares else [plan_packing(listing, options, masks)]
    out = Store(absolute(args.out))
    stores = [out.child(split) for split in splits] if shares else [out]
    jobs = []
    for packing, store in zip(packings, stores, strict=True):
        waiting = _prepare(store, packing, overwrite=args.overwrite)
        if waiting is None:
            num = sum(len(shard.keys) for shard in packing.shards)
            print(f"{printable(store.location)} already holds these {num:,} images: nothing to do")
        else:
            jobs.append(_Job(packing, waiting, store))
    if not jobs:
        return 0

    if listing.left_out:
        print(f"left out of {printable(args.source)}: {printable(counted(listing.left_out))}", flush=True)
    for line in _try(listing, masks, args.mask_255):
        print(line, flush=True)
    for job in jobs:
        num, where = sum(len(shard.keys) for shard in job.packing.shards), printable(job.store.location)
        print(f"packing {num:,} images into {len(job.packing.shards)} shards in {where}", flush=True)
        if kept := len(job.packing.shards) - len(job.waiting):
            print(f"{kept} of them are whole from an earlier run and kept", flush=True)
    _pack(jobs, args.workers)
    for job in jobs:
        manifest, num_skipped = _finish(job.packing, job.store)
        _summarise(manifest, num_skipped, time.monotonic() - start)
    if shares or args.split not in ("test", "val"):  # the next of these is another split
        print(f"next: {next_step(load_manifest(stores[0].location), stores[-1].location if shares else '')}")
    return 0


@dataclass(frozen=True)
class _Job:
    """The shards of a packing that are still to be written, and where."""

    packing: Packing
    waiting: list[ShardPlan]
    store: Store


def _shares(args: MakeShards) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """The shares of ``--split``, and the splits' names; empty where it is one split's name."""
    if "," not in args.split:
        return (), ()
    shares = tuple(map(float, args.split.split(",")))
    if abs(sum(shares) - 1) > 1e-6 or min(shares) <= 0:
        raise UserError(f"--split {args.split}: the shares must be above 0 and add up to 1, as in 0.9,0.1")
    if args.source == "digits":
        raise UserError("--split: digits are divided already, into --split train and --split test")
    return shares, ("train", "test") if len(shares) == 2 else ("train", "val", "test")


def _try(listing: Listing, masks: Masks | None, mask_255: int) -> Iterator[str]:
    """Decodes some images of each kind, and some masks; yields what will not decode, a line each kind."""
    from mae_core.images import ImageError, decode
    from mae_core.mask_images import IGNORE, decode_mask

    kinds: dict[str, list[int]] = {}
    # As they come in the archive: of one that is streamed nothing is read beyond them.
    order = np.argsort(listing.wheres_S, kind="stable") if listing.source.streamed else range(len(listing.paths))
    for n in order:
        path = listing.paths[n]
        kind = extension_of(path) if image_extension(path) else "otherwise named"
        kinds.setdefault(kind, []).append(int(n))
    chosen = {}
    for kind, numbers in kinds.items():
        spread = (
            range(_TRIED) if listing.source.streamed else np.linspace(0, len(numbers) - 1, _TRIED).round().astype(int)
        )
        chosen |= {numbers[place]: kind for place in spread if place < len(numbers)}
    tried = Counter(chosen.values())
    failed: dict[str, list[str]] = {}
    where = sorted(chosen)
    paths = [listing.paths[n] for n in where]
    for position, data in read_images(listing.source, paths, listing.sizes_S[where], listing.wheres_S[where]):
        try:
            decode(data)
        except ImageError as error:
            failed.setdefault(chosen[where[position]], []).append(printable(f"{paths[position]}: {error}"))
    for kind, reasons in failed.items():
        yield f"{len(reasons)} of {tried[kind]} {kind} images that were tried cannot be decoded: {reasons[0]}"
    if masks and mask_255 == IGNORE:
        values: set[int] = set()
        for path in masks.paths[:: -(-len(masks.paths) // _TRIED)]:
            with contextlib.suppress(ValueError):  # said when it is packed, with its name
                values |= set(np.unique(decode_mask(Path(path).read_bytes())).tolist())
        if values and values <= {0, IGNORE}:
            yield f"the masks that were tried {ONE_CLASS}"


def _say_listed():
    last = time.monotonic()

    def say(count: int) -> None:
        nonlocal last
        if time.monotonic() - last > _REPORT_EVERY_S:
            last = time.monotonic()
            print(f"listed {count:,} images", flush=True)

    return say


def _prepare(store: Store, packing: Packing, *, overwrite: bool) -> list[ShardPlan] | None:
    """Makes the folder ready; returns the shards still to be written, None where all is done.

    Raises:
        UserError: The folder holds something else.
    """
    sizes = file_sizes(store) or {}
    present = [name for name in store.names() if not name.startswith(".")]
    state = _read_state(store) if STATE in present else None
    if state and state["digest"] == packing.digest:
        waiting = [shard for shard in packing.shards if not _is_whole(store, shard, sizes)]
        if INFO in present and not waiting:
            return None
    else:
        waiting = list(packing.shards)
        if present:
            _clear(store, packing, present, state, overwrite=overwrite)
    # What a killed run was writing; its name cannot be taken for a shard's, but it fills the disk.
    if store.is_local:
        for path in store.local().glob(".*.tmp"):
            if _is_packed(path.name[1:].rsplit(".", 2)[0]):
                path.unlink(missing_ok=True)
    store.write(STATE, json.dumps({"digest": packing.digest, "split": packing.options.split}) + "\n")
    return waiting


def _clear(store: Store, packing: Packing, present: list[str], state: dict | None, *, overwrite: bool) -> None:
    ours = [name for name in present if _is_packed(name)]
    foreign = [name for name in present if not _is_packed(name)]
    if state is None or foreign:
        example = (foreign or present)[0]
        raise UserError(f"{store.location} holds other files ('{example}'): name an empty folder by --out")
    if not overwrite:
        if state["split"] != packing.options.split:
            raise UserError(
                f"{store.location} holds the split '{state['split']}', and one folder holds one split: "
                f"name another --out for '{packing.options.split}', or replace it by --overwrite"
            )
        raise UserError(
            f"{store.location} holds shards of another input or other options: "
            "name another --out, or replace them by --overwrite"
        )
    # The manifest goes first: from here on nothing looks whole.
    # The state goes last: until then this is a packing that can be replaced.
    for name in sorted(ours, key=lambda name: (name != INFO, name == STATE)):
        store.remove(name)


def _is_packed(name: str) -> bool:
    return name in (INFO, STATE, _SKIPPED) or name.endswith((".tar", ".index.arrow"))


def _read_state(store: Store) -> dict:
    try:
        state = json.loads(store.read(STATE))
        return {"digest": state["digest"], "split": state["split"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{store.path(STATE)} is damaged: name another --out") from None


def _is_whole(store: Store, shard: ShardPlan, sizes: dict[str, int]) -> bool:
    if shard.name not in sizes or index_name(shard.name) not in sizes:
        return False
    try:
        _, facts = read_index(store, shard.name)
    except UserError:
        return False
    return facts.get("tar_bytes") == str(sizes[shard.name])


def _pack(jobs: list[_Job], workers: int) -> None:
    """Writes the shards: in this process where there is little to do, since Ray takes seconds to start."""
    waiting = [shard for job in jobs for shard in job.waiting]
    progress = _Progress(sum(len(shard.keys) for shard in waiting))
    size = sum(int(shard.sizes_S.sum()) for shard in waiting)
    decoded = any(job.packing.options.resize or shard.masks for job in jobs for shard in job.waiting)
    little = progress.images <= _FEW_IMAGES and size <= (_FEW_BYTES_DECODED if decoded else _FEW_BYTES)
    try:
        if workers == 1 or (little and not workers):
            for job in jobs:
                for group in group_shards(job.waiting, job.packing.source, 1):
                    for images, size in write_shards(group, job.packing.source, job.packing.options, job.store):
                        progress.add(images, size)
        else:
            _pack_with_ray(jobs, workers, progress)
    except OSError as error:
        if error.filename:
            raise
        # A full disk or an object store that says no: neither names the place.
        places = " and ".join(job.store.shown() for job in jobs)
        raise UserError(f"cannot write to {places}: {error.strerror or error}") from None


def _pack_with_ray(jobs: list[_Job], workers: int, progress: _Progress) -> None:
    import ray  # seconds to import, and a wrong flag should not wait for it
    from ray.exceptions import RayError, RayTaskError

    from pipelines.ray_session import connect

    with connect(num_cpus=workers):
        at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        groups = [
            (group, job.packing.source, job.packing.options, job.store)
            for job in jobs
            for group in group_shards(job.waiting, job.packing.source, at_once)
        ][::-1]
        task: Any = ray.remote(num_cpus=1, num_returns="streaming")(_write_task)
        running: list[Any] = []  # streams of a task's progress
        try:
            while groups or running:
                while groups and len(running) < at_once:
                    running.append(task.remote(*groups.pop()))
                ready: list[Any] = ray.wait(running, num_returns=1, timeout=1.0)[0]
                for stream in ready:
                    try:
                        progress.add(*ray.get(next(stream)))
                    except StopIteration:
                        running.remove(stream)
        except RayTaskError as error:
            if isinstance(error.cause, UserError | OSError):
                raise error.cause from None
            raise
        except RayError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"a packing task died ({reason}): run again, with fewer --workers") from None
        finally:
            _stop(running)


def _stop(running: list[Any]) -> None:
    """Cancels tasks, and gives them the time to remove what they were writing."""
    import ray
    from ray.exceptions import RayError

    for stream in running:
        ray.cancel(stream)
    deadline = time.monotonic() + _STOP_WITHIN_S
    while running and time.monotonic() < deadline:
        ready: list[Any] = ray.wait(running, num_returns=1, timeout=1.0)[0]
        for stream in ready:
            try:
                ray.get(next(stream))
            except (StopIteration, RayError):
                running.remove(stream)


def _write_task(
    shards: list[ShardPlan], source: Source, options: PackingOptions, store: Store
) -> Iterator[tuple[int, int]]:
    """Writes some shards; yields images and bytes about twice a second."""
    images = size = 0
    last = time.monotonic()
    for more_images, more_size in write_shards(shards, source, options, store):
        images += more_images
        size += more_size
        if time.monotonic() - last > 0.5:
            yield images, size
            images, size, last = 0, 0, time.monotonic()
    yield images, size


def _finish(packing: Packing, store: Store) -> tuple[Manifest, int]:
    """Writes the list of skipped images, and last of all the manifest."""
    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        read = list(pool.map(lambda shard: read_index(store, shard.name), packing.shards))
    skipped = [line for _, facts in read for line in json.loads(facts["skipped"])]
    manifest = Manifest(
        location=store.location,
        split=packing.options.split,
        shard_names=tuple(shard.name for shard in packing.shards),
        shard_lengths=tuple(len(index) for index, _ in read),
        shard_bytes=tuple(int(facts["tar_bytes"]) for _, facts in read),
        shard_digests=tuple(facts["tar_sha256"] for _, facts in read),
        classes=packing.classes,
        mask_classes=max(int(facts.get("mask_classes", 0)) for _, facts in read),
    )
    if skipped:
        store.write(_SKIPPED, "".join(json.dumps(line) + "\n" for line in skipped))
    if not manifest.num_samples:
        raise UserError(f"none of the {len(skipped):,} images can be decoded: see {store.path(_SKIPPED)}")
    store.write(INFO, encode_info(manifest))
    return manifest, len(skipped)


def _summarise(manifest: Manifest, num_skipped: int, taken: float) -> None:
    classes = ", ".join(map(printable, manifest.classes[:3])) + (", ..." if len(manifest.classes) > 3 else "")
    classes = f" in {len(manifest.classes)} classes ({classes})" if manifest.labelled else " without labels"
    if manifest.mask_classes:
        classes += f", masks of {manifest.mask_classes} classes"
    size = sum(manifest.shard_bytes) / 1e6
    line = f"packed {manifest.num_samples:,} images{classes} into {len(manifest.shard_names)} shards"
    line += f", {size:,.1f} MB, in {taken:.1f} s"
    if num_skipped:
        line += f"; {num_skipped:,} cannot be decoded and are left out, listed in {_SKIPPED}"
    print(line)
    if manifest.mask_classes == 1:
        print(f"the masks {ONE_CLASS}")


if __name__ == "__main__":
    run_command(main)
