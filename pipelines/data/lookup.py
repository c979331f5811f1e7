"""Chosen samples, by id or by key, read here and now. Knows no Ray."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.data.plan import Cut, Plan
from pipelines.data.readers import Stream, View, locate, parse_block, read_blocks
from pipelines.data.shards import Manifest, load_index
from pipelines.data.sources import valid_text
from pipelines.errors import UserError
from pipelines.reading import DEFAULT_POLICY, ReadPolicy

_COMPARED = 20_000  # keys that an unknown one is held against


@dataclass(frozen=True)
class Samples:
    """Some samples in the order that was asked for, without those that could not be read.

    Args:
        sample_B: int64 ids.
        images_BHWC: uint8, memory of its own.
        skipped: Those that could not be read: dictionaries of shard, key, reason.
    """

    sample_B: np.ndarray
    images_BHWC: np.ndarray
    skipped: list[dict[str, str]]


def find_keys(manifest: Manifest, keys: Sequence[str]) -> list[int]:
    """The ids of the samples with these keys; of several with one key, the first.

    Raises:
        UserError: There is no such key; the text lists similar ones.
    """
    keys = [valid_text(key) for key in keys]
    found: dict[str, int] = {}
    compared: list[str] = []
    wanted = set(keys)
    for shard, start in enumerate(manifest.starts[:-1].tolist()):
        there = load_index(manifest, shard).keys[:]
        if wanted & set(there):
            for place, key in enumerate(there):
                if key in wanted:
                    found.setdefault(key, start + place)
        if len(found) == len(wanted):
            break
        compared += there[: _COMPARED - len(compared)]
    for key in keys:
        if key not in found:
            near = difflib.get_close_matches(key, compared, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"they look like '{compared[0]}'"
            raise UserError(f"no sample has the key '{key}' among the {manifest.num_samples:,} of the shards: {hint}")
    return [found[key] for key in keys]


def key_of(manifest: Manifest, sample: int) -> str:
    """The key of a sample."""
    shard, place = locate(manifest, np.array([sample]))
    return load_index(manifest, int(shard[0])).keys[int(place[0])]


def read_samples(
    manifest: Manifest, ids: Sequence[int], view: View, *, rows: int = 64, policy: ReadPolicy = DEFAULT_POLICY
) -> Iterator[Samples]:
    """Reads samples in the order of their ids' list, ``rows`` at a time.

    Args:
        manifest: The shards.
        ids: Sample ids, in any order.
        view: Size and crop; the epoch is 0.
        rows: Samples that are held at once, beside what is read ahead.
        policy: How long a store may fail.
    """
    # Unshuffled, position p is sample p, and of a batch of one the number is the position.
    stream = Stream(manifest, Plan(manifest.num_samples, view.seed, shuffle=False), Cut(1, 1, 1), view, policy)
    height, width = view.image_size
    # Blocks share their pixels' memory: each image is copied before the next block is asked for.
    blocks = read_blocks(stream, [[[int(id_)]] for id_ in ids]) if len(ids) else iter(())
    for start in range(0, len(ids), rows):
        part = ids[start : start + rows]
        images_BHWC = np.empty((len(part), height, width, view.channels), np.uint8)
        good: list[int] = []
        skipped: list[dict[str, str]] = []
        for id_ in part:
            (micro,) = parse_block(next(blocks), stream)
            assert micro.sample_B.tolist() == [id_], f"asked for sample {id_}, got {micro.sample_B}"
            skipped += micro.skipped
            if micro.weight_B[0]:
                images_BHWC[len(good)] = micro.images_BHWC[0]
                good.append(id_)
        yield Samples(np.array(good, np.int64), images_BHWC[: len(good)], skipped)
