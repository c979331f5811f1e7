"""Checkpoints while training goes on: the state of their step, full disks, and stores that fail or are away."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.processes import wait_until
from mae_core.optim import make_optimizer, set_lr
from pipelines import storage
from pipelines.errors import UserError
from pipelines.reading import ReadPolicy
from pipelines.storage import Store
from pipelines.training import checkpoint, snapshot
from pipelines.training import writer as writing
from pipelines.training.writer import Writer
from tests.pipelines.test_checkpoint import save, small_model, trained
from tests.stores import Fault, FaultyProxy, moto_server, put, s3_environment

ROOT = Path(__file__).parents[2]


def step(model, optimizer) -> None:
    optimizer.zero_grad()
    model(torch.rand(4, 3, 16, 16), torch.rand(4, 16))["loss"].backward()
    optimizer.step()


def state_of(model, optimizer) -> dict[str, torch.Tensor]:
    """A copy of all that a checkpoint holds."""
    files = checkpoint.tensors_of(model, optimizer)
    return {f"{file}/{name}": t.clone() for file, tensors in files.items() for name, t in tensors.items()}


def saved(checkpoints: Store, at: int) -> dict[str, torch.Tensor]:
    """All that is in a checkpoint."""
    model = small_model(7)
    optimizer = make_optimizer(model)
    checkpoint.restore(checkpoints, at, model, optimizer)
    return state_of(model, optimizer)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class SlowStore(Store):
    """A disk on which nothing is written before its door opens."""

    door = threading.Event()

    def child(self, name: str) -> Store:
        return SlowStore(self.path(name))

    def write_content(self, *args, **options) -> None:
        assert self.door.wait(60)
        super().write_content(*args, **options)


def test_a_checkpoint_is_the_state_of_its_step_whatever_training_does_meanwhile(tmp_path, monkeypatch):
    copy = snapshot._copy

    def slow_copy(to: torch.Tensor, tensor: torch.Tensor) -> None:
        time.sleep(0.002)
        copy(to, tensor)

    monkeypatch.setattr(snapshot, "_copy", slow_copy)
    checkpoints = SlowStore(str(tmp_path))
    checkpoints.door.clear()
    model, optimizer = trained(2)
    set_lr(optimizer, 0.1)
    writer = Writer(checkpoints, keep=9)
    states = {2: state_of(model, optimizer)}
    writer.save(2, model, optimizer, {})
    step(model, optimizer)
    step(model, optimizer)
    assert writer.busy, "training waits for the disk"
    # The next one is due while the first is still being written.
    threading.Timer(0.5, checkpoints.door.set).start()
    states[4] = state_of(model, optimizer)
    writer.save(4, model, optimizer, {})
    for at in range(5, 15):
        step(model, optimizer)
        states[at] = state_of(model, optimizer)
        if at % 2:
            writer.save(at, model, optimizer, {})
    writer.wait()
    for at in (2, 4, 5, 7, 9, 11, 13):
        assert checkpoint.fault(checkpoints.child(checkpoint.folder_name(at))) is None
        assert same(saved(checkpoints, at), states[at]), at
    assert not same(states[2], states[4])


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of so many KiB at a folder."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "mae-test", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_the_run_in_time_and_leaves_the_older_checkpoint_whole(tmp_path):
    with small_disk(tmp_path / "disk", 512) as disk:
        checkpoints = Store(str(disk)).child("checkpoints")
        model, optimizer = trained(1)
        save(checkpoints, 1, model, optimizer)
        fill(disk)
        told = []
        writer = Writer(checkpoints, 2, say=told.append, patience_s=3.0)
        writer.save(2, model, optimizer, {})
        began = time.monotonic()
        step(model, optimizer)
        step(model, optimizer)
        with pytest.raises(UserError, match=r"step-00000002: No space left on device; mend the storage") as caught:
            writer.wait()
        assert "\n" not in str(caught.value)
        assert time.monotonic() - began > 2.0
        assert len(told) == 1
        assert "No space left on device; training goes on, and it is tried again for 3 s" in told[0]
        passed = []
        assert checkpoint.newest_whole(checkpoints, passed.append) == 1
        assert not list(disk.rglob("*.tmp"))


def fill(disk: Path) -> Path:
    """Writes until a disk is full."""
    path = disk / "somebody-elses"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 1024):
            pass
    return path


def test_a_disk_that_is_cleaned_in_time_costs_nothing(tmp_path):
    with small_disk(tmp_path / "disk", 512) as disk:
        checkpoints = Store(str(disk)).child("checkpoints")
        model, optimizer = trained(1)
        (disk / "checkpoints").mkdir()
        full = fill(disk)
        told = []
        writer = Writer(checkpoints, 2, say=told.append)
        before = state_of(model, optimizer)
        writer.save(1, model, optimizer, {})
        wait_until(lambda: bool(told), 30, lambda: "nothing was said")
        step(model, optimizer)
        full.unlink()
        writer.wait()
        assert "is written, at attempt" in told[-1]
        assert same(saved(checkpoints, 1), before)


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path):
    # Root writes anywhere, so the folder's place is taken by a file.
    (tmp_path / "file").write_text("not a folder")
    writer = Writer(Store(str(tmp_path / "file")), 2, patience_s=0.0)
    writer.save(1, *trained(1), {"step": 1})
    with pytest.raises(UserError, match=r"file/step-00000001: (Not a directory|File exists)"):
        writer.wait()


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with moto_server() as address:
        yield address


_numbers = itertools.count()


@pytest.fixture
def proxy(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with FaultyProxy(moto) as proxy:
        for name, value in s3_environment(proxy.address).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def remote(moto: str, proxy: FaultyProxy) -> Store:
    """Checkpoints in a bucket that no other test has, whose one of step 1 is whole."""
    bucket = f"checkpoints-{next(_numbers)}"
    put(moto, bucket)
    store = Store(f"s3://{bucket}/run/checkpoints")
    save(store, 1, *trained(1))
    return store


def test_a_store_that_errs_and_is_away_for_a_while_costs_nothing(proxy, remote, monkeypatch):
    monkeypatch.setattr(storage, "_SHORT", ReadPolicy(deadline_s=1.0))
    monkeypatch.setattr(writing, "_FIRST_PAUSE_S", 0.2)
    told: list[str] = []
    model, optimizer = trained(2)
    before = state_of(model, optimizer)
    writer = Writer(remote, 2, say=told.append)
    proxy.rules = lambda method, *_: Fault(status=500) if method == "PUT" else None
    writer.save(2, model, optimizer, {})
    wait_until(lambda: bool(told), 30, lambda: "nothing was said")
    step(model, optimizer)
    proxy.close_door()
    time.sleep(2.0)
    step(model, optimizer)
    assert writer.busy
    proxy.open_door()
    proxy.rules = lambda *_: None
    writer.wait()
    assert len(told) == 2
    assert "training goes on" in told[0]
    assert "step-00000002 is written, at attempt" in told[1]
    assert checkpoint.newest_whole(remote, told.append) == 2
    assert same(saved(remote, 2), before)


def test_a_store_that_stays_away_is_an_error_in_time(proxy, remote, monkeypatch):
    monkeypatch.setattr(storage, "_SHORT", ReadPolicy(deadline_s=1.0))
    told: list[str] = []
    writer = Writer(remote, 2, say=told.append, patience_s=3.0)
    proxy.close_door()
    writer.save(2, *trained(2), {})
    with pytest.raises(UserError, match=r"no checkpoint could be written for \d+ s: s3://.*/step-00000002: .*; mend"):
        writer.wait()
    proxy.open_door()
    assert checkpoint.newest_whole(remote, told.append) == 1


def test_what_else_fails_beside_a_checkpoint_is_a_warning(proxy, remote, monkeypatch):
    monkeypatch.setattr(storage, "_SHORT", ReadPolicy(deadline_s=1.0))
    told: list[str] = []

    def small_files() -> None:
        remote.child("small").write("run.json", "{}")

    # Lists (of what is old) fail, and so does what is sent along.
    def rules(method: str, path: str, *_: object) -> Fault | None:
        return Fault(status=503) if "list-type" in path and "step-00000002" not in path else None

    proxy.rules = rules
    writer = Writer(remote, 1, small_files, say=told.append)
    model, optimizer = trained(2)
    writer.save(2, model, optimizer, {})
    writer.wait()
    assert [line.partition(":")[0] for line in told] == ["warning"]
    assert "beside the checkpoint of step 2" in told[0]
    proxy.rules = lambda *_: None
    assert checkpoint.steps(remote) == [2, 1]
    writer.save(3, model, optimizer, {})
    writer.wait()
    assert checkpoint.steps(remote) == [3]


def test_one_part_of_a_large_file_is_sent_again_alone(proxy, remote):
    content = os.urandom(60 << 20)
    # Each part fails once: whoever begins all of it anew never ends.
    proxy.rules = lambda method, path, _, count: (
        Fault(status=503) if method == "PUT" and "partNumber" in path and not count else None
    )
    remote.write("large", content)
    assert remote.read("large") == content
    uploads = [each for each in proxy.requests if each.method == "POST" and each.path.endswith("large?uploads")]
    assert len(uploads) == 1


SAVE = """
import sys, time
from pipelines.storage import Store
from pipelines.training.writer import Writer
from tests.pipelines.test_checkpoint import trained

class Slow(Store):
    def child(self, name):
        return Slow(self.path(name))

    def write_content(self, name, content, **options):
        if self.is_local and name == "optimizer.safetensors":
            print("here", flush=True)
            time.sleep(600)
        super().write_content(name, content, **options)

writer = Writer(Slow(sys.argv[1]), 2)
writer.save(2, *trained(2), {})
writer.wait()
"""


@contextlib.contextmanager
def saving(checkpoints: Store) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes the checkpoint of step 2."""
    process = subprocess.Popen([sys.executable, "-c", SAVE, checkpoints.location], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def check_the_older_one_is_taken(checkpoints: Store) -> None:
    told: list[str] = []
    assert checkpoint.newest_whole(checkpoints, told.append) == 1
    expected = "checkpoint step-00000002 has no manifest.json: it was never finished; taking the next older one"
    assert told == [expected]
    # Whoever takes it up again leaves nothing of it.
    save(checkpoints, 2, *trained(2))
    assert checkpoint.newest_whole(checkpoints, told.append) == 2
    names = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert checkpoints.child("step-00000002").names() == names


def test_a_kill_between_two_files_of_an_upload(proxy, remote):
    proxy.rules = lambda method, path, *_: Fault(stall_s=600) if "optimizer" in path and method == "PUT" else None

    def at_the_second_file() -> bool:
        return any("optimizer" in each.path for each in proxy.requests[before:])

    before = len(proxy.requests)
    with saving(remote) as process:
        wait_until(at_the_second_file, 60, lambda: "the second file never came")
        process.send_signal(signal.SIGKILL)
        process.wait()
    proxy.rules = lambda *_: None
    assert remote.child("step-00000002").exists("model.safetensors")
    check_the_older_one_is_taken(remote)


def test_a_kill_between_two_files_on_a_disk(tmp_path):
    checkpoints = Store(str(tmp_path)).child("checkpoints")
    save(checkpoints, 1, *trained(1))
    with saving(checkpoints) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert checkpoints.child("step-00000002").names() == ["model.safetensors"]
    check_the_older_one_is_taken(checkpoints)
