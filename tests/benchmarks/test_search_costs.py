"""What the search's benchmark makes of a search's files."""

import json

import pytest

from benchmarks.search import costs


def test_what_a_trial_costs_beyond_its_steps(tmp_path):
    folder = tmp_path / "found"
    (folder / "trials" / "a").mkdir(parents=True)
    told = {"trial": "a", "values": {"model.mask_ratio": 0.5}, "seed": 0, "seconds": 1.0, "flops": 1.0}
    lines = [
        {**told, "state": "running", "time": 100.0},
        {**told, "state": "running", "step": 50, "score": 40.0, "time": 120.0},
        {**told, "state": "finished", "step": 100, "score": 41.0, "time": 134.0},
    ]
    (folder / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # 50 steps of 128 images at 640 a second: 10 s, of which 2 were waiting; then 50 at twice the rate.
    windows = [(50, 640.0, 0.04), (100, 1280.0, 0.0)]
    spool = [
        {"step": step, "metrics": {"perf/images_per_s": rate, "data/wait_s": wait}, "time": 0}
        for step, rate, wait in windows
    ]
    spool.insert(1, {"step": 50, "metrics": {"probe/linear_top1": 40.0}, "time": 0})
    (folder / "trials" / "a" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in spool))
    (cost,) = costs(folder, 128)
    assert cost.training_s == pytest.approx(13.0)
    assert cost.whole_s == pytest.approx(34.0)
    assert cost.overhead_s == pytest.approx(21.0)
    assert cost.reports == 2
