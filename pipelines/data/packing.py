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
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from pipelines.data.sources import Listing, Masks, Source, split_of, valid_text
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
        classes: Class names in the order of their labels; empty: the class folders, sorted.
        mask_255: What a mask's value 255 becomes; 255: a pixel that does not count.
        shares: How the source is divided into splits, of which these shards are one; empty: it is not.
    """

    split: str
    shard_bytes: int
    seed: int
    resize: int
    quality: int
    labels: bool
    classes: tuple[str, ...] = ()
    mask_255: int = 255
    shares: tuple[float, ...] = ()


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
        UserError: Images lie both beside the class folders and in them, the folders are no classes or not those asked
            for.
    """
    return _pack(listing, options, masks, _name(listing, options), np.arange(len(listing.paths)))


def plan_splits(
    listing: Listing, options: PackingOptions, splits: Sequence[str], masks: Masks | None = None
) -> list[Packing]:
    """As ``plan_packing``, for each of several splits, with ``options.shares`` of the images.

    An image belongs to a split by a hash of its key alone, whatever the seed and whatever lies beside it. All splits
    number the classes alike.

    Raises:
        UserError: As ``plan_packing``; or a split gets no image.
    """
    named = _name(listing, options)
    bounds = np.cumsum(options.shares)[:-1] / sum(options.shares)
    split_S = np.searchsorted(bounds, _hash(named.keys, b"split") / 2.0**64, side="right")
    packings = []
    for number, split in enumerate(splits):
        chosen = np.flatnonzero(split_S == number)
        if not len(chosen):
            raise UserError(
                f"--split: of {len(named.keys):,} images, none falls into '{split}': give it a larger share"
            )
        # Which classes there are depends on the other splits' images too.
        parts = replace(options, split=split, classes=named.classes)
        packings.append(_pack(listing, parts, masks, named, chosen))
    return packings


@dataclass(frozen=True)
class _Named:
    """The images of a listing below their common root: names, keys, classes, and labels, -1 where there is none."""

    names: list[str]
    keys: list[str]
    classes: tuple[str, ...]
    labels_S: np.ndarray


def _name(listing: Listing, options: PackingOptions) -> _Named:
    folders = {posixpath.dirname(path) for path in listing.paths}
    root = posixpath.commonpath(folders)
    if options.classes and folders == {root}:
        root = posixpath.dirname(root)  # one folder is one class, where it is known to be one
    names = [path[len(root) + 1 :] if root else path for path in listing.paths]
    # A digit's name says all by itself; its folder is only its label.
    keys = make_keys([posixpath.basename(name) for name in names] if listing.source.kind == "digits" else names)
    if not options.labels:
        return _Named(names, keys, (), np.full(len(names), -1, np.int64))
    return _Named(names, keys, *_label(names, options.classes, posixpath.join(listing.source.path, root)))


def _pack(
    listing: Listing, options: PackingOptions, masks: Masks | None, named: _Named, chosen_S: np.ndarray
) -> Packing:
    """Deals some of a listing's images, by their positions, to shards."""
    sizes_S = listing.sizes_S[chosen_S]
    order_S = np.argsort(_hash([named.keys[n] for n in chosen_S], options.seed.to_bytes(8, "little")), kind="stable")
    stored_S = sizes_S if not options.resize else np.minimum(sizes_S, options.resize**2 // 2)
    tar_S = member_bytes(stored_S) + (2 * HEADER_BYTES if named.classes else 0)
    if masks:
        tar_S += member_bytes(masks.sizes_S[chosen_S])
    total = int(tar_S.sum())
    num_shards = max(-(-total // options.shard_bytes), min(_MIN_SHARDS, total // _MIN_SHARD_BYTES), 1)
    before_S = np.cumsum(tar_S[order_S]) - tar_S[order_S]
    shard_S = before_S * num_shards // total

    shards = []
    for shard in range(num_shards):
        chosen = chosen_S[order_S[np.searchsorted(shard_S, shard) : np.searchsorted(shard_S, shard + 1)]]
        if not len(chosen):
            continue
        shards.append(
            ShardPlan(
                name=f"{options.split}-{len(shards):06d}.tar",
                keys=[named.keys[n] for n in chosen],
                paths=[listing.paths[n] for n in chosen],
                sizes_S=listing.sizes_S[chosen],
                wheres_S=listing.wheres_S[chosen],
                labels_S=named.labels_S[chosen],
                masks=[masks.paths[n] for n in chosen] if masks else [],
            )
        )
    digest = _digest([named.names[n] for n in chosen_S], sizes_S, options, masks.sizes_S[chosen_S] if masks else None)
    return Packing(listing.source, options, named.classes, shards, digest)


def _label(names: list[str], known: tuple[str, ...], source: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and labels: the first folder below the common root, where all images lie in one."""
    inside = [name for name in names if "/" in name]
    if not inside:
        if known:
            raise UserError(f"--classes: the images in '{source}' lie in no class folders")
        return (), np.full(len(names), -1, np.int64)
    if len(inside) < len(names):
        outside = next(name for name in names if "/" not in name)
        raise UserError(
            f"some images lie in class folders ('{inside[0]}') and some beside them ('{outside}'): "
            "move these, or pack without labels by --labels none"
        )
    folders = [name.split("/", 1)[0] for name in names]
    found = sorted(set(folders))
    if all(split_of(folder) for folder in found):
        raise UserError(
            f"the only folders in '{source}', {', '.join(found)}, are splits and no classes: pack each by itself "
            f"(--source {posixpath.join(source, found[0])} --split {found[0]}, of an archive when it is unpacked), or "
            "all as one without labels by --labels none"
        )
    classes = known or tuple(map(valid_text, found))
    label = {name: number for number, name in enumerate(classes)}
    unknown = [folder for folder in found if valid_text(folder) not in label]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"the folder '{unknown[0]}'{more} in '{source}' is none of the {len(classes)} of --classes")
    return classes, np.array([label[valid_text(folder)] for folder in folders], np.int64)


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


def _hash(keys: Sequence[str], salt: bytes) -> np.ndarray:
    """uint64 hashes of keys."""
    return np.array(
        [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, key=salt).digest(), "little") for key in keys],
        np.uint64,
    )


def member_bytes(size: Any) -> Any:
    """Bytes of a tar member: its header, and its content up to a whole block."""
    return HEADER_BYTES + -(-size // HEADER_BYTES) * HEADER_BYTES


def _digest(names: list[str], sizes_S: np.ndarray, options: PackingOptions, mask_sizes_S: np.ndarray | None) -> str:
    values = vars(replace(options, quality=options.quality if options.resize else 0))
    # Options that are younger than the first shards count where they are used.
    defaults = {field.name: field.default for field in fields(PackingOptions)}
    values = {name: value for name, value in values.items() if value != defaults[name]}
    digest = hashlib.sha256(json.dumps([_FORMAT, values], sort_keys=True).encode())
    for name, size in zip(names, sizes_S.tolist(), strict=True):
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    if mask_sizes_S is not None:
        digest.update(mask_sizes_S.tobytes())
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
