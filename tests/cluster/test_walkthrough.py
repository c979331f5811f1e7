"""The walk-through of the README at its smallest size, on real processes: packing, jobs, losses, the record."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from cluster import members, operations, processes
from cluster.state import BUCKET, State
from tests.conftest import write_images

ROOT = Path(__file__).parents[2]
STEPS = 120
RAY = [sys.executable, "-m", "ray.scripts.scripts", "job"]
TINY = [
    "--run.name", "walk", "--run.storage", f"s3://{BUCKET}/runs", "--data.train", f"s3://{BUCKET}/photos",
    "--probe.train", f"s3://{BUCKET}/photos", "--probe.test", "", "--data.image-size", "16", "16",
    "--model.depth", "1", "--model.width", "48", "--batch.global-size", "24", "--batch.micro-size", "8",
    "--train.steps", str(STEPS), "--checkpoint.every-steps", "6", "--log.every", "6", "--log.pictures", "0",
    "--scale.cpus-per-worker", "0.6", "--data.cpus-per-task", "0.4",
]  # fmt: skip


def on(state: State, *command: str, timeout_s: float = 120) -> str:
    """What a command on the cluster says; it must end well."""
    environment = state.environment() | {"PYTHONPATH": ""}
    done = subprocess.run(
        [*command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(state: State, job: str, workers: int) -> None:
    recipe = ["--config", "pipelines/recipes/digits.toml", *TINY, "--scale.workers", str(workers)]
    submitted = [*RAY, "submit", "--no-wait", "--submission-id", job, "--working-dir", "."]
    on(state, *submitted, "--", "python", "pipelines/pretrain.py", *recipe)


def logs(state: State, job: str) -> str:
    """What `ray job logs` shows: asked of its server, since the command takes a core for two seconds each time."""
    return json.loads(asked(state, f"{job}/logs"))["logs"]


def asked(state: State, what: str) -> bytes:
    answer = members.answer(f"{state.dashboard}/api/jobs/{what}", state.token, timeout_s=60)
    assert answer is not None, f"the job server does not know {what}"
    return answer


def step_of(told: str) -> int:
    """The last step that a job's log tells of."""
    return max((int(step) for step in re.findall(rf"step +(\d+) of {STEPS}  loss", told)), default=-1)


def nodes_with_workers(state: State) -> set[str]:
    return {node.name for node in state.nodes if members.training(state, node.name)}


def state_of(state: State, node: str) -> str:
    known = members.ray_nodes(state)
    assert known is not None
    return known[node]["state"]


def pack(state: State, folder: Path) -> None:
    write_images(folder, 96)
    packed = ["--source", str(folder), "--out", f"s3://{BUCKET}/photos", "--workers", "1"]
    assert "packed 96 images" in on(state, sys.executable, "-m", "pipelines.make_shards", *packed)


def wait_for_end(state: State, job: str) -> None:
    def finished() -> bool:
        status = json.loads(asked(state, job))["status"]
        assert status != "FAILED", logs(state, job)
        return status == "SUCCEEDED"

    processes.wait_until(finished, 420, lambda: logs(state, job))
    assert f"run 'walk' finished: {STEPS} steps" in on(state, *RAY, "logs", job)


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_the_walk_through(tmp_path):
    with operations.cluster(tmp_path / "cluster", nodes=3, cpus=1) as state:
        pack(state, tmp_path / "photos")
        submit(state, "two", workers=2)
        processes.wait_until(lambda: step_of(logs(state, "two")) >= 12, 240, lambda: logs(state, "two"))
        working = nodes_with_workers(state)
        assert len(working) == 2
        # From one place for all of them, a node that joins would take away the code under the others.
        unpacked = state.ray_dir.glob("*/session_*/runtime_resources/working_dir_files/_ray_pkg_*/pipelines")
        assert {path.relative_to(state.ray_dir).parts[0] for path in unpacked} >= working | {"head"}
        on(state, *RAY, "stop", "two")
        assert step_of(logs(state, "two")) < STEPS, "it had finished before it was stopped"

        submit(state, "three", workers=3)
        processes.wait_until(lambda: step_of(logs(state, "three")) > 0, 240, lambda: logs(state, "three"))
        assert nodes_with_workers(state) == {"node-1", "node-2", "node-3"}
        assert re.search(r"continuing from the checkpoint of step \d+", logs(state, "three"))
        operations.kill(state, "node-2")
        assert operations.add(state).name == "node-4"

        wait_for_end(state, "three")
        check_what_is_left(state)

        assert state_of(state, "node-2") == "DEAD"
        operations.drain(state, "node-1", deadline_s=30, reason="a test")
        # The head finds out some seconds after it has gone.
        processes.wait_until(lambda: state_of(state, "node-1") == "DEAD", 30)
        assert state_of(state, "node-4") == "ALIVE"
    assert not processes.marked(state.mark(), state.ray_dir)


# On SIGTERM it needs longer than the 3 s that Ray gives a stopped job by default.
SLOW_TO_END = """
import pathlib, signal, sys, time

def end(*_):
    time.sleep(6)
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit()

signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1], "runs").touch()
time.sleep(600)
"""


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_lost_head_costs_what_came_after_the_last_checkpoint(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW_TO_END)
    with operations.cluster(tmp_path / "cluster", nodes=2, cpus=1) as state:
        pack(state, tmp_path / "photos")
        slow = ["--no-wait", "--submission-id", "slow", "--", "python", str(tmp_path / "slow.py"), str(tmp_path)]
        on(state, *RAY, "submit", *slow)
        processes.wait_until((tmp_path / "runs").exists, 60)
        on(state, *RAY, "stop", "slow")
        assert (tmp_path / "saved").exists(), "it was killed before it had saved"

        submit(state, "first", workers=2)
        processes.wait_until(lambda: step_of(logs(state, "first")) >= 30, 240, lambda: logs(state, "first"))
        operations.kill(state, "head")
        state = operations.up(state.folder, nodes=2, cpus=1, store_mib=100)
        # the servers have lived on, and nothing of the first life's nodes has
        saved = checkpoints(state)
        assert saved
        assert [node.name for node in state.nodes] == ["head", "node-1", "node-2"]

        submit(state, "second", workers=2)
        wait_for_end(state, "second")
        (continued,) = re.findall(r"continuing from the checkpoint of step (\d+)", logs(state, "second"))
        assert int(continued) == max(saved) < STEPS
        check_what_is_left(state)
    assert not processes.marked(state.mark(), state.ray_dir)


def checkpoints(state: State) -> set[int]:
    """The steps whose checkpoint is whole."""
    store = pafs.S3FileSystem(access_key="local", secret_key="local", region="us-east-1", endpoint_override=state.s3)
    found = store.get_file_info(pafs.FileSelector(f"{BUCKET}/runs/walk/checkpoints", recursive=True))
    whole = (Path(info.path).parent.name for info in found if info.base_name == "manifest.json")
    return {int(name.removeprefix("step-")) for name in whole}


def check_what_is_left(state: State) -> None:
    """Checkpoints in the store, each point of the record once on the server, the probe's score."""
    assert STEPS in checkpoints(state)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=state.mlflow)
    experiment = client.get_experiment_by_name("mae-on-ray")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    told = [point.step for point in history]
    assert sorted(set(told)) == told
    # A run that is stopped also tells of its last step.
    assert len(set(told) - set(range(6, STEPS + 1, 6))) <= 1
    assert set(told) >= set(range(6, STEPS + 1, 6))
    assert "probe/knn_top1" in run.data.metrics
