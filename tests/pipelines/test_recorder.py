"""Telling of a run beside its steps, on a file that cannot be written."""

import contextlib
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.spool import SPOOL_FILE, Spool
from pipelines.training.recorder import Recorder


@contextlib.contextmanager
def no_file_may_grow_beyond(size: int) -> Iterator[None]:
    """As on a full disk, the write that crosses it is short and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / SPOOL_FILE).read_text().splitlines()]


def test_no_step_waits_for_what_hangs(tmp_path: Path):
    os.mkfifo(tmp_path / "hung")
    spool, recorder = Spool(tmp_path), Recorder(print)
    # Opening it waits for somebody who reads.
    recorder.do(lambda: (tmp_path / "hung").write_text("-"))
    # If these waited too, it would be for ever.
    for step in range(100):
        recorder.do(lambda step=step: spool.metrics(step, {"train/loss": 1.0}))
    assert steps(tmp_path) == []
    (tmp_path / "hung").read_text()
    recorder.flush()
    assert steps(tmp_path) == list(range(100))


def test_a_full_disk_costs_no_point(tmp_path: Path):
    spool, told = Spool(tmp_path), list[str]()
    recorder = Recorder(told.append)
    with no_file_may_grow_beyond(500):
        for step in range(100):
            recorder.do(lambda step=step: spool.metrics(step, {"train/loss": 1.0}))
        deadline = time.monotonic() + 60
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 0 < len(steps(tmp_path)) < 100
    recorder.flush()
    assert steps(tmp_path) == list(range(100))
    assert len(told) == 2
    assert "no record can be written" in told[0]


def test_what_does_not_pass_is_raised(tmp_path: Path):
    spool = Spool(tmp_path)
    recorder = Recorder(print, patience_s=0.1)
    with no_file_may_grow_beyond(0):
        recorder.do(lambda: spool.metrics(0, {"train/loss": 1.0}))
        with pytest.raises(OSError, match=r"No space left|File too large"):
            recorder.flush()
        with pytest.raises(OSError, match=r"No space left|File too large"):
            recorder.do(lambda: None)
