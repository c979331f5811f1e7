"""From a listing of images to a plan of shards: keys, labels, and who goes where.

All of it is a pure function of the listing and the options, so that the same input gives the same bytes,
whatever the number of workers and however often packing was interrupted.
"""

import hashlib
import itertools
import json
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.data.sources import Listing, Masks, Source
from pipelines.errors import UserError

_FORMAT = 1  # counts up when the same input begins to give other bytes
HEADER_BYTES = 512
_LONGEST_KEY = 80  # of the 100 bytes that a plain tar header has for a name
_MIN_SHARDS = 8
_MIN_SHARD_BYTES = 1 << 20
# How many images of a streamed archive one task holds in memory until it can write them in order.
STREAM_BUDGET_BYTES = 1 << 30


@dataclass(frozen=True)
class PackingOptions:
    """What decides the bytes of the shards, beside the images.

    Attributes:
        split: Name of the split, and the beginning of each shard's name.
        shard_bytes: About how large a shard may grow.
        seed: Seed of the order.
        resize: Shorter side in pixels; 0 stores the files as they are.
        quality: JPEG quality of what is resized.
        labels: Whether class folders become labels.
    """

    split: str
    shard_bytes: int
    seed: int
    resize: int
    quality: int
    labels: bool


@dataclass(frozen=True)
class ShardPlan:
    """The images of one shard, in the order in which they are written.

    Attributes:
        name: ``train-000000.tar``.
        keys: Of each sample.
        paths: In the source.
        sizes_S: int64, bytes in the source.
        wheres_S: int64, as in the listing.
        labels_S: int64, -1 where there is none.
        masks: Path of each image's mask; empty where there are none.
    """

    name: str
    keys: list[str]
    paths: list[str]
    sizes_S: np.ndarray
    wheres_S: np.ndarray
    labels_S: np.ndarray
    masks: list[str]


@dataclass(frozen=True)
class Packing:
    """All shards of a listing.

    Attributes:
        source: Where the images are read from.
        options: How they are packed.
        classes: Class names in label order.
        shards: What goes where.
        digest: SHA-256 of names, sizes and options: whether two packings give the same bytes.
    """

    source: Source
    options: PackingOptions
    classes: tuple[str, ...]
    shards: list[ShardPlan]
    digest: str


def plan_packing(listing: Listing, options: PackingOptions, masks: Masks | None = None) -> Packing:
    """Decides keys, labels, and the shard and place of each image.

    Args:
        listing: The images.
        options: How they are packed.
        masks: Of the images, in the same order.

    Raises:
        UserError: Images lie both beside the class folders and in them.
    """
    root = posixpath.commonpath([posixpath.dirname(path) for path in listing.paths])
    names = [path[len(root) + 1 :] if root else path for path in listing.paths]
    classes, labels_S = _label(names) if options.labels else ((), np.full(len(names), -1, np.int64))
    # A digit's name says all by itself; its folder is only its label.
    keys = make_keys([posixpath.basename(name) for name in names] if listing.source.kind == "digits" else names)

    order_S = _scatter(keys, options.seed)
    stored_S = listing.sizes_S if not options.resize else np.minimum(listing.sizes_S, options.resize**2 // 2)
    tar_S = member_bytes(stored_S) + (2 * HEADER_BYTES if classes else 0)
    if masks:
        tar_S += member_bytes(masks.sizes_S)
    total = int(tar_S.sum())
    num_shards = max(-(-total // options.shard_bytes), min(_MIN_SHARDS, total // _MIN_SHARD_BYTES), 1)
    before_S = np.cumsum(tar_S[order_S]) - tar_S[order_S]
    shard_S = before_S * num_shards // total

    shards = []
    for shard in range(num_shards):
        chosen = order_S[np.searchsorted(shard_S, shard) : np.searchsorted(shard_S, shard + 1)]
        if not len(chosen):
            continue
        shards.append(
            ShardPlan(
                name=f"{options.split}-{len(shards):06d}.tar",
                keys=[keys[n] for n in chosen],
                paths=[listing.paths[n] for n in chosen],
                sizes_S=listing.sizes_S[chosen],
                wheres_S=listing.wheres_S[chosen],
                labels_S=labels_S[chosen],
                masks=[masks.paths[n] for n in chosen] if masks else [],
            )
        )
    return Packing(listing.source, options, classes, shards, _digest(listing, names, options, masks))


def _label(names: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and labels: the first folder below the common root, where all images lie in one."""
    inside = [name for name in names if "/" in name]
    if not inside:
        return (), np.full(len(names), -1, np.int64)
    if len(inside) < len(names):
        outside = next(name for name in names if "/" not in name)
        raise UserError(
            f"some images lie in class folders ('{inside[0]}') and some beside them ('{outside}'): "
            "move these, or pack without labels by --labels none"
        )
    folders = [name.split("/", 1)[0] for name in names]
    classes = tuple(sorted(set(folders)))
    label = {name: number for number, name in enumerate(classes)}
    return classes, np.array([label[folder] for folder in folders], np.int64)


def make_keys(names: Sequence[str]) -> list[str]:
    """Keys that every tar and webdataset's first-dot rule take: ASCII letters, digits, ``_`` and ``-``.

    A key that is long, or that several names would share, ends with a hash of its own name.
    """
    plain = [re.sub(r"[^A-Za-z0-9_-]", "_", posixpath.splitext(name)[0]) for name in names]
    shared = {key for key, count in Counter(plain).items() if count > 1}
    keys = []
    for name, key in zip(names, plain, strict=True):
        if key in shared or len(key) > _LONGEST_KEY:
            own = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
            key = f"{key[: _LONGEST_KEY - len(own) - 1]}-{own}"
        keys.append(key)
    assert len(set(keys)) == len(keys), "two names have one hash"
    return keys


def _scatter(keys: list[str], seed: int) -> np.ndarray:
    """The samples' positions ordered by a hash of seed and key."""
    salt = seed.to_bytes(8, "little", signed=True)
    hashes_S = np.array(
        [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, key=salt).digest(), "little") for key in keys],
        np.uint64,
    )
    return np.argsort(hashes_S, kind="stable")


def member_bytes(size: Any) -> Any:
    """Bytes of a tar member: its header, and its content up to a whole block."""
    return HEADER_BYTES + -(-size // HEADER_BYTES) * HEADER_BYTES


def _digest(listing: Listing, names: list[str], options: PackingOptions, masks: Masks | None) -> str:
    options = replace(options, quality=options.quality if options.resize else 0)
    digest = hashlib.sha256(json.dumps([_FORMAT, vars(options)], sort_keys=True).encode())
    for name, size in zip(names, listing.sizes_S.tolist(), strict=True):
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    if masks:
        digest.update(masks.sizes_S.tobytes())
    return digest.hexdigest()


def group_shards(
    shards: list[ShardPlan], source: Source, num_workers: int, budget_bytes: int = STREAM_BUDGET_BYTES
) -> list[list[ShardPlan]]:
    """The shards that one task writes: one each, or as many as its pass over a streamed archive can hold."""
    if not source.streamed:
        return [[shard] for shard in shards]
    total = sum(int(shard.sizes_S.sum()) for shard in shards)
    num_groups = min(len(shards), max(-(-total // budget_bytes), num_workers))
    cuts = np.linspace(0, len(shards), num_groups + 1).round().astype(int)
    return [shards[start:stop] for start, stop in itertools.pairwise(cuts)]
