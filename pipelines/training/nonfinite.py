"""Rows of steps whose loss or gradient was not finite: written down, and recognised where they come again."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.data.plan import Plan
from pipelines.data.shards import Manifest
from pipelines.spool import Spool
from pipelines.storage import Store
from pipelines.training import checkpoint
from pipelines.training.runfolder import RunFolder

FILE = "nonfinite.jsonl"


def note(
    row: Sequence[int],
    *,
    folder: RunFolder,
    spool: Spool,
    checkpoints: Store,
    mine: str,
    images: Manifest,
    global_size: int,
    plan: Plan,
) -> bool:
    """Writes down a row of bad steps, for the user and in the record; rank 0 calls it.

    ``nonfinite.jsonl`` gets a line a step: the step, its samples in their order, the shards that they lie in, the
    checkpoint that the run goes back to, the run's identity, and the time.

    Args:
        row: The bad steps.
        folder: The run's small files.
        spool: The run's record.
        checkpoints: The run's checkpoints, none of which is being written.
        mine: The identity of what goes bad: a run's, or a training of a transfer.
        images: Those that it learns from.
        global_size: Of them, in a step.
        plan: Who is seen when.

    Returns:
        Whether the run went bad in this place before.
    """
    back_to = max(checkpoint.steps(checkpoints), default=0)
    again = seen_before(folder, mine, row, back_to)
    now = time.time()
    for step in row:
        samples, _ = plan.samples(step * global_size, (step + 1) * global_size)
        shards = np.unique(np.searchsorted(images.starts, samples, side="right") - 1)
        line: dict[str, Any] = {
            "step": step,
            "samples": samples.tolist(),
            "shards": [images.shard_names[shard] for shard in shards],
            "back_to": back_to,
            "identity": mine,
            "time": now,
        }
        folder.append_line(FILE, line)
    spool.tags({"mae.nonfinite_steps": f"{row[0]} to {row[-1]}"})
    spool.artifact(FILE)
    folder.push()
    return again


def seen_before(folder: RunFolder, mine: str, row: Sequence[int], back_to: int) -> bool:
    """Whether the run went bad in this place already.

    A run is a pure function of its configuration: done again, the same steps go bad again, unless the machine was
    at fault. The place is the same where a step is, or where the run has come no further than to the same checkpoint.

    Args:
        folder: The run's small files.
        mine: The identity of the run's configuration; with another one it may fare better.
        row: The bad steps.
        back_to: Step of the newest checkpoint, 0 where there is none.
    """
    lines = [line for line in folder.read_lines(FILE) if line["identity"] == mine]
    return any(line["back_to"] == back_to or line["step"] in row for line in lines)
