"""Runs that are stopped, hang, or whose node will be taken away."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.audit import CONTINUED
from cluster import members, operations
from cluster.processes import wait_until
from pipelines.data.plan import Plan
from tests.jobs import submit
from tests.pipelines.test_elastic import started, wait_for
from tests.pipelines.test_pretrain import arguments, command, delivered, losses, points, recipe, steps_done

__all__ = ["recipe"]  # a fixture

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
QUIET = ("--log.pictures", "0")


def status(folder: Path) -> str:
    from mlflow.tracking import MlflowClient

    record = json.loads((folder / "run.json").read_text())
    return MlflowClient(tracking_uri=record["tracking_uri"]).get_run(record["mlflow_run_id"]).info.status


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.parent.name.split("-")[1]) for path in (folder / "checkpoints").glob("*/manifest.json"))


def check_ids(folder: Path, steps: int, *, whole: bool = True) -> None:
    found, plan = delivered(folder), Plan(300, seed=0)
    if whole:
        assert sorted(found) == list(range(steps))
    for step in range(steps):
        assert found[step] == plan.samples(step * 40, (step + 1) * 40)[0].tolist()


def workers_of(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_keeps_its_steps(recipe, shards, tmp_path, number):
    steps, folder, log = 4000, tmp_path / "run", tmp_path / "log.txt"
    flags = arguments(recipe(steps), shards, tmp_path, "run", *QUIET, "--checkpoint.every-steps", "0")
    with command(flags, log) as process:
        wait_until(lambda: steps_done(folder) >= 20, 120, lambda: log.read_text()[-3000:])
        process.send_signal(number)
        assert process.wait(90) == 128 + number, log.read_text()[-3000:]
        # Nothing of it is left behind: `command` waits for that.
    assert status(folder) == "KILLED"
    (saved,) = checkpoints(folder)
    assert saved == steps_done(folder), "there are steps after the checkpoint"
    told = log.read_text()
    assert f"stopped after step {saved}; the same command continues it" in told
    assert "Traceback" not in told
    before = delivered(folder)
    # The workers had gone on to read, but no step was begun that the checkpoint does not have.
    with command([*flags, "--train.steps", str(saved + 10), "--run.allow-change"], log) as process:
        assert process.wait(240) == 0, log.read_text()[-3000:]
    assert f"{CONTINUED} {saved} of" in log.read_text()
    assert status(folder) == "FINISHED"
    check_ids(folder, saved + 10)
    assert before.keys() <= delivered(folder).keys()


def test_a_stopped_job_has_begun_its_checkpoint(cluster, recipe, shards, tmp_path):
    """What fits into the 3 s that Ray gives a job: the checkpoint of a small model, and the status."""
    steps, folder = 4000, tmp_path / "job"
    flags = arguments(recipe(steps), shards, tmp_path, "job", *QUIET, "--checkpoint.every-steps", "0")
    done = submit(cluster, ["pipelines/pretrain.py", *flags], options=("--no-wait", "--submission-id", "stopped"))
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until(lambda: steps_done(folder) >= 20, 240)
    stop = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", "stopped"]
    stopped = subprocess.run(stop, env=cluster, capture_output=True, text=True, timeout=120)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    wait_until(lambda: bool(checkpoints(folder)), 30)
    assert checkpoints(folder) == [steps_done(folder)]
    wait_until(lambda: status(folder) == "KILLED", 60)


def test_a_worker_that_hangs_is_replaced_within_a_minute(recipe, shards, tmp_path):
    steps, folder, log = 400, tmp_path / "run", tmp_path / "log.txt"
    flags = arguments(recipe(steps), shards, tmp_path, "run", *QUIET)
    with command(flags, log) as process:
        wait_until(lambda: steps_done(folder) >= 30, 120, lambda: log.read_text()[-3000:])
        (_, hung) = workers_of(process.pid)
        hung.suspend()
        began = time.monotonic()
        wait_until(lambda: "it no longer answers" in log.read_text(), 60, lambda: log.read_text()[-3000:])
        print(f"found after {time.monotonic() - began:.1f} s")
        wait_until(lambda: not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE, 60)
        print(f"gone after {time.monotonic() - began:.1f} s")
        before = steps_done(folder)
        wait_until(lambda: steps_done(folder) > before, 60, lambda: log.read_text()[-3000:])
        print(f"next new step after {time.monotonic() - began:.1f} s")
        assert process.wait(240) == 0, log.read_text()[-3000:]
    assert log.read_text().count(CONTINUED) == 1
    check_ids(folder, steps)


def test_a_run_leaves_a_node_that_will_be_taken_away(recipe, shards, tmp_path):
    steps, folder, log = 6000, tmp_path / "run", tmp_path / "log.txt"
    with operations.cluster(tmp_path / "cluster", nodes=3, cpus=1) as nodes:
        flags = ["--scale.address", nodes.head, "--data.cpus-per-task", "0.2", "--scale.cpus-per-worker", "0.6"]
        flags += [*QUIET, "--checkpoint.every-steps", "0", "--checkpoint.every-minutes", "60"]
        line = arguments(recipe(steps), shards, tmp_path, "run", *flags)
        with started(line, log, nodes.environment()) as process:
            wait_for(lambda: steps_done(folder) >= 30, process, log)
            leaving = next(node for node in nodes.nodes if members.training(nodes, node.name))
            began, deadline_s = time.monotonic(), 60
            members.drain(nodes, leaving, deadline_s, "a test")
            wait_for(lambda: CONTINUED in log.read_text(), process, log, deadline_s)
            print(f"going on after {time.monotonic() - began:.1f} s of {deadline_s}")
            (saved,) = checkpoints(folder)
            assert f"step {saved} of {steps}: node " in log.read_text()
            assert f"{CONTINUED} {saved} of" in log.read_text()
            assert not members.training(nodes, leaving.name)
            if members.runs(nodes, leaving.name):
                operations.kill(nodes, leaving.name)
            before = max(saved, steps_done(folder))
            wait_for(lambda: steps_done(folder) >= before + 20, process, log)
    done = max(points(folder))
    assert done < steps
    # From that very step: what came before the checkpoint was not done again.
    lines = [line for path in (folder / "ids").glob("*.jsonl") for line in path.read_text().splitlines()[:-1]]
    seen = [json.loads(line) for line in lines]
    _, second = sorted({line["began"] for line in seen})
    assert min(line["step"] for line in seen if line["began"] == second) == saved
    check_ids(folder, done - 1, whole=False)
    assert max(losses(folder)) == done
