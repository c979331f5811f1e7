"""Whole searches, for real: trials, their record, a kill in the middle, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
import ray

from pipelines.errors import UserError
from pipelines.spool import read_spool
from tune.search import main, read_search

ROOT = Path(__file__).parents[2]
RECIPE = """
[data]
image_size = [16, 16]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
cpus_per_task = 0.5
[model]
arch = "vit_tiny_patch16_224"
patch_size = 4
width = 24
depth = 2
heads = 2
decoder_width = 16
decoder_depth = 1
decoder_heads = 2
[batch]
global_size = 40
micro_size = 20
[optim]
base_lr = 1e-2
warmup_epochs = 1.0
[train]
steps = 24
[scale]
cpus_per_worker = 0.5
[probe]
val_share = 0.3
[log]
every = 6
"""
SPACE = """
["model.mask_ratio"]
values = [0.25, 0.5, 0.75]
["model.decoder_width"]
values = [16, 32]
"""
# At the larger rate nothing is finite for long.
HALF_BROKEN = """
["model.mask_ratio"]
values = [0.5, 0.75]
["optim.base_lr"]
values = [1e-2, 1e30]
"""


@pytest.fixture
def command(shards, tmp_path):
    """Arguments of a search; the space is given as text."""

    def write(*more, space=SPACE, name="found"):
        (tmp_path / "recipe.toml").write_text(RECIPE)
        (tmp_path / "space.toml").write_text(space)
        files = ["--config", str(tmp_path / "recipe.toml"), "--space", str(tmp_path / "space.toml")]
        data = ["--data.train", shards["train"], "--probe.train", shards["train"]]
        return [*files, *data, "--run.storage", str(tmp_path / "runs"), "--run.name", name, *more]

    return write


@pytest.fixture
def short_folder():
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield folder


def journal(folder):
    """What each trial has come to: its reports, and its last state."""
    found = {}
    for line in (folder / "journal.jsonl").read_text().splitlines():
        value = json.loads(line)
        known = found.setdefault(value["trial"], {"steps": [], "values": value["values"]})
        known |= {"state": value["state"], "reason": value.get("reason", "")}
        known["steps"] += [value["step"]] if "step" in value else []
    return found


def left_over():
    """Places that some run still claims."""
    return [one for one in ray.util.placement_group_table().values() if one["state"] != "REMOVED"]


def test_a_search_finds_a_recipe_and_leaves_nothing_behind(command, tmp_path, capfd):
    from mlflow import MlflowClient

    def asked(*more):
        return command("--sampler", "grid", "--reports", "4", *more, space=HALF_BROKEN)

    assert main(asked()) == 0
    out = capfd.readouterr().out
    folder = tmp_path / "runs" / "found"
    trials = journal(folder)
    assert len(trials) == 4
    broken = {name: trials.pop(name) for name, one in list(trials.items()) if one["values"]["optim.base_lr"] == 1e30}
    assert len(broken) == 2
    for one in broken.values():
        # It goes on without them, and says why.
        assert one["state"] == "failed"
        assert "not finite in 216 of 216 samples" in one["reason"]
        assert f"failed: {one['reason']}" in out
    assert "finished" in {one["state"] for one in trials.values()} <= {"finished", "stopped"}
    for one in trials.values():
        # Every report of a trial once, in order; one that was stopped has not trained on.
        assert one["steps"] == [6, 12, 18, 24][: len(one["steps"])]
        assert (one["steps"][-1] == 24) == (one["state"] == "finished")
    assert left_over() == []

    # The best is a recipe, and it is what the table has first.
    best = tomllib.loads((folder / "best.toml").read_text())
    scores = {}
    for line in (folder / "journal.jsonl").read_text().splitlines():
        value = json.loads(line)
        if value["state"] == "finished":
            scores[value["trial"]] = value["score"]
    first = max(scores, key=lambda name: scores[name])
    assert scores[first] == max(scores.values())
    found = {key: best[key.split(".")[0]][key.split(".")[1]] for key in trials[first]["values"]}
    assert scores[first] in [s for n, s in scores.items() if trials[n]["values"] == found]
    assert best["run"]["name"] == "found"
    assert best["scale"]["reading_cpus"] == 0, "a share of this search is none of the recipe"
    assert "best.toml" in out

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'mae-on-ray'")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags["mae.kind"] == "search"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in children} == {*trials, *broken}
    assert {run.info.run_name for run in runs if run.info.status == "FAILED"} == set(broken)
    for run in children:
        if run.info.run_name in broken:
            continue
        assert run.info.status == "FINISHED"
        told = trials[run.info.run_name]
        assert run.data.params["model.mask_ratio"] == str(told["values"]["model.mask_ratio"])
        history = client.get_metric_history(run.info.run_id, "probe/linear_top1")
        assert [point.step for point in history] == told["steps"]
    assert parent.data.metrics["search/best"] >= max(scores.values())
    pictures = {Path(file.path).name for file in client.list_artifacts(parent.info.run_id, "pictures")}
    assert {"heat-map.png", "cost.png", "stopping.png", "over-model.mask_ratio.png"} <= pictures

    # The same name again is no second search, and another space is no continuation.
    with pytest.raises(UserError, match="exists: go on with it with --resume"):
        main(asked())
    with pytest.raises(UserError, match="begun with another space"):
        main(
            command(
                "--sampler", "grid", "--reports", "4", "--resume", space='["model.mask_ratio"]\nvalues = [0.25, 0.5]\n'
            )
        )
    capfd.readouterr()
    before = (folder / "journal.jsonl").read_text()
    assert main(asked("--resume")) == 0
    assert (folder / "journal.jsonl").read_text() == before, "what is known is not trained again"


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sampler", ["random", "optuna"])
def test_an_interrupted_search_goes_on_where_it_was(command, tmp_path, short_folder, sampler):
    how = ["--samples", "3", "--sampler", sampler, "--reports", "4", "--scheduler", "none", "--concurrent", "1"]
    asked = command(*how, name="killed")
    run = [sys.executable, "-u", "-m", "tune.search", *asked]
    # Socket paths have a length limit.
    environment = {**os.environ, "RAY_TMPDIR": short_folder}
    folder = tmp_path / "runs" / "killed"
    with subprocess.Popen(run, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reports = 0
        for line in process.stdout:
            reports += "%" in line
            if reports == 6:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(60) == 130, rest
    before = journal(folder)
    assert sorted(one["state"] for one in before.values()) == ["finished", "running"]
    done = subprocess.run([*run, "--resume"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    after = journal(folder)
    assert {one["state"] for one in after.values()} == {"finished"}
    assert len(after) == 3
    # Nothing was reported twice, and the one that was cut went on from its checkpoint.
    assert all(one["steps"] == [6, 12, 18, 24] for one in after.values())
    (cut,) = [name for name, one in before.items() if one["state"] == "running"]
    lines = [line for line, _ in read_spool(folder / "trials" / cut / "metrics.jsonl") if line]
    assert [line["status"] for line in lines if "status" in line] == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]


@pytest.mark.parametrize(
    ("more", "space", "told"),
    [
        (["--objective", "loss"], SPACE, "the reconstruction loss cannot rank configurations"),
        (["--objective", "top5"], SPACE, "objective must be one of linear, knn"),
        (["--final"], SPACE, "--final reads the test set once: give it with --probe.test"),
        (["--probe.train", ""], SPACE, "a search is scored by a probe"),
        ([], '["model.mask_ration"]\nvalues = [0.5, 0.6]\n', "did you mean model.mask_ratio"),
        ([], '["model.mask_ratio"]\nvalues = [0.5, 1.5]\n', "model.mask_ratio"),
        ([], '["model.mask_ratio"]\nvalues = [0.5]\n', "an axis needs two or more"),
        ([], '["model.decoder_width"]\nvalues = [16, 17]\n', "model.decoder_width 17"),
    ],
)
def test_bad_input_is_one_line(command, more, space, told):
    with pytest.raises(UserError) as error:
        read_search(command(*more, space=space))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_what_never_fits_is_said_at_once(command):
    with pytest.raises(UserError, match="no trial fits: one needs 16 CPUs to train and"):
        main(command("--scale.workers", "16", "--scale.cpus-per-worker", "1", name="large"))
    with pytest.raises(UserError, match="no search 'nowhere' to resume"):
        main(command("--resume", name="nowhere"))
