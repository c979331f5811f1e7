"""The recovery benchmark's counting, and what it says to wrong input."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.audit import delivery, points
from pipelines.data.plan import Plan

ROOT = Path(__file__).parents[2]
PLAN = Plan(100, seed=0)
SIZE, STEPS = 6, range(4)


def write_ids(folder, world_size, steps, change=lambda _, ids: ids, rows=2):
    """The ids of some steps as a run writes them down, in micro-batches dealt round robin."""
    (folder / "ids").mkdir(parents=True, exist_ok=True)
    micros, began = SIZE // rows, time.time()
    for step in steps:
        ids = change(step, PLAN.samples(step * SIZE, (step + 1) * SIZE)[0].tolist())
        for micro in range(micros):
            line = {"began": began, "step": step, "index": step * micros + micro}
            line["ids"] = ids[micro * rows : (micro + 1) * rows]
            path = folder / "ids" / f"rank-{micro % world_size:04d}-of-{world_size:04d}.jsonl"
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def counted(folder):
    found = delivery(folder, PLAN, SIZE, STEPS)
    return found.lost, found.repeated, found.order_equal, found.done_again


def test_delivery_counts_what_is_lost_repeated_and_out_of_order(tmp_path):
    write_ids(tmp_path / "good", 2, range(2))
    write_ids(tmp_path / "good", 2, range(1, 3))  # step 1 once more
    write_ids(tmp_path / "good", 1, range(2, 4), rows=3)  # step 2 once more, by one worker, in another cut
    assert counted(tmp_path / "good") == (0, 0, True, 2)

    swapped = lambda step, ids: [ids[1], ids[0], *ids[2:]] if step == 2 else ids  # noqa: E731
    write_ids(tmp_path / "order", 2, STEPS, swapped)
    assert counted(tmp_path / "order") == (0, 0, False, 0)

    write_ids(tmp_path / "lost", 2, STEPS, lambda step, ids: ids[:4] if step == 3 else ids)
    assert counted(tmp_path / "lost") == (2, 0, False, 0)

    write_ids(tmp_path / "repeated", 2, STEPS, lambda step, ids: [*ids[:5], ids[0]] if step == 0 else ids)
    assert counted(tmp_path / "repeated") == (1, 1, False, 0)

    # done a second time with other samples than the first
    write_ids(tmp_path / "changed", 2, STEPS)
    write_ids(tmp_path / "changed", 2, [1], lambda _, ids: ids[::-1])
    lost, repeated, order_equal, again = counted(tmp_path / "changed")
    assert (lost, order_equal, again) == (0, False, 1)
    assert repeated == SIZE

    # one attempt was given a micro-batch twice, by the same worker or by another
    for name, worker in (("twice", 1), ("twice-elsewhere", 0)):
        write_ids(tmp_path / name, 2, range(2))
        write_ids(tmp_path / name, 2, range(1, 4))
        lines = (tmp_path / name / "ids" / "rank-0001-of-0002.jsonl").read_text().splitlines(keepends=True)
        with (tmp_path / name / "ids" / f"rank-{worker:04d}-of-0002.jsonl").open("a") as file:
            file.write(lines[-1])
        assert counted(tmp_path / name) == (0, 2, False, 1)

    # a step that was broken off and never done again
    write_ids(tmp_path / "end", 2, range(3))
    assert counted(tmp_path / "end") == (SIZE, 0, False, 0)


def test_a_line_in_the_middle_of_being_written_is_left_out(tmp_path):
    whole = {"step": 1, "time": 2.0, "metrics": {"train/loss": 0.5, "train/grad_norm": 0.1}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(whole) + "\n" + json.dumps(whole | {"step": 2})[:-5])
    assert sorted(points(tmp_path)) == [1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--kills", "0"], "kills"), (["--kinds", "cat"], "cat"), (["--json", "no/where.json"], "no")],
)
def test_wrong_input_is_one_line(arguments, told):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.recovery", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
