"""The plan through a real Ray Data: the same samples and pixels in the same order on any number of workers."""

import threading
from dataclasses import replace

import numpy as np
import psutil
import pytest

from pipelines.data.plan import FILLER, Cut, Plan
from pipelines.data.readers import Stream, View, read_images
from pipelines.data.shards import load_manifest
from pipelines.data.source import Segments, stream_batches

STEPS = 12


@pytest.fixture
def stream(shards):
    manifest = load_manifest(shards["train"])
    view = View((16, 16), 3, seed=0, crop_scale=(0.2, 1.0), flip=True)
    return Stream(manifest, Plan(manifest.num_samples, seed=0, end=STEPS * 50 - 20), Cut(50, 8, 1), view)


class Exchange:
    """Rank 0's value to all ranks, among threads."""

    def __init__(self, world_size):
        self._barrier = threading.Barrier(world_size, timeout=120)
        self._value = None

    def __call__(self, value):
        if value is not None:
            self._value = value
        self._barrier.wait()
        found = self._value
        self._barrier.wait()
        return found


def consume(stream, world_size, num_tasks=2, steps=(0, STEPS)):
    """What each of several workers receives, consumed side by side."""
    stream = replace(stream, cut=replace(stream.cut, world_size=world_size))
    exchange, received, most = Exchange(world_size), [[] for _ in range(world_size)], [0]

    def work(rank):
        segments = Segments(stream, rank=rank, num_cpus=0.5, broadcast=exchange)
        for batch in stream_batches(segments, steps, num_tasks=num_tasks):
            received[rank].append(batch)
            if rank == 0 and len(received[0]) % 20 == 0:
                most[0] = max(most[0], coordinators())
        exchange(None)
        segments.close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    return received, most[0]


def coordinators():
    return sum(p.info["name"].startswith("ray::SplitCoord") for p in psutil.process_iter(["name"]))


def by_step(received, cut):
    """Ids and pixels of each step, in the order of the batch, whoever received them."""
    batches = sorted((batch for part in received for batch in part), key=lambda batch: batch.index)
    steps = {}
    for batch in batches:
        real = batch.sample_B != FILLER
        ids, pixels = steps.setdefault(batch.index // cut.micros, ([], []))
        ids.extend(batch.sample_B[real].tolist())
        pixels.extend(batch.images_BHWC[real].copy())
    return steps


def test_every_step_is_the_same_on_any_number_of_workers(stream):
    reference = None
    for world_size in (1, 2, 3):
        received, most = consume(stream, world_size)
        cut = replace(stream.cut, world_size=world_size)
        steps = by_step(received, cut)
        for step, (ids, _) in steps.items():
            expected, _ = stream.plan.samples(step * 50, (step + 1) * 50)
            np.testing.assert_array_equal(ids, expected[expected != FILLER])
        assert len(steps[STEPS - 1][0]) == 30, "the last batch is filled up, not repeated"
        reference = reference or steps
        for step, (_, pixels) in steps.items():
            np.testing.assert_array_equal(pixels, reference[step][1])
        # Ray would keep one for each segment
        assert most <= 4


def test_starting_in_the_middle_gives_what_follows(stream):
    whole = by_step(consume(stream, 1, num_tasks=64)[0], stream.cut)
    late = by_step(consume(stream, 1, num_tasks=64, steps=(7, STEPS))[0], stream.cut)
    assert sorted(late) == list(range(7, STEPS))
    for step, (ids, pixels) in late.items():
        assert ids == whole[step][0]
        np.testing.assert_array_equal(pixels, whole[step][1])


def test_a_broken_image_weighs_nothing_and_is_named(stream):
    manifest = stream.manifest
    everything = Stream(manifest, Plan(manifest.num_samples, seed=0), Cut(300, 300, 1), stream.view)
    batch = read_images(everything, 0)
    assert batch.weight_B.sum() == 299
    assert batch.skipped == [{"shard": manifest.shard_names[0], "key": "class1_0001", "reason": "truncated"}]
    assert not batch.images_BHWC[batch.weight_B == 0].any()


def test_crops_follow_the_epoch_and_nothing_else(stream):
    cut = Cut(300, 300, 1)
    first, second = (read_images(replace(stream, plan=Plan(300, seed=0), cut=cut), i) for i in (0, 1))
    again = read_images(replace(stream, plan=Plan(300, seed=0), cut=cut), 0)
    np.testing.assert_array_equal(first.images_BHWC, again.images_BHWC)
    rows = {int(sample): row for row, sample in enumerate(second.sample_B)}
    same = [
        np.array_equal(first.images_BHWC[row], second.images_BHWC[rows[int(sample)]])
        for row, sample in enumerate(first.sample_B)
        if first.weight_B[row]
    ]
    assert sum(same) < 10


def test_what_is_not_the_plan_stops_the_run(stream, monkeypatch):
    def another(self, plan, index):
        step, sample, epoch = honest(self, plan, index)
        return step, sample[::-1].copy(), epoch

    honest = Cut.micro_batch
    segments = Segments(stream, rank=0, num_cpus=0.5, broadcast=lambda value: value)
    batches = stream_batches(segments, (0, 2), num_tasks=2)
    next(batches)
    monkeypatch.setattr(Cut, "micro_batch", another)
    with pytest.raises(RuntimeError, match="does not hold the samples that the plan says"):
        list(batches)
    segments.close()
