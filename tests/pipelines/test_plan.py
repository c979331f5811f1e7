"""The order of samples: every one exactly once an epoch, the same on any number of workers, from any position."""

import time
import tracemalloc

import numpy as np
import pytest

from pipelines.data.plan import FILLER, GRAIN, Cut, Plan


@pytest.mark.parametrize("num_samples", [1, 7, 64, 65, 500, 1500, 4097])
def test_every_sample_once_an_epoch(num_samples):
    sample, epoch = Plan(num_samples, seed=3).samples(0, 3 * num_samples)
    for e in range(3):
        here = slice(e * num_samples, (e + 1) * num_samples)
        assert sorted(sample[here]) == list(range(num_samples))
        assert (epoch[here] == e).all()


def test_order_changes_with_epoch_and_seed_and_not_otherwise():
    first, second = np.split(Plan(1000, seed=1).samples(0, 2000)[0], 2)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, Plan(1000, seed=2).samples(0, 1000)[0])
    np.testing.assert_array_equal(first, Plan(1000, seed=1).samples(0, 1000)[0])


def test_order_is_the_one_that_runs_were_made_with():
    # Another order here would silently change every run that is continued.
    np.testing.assert_array_equal(Plan(1000, seed=0).samples(998, 1004)[0], [152, 719, 27, 23, 21, 7])


def test_any_position_gives_what_reading_from_the_start_gives():
    plan = Plan(700, seed=5)
    whole, _ = plan.samples(0, 5000)
    for start, stop in [(0, 1), (511, 513), (699, 701), (1234, 4321), (4999, 5000), (17, 17)]:
        np.testing.assert_array_equal(plan.samples(start, stop)[0], whole[start:stop])


def test_shuffle_leaves_no_trace_of_the_storage_order():
    sample, _ = Plan(50_000, seed=0).samples(0, 50_000)
    rank_correlation = np.corrcoef(np.arange(len(sample)), sample)[0, 1]
    assert abs(rank_correlation) < 0.1
    # A batch mixes what lies far apart: in storage order the mean distance of neighbours would be 1.
    assert np.abs(np.diff(sample)).mean() > 10_000


def test_neighbours_in_storage_are_read_together():
    sample, _ = Plan(100_000, seed=0).samples(0, GRAIN)
    runs = np.flatnonzero(np.diff(np.sort(sample)) > 1)
    assert len(runs) < 10, "a grain should be about eight reads"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("global_size", "micro_size"), [(128, 64), (96, 7), (100, 1000)])
def test_global_batches_do_not_depend_on_the_workers(world_size, global_size, micro_size):
    plan = Plan(333, seed=0, end=1000)
    cut = Cut(global_size, micro_size, world_size)
    assert cut.rows <= micro_size
    for step in range(1000 // global_size + 1):
        shares = [cut.micro_batch(plan, step * cut.micros + k) for k in range(cut.micros)]
        assert all(s == step and len(sample) == cut.rows for s, sample, _ in shares)
        together = np.concatenate([sample for _, sample, _ in shares])
        expected, _ = plan.samples(step * global_size, (step + 1) * global_size)
        np.testing.assert_array_equal(together[together != FILLER], expected[expected != FILLER])


def test_the_last_batch_is_filled_up_and_nothing_follows():
    plan, cut = Plan(100, seed=0, end=250), Cut(64, 64, 1)
    counts = [int((cut.micro_batch(plan, i)[1] != FILLER).sum()) for i in range(5)]
    assert counts == [64, 64, 64, 58, 0]


@pytest.mark.parametrize("world_size", [1, 3])
def test_tasks_and_segments_cover_every_micro_batch_once(world_size):
    cut = Cut(128, 48, world_size)
    segments = list(cut.segments(5, 300, num_tasks=4))
    steps = [step for start, stop in segments for step in range(start, stop)]
    assert steps == list(range(5, 300))
    assert len(segments) > 1
    indices = [i for segment in segments for task in cut.tasks(*segment) for i in task]
    assert indices == list(range(5 * cut.micros, 300 * cut.micros))


def test_segments_break_where_something_else_must_run():
    segments = list(Cut(128, 64, 2).segments(5, 100, num_tasks=8, break_every=30))
    assert [stop for _, stop in segments if stop % 30 == 0] == [30, 60, 90]
    assert [step for start, stop in segments for step in range(start, stop)] == list(range(5, 100))


def test_a_billion_samples_cost_no_more_than_a_thousand():
    tracemalloc.start()
    start = time.perf_counter()
    plan = Plan(10**9, seed=0)
    for position in (0, 123_456_789, 10**12):
        sample, _ = plan.samples(position, position + 4096)
        assert len(set(sample.tolist())) == 4096
    assert time.perf_counter() - start < 1
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
