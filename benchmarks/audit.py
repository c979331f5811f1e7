"""What a run's folder says of what was done: the numbers of every step, and the samples that it saw."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.plan import Plan

CONTINUED = "continuing from the checkpoint of step"  # what a run says each time that it is started again


@dataclass(frozen=True)
class Point:
    """One point of the record.

    Args:
        time: When it was written, in seconds since 1970.
        loss: Mean loss of the steps since the last point.
        grad_norm: Their mean gradient norm.
    """

    time: float
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Delivery:
    """The samples of all steps, held against the plan.

    Args:
        lost: Samples that a step should have seen and did not, over all steps.
        repeated: Samples that a step saw more often than it should have, or that one attempt was given again.
        order_equal: Whether every step saw the plan's samples in the plan's order, each time that it was done.
        done_again: Steps that were begun more than once, by the same number of workers or another.
    """

    lost: int
    repeated: int
    order_equal: bool
    done_again: int


def points(folder: Path) -> dict[int, Point]:
    """The points of a run by step; none where it has not begun."""
    path = folder / "metrics.jsonl"
    found = {}
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        # The last line may be in the middle of being written.
        value: dict[str, Any] = json.loads(line) if line.endswith("\n") else {}
        if "train/loss" in (metrics := value.get("metrics", {})):
            found[value["step"]] = Point(value["time"], metrics["train/loss"], metrics["train/grad_norm"])
    return found


def delivery(folder: Path, plan: Plan, global_size: int, steps: range) -> Delivery:
    """Holds the ids that a run wrote down (``log.ids``) against the plan.

    Args:
        folder: The run's folder.
        plan: What it should have seen.
        global_size: Samples a step.
        steps: The steps that are looked at.
    """
    # By step and number of workers: a step that was broken off is done again, perhaps by others, in another cut.
    seen: dict[int, dict[int, set[tuple[int, tuple[int, ...]]]]] = {}
    attempts: Counter[tuple[int, int, int]] = Counter()
    given: set[tuple[float, int]] = set()
    again_in_step: Counter[int] = Counter()
    for path in (folder / "ids").glob("*.jsonl"):
        world_size = int(path.stem.rsplit("-", 1)[1])
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                value = json.loads(line)
                if (micro_batch := (value["began"], value["index"])) in given:
                    again_in_step[value["step"]] += len(value["ids"])
                    continue
                given.add(micro_batch)
                attempts[world_size, value["step"], value["index"]] += 1
                # One that two attempts were given with the same samples is one; with others, both count, and the step
                # has too many.
                worlds = seen.setdefault(value["step"], {})
                worlds.setdefault(world_size, set()).add((value["index"], tuple(value["ids"])))
    lost = repeated = 0
    order_equal = True
    for step in steps:
        planned = plan.samples(step * global_size, (step + 1) * global_size)[0].tolist()
        records = [[sample for _, ids in sorted(micros) for sample in ids] for micros in seen.get(step, {}).values()]
        whole = [record for record in records if len(record) >= global_size]
        final = Counter(whole[0] if whole else max(records, key=len, default=[]))
        lost += (Counter(planned) - final).total()
        repeated += (final - Counter(planned)).total() + again_in_step[step]
        broken_off = [record for record in records if len(record) < global_size]
        order_equal &= bool(whole) and all(record == planned for record in whole) and not again_in_step[step]
        order_equal &= all(not Counter(record) - Counter(planned) for record in broken_off)
    again = {step for (_, step, _), times in attempts.items() if times > 1}
    again |= {step for step, worlds in seen.items() if len(worlds) > 1}
    return Delivery(lost, repeated, order_equal, len(again))
