"""Shards on disk: the manifest of a directory, and the way to the index beside each shard.

A directory holds one split: plain WebDataset tars, an index beside each, and ``_info.json`` as timm reads it,
with the bytes and the SHA-256 of each shard and the class names as further keys.
"""

import fnmatch
import functools
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from pipelines.data.index import WRITE_HINT, ShardIndex, index_name, index_tar, read_index
from pipelines.errors import UserError
from pipelines.objects import split_query
from pipelines.reading import DEFAULT_POLICY, ReadPolicy
from pipelines.storage import Store, absolute

__all__ = ["Manifest", "ShardIndex", "index_tar", "load_index", "load_manifest"]

INFO = "_info.json"
# What make_shards leaves first of all, and check_shards and loading look for.
STATE = "packing.json"
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
    """

    location: str
    split: str
    shard_names: tuple[str, ...]
    shard_lengths: tuple[int, ...]
    shard_bytes: tuple[int, ...]
    shard_digests: tuple[str, ...]
    classes: tuple[str, ...]
    mask_classes: int = 0

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
    return _cached_index(manifest.location, name, digest, manifest.shard_lengths[shard], policy)


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
        location: A directory of shards (all of them), or some of them: ``DIR/train-{000000..000012}.tar``,
            ``DIR/train-*.tar``, ``DIR/train-000003.tar``; locally, in an object store or on a web server.

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
    manifest = parse_manifest(store, read_info(store, sizes))
    if pattern:
        manifest = _choose(manifest, pattern, location)
    _check_sizes(manifest, _sizes_on_web(store, manifest) if sizes is None else sizes)
    return manifest


def _check_sizes(manifest: Manifest, sizes: Mapping[str, int | None]) -> None:
    for name, size in zip(manifest.shard_names, manifest.shard_bytes, strict=True):
        if sizes.get(name) != size:
            found = "it is missing" if sizes.get(name) is None else f"it has {sizes[name]}"
            shard = Store(manifest.location).shown(name)
            raise UserError(f"shard {shard} should have {size} bytes, {found}: copy or pack it again")


def _sizes_on_web(store: Store, manifest: Manifest) -> dict[str, int | None]:
    """Sizes of shards on a web server: asked for some, taken for granted for the others."""
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


def parse_manifest(store: Store, info: Any) -> Manifest:
    """The manifest that the content of an ``_info.json`` describes.

    Raises:
        UserError: It is not whole, or describes more than one split.
    """
    try:
        splits = info["splits"]
        if len(splits) != 1:
            found = ", ".join(splits) or "none"
            raise UserError(f"{store.shown(INFO)} describes the splits {found}: one directory holds one split")
        ((name, split),) = splits.items()
        manifest = Manifest(
            location=store.location,
            split=str(name),
            shard_names=tuple(map(str, split["filenames"])),
            shard_lengths=tuple(map(int, split["shard_lengths"])),
            shard_bytes=tuple(map(int, split["shard_bytes"])),
            shard_digests=tuple(map(str, split["shard_sha256"])),
            classes=tuple(map(str, split["classes"])),
            mask_classes=int(split.get("mask_classes", 0)),
        )
        columns = (manifest.shard_names, manifest.shard_lengths, manifest.shard_bytes, manifest.shard_digests)
        if len({len(column) for column in columns}) != 1 or not manifest.num_samples:
            raise KeyError("shards")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{store.shown(INFO)} lacks what the shards' bytes and digests are: {WRITE_HINT}") from None
    return manifest


def encode_info(manifest: Manifest) -> str:
    """The content of ``_info.json``: timm's keys, and ours beside them."""
    split = {
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
    return json.dumps({"splits": {manifest.split: split}}, indent=1) + "\n"


def _choose(manifest: Manifest, pattern: str, location: str) -> Manifest:
    """The part of a manifest that a pattern of names matches."""
    try:
        patterns = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"'{location}': {error}") from None
    known = manifest.shard_names
    exact = set(known)
    chosen: set[str] = set()
    for each in patterns:
        matched = {each} & exact if not set(each) & set("*?[") else set(fnmatch.filter(known, each))
        if not matched:
            raise UserError(f"'{location}': {each} is none of the {len(known)} shards, {known[0]} to {known[-1]}")
        chosen |= matched
    keep = [position for position, name in enumerate(known) if name in chosen]

    def part(column: tuple) -> tuple:
        return tuple(column[position] for position in keep)

    return Manifest(
        location=manifest.location,
        split=manifest.split,
        shard_names=part(manifest.shard_names),
        shard_lengths=part(manifest.shard_lengths),
        shard_bytes=part(manifest.shard_bytes),
        shard_digests=part(manifest.shard_digests),
        classes=manifest.classes,
        mask_classes=manifest.mask_classes,
    )
