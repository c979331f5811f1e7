"""Processes that Ray kills for memory, on real ones: its threshold is put somewhat above what this machine uses."""

import re
import signal
import time

import numpy as np
import psutil
import pytest

from benchmarks.audit import CONTINUED
from cluster.processes import wait_until
from tests.pipelines.test_pretrain import arguments, command, recipe, steps_done
from tests.pipelines.test_stop import QUIET, check_ids, checkpoints

__all__ = ["recipe"]  # a fixture

ROOM = 5 << 30  # bytes that the run has before anything is killed; it needs about 3 GiB
PIECE = 50 << 20


def fill_until(killed, patience_s=120):
    """Takes memory until something is killed, at most what should be enough; gives it back at once."""
    held, began = [], time.monotonic()
    while not killed():
        assert time.monotonic() - began < patience_s, "nothing was killed"
        if len(held) * PIECE < 1.5 * ROOM:
            held.append(np.ones(PIECE, np.uint8))
        time.sleep(0.1)


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", ["worker", "reading task"])
def test_a_run_survives_and_names_the_setting(recipe, shards, tmp_path, victim):
    # Of a short run all images are soon read, and the workers are the youngest processes left.
    steps = 600 if victim == "worker" else 30000
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    flags = arguments(recipe(steps), shards, tmp_path, "run", *QUIET, "--scale.max-failures", "3")
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + ROOM) / memory.total
    settings = {"RAY_memory_usage_threshold": f"{threshold:.4f}", "RAY_memory_monitor_refresh_ms": "100"}
    with command(flags, log, **settings) as process:
        wait_until(lambda: steps_done(folder) >= 60, 120, lambda: log.read_text()[-3000:])
        running = {
            one for one in psutil.Process(process.pid).children(recursive=True) if one.name().startswith("ray::")
        }
        fill_until(lambda: any(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in running))
        before = steps_done(folder)
        wait_until(lambda: "ran out of memory" in log.read_text(), 30, lambda: log.read_text()[-3000:])
        wait_until(lambda: steps_done(folder) > before, 120, lambda: log.read_text()[-3000:])
        if victim == "reading task":
            process.send_signal(signal.SIGTERM)
        code = process.wait(240)
    told = log.read_text()
    print(told)
    (line,) = re.findall(".*ran out of memory.*", told)
    assert "lower batch.micro_size (16), or raise data.cpus_per_task" in line
    if victim == "worker":
        assert code == 0
        assert re.match(r"worker \d is lost: its node", line)
        assert CONTINUED in told
    else:
        assert code == 128 + signal.SIGTERM
        assert CONTINUED not in told, "a worker was killed too"
        steps = checkpoints(folder)[-1]
    check_ids(folder, steps, whole=victim == "worker")
