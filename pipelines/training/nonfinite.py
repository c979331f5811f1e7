"""Rows of steps whose loss or gradient was not finite: written down, and recognised where they come again."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.data.plan import Plan
from pipelines.data.shards import Manifest
from pipelines.training.runfolder import RunFolder

FILE = "nonfinite.jsonl"


def seen_before(folder: RunFolder, identity: str, row: Sequence[int], back_to: int) -> bool:
    """Whether the run went bad in this place already.

    A run is a pure function of its configuration: done again, the same steps go bad again, unless the machine was
    at fault. The place is the same where a step is, or where the run has come no further than to the same checkpoint.

    Args:
        folder: The run's small files.
        identity: Of the run's configuration; with another one it may fare better.
        row: The bad steps.
        back_to: Step of the newest checkpoint, 0 where there is none.
    """
    mine = [line for line in folder.read_lines(FILE) if line["identity"] == identity]
    return any(line["back_to"] == back_to or line["step"] in row for line in mine)


def write_down(
    folder: RunFolder, identity: str, row: Sequence[int], back_to: int, *, plan: Plan, size: int, manifest: Manifest
) -> None:
    """Adds a line for each bad step: the step, its samples in their order, and the shards that they lie in.

    Args:
        folder: The run's small files.
        identity: Of the run's configuration.
        row: The bad steps.
        back_to: Step of the newest checkpoint, 0 where there is none.
        plan: Who is seen when.
        size: Images a step.
        manifest: The images.
    """
    now = time.time()
    for step in row:
        samples, _ = plan.samples(step * size, (step + 1) * size)
        shards = np.unique(np.searchsorted(manifest.starts, samples, side="right") - 1)
        line: dict[str, Any] = {
            "step": step,
            "samples": samples.tolist(),
            "shards": [manifest.shard_names[shard] for shard in shards],
            "back_to": back_to,
            "identity": identity,
            "time": now,
        }
        folder.append_line(FILE, line)
