"""Samples that could not be read: counted by reason, listed once each; never a crash, never silent, never the most."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from pipelines.errors import UserError
from pipelines.training.runfolder import RunFolder

FILE = "skipped.jsonl"
IN_A_ROW = 100  # so many unreadable images, one after the other, are a broken disk or the wrong files


class UnreadableError(UserError):
    """More images cannot be read than a run goes on with; all ranks raise it together."""


def over_ranks(value: float, device: torch.device, operation: Any = dist.ReduceOp.SUM) -> float:
    """A number of every rank, reduced; all ranks call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total, operation)
    return total.item()


def gathered(mine: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """The unreadable samples of all ranks, on all ranks; all call it. Where there are none it takes one number."""
    if not over_ranks(float(len(mine)), device):
        return []
    lists: list[Any] = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        lists = [None] * dist.get_world_size()
        dist.all_gather_object(lists, mine)
    return [sample for part in lists for sample in part]


def allowed(share: float, read: int, num_samples: int) -> float:
    """How many images may be unreadable among those that have been read.

    The share is that of the epochs that have been begun, since the broken images of an epoch may come first: one of
    the first 20 is not 5 % of the data. In a long epoch it is ``IN_A_ROW`` more than the share of what has been read.

    Args:
        share: ``data.max_unreadable``.
        read: Images read so far, those of earlier epochs and unreadable ones included.
        num_samples: Images of an epoch.
    """
    epochs = -(-read // num_samples)
    return min(share * num_samples * epochs, share * read + IN_A_ROW)


def check_readable(
    counts: Counter[str], read: int, num_samples: int, share: float, where: str, *, row: int = 0, listed: str = ""
) -> None:
    """Ends what cannot be trained or scored on. A pure function, so that all ranks who know the same do the same.

    Args:
        counts: Unreadable images among those read, by reason.
        read: Images read so far.
        num_samples: Images of an epoch.
        share: ``data.max_unreadable``; with 1 nothing ends it but that none can be read.
        where: Where the images lie.
        row: The longest row of them, in the order of reading.
        listed: The file that lists them; empty: none.

    Raises:
        UnreadableError: More cannot be read than may be.
    """
    bad = counts.total()
    if not bad:
        return
    if bad >= read:
        found, limit = f"none of the {read:,} images read so far of {where} can be read", ""
    elif share < 1 and row >= IN_A_ROW:
        found, limit = f"{row:,} images in a row of {where} cannot be read", ""
    elif bad > allowed(share, read, num_samples):
        found = f"{bad:,} of the {read:,} images read so far of {where} cannot be read"
        limit = f", and data.max_unreadable allows {100 * share:g} %"
    else:
        return
    seen = f", listed in {listed}" if listed else ""
    way_on = ", or raise --data.max-unreadable" if bad < read else ""
    raise UnreadableError(f"{found} ({told(counts)}{seen}){limit}: mend these files, or pack without them{way_on}")


class Unreadable:
    """What could not be read, over all ranks; rank 0 writes ``skipped.jsonl``.

    Args:
        folder: The run's folder on rank 0, None elsewhere.
        device: Where collectives run.
    """

    def __init__(self, folder: RunFolder | None, device: torch.device):
        self._folder = folder
        self._device = device
        self._listed = {(line["shard"], line["key"]) for line in folder.read_lines(FILE)} if folder else set()
        self._row = _Row()
        self.counts: Counter[str] = Counter()
        """Times that training met one, by reason; the same on all ranks."""

    def collect(self, mine: list[dict[str, Any]], step: int) -> Counter[str]:
        """Brings the ranks' samples together and lists those that are new; all ranks call it.

        Args:
            mine: This rank's: shard, key, reason; those of training also their position in the plan.
            step: Steps done.

        Returns:
            How many there were, by reason.
        """
        samples = gathered(mine, self._device)
        self._row.add(sample["position"] for sample in samples if "position" in sample)
        for sample in samples if self._folder else ():
            if (sample["shard"], sample["key"]) not in self._listed:
                self._listed.add((sample["shard"], sample["key"]))
                line = {name: sample[name] for name in ("shard", "key", "reason")}
                self._folder.append_line(FILE, {**line, "step": step})  # type: ignore[union-attr]
        return Counter(sample["reason"] for sample in samples)

    def check(self, read: int, num_samples: int, share: float, where: str, listed: str) -> None:
        """As ``check_readable``, of what training has met; all ranks call it and do the same."""
        check_readable(self.counts, read, num_samples, share, where, row=self._row.longest, listed=listed)


class _Row:
    """The longest row of positions without a gap, of positions that come a window at a time."""

    def __init__(self) -> None:
        self._last, self._length = -1, 0
        self.longest = 0

    def add(self, positions: Iterable[int]) -> None:
        """Takes in a window's, in any order; all of an earlier window's are smaller."""
        for position in sorted(positions):
            self._length = self._length + 1 if position == self._last + 1 else 1
            self._last = position
            self.longest = max(self.longest, self._length)


def told(counts: Counter[str]) -> str:
    """``3 truncated, 1 empty``."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
