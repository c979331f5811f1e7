"""Searches elsewhere than on this disk and in this process: in an object store, and as a job on a cluster."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cluster.processes import wait_until
from pipelines.pretrain import read_config
from pipelines.storage import Store
from pipelines.training import checkpoint
from tests.jobs import left_behind, submit
from tests.stores import moto_server, put, s3_environment
from tests.tune.searches import arguments, journal
from tune.journal import Journal

ROOT = Path(__file__).parents[2]
SPACE = '["model.mask_ratio"]\nvalues = [0.5, 0.75]\n'
HOW = ["--sampler", "grid", "--reports", "2", "--scheduler", "none"]


def children(uri, name):
    """The runs of a search's trials in MLflow, by their names."""
    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'mae-on-ray'")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags.get("mae.kind") == "search" and run.info.run_name == name]
    assert parent.info.status == "FINISHED"
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    files = {file.path for folder in ("", "pictures") for file in client.list_artifacts(parent.info.run_id, folder)}
    assert {"best.toml", "table.txt", "pictures/cost.png"} <= files
    return {str(run.info.run_name): run for run in below}


@pytest.mark.chaos
def test_a_search_in_an_object_store(shards, tmp_path, short_folder, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    asked = arguments(tmp_path, shards, *HOW, "--run.storage", "s3://bucket/runs", space=SPACE, name="far")
    final = ["--final", "--final-factor", "0.5", "--probe.test", shards["test"]]
    with moto_server() as address:
        put(address, "bucket")
        for key, value in s3_environment(address).items():
            monkeypatch.setenv(key, value)
        environment = {**os.environ, "RAY_TMPDIR": short_folder, "MLFLOW_TRACKING_URI": uri}
        done = subprocess.run(
            [sys.executable, "-m", "tune.search", *asked, *final],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        store = Store("s3://bucket/runs/far")
        trials = Journal(store).trials
        (tmp_path / "best.toml").write_bytes(store.read("best.toml"))
        assert store.exists("pictures/cost.png")
        assert store.read("table.txt").decode().strip() in done.stdout
        record = json.loads(store.read("run.json"))
        spooled = {name: store.child("trials").child(name).read("metrics.jsonl").decode() for name in trials}
        test = json.loads(Store("s3://bucket/runs/far-final").read("result.json"))
    assert [(one.state, [step for step, _ in one.scores]) for one in trials.values()] == [("finished", [12, 24])] * 2
    assert read_config(["--config", str(tmp_path / "best.toml")]).run.storage == "s3://bucket/runs"
    assert (test["step"], "test/linear_top1" in test["scores"]) == (12, True)
    assert all('"status": "FINISHED"' in text for text in spooled.values())
    assert record["name"] == "far"
    below = children(uri, "far")
    assert set(below) == set(trials)
    for name, run in below.items():
        assert name is not None
        assert run.data.metrics["probe/linear_top1"] == trials[name].score
        assert run.info.status == "FINISHED"
        assert run.data.tags["mae.state"] == "finished"
    assert sorted(run.data.tags["mae.rank"] for run in below.values()) == ["1", "2"]


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_killed_search_in_an_object_store_goes_on(shards, tmp_path, short_folder, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    how = ["--sampler", "grid", "--reports", "4", "--scheduler", "none", "--concurrent", "1"]
    asked = arguments(tmp_path, shards, *how, "--run.storage", "s3://bucket/runs", space=SPACE, name="far")
    run = [sys.executable, "-u", "-m", "tune.search", *asked]
    with moto_server() as address:
        put(address, "bucket")
        for key, value in s3_environment(address).items():
            monkeypatch.setenv(key, value)
        environment = {**os.environ, "RAY_TMPDIR": short_folder, "MLFLOW_TRACKING_URI": uri}
        with subprocess.Popen(run, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            shown = 0
            for line in process.stdout:
                shown += " %  " in line
                if shown == 6:
                    break
            process.kill()
            rest = process.stdout.read()
            assert process.wait(60) == -signal.SIGKILL, rest
        wait_until(lambda: not left_behind(short_folder), 60, lambda: f"left: {left_behind(short_folder)}")
        store = Store("s3://bucket/runs/far")
        before = Journal(store).trials
        assert sorted(one.state for one in before.values()) == ["finished", "running"]
        (cut,) = [name for name, one in before.items() if one.state == "running"]
        saved = checkpoint.steps(store.child("trials").child(cut).child("checkpoints"))
        done = subprocess.run(
            [*run, "--resume"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        after = Journal(store).trials
        points = store.child("trials").child(cut).read("metrics.jsonl").decode()
    assert [one.state for one in after.values()] == ["finished"] * 2
    assert all([step for step, _ in one.scores] == [6, 12, 18, 24] for one in after.values())
    # What was known is kept, and the one that was cut went on from its checkpoint.
    for name, one in before.items():
        assert after[name].scores[: len(one.scores)] == one.scores
    assert max(saved) in (6, 12)
    lines = [json.loads(line) for line in points.splitlines()]
    assert sum(line.get("step") == min(saved) and "train/loss" in line["metrics"] for line in lines) == 1
    below = children(uri, "far")
    assert {name: run.data.metrics["probe/linear_top1"] for name, run in below.items()} == {
        name: one.score for name, one in after.items()
    }


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_search_as_a_job_on_a_cluster(cluster, shards, tmp_path):
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    asked = arguments(tmp_path, shards, *HOW, space=SPACE, name="job")
    done = submit(cluster, ["tune/search.py", *asked], MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "search 'job' finished" in done.stdout
    trials = journal(tmp_path / "runs" / "job")
    assert [(one["state"], one["steps"]) for one in trials.values()] == [("finished", [12, 24])] * 2
    assert read_config(["--config", str(tmp_path / "runs" / "job" / "best.toml")]).run.name == "job-best"
    assert set(children(uri, "job")) == set(trials)
