"""Shards on disk: the manifest of a directory, and the way to the index beside each shard.

A directory holds plain WebDataset tars, an index beside each, and ``_info.json`` as timm reads it, with the bytes and
the SHA-256 of each shard and the class names as further keys. It holds one split; where it holds several, a pattern of
shard names says which is meant. Where the tars cannot be written beside, another directory holds the indexes and an
``_info.json`` that says where the tars lie.
"""

import fnmatch
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from pipelines.commands import command_line
from pipelines.data.index import WRITE_HINT, ShardIndex, index_name, index_tar, read_index
from pipelines.data.sources import named_split
from pipelines.errors import UserError
from pipelines.objects import split_query
from pipelines.reading import DEFAULT_POLICY, ReadPolicy
from pipelines.storage import Store, absolute

__all__ = ["Manifest", "ShardIndex", "index_tar", "load_index", "load_manifest"]

INFO = "_info.json"
# What make_shards leaves first of all, and check_shards and loading look for.
STATE = "packing.json"
# What is said of masks that no training can learn from: whatever is predicted, all of it is right.
ONE_CLASS = (
    "have one class: 0, and perhaps 255, which is a pixel that does not count; segmentation needs two: write 1 where "
    "255 means the object (make_shards --masks DIR --mask-255 1 does)"
)
_CACHED_INDEXES = 256
# A web server lists nothing: so many shards are asked for their size, so many at once.
_ASKED_ON_WEB, _AT_ONCE = 64, 16


@dataclass(frozen=True)
class Manifest:
    """What there is to train on: shards, how many samples each holds, and their digests.

    Attributes:
        location: Absolute folder or URI of the shards.
        split: Name of the split.
        shard_names: ``train-000000.tar`` and so on.
        shard_lengths: Samples of each shard.
        shard_bytes: Size of each tar.
        shard_digests: SHA-256 of each tar, hex.
        classes: Class names in label order; empty where there are no labels.
        mask_classes: Classes in the samples' masks; 0 where there are none, or nobody has read them yet.
        index_location: Where the indexes lie; empty where they lie beside the shards.
        no_labels: Why there are no labels, where there might have been.
    """

    location: str
    split: str
    shard_names: tuple[str, ...]
    shard_lengths: tuple[int, ...]
    shard_bytes: tuple[int, ...]
    shard_digests: tuple[str, ...]
    classes: tuple[str, ...]
    mask_classes: int = 0
    index_location: str = ""
    no_labels: str = ""

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(self.shard_lengths)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """The first sample id of each shard, and the number of samples: int64, one more than shards."""
        return np.cumsum((0, *self.shard_lengths), dtype=np.int64)

    @property
    def labelled(self) -> bool:
        """Whether the samples have labels."""
        return bool(self.classes)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of names, content and classes: the same shards elsewhere are the same data."""
        parts = [self.shard_names, self.shard_lengths, self.shard_bytes, self.shard_digests, self.classes]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load_index(manifest: Manifest, shard: int, policy: ReadPolicy = DEFAULT_POLICY) -> ShardIndex:
    """The index of a manifest's shard; the last few hundred stay in the process's memory.

    Raises:
        UserError: There is none, or it was made of another tar.
    """
    name, digest = manifest.shard_names[shard], manifest.shard_digests[shard]
    return _cached_index(
        manifest.index_location or manifest.location, name, digest, manifest.shard_lengths[shard], policy
    )


@functools.lru_cache(maxsize=_CACHED_INDEXES)
def _cached_index(location: str, shard_name: str, digest: str, length: int, policy: ReadPolicy) -> ShardIndex:
    index, facts = read_index(Store(location), shard_name, policy)
    if facts.get("tar_sha256") != digest or len(index) != length:
        raise UserError(f"{Store(location).shown(index_name(shard_name))} was made of another tar: {WRITE_HINT} anew")
    return index


def load_manifest(location: str) -> Manifest:
    """Reads what a location holds and sees to it that each shard is there at its full size.

    On a web server, which lists nothing, this is seen to for 64 shards: the first, the last, and others evenly between.

    Args:
        location: A directory of shards (all of them, which must be of one split), or some of them:
            ``DIR/train-{000000..000012}.tar``, ``DIR/train-*.tar``, ``DIR/train-000003.tar``; locally, in an object
            store or on a web server.

    Raises:
        UserError: No such directory or shard, no manifest, a shard that is missing or cut, or (``ReadError``) a store
            that cannot be reached.
    """
    place, query = split_query(absolute(location))
    pattern = ""
    if place.endswith(".tar") and not Path(place).is_dir():
        place, _, pattern = place.rpartition("/")
    store = Store(place + query)
    sizes = None if store.is_web else file_sizes(store)
    if sizes is None and not store.is_web:
        raise UserError(f"no shards at '{location}': there is no directory {place}")
    info = read_info(store, sizes)
    manifest = _choose(store, info, pattern, location) if pattern else parse_manifest(store, info)
    named = sorted({split for name in manifest.shard_names if (split := named_split(name))})
    if len(named) > 1:
        raise UserError(
            f"'{location}' would mix the splits {' and '.join(named)}, as its shards are named: run "
            f"{command_line('pipelines.check_shards', store.shown(), '--write', '--split', named[0])}, and so on"
        )
    if manifest.index_location:
        shards = Store(manifest.location)
        sizes = None if shards.is_web else file_sizes(shards)
        if sizes is None and not shards.is_web:
            raise UserError(
                f"{store.shown(INFO)}: the shards should be in {shards.shown()}, and there is no such directory"
            )
    _check_sizes(manifest, _sizes_on_web(manifest) if sizes is None else sizes)
    return manifest


def _check_sizes(manifest: Manifest, sizes: Mapping[str, int | None]) -> None:
    for name, size in zip(manifest.shard_names, manifest.shard_bytes, strict=True):
        if sizes.get(name) != size:
            found = "it is missing" if sizes.get(name) is None else f"it has {sizes[name]}"
            shard = Store(manifest.location).shown(name)
            raise UserError(f"shard {shard} should have {size} bytes, {found}: copy or pack it again")


def _sizes_on_web(manifest: Manifest) -> dict[str, int | None]:
    """Sizes of shards on a web server: asked for some, taken for granted for the others."""
    store = Store(manifest.location)
    names = manifest.shard_names
    sizes: dict[str, int | None] = dict(zip(names, manifest.shard_bytes, strict=True))
    asked = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, _ASKED_ON_WEB).round().astype(int))]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        sizes.update(zip(asked, pool.map(store.size, asked), strict=True))
    if sizes[names[0]] == manifest.shard_bytes[0] > 1:
        store.read(names[0], manifest.shard_bytes[0] - 1, 1)  # says at once if the server knows no ranges
    return sizes


def file_sizes(store: Store) -> dict[str, int] | None:
    """Sizes of the files directly in a directory by name, in one listing; None where it does not exist.

    Raises:
        UserError: The object store cannot be reached, or it is a file, or on a web server, which lists nothing.
    """
    return store.sizes()


def read_info(store: Store, sizes: dict[str, int] | None) -> Any:
    """The content of a directory's ``_info.json``.

    Args:
        store: The directory.
        sizes: What it holds; None where that is not known.

    Raises:
        UserError: There is none, or it is no JSON.
    """
    if sizes is not None and INFO not in sizes:
        if STATE in sizes:
            raise UserError(f"packing into {store.location} was not finished: run pipelines.make_shards again")
        tars = sum(name.endswith(".tar") for name in sizes)
        hint = WRITE_HINT.replace("DIR", store.location) if tars else "pack images with pipelines.make_shards"
        raise UserError(f"{store.location} holds {tars} tars and no {INFO}: {hint}")
    try:
        data = store.read(INFO)
    except FileNotFoundError:
        raise UserError(
            f"there is no {store.shown(INFO)}: a directory of shards is served with all its files"
        ) from None
    try:
        return json.loads(data)
    except ValueError as error:
        raise UserError(f"{store.shown(INFO)} is no JSON ({error}): {WRITE_HINT} anew") from None


def known_splits(store: Store, info: Any) -> dict[str, dict[str, Any]]:
    """The splits that the content of an ``_info.json`` describes, ours or timm's, by name.

    Raises:
        UserError: It describes none.
    """
    splits = info.get("splits") if isinstance(info, dict) else None
    if not isinstance(splits, dict) or not splits or not all(isinstance(split, dict) for split in splits.values()):
        raise UserError(f"{store.shown(INFO)} lacks what the shards' bytes and digests are: {WRITE_HINT}")
    return {str(name): split for name, split in splits.items()}


def parse_manifest(store: Store, info: Any, split: str = "") -> Manifest:
    """The manifest that the content of an ``_info.json`` describes.

    Args:
        store: Where it lies.
        info: Its content.
        split: Which of its splits; may be empty where it describes one.

    Raises:
        UserError: It is not whole, lacks the split, or describes several and none is named.
    """
    splits = known_splits(store, info)
    if split and split not in splits:
        raise UserError(f"{store.shown(INFO)} describes no split '{split}': it has {', '.join(splits)}")
    if not split and len(splits) > 1:
        raise UserError(
            f"{store.shown(INFO)} describes the splits {', '.join(splits)}: say which by the names of its shards, "
            f"{_pattern(store, splits)}"
        )
    name = split or next(iter(splits))
    found = splits[name]
    try:
        location = str(found.get("location", ""))
        manifest = Manifest(
            location=location or store.location,
            split=name,
            shard_names=tuple(map(str, found["filenames"])),
            shard_lengths=tuple(map(int, found["shard_lengths"])),
            shard_bytes=tuple(map(int, found["shard_bytes"])),
            shard_digests=tuple(map(str, found["shard_sha256"])),
            classes=tuple(map(str, found["classes"])),
            mask_classes=int(found.get("mask_classes", 0)),
            index_location=store.location if location else "",
            no_labels=str(found.get("no_labels", "")),
        )
        columns = (manifest.shard_names, manifest.shard_lengths, manifest.shard_bytes, manifest.shard_digests)
        if len({len(column) for column in columns}) != 1 or not manifest.num_samples:
            raise KeyError("shards")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{store.shown(INFO)} lacks what the shards' bytes and digests are: {WRITE_HINT}") from None
    return manifest


def _pattern(store: Store, splits: Mapping[str, Mapping[str, Any]]) -> str:
    """An address that chooses one of several splits, as an example."""
    name = str(next((name for split in splits.values() for name in split.get("filenames", ())), "train-0.tar"))
    return store.shown(re.sub(r"[0-9].*", "*.tar", name))


def encode_info(manifest: Manifest, others: Mapping[str, Any] | None = None) -> str:
    """The content of ``_info.json``: timm's keys, and ours beside them; with other splits as they were."""
    split: dict[str, Any] = {
        "name": manifest.split,
        "num_samples": manifest.num_samples,
        "filenames": manifest.shard_names,
        "shard_lengths": manifest.shard_lengths,
        "shard_bytes": manifest.shard_bytes,
        "shard_sha256": manifest.shard_digests,
        "classes": manifest.classes,
    }
    if manifest.mask_classes:
        split["mask_classes"] = manifest.mask_classes
    if manifest.no_labels:
        split["no_labels"] = manifest.no_labels
    if manifest.index_location:
        split["location"] = manifest.location
    return json.dumps({"splits": {**(others or {}), manifest.split: split}}, indent=1) + "\n"


def need_labels(name: str, manifest: Manifest, purpose: str) -> None:
    """Sees that shards have labels.

    Args:
        name: The key that names them, for the message.
        manifest: The shards.
        purpose: What needs them, for the message.

    Raises:
        UserError: They have none.
    """
    if not manifest.labelled:
        reason = f" ({manifest.no_labels})" if manifest.no_labels else ""
        where = Store(manifest.location).shown()
        raise UserError(f"{name}: the shards in {where} have no labels{reason}, and {purpose} needs them")


def need_same_classes(name: str, manifest: Manifest, other_name: str, other: Manifest) -> None:
    """Sees that labels of the second shards mean in the first what they mean in the second.

    Raises:
        UserError: They do not: the first label whose classes differ is named.
    """
    if manifest.classes[: len(other.classes)] == other.classes:
        return
    alike = f"pack {other_name} with --classes {Store(manifest.location).shown()} to number it alike"
    lacking = sorted(set(other.classes) - set(manifest.classes))
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(
            f"{other_name} has the class {lacking[0]!r}{more}, which {name} lacks: leave it out, then {alike}"
        )
    pairs = itertools.zip_longest(manifest.classes, other.classes)
    label, (known, asked) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
    raise UserError(
        f"{name} and {other_name} do not number the same classes: label {label} is {known!r} in the one and {asked!r} "
        f"in the other; {alike}"
    )


def read_classes(text: str) -> tuple[str, ...]:
    """Class names in label order: of shards, or of a text file with one a line.

    Raises:
        UserError: There are none.
    """
    path = Path(text).expanduser()
    if "://" in text or path.is_dir() or (text.endswith(".tar") and not path.is_file()):
        manifest = load_manifest(text)
        need_labels("--classes", manifest, "a numbering")
        return manifest.classes
    try:
        lines = path.read_bytes().decode("utf-8", "backslashreplace").splitlines()
    except FileNotFoundError:
        raise UserError(f"--classes: there are no shards and no file of class names '{text}'") from None
    classes = tuple(line.strip() for line in lines if line.strip())
    if not classes or len(set(classes)) < len(classes):
        repeated = next((name for name in classes if classes.count(name) > 1), "")
        raise UserError(f"--classes: {text} " + (f"has {repeated!r} more than once" if repeated else "is empty"))
    return classes


def _choose(store: Store, info: Any, pattern: str, location: str) -> Manifest:
    """The part of a directory's one split that a pattern of names matches.

    Raises:
        UserError: It matches nothing, or shards of several splits.
    """
    try:
        patterns = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"'{location}': {error}") from None
    splits = known_splits(store, info)
    of_split = {str(name): split for split, found in splits.items() for name in found.get("filenames", ())}
    known = list(of_split)
    chosen: set[str] = set()
    for each in patterns:
        matched = {each} & of_split.keys() if not set(each) & set("*?[") else set(fnmatch.filter(known, each))
        if not matched:
            between = f"the {len(known)} shards, {known[0]} to {known[-1]}" if known else "the shards"
            raise UserError(f"'{location}': {each} is none of {between}")
        chosen |= matched
    matched_splits = sorted({of_split[name] for name in chosen})
    if len(matched_splits) > 1:
        raise UserError(
            f"'{location}' names shards of the splits {', '.join(matched_splits)}: one at a time, "
            f"{_pattern(store, splits)}"
        )
    manifest = parse_manifest(store, info, matched_splits[0])
    keep = [position for position, name in enumerate(manifest.shard_names) if name in chosen]

    def part(column: tuple) -> tuple:
        return tuple(column[position] for position in keep)

    return replace(
        manifest,
        shard_names=part(manifest.shard_names),
        shard_lengths=part(manifest.shard_lengths),
        shard_bytes=part(manifest.shard_bytes),
        shard_digests=part(manifest.shard_digests),
    )
