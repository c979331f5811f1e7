"""The plan through a real Ray Data: the same samples and pixels in the same order on any number of workers."""

import contextlib
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from ray._private.internal_api import node_stats

from cluster.processes import wait_until
from pipelines.data import feed as feed_module
from pipelines.data import readers
from pipelines.data.feed import Crew, Feed, join_crew
from pipelines.data.plan import FILLER, Cut, Members, Plan
from pipelines.data.readers import Stream, View, read_images
from pipelines.data.shards import load_index, load_manifest
from pipelines.errors import UserError
from pipelines.reading import ReadError, ReadPolicy
from tests.stores import Fault, FaultyProxy, range_server

STEPS = 12


def stream_of(shards):
    manifest = load_manifest(shards["train"])
    view = View((16, 16), 3, seed=0, crop_scale=(0.2, 1.0), flip=True)
    return Stream(manifest, Plan(manifest.num_samples, seed=0, end=STEPS * 50 - 20), Cut(50, 8, 1), view)


@pytest.fixture
def stream(shards):
    return stream_of(shards)


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


def consume(stream, world_size, num_tasks=2, steps=(0, STEPS), pause_s=0.0):
    """What each of several workers receives, consumed side by side; the most coordinators seen, and the feeds."""
    stream = replace(stream, cut=replace(stream.cut, world_size=world_size))
    exchange, received, most = Exchange(world_size), [[] for _ in range(world_size)], [0]
    feeds: list[Feed] = []

    def work(rank):
        crew = join_crew(rank, world_size, num_cpus=0.5, broadcast=exchange)
        feed = Feed(stream, steps, crew=crew, num_tasks=num_tasks)
        feeds.append(feed)
        for batch in feed:
            received[rank].append(batch)
            time.sleep(pause_s)
            if rank == 0 and len(received[0]) % 20 == 0:
                most[0] = max(most[0], coordinators())

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert not any(thread.is_alive() for thread in threads), "a feed hangs"
    return received, most[0], feeds


def coordinators():
    """The coordinators of this process's Ray."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += process.name().startswith("ray::SplitCoord")
    return found


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


@pytest.fixture(scope="module")
def whole(shards):
    """Ids and pixels of each step."""
    stream = stream_of(shards)
    return by_step(consume(stream, 1, num_tasks=64)[0], stream.cut)


# The larger ones take longer, for coordinators are processes, and tell less.
@pytest.mark.parametrize("world_size", [1, 2, 3, *(pytest.param(size, marks=pytest.mark.chaos) for size in (4, 8))])
def test_every_step_is_the_same_on_any_number_of_workers(stream, whole, monkeypatch, world_size):
    # Blocks and tasks as of large images, so that so few make several executions.
    monkeypatch.setattr("pipelines.data.layout.BLOCK_BYTES", 1)
    monkeypatch.setattr("pipelines.data.layout.TASK_BYTES", 1)
    monkeypatch.setattr("pipelines.data.layout.GRAIN", 64)
    received, most, feeds = consume(stream, world_size, num_tasks=4)
    cut = replace(stream.cut, world_size=world_size)
    steps = by_step(received, cut)
    for step, (ids, pixels) in steps.items():
        expected, _ = stream.plan.samples(step * 50, min((step + 1) * 50, stream.plan.end))
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(pixels, whole[step][1])
    assert sorted(steps) == list(range(STEPS))
    assert len(steps[STEPS - 1][0]) == 30, "the last batch is filled up, not repeated"
    assert len(feeds[0].segments) > 1
    # Ray would keep one for each segment.
    assert most <= 5


def test_from_any_step_follows_what_follows_without_a_stop(stream, whole):
    # The position is the step's number: no other state.
    crew = join_crew(0, 1, num_cpus=0.5)
    for start in (1, 6, STEPS - 1):
        feed = Feed(stream, (start, STEPS), crew=crew, num_tasks=64)
        late = by_step([list(feed)], stream.cut)
        assert sorted(late) == list(range(start, STEPS))
        for step, (ids, pixels) in late.items():
            assert ids == whole[step][0]
            np.testing.assert_array_equal(pixels, whole[step][1])


def many_epochs(stream):
    """A data set that is through in a moment, 240 epochs of it, many to an execution: its feed, and all is there."""
    stream = replace(
        stream, plan=Plan(300, seed=0), cut=Cut(300, 300, 1), view=replace(stream.view, image_size=(64, 64))
    )
    received, _, feeds = consume(stream, 1, num_tasks=4, steps=(0, 240), pause_s=0.05)
    assert [batch.index for batch in received[0]] == list(range(240))
    assert len(feeds[0].segments) > 2
    return feeds[0]


def test_executions_follow_one_another(stream):
    many_epochs(stream)


@pytest.mark.timing
def test_executions_follow_one_another_without_a_pause(stream):
    feed = many_epochs(stream)
    began = time.perf_counter()
    next(Feed(stream, (0, 1), crew=join_crew(0, 1, num_cpus=0.5), num_tasks=4))
    cold = time.perf_counter() - began
    print(f"a change waits {feed.change_wait_s / (len(feed.segments) - 1):.3f} s, a first execution {cold:.3f} s")
    # Made ready meanwhile; one after the other each would take as long as the first.
    assert feed.change_wait_s < 0.5 * cold * (len(feed.segments) - 1)


@pytest.mark.parametrize("told", [True, False])
def test_the_next_execution_waits_until_the_present_one_needs_no_more_cpus(stream, monkeypatch, told):
    monkeypatch.setattr("pipelines.data.layout.BLOCK_BYTES", 1)
    monkeypatch.setattr("pipelines.data.layout.TASK_BYTES", 1)
    monkeypatch.setattr("pipelines.data.layout.GRAIN", 64)
    if not told:
        # The last task does not say that it has begun.
        monkeypatch.setattr("pipelines.data.feed._Started", lambda *_: lambda: None)
    feed = Feed(stream, (0, STEPS), crew=join_crew(0, 1, num_cpus=0.5), num_tasks=8)
    assert len(feed.segments) > 1
    next(feed)
    # Most of the first segment is not yet taken, so its reader cannot have left.
    deadline = time.monotonic() + (60 if told else 5)
    while feed._queues[1].empty() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert feed._queues[1].empty() != told
    assert [batch.index for batch in feed] == list(range(1, STEPS * stream.cut.micros))


def test_views_of_a_sample_come_from_one_decoding_and_differ(stream, monkeypatch):
    cut = Cut(48, 8, 2, repeats=3)
    stream = replace(stream, plan=Plan(300, seed=0, end=3 * 300 - 10), cut=cut)
    received, _, _ = consume(stream, 2, num_tasks=4, steps=(1, -(-890 // 48)))
    batches = {batch.index: batch for part in received for batch in part}
    assert sorted(batches) == list(range(cut.micros, -(-890 // 48) * cut.micros))
    for index, batch in batches.items():
        alone = read_images(stream, index)
        assert batch.repeat == index // cut.micros % 3
        np.testing.assert_array_equal(batch.sample_B, alone.sample_B)
        np.testing.assert_array_equal(batch.weight_B, alone.weight_B)
        np.testing.assert_array_equal(batch.images_BHWC, alone.images_BHWC)
    first, second = batches[3 * cut.micros], batches[4 * cut.micros]
    np.testing.assert_array_equal(first.sample_B, second.sample_B)
    assert not np.array_equal(first.images_BHWC, second.images_BHWC)

    counted = []
    monkeypatch.setattr(readers, "decode", lambda data, channels: counted.append(1) or honest(data, channels))
    honest = __import__("mae_core.images", fromlist=["decode"]).decode
    list(readers.read_blocks(stream, [stream.layout.micro_batches((0, 3), 0, 0)]))
    block = stream.layout.micro_batches((0, 3), 0, 0)
    assert len(counted) == 8 * len(block), "decoded more than once"


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
    feed = Feed(stream, (0, 2), crew=join_crew(0, 1, num_cpus=0.5), num_tasks=2)
    next(feed)
    monkeypatch.setattr(Cut, "micro_batch", another)
    with pytest.raises(RuntimeError, match="does not hold the samples that the plan says"):
        for _ in Feed(stream, (0, 2), crew=feed.crew, num_tasks=2):
            pass
    feed.close()


@pytest.mark.parametrize(
    ("world_size", "wrong"),
    [(2, lambda opened: opened(0)[::-1]), (1, lambda opened: opened(1))],
    ids=["of another worker", "of later steps"],
)
def test_what_is_not_due_stops_the_run(stream, monkeypatch, world_size, wrong):
    def opened(stream, reference, steps, **rest):
        return wrong(lambda later: honest(stream, reference, (steps[0] + later, steps[1] + later), **rest))

    honest = feed_module.open_segment
    monkeypatch.setattr(feed_module, "open_segment", opened)
    stream = replace(stream, cut=replace(stream.cut, world_size=world_size))
    first = join_crew(0, world_size, num_cpus=0.5)
    feeds = [Feed(stream, (0, 2), crew=replace(first, rank=rank), num_tasks=64) for rank in range(world_size)]
    for rank, feed in enumerate(feeds):
        with pytest.raises(RuntimeError, match=f"arrived, which is not due on worker {rank}"):
            next(feed)
    for feed in feeds:
        feed.close()


def test_a_shard_that_cannot_be_read_stops_the_run_with_one_line(stream, tmp_path):
    manifest = replace(stream.manifest, location=str(tmp_path))
    feed = Feed(replace(stream, manifest=manifest), (0, 2), crew=join_crew(0, 1, num_cpus=0.5), num_tasks=2)
    with pytest.raises(UserError) as error:
        next(feed)
    assert manifest.shard_names[0] in str(error.value)
    assert "\n" not in str(error.value)
    feed.close()


@pytest.fixture
def served(stream, shards):
    """The stream from a web server, behind a proxy that can break its answers; parts of it far from each other."""
    with range_server(Path(shards["train"]).parent) as web, FaultyProxy(web) as proxy:
        manifest = load_manifest(f"{proxy.address}/{Path(shards['train']).name}")
        load_index(manifest, 0, ReadPolicy(deadline_s=2.0))
        members = Members(np.arange(0, manifest.num_samples, 20))
        plan = Plan(len(members.sample_N), seed=0, members=members)
        yield replace(stream, manifest=manifest, plan=plan, policy=ReadPolicy(deadline_s=2.0)), proxy


def test_images_are_the_same_through_faults_of_their_store(served, shards):
    stream, proxy = served
    blocks = [stream.layout.micro_batches((0, 2), 0, block) for block in range(2)]

    def pixels(stream):
        found = (batch for block in readers.read_blocks(stream, blocks) for batch in readers.parse_block(block, stream))
        return [(batch.sample_B.tolist(), batch.images_BHWC.tobytes()) for batch in found]

    whole = pixels(replace(stream, manifest=load_manifest(shards["train"])))
    faults = itertools.cycle([Fault(status=503), None, Fault(cut_after_bytes=100), None, None])
    proxy.rules = lambda method, path, *_: next(faults) if method == "GET" and path.endswith(".tar") else None
    asked = len(proxy.requests)
    assert pixels(replace(stream, policy=ReadPolicy(deadline_s=60.0))) == whole
    assert len(proxy.requests) - asked > 15, "some answers were broken, and asked for again"


@pytest.mark.timing
def test_a_task_ends_with_its_first_deadline(served):
    stream, proxy = served
    stream = replace(stream, policy=ReadPolicy(deadline_s=4.0))
    proxy.rules = lambda _method, path, *_: Fault(status=503) if path.endswith(".tar") else None
    began = time.monotonic()
    with pytest.raises(ReadError, match="503"):
        list(readers.read_blocks(stream, [stream.layout.micro_batches((0, 2), 0, 0)]))
    # Fifteen pieces, eight at once: the others do not wait for deadlines of their own.
    assert time.monotonic() - began < 1.75 * 4.0


def test_a_task_whose_store_stays_away_ends(served):
    stream, proxy = served
    proxy.rules = lambda _method, path, *_: Fault(status=503) if path.endswith(".tar") else None
    with pytest.raises(ReadError, match="503"):
        list(readers.read_blocks(stream, [stream.layout.micro_batches((0, 2), 0, 0)]))


def joined(world_size):
    """Workers of one crew, all in this process."""
    exchange = Exchange(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: join_crew(rank, world_size, num_cpus=0.5, broadcast=exchange),
                             range(world_size)))  # fmt: skip


def nothing_left(before):
    """Waits until no coordinator, no memory and no task of what was read is there, while the crew is."""
    wait_until(
        lambda: (
            coordinators() <= before[0]
            and stored_bytes() < before[1] + (4 << 20)
            and ray.available_resources().get("CPU") == 2
        ),
        30,
    )


# A single worker runs its executions itself; several have a coordinator for each.
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_feed_that_is_given_up_leaves_nothing(stream, world_size):
    before = coordinators(), stored_bytes()
    stream = replace(stream, cut=replace(stream.cut, world_size=world_size))
    crews = joined(world_size)
    feeds = [Feed(stream, (0, STEPS), crew=crew, num_tasks=1) for crew in crews]
    with ThreadPoolExecutor(world_size) as pool:
        list(pool.map(next, feeds))
    assert coordinators() > before[0] or world_size == 1
    for feed in feeds:
        feed.close()
    nothing_left(before)


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_has_been_read_leaves_neither_processes_nor_memory(stream, world_size):
    before = coordinators(), stored_bytes()
    # 3.7 MB a step
    cut, view = Cut(300, 150, world_size), replace(stream.view, image_size=(64, 64))
    stream = replace(stream, plan=Plan(300, seed=0), cut=cut, view=view)
    feeds = [Feed(stream, (0, 46), crew=crew, num_tasks=1) for crew in joined(world_size)]
    assert len(feeds[0].segments) == 3
    with ThreadPoolExecutor(world_size) as pool:
        read = list(pool.map(list, feeds))
    assert sorted(batch.index for part in read for batch in part) == list(range(92))
    del read
    nothing_left(before)


def stored_bytes():
    """What lies in the object store."""
    (node,) = ray.nodes()
    return node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats.object_store_bytes_used


def test_a_crew_without_nodes_of_its_own_is_one_group(ray_local):
    crew = join_crew(0, 1, num_cpus=0.5, per_node=True)
    assert isinstance(crew, Crew)
    assert crew.groups == 1
    ray.kill(crew.desk)
