"""Samples that could not be read: counted by reason, listed once each; never a crash, never silent."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from pipelines.training.runfolder import RunFolder

FILE = "skipped.jsonl"


def over_ranks(value: float, device: torch.device, operation: Any = dist.ReduceOp.SUM) -> float:
    """A number of every rank, reduced; all ranks call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total, operation)
    return total.item()


class Unreadable:
    """What could not be read, over all ranks; rank 0 keeps the counts and writes ``skipped.jsonl``.

    Args:
        folder: The run's folder on rank 0, None elsewhere.
        device: Where collectives run.
    """

    def __init__(self, folder: RunFolder | None, device: torch.device):
        self._folder = folder
        self._device = device
        self._listed = {(line["shard"], line["key"]) for line in folder.read_lines(FILE)} if folder else set()
        self.counts: Counter[str] = Counter()
        """Times that training met one, by reason; on rank 0."""

    def collect(self, mine: list[dict[str, str]], step: int) -> Counter[str]:
        """Brings the ranks' samples together and lists those that are new; all ranks call it.

        Args:
            mine: This rank's: shard, key, reason.
            step: Steps done.

        Returns:
            On rank 0 how many there were, by reason.
        """
        if not over_ranks(float(len(mine)), self._device):
            return Counter()
        lists: list[Any] = [mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            lists = [None] * dist.get_world_size()
            dist.gather_object(mine, lists if dist.get_rank() == 0 else None, dst=0)
        if self._folder is None:
            return Counter()
        samples = [sample for part in lists for sample in part]
        for sample in samples:
            if (sample["shard"], sample["key"]) not in self._listed:
                self._listed.add((sample["shard"], sample["key"]))
                self._folder.append_line(FILE, {**sample, "step": step})
        return Counter(sample["reason"] for sample in samples)


def told(counts: Counter[str]) -> str:
    """``3 truncated, 1 empty``."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
