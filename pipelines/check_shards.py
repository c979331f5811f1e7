"""Checks shards, and indexes those that others made: ``python -m pipelines.check_shards DIR [--write]``."""

import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, cast

import numpy as np
import tyro
from pydantic import BaseModel, ConfigDict, Field

from pipelines.cli import parse
from pipelines.data.index import ShardIndex, encode_index, index_name, index_tar, read_index
from pipelines.data.shards import INFO, STATE, Manifest, encode_info, file_sizes, parse_manifest, read_info
from pipelines.errors import UserError, run_command
from pipelines.storage import Store, absolute

PROG = "python -m pipelines.check_shards"
_CHUNK = 8 << 20
_IN_MEMORY = 256 << 20
_MOST_CLASSES = 1_000_000
_REPORT_EVERY_S = 3.0


class CheckShards(BaseModel):
    """Checks the shards of a directory: sizes, digests, indexes; makes index and manifest with --write."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    location: Annotated[str, tyro.conf.Positional]
    """Folder or s3:// address of the shards."""
    write: bool = False
    """Make the index of every tar in the directory, and its _info.json."""
    split: str = Field("", pattern=r"^[A-Za-z0-9_-]*$")
    """With --write: name of the split; what _info.json says, or 'train', where empty."""
    decode: bool = False
    """Decode every image and every mask, too."""
    workers: int = Field(0, ge=0)
    """Tasks at once; 0: as many as there are CPUs."""


@dataclass(frozen=True)
class Checked:
    """What one shard is found to be.

    Attributes:
        name: Of the shard.
        num_bytes: Its size.
        sha256: Its digest.
        num_samples: Samples in it.
        top_label: Its highest label, -1 where it has none.
        mask_classes: The highest class in its masks, and 1; 0 where it has none, or they were not decoded.
        problems: What is wrong, a line each.
    """

    name: str
    num_bytes: int = 0
    sha256: str = ""
    num_samples: int = 0
    top_label: int = -1
    mask_classes: int = 0
    problems: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 where there are problems, else 0.

    Raises:
        UserError: There are no shards to check.
    """
    args = parse(CheckShards, prog=PROG, argv=argv)
    store = Store(absolute(args.location))
    sizes = file_sizes(store)
    if sizes is None:
        raise UserError(f"no shards at '{args.location}': there is no such directory")
    tars = sorted(name for name in sizes if name.endswith(".tar") and not name.startswith("."))
    if args.write:
        return _write(args, store, sizes, tars)

    if args.split:
        raise UserError("--split names the split that --write makes: give both, or neither")
    manifest = parse_manifest(store, read_info(store, sizes))
    problems = [f"{name}: is not in {INFO}" for name in tars if name not in manifest.shard_names]
    for line in problems:
        print(line)
    for checked in _run(args, store, manifest.shard_names, manifest):
        problems += checked.problems
    if problems:
        print(f"{len(problems)} problems in {len(manifest.shard_names)} shards of {store.location}")
        return 1
    size = sum(manifest.shard_bytes) / 1e6
    what = "decoded, " if args.decode else ""
    print(
        f"{len(manifest.shard_names)} shards of split '{manifest.split}', {manifest.num_samples:,} images, "
        f"{len(manifest.classes)} classes, {size:,.1f} MB: {what}no problem found"
    )
    return 0


def _write(args: CheckShards, store: Store, sizes: dict[str, int], tars: list[str]) -> int:
    if not tars:
        raise UserError(f"{store.location} holds no .tar: nothing to index")
    if STATE in sizes and INFO not in sizes:
        raise UserError(f"packing into {store.location} was not finished: run pipelines.make_shards again")
    split, classes, mask_classes = _known_info(store, sizes)
    split = args.split or split
    found = {checked.name: checked for checked in _run(args, store, tars, None)}
    problems = [line for checked in found.values() for line in checked.problems]
    if problems:
        print(f"{len(problems)} problems in {len(tars)} shards of {store.location}: no {INFO} is written")
        return 1
    shards = [found[name] for name in tars]
    num_classes = max(shard.top_label for shard in shards) + 1
    if num_classes > _MOST_CLASSES:
        raise UserError(f"the highest label is {num_classes - 1:,}: labels count from 0 on, one for each class")
    if len(classes) < num_classes:
        classes = tuple(str(label) for label in range(num_classes))
    manifest = Manifest(
        location=store.location,
        split=split,
        shard_names=tuple(tars),
        shard_lengths=tuple(shard.num_samples for shard in shards),
        shard_bytes=tuple(shard.num_bytes for shard in shards),
        shard_digests=tuple(shard.sha256 for shard in shards),
        classes=classes if num_classes else (),
        mask_classes=max(mask_classes, *(shard.mask_classes for shard in shards)),
    )
    store.write(INFO, encode_info(manifest))
    print(f"indexed {len(tars)} shards of split '{split}': {manifest.num_samples:,} images, {num_classes} classes")
    return 0


def _known_info(store: Store, sizes: dict[str, int]) -> tuple[str, tuple[str, ...], int]:
    """Split, class names and classes of masks in an ``_info.json`` that is there already, ours or timm's."""
    if INFO not in sizes:
        return "train", (), 0
    info = read_info(store, sizes)
    splits = info.get("splits") if isinstance(info, dict) else None
    if not isinstance(splits, dict) or not all(isinstance(split, dict) for split in splits.values()):
        raise UserError(f"{store.path(INFO)} is not timm's: delete it, then run --write again")
    if len(splits) != 1:
        raise UserError(
            f"{store.path(INFO)} describes {len(splits)} splits, and one directory holds one: move each to its own"
        )
    ((name, split),) = splits.items()
    return str(name), tuple(map(str, split.get("classes", ()))), int(split.get("mask_classes", 0))


def _run(args: CheckShards, store: Store, names: Sequence[str], manifest: Manifest | None) -> Iterator[Checked]:
    """Checks shards in parallel, or writes their indexes where there is no manifest; prints what is wrong."""
    import ray  # seconds to import, and a wrong path should not wait for it

    from pipelines.ray_session import connect

    with connect(num_cpus=args.workers):
        at_once = args.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        remote: Any = ray.remote(num_cpus=1)
        task = remote(check_shard)
        waiting = list(range(len(names)))[::-1]
        running: list[Any] = []
        done, last = 0, time.monotonic()
        while waiting or running:
            while waiting and len(running) < at_once:
                position = waiting.pop()
                running.append(task.remote(store, names[position], manifest, position, decode=args.decode))
            ready, running = ray.wait(running, num_returns=1, timeout=1.0)
            for checked in ray.get(ready):
                done += 1
                for line in checked.problems:
                    print(line, flush=True)
                yield checked
            if time.monotonic() - last > _REPORT_EVERY_S:
                last = time.monotonic()
                print(f"{done:,} of {len(names):,} shards", flush=True)


def check_shard(store: Store, name: str, manifest: Manifest | None, position: int, *, decode: bool) -> Checked:
    """Checks a shard against the manifest and its index, or writes its index where there is no manifest."""
    try:
        with _local_copy(store, name) as (file, num_bytes, digest):
            index = index_tar(file)
            problems = []
            if manifest is None:
                content = encode_index(index, tar_bytes=num_bytes, tar_sha256=digest)
                store.write(index_name(name), content)
            else:
                problems += _compare(store, name, manifest, position, index, num_bytes, digest)
            mask_classes = 0
            if decode:
                broken, mask_classes = _decode_all(name, file, index)
                problems += broken
                known = manifest.mask_classes if manifest else 0
                if 0 < known < mask_classes:
                    problems.append(f"{name}: class {mask_classes - 1} in its masks, and {INFO} has {known} classes")
    except FileNotFoundError:
        return Checked(name, problems=(f"{name}: is missing",))
    except ValueError as error:
        return Checked(name, problems=(f"{name}: {error}",))
    return Checked(name, num_bytes, digest, len(index), int(index.label_S.max()), mask_classes, tuple(problems))


@contextmanager
def _local_copy(store: Store, name: str) -> Iterator[tuple[BinaryIO, int, str]]:
    """A shard as a local file with its size and SHA-256; one from an object store is fetched once."""
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) if not store.is_local else store.local(name).open("rb") as file:
        sha256 = hashlib.sha256()
        num_bytes = 0
        if store.is_local:
            while chunk := file.read(_CHUNK):
                sha256.update(chunk)
                num_bytes += len(chunk)
        else:
            total = store.size(name)
            if total is None:
                raise FileNotFoundError(name)
            while num_bytes < total:
                chunk = store.read(name, num_bytes, min(_CHUNK, total - num_bytes))
                sha256.update(chunk)
                num_bytes += len(chunk)
                file.write(chunk)
        file.seek(0)
        yield cast(BinaryIO, file), num_bytes, sha256.hexdigest()


def _compare(
    store: Store, name: str, manifest: Manifest, position: int, index: ShardIndex, num_bytes: int, digest: str
) -> Iterator[str]:
    if num_bytes != manifest.shard_bytes[position]:
        yield f"{name}: {num_bytes} bytes, and {INFO} says {manifest.shard_bytes[position]}"
    elif digest != manifest.shard_digests[position]:
        yield f"{name}: its SHA-256 is {digest}, and {INFO} says {manifest.shard_digests[position]}"
    if len(index) != manifest.shard_lengths[position]:
        yield f"{name}: {len(index)} samples, and {INFO} says {manifest.shard_lengths[position]}"
    if manifest.labelled and int(index.label_S.max()) >= len(manifest.classes):
        yield f"{name}: label {index.label_S.max()}, and {INFO} has {len(manifest.classes)} classes"
    try:
        written, facts = read_index(store, name)
    except UserError as error:
        yield f"{name}: {error}"
        return
    same = (
        facts.get("tar_sha256") == digest
        and all(np.array_equal(getattr(written, column), getattr(index, column)) for column in _COLUMNS)
        and list(written.keys) == list(index.keys)
        and list(written.extensions) == list(index.extensions)
    )
    if not same:
        yield f"{name}: {index_name(name)} does not say what the tar holds: run {PROG} DIR --write"


_COLUMNS = ("offset_S", "size_S", "label_S", "mask_offset_S", "mask_size_S")


def _decode_all(name: str, file: BinaryIO, index: ShardIndex) -> tuple[list[str], int]:
    """What is wrong with the images and the masks of a shard, and the masks' highest class, and 1."""
    from mae_core.images import decode
    from mae_core.mask_images import check_mask_size, decode_mask, num_mask_classes

    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    problems, mask_classes = [], 0
    columns = (index.offset_S, index.size_S, index.mask_offset_S, index.mask_size_S)
    for key, *where in zip(index.keys, *(column.tolist() for column in columns), strict=True):
        what = ""
        try:
            height, width, _ = decode(read(*where[:2])).shape
            if where[3]:
                what = "mask: "
                mask_HW = decode_mask(read(*where[2:]))
                mask_classes = max(mask_classes, num_mask_classes(mask_HW))
                check_mask_size(mask_HW, height, width)
        except ValueError as error:
            problems.append(f"{name}: {key}: {what}{error}")
    return problems, mask_classes


if __name__ == "__main__":
    run_command(main)
