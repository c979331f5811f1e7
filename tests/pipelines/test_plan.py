"""The order of samples: every one exactly once an epoch, the same on any number of workers, from any position."""

import pickle
import tracemalloc

import numpy as np
import pytest

from pipelines.data.layout import BLOCK_BYTES, Layout, make_layout
from pipelines.data.plan import FILLER, GRAIN, Cut, Members, Plan
from pipelines.data.readers import Stream, View, locate
from pipelines.data.shards import Manifest


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


def batch_of(cut, plan, step):
    """The ids of a whole batch, in the plan's order."""
    shares = [cut.micro_batch(plan, step * cut.micros + k) for k in range(cut.micros)]
    assert all(s == step and len(sample) == cut.rows for s, sample, _ in shares)
    together = np.concatenate([sample for _, sample, _ in shares])
    return together[together != FILLER]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("global_size", "micro_size"), [(128, 64), (96, 7), (100, 1000)])
def test_global_batches_do_not_depend_on_the_workers(world_size, global_size, micro_size):
    plan = Plan(333, seed=0, end=1000)
    cut = Cut(global_size, micro_size, world_size)
    assert cut.rows <= micro_size
    for step in range(-(-1000 // global_size)):
        expected, _ = plan.samples(step * global_size, min((step + 1) * global_size, 1000))
        np.testing.assert_array_equal(batch_of(cut, plan, step), expected)


@pytest.mark.parametrize(("world_size", "groups"), [(1, 1), (3, 1), (4, 2), (8, 4)])
def test_every_micro_batch_is_due_once_on_one_worker(world_size, groups):
    cut = Cut(200, 16, world_size, groups=groups)
    due = {cut.index(5, turn, rank): rank for turn in range(cut.accumulation) for rank in range(world_size)}
    assert sorted(due) == list(range(5 * cut.micros, 6 * cut.micros))
    assert all(cut.rank(index) == rank for index, rank in due.items())
    # The workers of a group take one stretch of the batch, so that a node reads what lies together.
    group = [due[index] // cut.group_size for index in sorted(due)]
    assert group == sorted(group)


def test_the_last_batch_is_filled_up_and_nothing_follows():
    plan, cut = Plan(100, seed=0, end=250), Cut(64, 64, 1)
    counts = [int((cut.micro_batch(plan, i)[1] != FILLER).sum()) for i in range(5)]
    assert counts == [64, 64, 64, 58, 0]


def test_repeats_give_each_sample_so_many_views_an_epoch_each_in_another_batch():
    plan, cut = Plan(100, seed=0, end=9 * 100), Cut(32, 8, 2, repeats=3)
    views = []
    for step in range(-(-900 // 32)):
        ids = batch_of(cut, plan, step)
        epochs = np.concatenate([cut.micro_batch(plan, step * cut.micros + k)[2] for k in range(cut.micros)])
        batch = [(int(e), int(sample)) for e, sample in zip(epochs, ids, strict=False)]
        assert len(set(batch)) == len(batch), "two views of a sample in one batch"
        views += [(*which, cut.repeat(step * cut.micros)) for which in batch]
    assert len(views) == len(set(views)) == 900
    # The first two epochs are complete; the run ends within the views of the third.
    assert {view for view in views if view[0] < 2} == {
        (e, s, r) for e in range(2) for s in range(100) for r in range(3)
    }


@pytest.mark.parametrize(("world_size", "groups"), [(1, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize(("turns", "blocks"), [(1, 1), (3, 2), (4, 6)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_blocks_hold_every_micro_batch_once_for_the_worker_that_it_goes_to(world_size, groups, turns, blocks, repeats):
    cut = Cut(96, 10, world_size, repeats, groups)
    layout = Layout(cut, turns, blocks)
    found = []
    segments = list(layout.segments((5, 60), num_tasks=3))
    assert [step for first, stop in segments for step in range(first, stop)] == list(range(5, 60))
    assert len(segments) > 1
    assert all(stop % repeats == 0 for _, stop in segments[:-1]), "views of one batch in two executions: decoded twice"
    for steps in segments:
        for group in range(groups):
            numbers = [q for task in layout.tasks(steps) for q in task]
            assert numbers == list(range(layout.num_blocks(steps)))
            for q in numbers:
                views = layout.micro_batches(steps, group, q)
                indices = [index for same in views for index in same]
                assert {cut.rank(index) for index in indices} == {group * cut.group_size + q % cut.group_size}
                assert all(len({cut.positions(index) for index in same}) == 1 for same in views)
                found += indices
    assert sorted(found) == list(range(5 * cut.micros, 60 * cut.micros))


def test_small_images_share_blocks_and_large_ones_do_not():
    small = make_layout(Cut(128, 64, 2), encoded_bytes=1500, pixel_bytes=32 * 32 * 3)
    large = make_layout(Cut(4096, 64, 8), encoded_bytes=100_000, pixel_bytes=224 * 224 * 3)
    assert small.turns_per_block > 20
    assert large.turns_per_block * 64 * 224 * 224 * 3 <= BLOCK_BYTES
    # One task is a grain at least, and not much more than fits in memory.
    assert GRAIN <= large.blocks_per_task * large.turns_per_block * 64 <= 2048
    huge = make_layout(Cut(256, 256, 1), encoded_bytes=1e6, pixel_bytes=512 * 512 * 3)
    assert huge.turns_per_block == 1


def test_a_billion_samples_cost_no_more_than_a_thousand():
    tracemalloc.start()
    plan = Plan(10**9, seed=0)
    for position in (0, 123_456_789, 10**12):
        sample, _ = plan.samples(position, position + 4096)
        assert len(set(sample.tolist())) == 4096
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_a_billion_samples_in_100_000_shards():
    shards = 100_000
    tracemalloc.start()
    manifest = Manifest(
        location="s3://bucket/shards",
        split="train",
        shard_names=tuple(f"train-{i:06d}.tar" for i in range(shards)),
        shard_lengths=(10_000,) * shards,
        shard_bytes=(1_000_000_000,) * shards,
        shard_digests=tuple(f"{i:064x}" for i in range(shards)),
        classes=(),
    )
    assert len(manifest.digest) == 64
    manifest = pickle.loads(pickle.dumps(manifest))
    plan, cut = Plan(manifest.num_samples, seed=0), Cut(4096, 64, 64)
    for step in (0, 123_456, 10**9):
        stream = Stream(manifest, plan, cut, View((224, 224), 3))
        steps = (step, step + 16)
        for task in stream.layout.tasks(steps):
            for block in task:
                for (index,) in stream.layout.micro_batches(steps, 0, block):
                    sample = cut.micro_batch(plan, index)[1]
                    shard, place = locate(manifest, sample)
                    assert (shard * 10_000 + place == sample).all()
    assert tracemalloc.get_traced_memory()[1] < 2 << 30
    tracemalloc.stop()


def test_a_part_of_the_data_is_passed_through_like_a_whole():
    ids = np.flatnonzero(np.arange(1000) % 7 != 3)
    plan = Plan(len(ids), seed=5, members=Members(ids))
    for epoch in range(3):
        sample, epochs = plan.samples(epoch * len(ids), (epoch + 1) * len(ids))
        assert sorted(sample) == ids.tolist()
        assert set(epochs) == {epoch}
    in_order = Plan(len(ids), seed=0, end=len(ids), shuffle=False, members=Members(ids))
    cut = Cut(64, 64, 1)
    seen = np.concatenate([cut.micro_batch(in_order, index)[1] for index in range(-(-len(ids) // 64))])
    assert seen[seen >= 0].tolist() == ids.tolist()
    assert (seen < 0).sum() == -len(ids) % 64
