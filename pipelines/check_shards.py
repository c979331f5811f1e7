"""Checks shards, and indexes those that others made: ``python -m pipelines.check_shards DIR [--write]``."""

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, BinaryIO, cast
from urllib.parse import urlsplit

import numpy as np
import tyro
from pydantic import BaseModel, ConfigDict, Field

from mae_core.names import printable
from pipelines.cli import parse
from pipelines.commands import command_line
from pipelines.data.index import (
    KeyRule,
    LeftOut,
    ShardIndex,
    add_left_out,
    encode_index,
    index_name,
    read_index,
    read_tar,
)
from pipelines.data.shards import (
    INFO,
    ONE_CLASS,
    STATE,
    Manifest,
    encode_info,
    file_sizes,
    known_splits,
    parse_manifest,
    read_classes,
    read_info,
)
from pipelines.data.sources import named_split, split_of
from pipelines.errors import UserError, run_command
from pipelines.reading import ReadError
from pipelines.storage import Store, absolute

PROG = command_line("pipelines.check_shards")
_CHUNK = 8 << 20
_IN_MEMORY = 256 << 20
_MOST_CLASSES = 1_000_000
_REPORT_EVERY_S = 3.0
# What one process has looked at before Ray has started.
_FEW_BYTES, _FEW_BYTES_DECODED = 1 << 30, 64 << 20
_FEW_ASKED = 16


class CheckShards(BaseModel):
    """Checks the shards of a directory: sizes, digests, indexes; makes index and manifest with --write."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    location: Annotated[str, tyro.conf.Positional]
    """Folder or s3:// address of the shards; on a web server, one whose _info.json lists them."""
    write: bool = False
    """Make the index of every tar, and _info.json; what members are not used is said."""
    split: str = Field("", pattern=r"^[A-Za-z0-9_-]*$")
    """Which split, where _info.json or the tars' names tell several; with --write also its name, 'train' where
    nothing tells it."""
    keys: KeyRule = "longest"
    """With --write: where a member's key ends. 'longest': before the longest known extension ('22.05.jpg' has the key
    22.05); 'first-dot': where webdataset has it (key 22, extension 05.jpg)."""
    classes: str = ""
    """With --write: names of the classes, as these have them: shards, or a text file with a name a line, in the order
    of the labels."""
    index_to: str = ""
    """With --write: folder of the indexes and of an _info.json that says where the shards lie, which data.train names
    then. For shards that nothing can be written beside."""
    decode: bool = False
    """Decode every image and every mask, too."""
    workers: int = Field(0, ge=0)
    """Tasks at once; 0: as many as there are CPUs, or none beside this process where that is faster."""


@dataclass(frozen=True)
class Checked:
    """What one shard is found to be.

    Attributes:
        name: Of the shard.
        num_bytes: Its size.
        sha256: Its digest.
        num_samples: Samples in it.
        top_label: Its highest label, -1 where it has none.
        has_masks: Whether a sample of it has a mask.
        mask_classes: The highest class in its masks, and 1; 0 where it has none, or they were not decoded.
        problems: What is wrong, a line each.
        left_out: Which members are not used, by reason.
        no_labels: Why its labels cannot be used, if so.
    """

    name: str
    num_bytes: int = 0
    sha256: str = ""
    num_samples: int = 0
    top_label: int = -1
    has_masks: bool = False
    mask_classes: int = 0
    problems: tuple[str, ...] = ()
    left_out: LeftOut = field(default_factory=dict)
    no_labels: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 where there are problems, else 0.

    Raises:
        UserError: There are no shards to check.
    """
    args = parse(CheckShards, prog=PROG, argv=argv)
    if not args.write and (args.classes or args.index_to or args.keys != "longest"):
        raise UserError("--keys, --classes and --index-to say what --write makes: give --write, too")
    store = Store(absolute(args.location))
    sizes = None if store.is_web else file_sizes(store)
    if sizes is None and not store.is_web:
        raise UserError(f"no shards at '{args.location}': there is no such directory")
    tars = sorted(name for name in sizes or () if name.endswith(".tar") and not name.startswith("."))
    if args.write:
        return _write(args, store, sizes, tars)

    info = read_info(store, sizes)
    splits = known_splits(store, info)
    manifests = [parse_manifest(store, info, split) for split in ([args.split] if args.split else splits)]
    listed = {name for split in splits.values() for name in map(str, split.get("filenames", ()))}
    problems = [f"{printable(name)}: is not in {INFO}" for name in tars if name not in listed and not args.split]
    for line in problems:
        print(line)
    for manifest in manifests:
        problems += _check(args, manifest)
    if problems:
        num = sum(len(manifest.shard_names) for manifest in manifests)
        print(f"{len(problems)} problems in {num} shards of {store.shown()}")
        return 1
    return 0


def _check(args: CheckShards, manifest: Manifest) -> list[str]:
    """Checks the shards of a split, says what is found, and returns the problems."""
    store = Store(manifest.location)
    found = list(_run(args, store, manifest.shard_names, sum(manifest.shard_bytes), manifest=manifest))
    problems = [line for checked in found for line in checked.problems]
    _say(found, manifest.mask_classes, manifest.no_labels)
    if not problems:
        size = sum(manifest.shard_bytes) / 1e6
        what = "decoded, " if args.decode else ""
        print(
            f"{len(manifest.shard_names)} shards of split '{manifest.split}', {manifest.num_samples:,} images, "
            f"{len(manifest.classes)} classes, {size:,.1f} MB: {what}no problem found"
        )
    return problems


def _write(args: CheckShards, store: Store, sizes: dict[str, int] | None, tars: list[str]) -> int:
    if sizes is not None and not tars:
        raise UserError(f"{store.shown()} holds no .tar: nothing to index")
    if sizes is not None and STATE in sizes and INFO not in sizes:
        raise UserError(f"packing into {store.shown()} was not finished: run pipelines.make_shards again")
    indexes = Store(absolute(args.index_to)) if args.index_to else store
    if indexes.is_web:
        raise UserError(f"nothing can be written to {indexes.shown()}: keep the index elsewhere, by --index-to DIR")
    if args.index_to and (urlsplit(store.location).username or (store.is_web and urlsplit(store.location).query)):
        raise UserError(f"{store.shown()}: its password or signature would stand in {INFO}; give an address without")
    known = _known_splits(store, sizes)
    split, names = _choose_split(args.split, store, tars, known)
    _say_unlisted(known.get(split, {}), names, tars)
    found = {checked.name: checked for checked in _index_all(args, store, indexes, names, sizes)}
    shards = [found[name] for name in names]
    problems = [line for shard in shards for line in shard.problems]
    if problems:
        print(f"{len(problems)} problems in {len(names)} shards of {store.shown()}: no {INFO} is written")
        return 1
    before = known.get(split, {})
    mask_classes = max(int(before.get("mask_classes", 0)), *(shard.mask_classes for shard in shards))
    no_labels = next((f"{shard.name}: {shard.no_labels}" for shard in shards if shard.no_labels), "")
    if (top := max(shard.top_label for shard in shards)) >= _MOST_CLASSES:
        no_labels = no_labels or f"the highest label is {top:,}, and labels count from 0 on, one for each class"
    _say_left_out(shards)
    _say(shards, mask_classes, no_labels)
    manifest = Manifest(
        location=store.location,
        split=split,
        shard_names=tuple(names),
        shard_lengths=tuple(shard.num_samples for shard in shards),
        shard_bytes=tuple(shard.num_bytes for shard in shards),
        shard_digests=tuple(shard.sha256 for shard in shards),
        classes=() if no_labels else _class_names(args, shards, tuple(map(str, before.get("classes", ())))),
        mask_classes=mask_classes,
        index_location=indexes.location if args.index_to else "",
        no_labels=no_labels,
    )
    if not manifest.num_samples:
        print(f"no image in {len(names)} shards of {store.shown()}: no {INFO} is written")
        return 1
    if args.index_to:
        known = known_splits(indexes, json.loads(indexes.read(INFO))) if indexes.exists(INFO) else {}
    # The other splits stay; but not what is this one under another name.
    others = {
        name: other for name, other in known.items() if not set(names) & set(map(str, other.get("filenames", ())))
    }
    indexes.write(INFO, encode_info(manifest, others))
    print(
        f"indexed {len(names)} shards of split '{split}': {manifest.num_samples:,} images, "
        f"{len(manifest.classes)} classes"
    )
    return 0


def _choose_split(asked: str, store: Store, tars: list[str], known: dict[str, dict[str, Any]]) -> tuple[str, list[str]]:
    """The split that is indexed, and its shards: as ``_info.json`` has several, or as the tars' names tell them.

    Raises:
        UserError: There are several, and none of them is asked for.
    """
    if listed := [str(name) for name in known.get(asked, {}).get("filenames", ())]:
        return asked, listed
    split = asked or (next(iter(known)) if len(known) == 1 else "")
    by_name: dict[str, list[str]] = {}
    for name in tars:
        by_name.setdefault(named_split(name), []).append(name)
    splits = sorted(name for name in by_name if name)
    if not tars or len(known) > 1:
        names = [str(name) for name in known.get(split, {}).get("filenames", ())]
        if names:
            return split, names
        if len(splits) < 2:
            raise UserError(f"{store.path(INFO)} describes the splits {', '.join(known)}: name one by --split")
    if len(splits) < 2:
        return split or "train", tars
    names = by_name.get(split_of(split), []) if split_of(split) else []
    if not names:
        shown = ", ".join(f"{name} ({len(by_name[name])} tars)" for name in splits)
        raise UserError(f"{store.shown()} holds shards of several splits, {shown}: name one by --split {splits[-1]}")
    if rest := by_name.get(""):
        print(f"left out: {len(rest)} tars whose names tell no split ({printable(', '.join(rest[:3]))})")
    return split, names


def _known_splits(store: Store, sizes: dict[str, int] | None) -> dict[str, dict[str, Any]]:
    """The splits in an ``_info.json`` that is there already.

    Raises:
        UserError: It is none.
    """
    if sizes is not None and INFO not in sizes:
        return {}
    try:
        return known_splits(store, read_info(store, sizes))
    except ReadError:
        raise
    except UserError:
        raise UserError(f"{store.shown(INFO)} is not timm's, nor ours: delete it, then run --write again") from None


def _say_unlisted(split: dict[str, Any], names: Sequence[str], tars: Sequence[str]) -> None:
    """Prints which shards beside those of ``_info.json`` are indexed too, or are not."""
    listed = {str(name) for name in split.get("filenames", ())}
    for others, what in ((set(names) - listed, "indexed too"), (set(tars) - set(names), "left out")):
        if listed and (shown := sorted(others)):
            more = ", ..." if len(shown) > 3 else ""
            print(f"{what}: {len(shown)} tars that {INFO} did not list ({printable(', '.join(shown[:3]))}{more})")


def _index_all(
    args: CheckShards, store: Store, indexes: Store, names: list[str], sizes: dict[str, int] | None
) -> Iterator[Checked]:
    if sizes is None:  # a web server, which is asked for each
        sizes = {name: store.size(name) or 0 for name in names[:_FEW_ASKED]}
    total = sum(sizes.get(name, _FEW_BYTES) for name in names)
    try:
        yield from _run(args, store, names, total, indexes=indexes)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not args.index_to:
            reason = os.strerror(error.errno)
            raise UserError(f"{indexes.shown()}: {reason}: keep the index elsewhere, by --index-to DIR") from None
        raise


def _class_names(args: CheckShards, shards: list[Checked], known: tuple[str, ...]) -> tuple[str, ...]:
    num_classes = max(shard.top_label for shard in shards) + 1
    if args.classes and num_classes:
        known = read_classes(args.classes)
        if len(known) < num_classes:
            raise UserError(f"the highest label is {num_classes - 1:,}, and --classes names {len(known)} classes")
    if len(known) < num_classes:
        known = tuple(str(label) for label in range(num_classes))
    return known if num_classes else ()


def _say_left_out(found: Sequence[Checked]) -> None:
    for reason, (count, names) in add_left_out(checked.left_out for checked in found).items():
        first = ", ".join(names) + (", ..." if count > len(names) else "")
        print(f"not used, or odd: {count:,} {printable(reason)} ({printable(first)})")


def _say(found: Sequence[Checked], mask_classes: int, no_labels: str) -> None:
    """Prints what of the shards is not used, and what keeps them from some uses."""
    empty = [checked.name for checked in found if not checked.num_samples and not checked.problems]
    if empty:
        print(
            f"{len(empty)} shards hold no image: {printable(', '.join(empty[:3]))}{', ...' if len(empty) > 3 else ''}"
        )
    if no_labels:
        print(f"the labels are not used, and no probe or transfer can be: {printable(no_labels)}")
    if mask_classes == 1:
        print(f"the masks {ONE_CLASS}")
    elif not mask_classes and any(checked.has_masks for checked in found):
        print("there are masks, and it is not known how many classes they have: --decode looks")


def _run(
    args: CheckShards,
    store: Store,
    names: Sequence[str],
    num_bytes: int,
    *,
    manifest: Manifest | None = None,
    indexes: Store | None = None,
) -> Iterator[Checked]:
    """Checks shards, or writes their indexes where there is no manifest; prints what is wrong.

    Little is done in this process, since Ray takes seconds to start, and more in parallel.
    """
    options = {"decode": args.decode, "keys": args.keys, "indexes": indexes}
    few = num_bytes <= (_FEW_BYTES_DECODED if args.decode else _FEW_BYTES)
    if args.workers == 1 or (few and not args.workers):
        results = (check_shard(store, name, manifest, n, **options) for n, name in enumerate(names))
    else:
        results = _run_with_ray(args, [(store, name, manifest, n) for n, name in enumerate(names)], options)
    last = time.monotonic()
    for done, checked in enumerate(results, start=1):
        for line in checked.problems:
            print(printable(line), flush=True)
        yield checked
        if time.monotonic() - last > _REPORT_EVERY_S:
            last = time.monotonic()
            print(f"{done:,} of {len(names):,} shards", flush=True)


def _run_with_ray(args: CheckShards, calls: list[tuple], options: dict[str, Any]) -> Iterator[Checked]:
    import ray  # seconds to import, and a wrong path should not wait for it

    from pipelines.ray_session import connect

    with connect(num_cpus=args.workers):
        at_once = args.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        remote: Any = ray.remote(num_cpus=1)
        task = remote(check_shard)
        waiting = calls[::-1]
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(task.remote(*waiting.pop(), **options))
            ready, running = ray.wait(running, num_returns=1, timeout=1.0)
            yield from ray.get(ready)


def check_shard(
    store: Store,
    name: str,
    manifest: Manifest | None,
    position: int,
    *,
    decode: bool,
    keys: KeyRule = "longest",
    indexes: Store | None = None,
) -> Checked:
    """Checks a shard against the manifest and its index, or writes its index where there is no manifest.

    Args:
        store: Where the shard lies.
        name: Of the shard.
        manifest: What it is held against; None: its index is written.
        position: Of the shard in the manifest.
        decode: Decode images and masks, too.
        keys: Where a key ends in an index that is written.
        indexes: Where the index is written; None: beside the shard.
    """
    try:
        with _local_copy(store, name) as (file, num_bytes, digest):
            written = _written(manifest, name) if manifest else None
            if written and not isinstance(written, str):
                keys = cast(KeyRule, written[1].get("keys", "longest"))
            contents = read_tar(file, keys)
            index = contents.index
            problems = [f"{name}: {problem}" for problem in contents.problems]
            if manifest:
                problems += _compare(name, manifest, position, index, num_bytes, digest, written)
            elif not problems:
                content = encode_index(index, tar_bytes=num_bytes, tar_sha256=digest, keys=keys)
                (indexes or store).write(index_name(name), content)
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
    return Checked(
        name,
        num_bytes,
        digest,
        len(index),
        int(index.label_S.max(initial=-1)),
        bool(index.mask_size_S.any()),
        mask_classes,
        tuple(problems),
        {
            reason: (count, tuple(f"{name}: {member}" for member in names))
            for reason, (count, names) in contents.left_out.items()
        },
        contents.no_labels,
    )


def _written(manifest: Manifest, name: str) -> tuple[ShardIndex, dict[str, str]] | str:
    """The index of a shard and the facts in it, or why there is none."""
    try:
        return read_index(Store(manifest.index_location or manifest.location), name)
    except UserError as error:
        return str(error)


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
    name: str,
    manifest: Manifest,
    position: int,
    index: ShardIndex,
    num_bytes: int,
    digest: str,
    written: tuple[ShardIndex, dict[str, str]] | str | None,
) -> Iterator[str]:
    if num_bytes != manifest.shard_bytes[position]:
        yield f"{name}: {num_bytes} bytes, and {INFO} says {manifest.shard_bytes[position]}"
    elif digest != manifest.shard_digests[position]:
        yield f"{name}: its SHA-256 is {digest}, and {INFO} says {manifest.shard_digests[position]}"
    if len(index) != manifest.shard_lengths[position]:
        yield f"{name}: {len(index)} samples, and {INFO} says {manifest.shard_lengths[position]}"
    top_label = int(index.label_S.max(initial=-1))
    if manifest.labelled and top_label >= len(manifest.classes):
        yield f"{name}: label {top_label}, and {INFO} has {len(manifest.classes)} classes"
    if written is None or isinstance(written, str):
        yield f"{name}: {written}"
        return
    before, facts = written
    same = (
        facts.get("tar_sha256") == digest
        and all(np.array_equal(getattr(before, column), getattr(index, column)) for column in _COLUMNS)
        and list(before.keys) == list(index.keys)
        and list(before.extensions) == list(index.extensions)
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
