"""Processes that Ray kills for memory, on real ones: its threshold is put somewhat above what this machine uses."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from ray.core.generated import common_pb2
from ray.exceptions import ActorDiedError

from cluster.processes import wait_until
from pipelines.config import Config
from pipelines.training.lost import reason
from pipelines.training.memory import ran_out
from tests.pipelines.test_pretrain import ROOT, arguments, command, recipe, steps_done
from tests.pipelines.test_stop import QUIET, check_ids, checkpoints

__all__ = ["recipe"]  # a fixture

ROOM = 5 << 30  # bytes that the run has before anything is killed; it needs about 3 GiB
PIECE = 50 << 20


def fill_until_one_ends(root):
    """Takes memory until one of Ray's processes ends, at most what should be enough; gives it back at once."""
    running = {one for one in psutil.Process(root).children(recursive=True) if one.name().startswith("ray::")}
    held, began = [], time.monotonic()
    while all(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in running):
        assert time.monotonic() - began < 60, "nothing was killed"
        if len(held) * PIECE < 1.5 * ROOM:
            held.append(np.ones(PIECE, np.uint8))
        time.sleep(0.1)


def limited():
    """Variables with which Ray kills when this machine uses so much more than it does now."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + ROOM) / memory.total
    return {"RAY_memory_usage_threshold": f"{threshold:.4f}", "RAY_memory_monitor_refresh_ms": "100"}


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_run_survives_and_names_the_setting(recipe, shards, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    flags = arguments(recipe(200_000), shards, tmp_path, "run", *QUIET)
    with command(flags, log, **limited()) as process:
        wait_until(lambda: steps_done(folder) >= 60, 120, lambda: log.read_text()[-3000:])
        while "Ray killed ReadPlan" not in log.read_text():
            # What ends first may be an actor of Ray's that is begun again, or a process that has nothing more to do.
            fill_until_one_ends(process.pid)
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: "Ray killed ReadPlan" in log.read_text(), 10)
        before = steps_done(folder)
        wait_until(lambda: steps_done(folder) > before + 100, 120, lambda: log.read_text()[-3000:])
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM
    told = log.read_text()
    setting = "lower batch.micro_size (16), or raise data.cpus_per_task (0.66) so that fewer tasks read at once"
    # Workers may have been killed too.
    lines = re.findall(".*ran out of memory.*", told)
    assert lines
    assert [line for line in lines if not line.endswith(setting)] == []
    (saved, *_) = reversed(checkpoints(folder))
    check_ids(folder, saved, whole=False)


WORKER = """
import sys
import numpy as np
import ray
from pipelines.config import Config
from pipelines.ray_session import connect
from pipelines.training.lost import reason

@ray.remote(max_restarts=0)
class Worker:
    def work(self):
        held = []
        while len(held) < 300:
            held.append(np.ones(50 << 20, np.uint8))

with connect(num_cpus=1):
    try:
        ray.get(Worker.remote().work.remote())
    except Exception as error:
        print(reason(error, Config()))
"""


@pytest.mark.chaos
def test_of_a_worker_the_setting_is_named_too(short_folder):
    environment = {**os.environ, **limited(), "RAY_TMPDIR": short_folder}
    done = subprocess.run(
        [sys.executable, "-c", WORKER], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("its node ran out of memory: lower batch.micro_size ("), done.stdout + done.stderr


def test_the_memory_of_a_gpu_is_told_as_what_it_is():
    error = RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    assert reason(error, Config()) == "RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB."
    assert not ran_out(str(error))


@pytest.mark.parametrize("expected", ["unexpectedly", "expectedly"])
def test_a_lost_node_is_named_as_the_cause(expected):
    # In the words of Ray, in the error that Ray makes of them.
    words = f"the actor's node was terminated {expected}: health check failed due to missing too many heartbeats"
    cause = common_pb2.ActorDiedErrorContext(  # pyright: ignore[reportAttributeAccessIssue]
        actor_id=bytes(16),
        class_name="RayTrainWorker",
        node_ip_address="127.0.0.3",
        error_message=f"The actor died because its node has died. Node Id: 01ab\n\t{words}",
    )
    told = "its node 127.0.0.3 is lost: health check failed due to missing too many heartbeats"
    assert reason(ActorDiedError(cause), Config()) == told
    other = common_pb2.ActorDiedErrorContext(  # pyright: ignore[reportAttributeAccessIssue]
        actor_id=bytes(16), node_ip_address="127.0.0.3", error_message="Worker exits by SIGKILL"
    )
    assert "node" not in reason(ActorDiedError(other), Config())
