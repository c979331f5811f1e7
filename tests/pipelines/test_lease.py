"""The lease of a folder: one holder at a time, on a disk and in an object store, whatever becomes of it."""

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cluster.processes import wait_until
from pipelines.errors import UserError
from pipelines.lease import FILE, LeaseLostError, Owner, Timing, hold
from pipelines.storage import Store
from pipelines.training import checkpoint
from pipelines.training.writer import Writer
from tests.pipelines.test_checkpoint import trained
from tests.stores import FaultyProxy, moto_server, put, s3_environment

ROOT = Path(__file__).parents[2]
# Seconds between beats, until one is stale, and to settle.
FAST, STEADY, PATIENT = (0.3, 3.0, 0.5), (0.8, 4.0, 0.5), (0.3, 120.0, 0.5)
HOLD = """
import sys
from pipelines.errors import run_command
from pipelines.lease import Timing, hold
from pipelines.storage import Store

def main():
    with hold(Store(sys.argv[1]), "run 'cells'", "run", timing=Timing(*map(float, sys.argv[2:]))):
        print("holds", flush=True)
        sys.stdin.read()

run_command(main)
"""


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with moto_server() as address:
        yield address


_numbers = itertools.count()


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path) -> Iterator[tuple[Store, FaultyProxy | None]]:
    """A run's folder that does not exist yet, and the proxy before it."""
    if request.param == "disk":
        yield Store(str(tmp_path)).child("run"), None
        return
    moto = request.getfixturevalue("moto")
    with FaultyProxy(moto) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(proxy.address).items():
            patch.setenv(name, value)
        bucket = f"leases-{next(_numbers)}"
        put(moto, bucket)
        yield Store(f"s3://{bucket}/run"), proxy


@pytest.fixture
def begin() -> Iterator:
    """Starts processes that hold a lease until their input ends."""
    with ExitStack() as stack:

        def start(store: Store, timing: tuple[float, ...]) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", HOLD, store.location, *map(str, timing)],
                cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield start


def holds(process: subprocess.Popen[str]) -> bool:
    """Whether a process has come to hold the lease; waits until it does, or has ended."""
    assert process.stdout is not None
    return any(line == "holds\n" for line in iter(process.stdout.readline, ""))


def test_of_two_at_once_one_is_refused(place, begin):
    store, _ = place
    both = [begin(store, FAST) for _ in range(2)]
    ended = threading.Event()
    found: list[subprocess.Popen[str]] = []

    def look(process: subprocess.Popen[str]) -> None:
        if holds(process):
            found.append(process)
        elif process.wait() == 2:
            ended.set()

    for process in both:
        threading.Thread(target=look, args=(process,), daemon=True).start()
    wait_until(lambda: len(found) == 1 and ended.is_set(), 60, lambda: f"{len(found)} hold it")
    (winner,), (loser,) = found, [process for process in both if process not in found]
    assert loser.stderr is not None
    told = loser.stderr.read()
    assert told.startswith(f"error: run 'cells' is being worked on by process {winner.pid} on ")
    assert told.count("\n") == 1
    # A clean end leaves nothing, and the next one waits for nobody.
    assert winner.communicate("")[1] == ""
    assert winner.returncode == 0
    assert not store.exists(FILE)
    assert holds(begin(store, PATIENT))


def test_of_many_at_the_same_moment_the_file_system_lets_one_begin(tmp_path):
    timing, num = Timing(0.1, 20.0, 0.1), 8
    for attempt in range(5):
        store, start = Store(str(tmp_path)).child(str(attempt)), threading.Barrier(num)
        refused = threading.Semaphore(0)
        held: list[str] = []

        def take(store=store, start=start, refused=refused, held=held) -> None:
            start.wait()
            try:
                with hold(store, "it", "run", lambda _: None, timing) as lease:
                    held.append(lease.owner.token)
                    for _ in range(num - 1):
                        refused.acquire(timeout=60)
            except UserError:
                refused.release()

        threads = [threading.Thread(target=take) for _ in range(num)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(held) == 1


def test_a_killed_holder_is_followed_at_once(place, begin):
    store, _ = place
    first = begin(store, FAST)
    assert holds(first)
    first.kill()
    second = begin(store, PATIENT)  # not reaped yet: that it has ended is known all the same
    assert second.stdout is not None
    assert second.stdout.readline() == "holds\n", "it watches whether the first one is alive"


def test_a_number_of_a_process_that_is_used_again_holds_nothing(tmp_path, begin):
    store = Store(str(tmp_path))
    first = begin(store, FAST)
    assert holds(first)
    first.kill()
    first.wait()
    left = json.loads(store.read(FILE))
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        store.write(FILE, json.dumps(left | {"pid": other.pid}))
        assert holds(begin(store, PATIENT))
    finally:
        other.communicate()


@pytest.mark.parametrize("alive", [True, False])
def test_one_of_another_machine_is_watched(place, alive):
    store, _ = place
    other = Owner("other", "elsewhere", "another boot", 1, 1, "2026-11-28 01:00:00 +0000")
    write = lambda beats: store.write(FILE, json.dumps(dataclasses.asdict(other) | {"beats": beats}))  # noqa: E731
    write(0)
    ended = threading.Event()

    def beat() -> None:
        for beats in itertools.count(1):
            if ended.wait(0.5):
                return
            write(beats)

    if alive:
        threading.Thread(target=beat, daemon=True).start()
    began = time.monotonic()
    try:
        if alive:
            with (
                pytest.raises(UserError, match=r"worked on by process 1 on elsewhere \(since 2026-11-28 01:00"),
                hold(store, "it", "run", timing=Timing(*PATIENT)),
            ):
                pass
        else:
            with hold(store, "it", "run", timing=Timing(*FAST)) as lease:
                assert time.monotonic() - began > FAST[1]
                lease.check()
    finally:
        ended.set()


def test_a_holder_that_stood_still_leaves_when_it_was_taken_over(place, begin):
    store, _ = place
    first = begin(store, STEADY)
    assert holds(first)
    # Behind a heartbeat, not in one, whose answer it would write over the next owner's later.
    before = store.read(FILE)
    wait_until(lambda: store.read(FILE) != before, 60, lambda: "no heartbeat")
    first.send_signal(signal.SIGSTOP)
    second = begin(store, STEADY)
    assert holds(second)
    first.send_signal(signal.SIGCONT)
    assert first.wait(120) == 2
    assert first.stderr is not None
    told = first.stderr.read()
    assert f"was taken over by process {second.pid} on " in told
    assert told.count("\n") == 1
    time.sleep(1.0)
    assert second.poll() is None
    assert json.loads(store.read(FILE))["pid"] == second.pid


class TakenOver(Store):
    """A folder of checkpoints whose run is taken over while the first file of step 3 is written."""

    def child(self, name: str) -> Store:
        return TakenOver(self.path(name))

    def write_content(self, name: str, *args: Any, **options: Any) -> None:
        super().write_content(name, *args, **options)
        if self.location.endswith("step-00000003"):
            take_over(Store(self.location.removesuffix("/checkpoints/step-00000003")))


def take_over(store: Store) -> None:
    store.write(FILE, store.read(FILE).replace(b'"token": "', b'"token": "x'))


def test_who_works_for_a_lost_lease_writes_no_checkpoint(place):
    store, _ = place
    lost = []
    with hold(store, "it", "run", lost.append, Timing(30.0, 60.0, 0.1)) as lease:
        model, optimizer = trained(1)
        before = store.read(FILE)
        writer = Writer(TakenOver(store.child("checkpoints").location), 2, guard=lease.check)
        writer.save(1, model, optimizer, {})
        writer.wait()
        writer.save(3, model, optimizer, {})
        with pytest.raises(LeaseLostError):
            writer.wait()
        assert not store.exists("checkpoints/step-00000003/manifest.json")
        store.child("checkpoints/step-00000003").delete()
        store.write(FILE, before)
        lease.check()
        take_over(store)
        writer.save(2, model, optimizer, {})
        with pytest.raises(LeaseLostError):
            writer.wait()
        assert checkpoint.steps(store.child("checkpoints")) == [1]
    # Nor does it take the other's away.
    assert json.loads(store.read(FILE))["token"] == "x" + lease.owner.token


@pytest.mark.chaos
def test_a_store_that_is_away_ends_no_holder(request, begin, tmp_path):
    moto = request.getfixturevalue("moto")
    put(moto, "away")
    with FaultyProxy(moto) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(proxy.address).items():
            patch.setenv(name, value)
        store = Store("s3://away/run")
        holder = begin(store, FAST)
        assert holds(holder)
        before = json.loads(store.read(FILE))
        proxy.close_door()
        time.sleep(15.0)  # longer than a heartbeat is tried
        assert holder.poll() is None
        proxy.open_door()
        wait_until(lambda: json.loads(store.read(FILE))["beats"] > before["beats"] + 2, 60, lambda: "no heartbeat")
        assert holder.communicate("")[1] == ""
        assert holder.returncode == 0
        assert not store.exists(FILE)
