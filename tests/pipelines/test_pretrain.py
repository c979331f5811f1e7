"""Whole runs, for real: pretraining, probes and record; kills in the middle; a job on a cluster."""

import contextlib
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.torch
import timm
import torch

from benchmarks.audit import CONTINUED
from cluster.processes import free_ports, wait_until
from mae_core.weights import encoder_state, load_official
from pipelines import provenance
from pipelines.config import identity, identity_hash
from pipelines.data.plan import Plan
from pipelines.data.shards import load_manifest
from pipelines.errors import UserError, run_command
from pipelines.pretrain import main, open_run, read_config, resolve
from pipelines.training.build import build_model, fit_target, make_stream
from pipelines.training.clock import PARTS
from tests.jobs import left_behind, submit

ROOT = Path(__file__).parents[2]
TINY = """
[data]
image_size = [16, 16]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
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
micro_size = 16
[optim]
base_lr = 1e-2
warmup_epochs = 1.0
[train]
steps = {steps}
[scale]
workers = 2
cpus_per_worker = 0.5
segment_tasks = 4
[checkpoint]
every_steps = 20
[log]
every = 3
ids = true
"""
# A target that is fitted before the first step, and what else needs more of a run than the usual.
OPTIONS = ["--model.target", "pca", "--model.target-components", "10", "--model.mask", "block",
           "--model.encoder-mask-tokens", "--data.augment", "fixed_crop", "--probe.no-at-start"]  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    def write(steps):
        path = tmp_path / f"tiny-{steps}.toml"
        path.write_text(TINY.format(steps=steps))
        return str(path)

    return write


def arguments(recipe, shards, storage, name, *more):
    where = ["--data.train", shards["train"], "--run.storage", str(storage), "--run.name", name]
    return ["--config", recipe, *where, *more]


def points(folder):
    """The metrics of a run, by step."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        value = json.loads(line)
        if "metrics" in value:
            found.setdefault(value["step"], {}).update(value["metrics"])
    return found


def losses(folder):
    """The loss of every step."""
    return {step: values["train/loss"] for step, values in points(folder).items() if "train/loss" in values}


def delivered(folder):
    """The sample ids of every step, in order; what was done twice must have been the same."""
    parts = {}
    for path in (folder / "ids").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            value = json.loads(line)
            assert parts.setdefault((value["step"], value["index"]), value["ids"]) == value["ids"]
    steps = {}
    for (step, _), ids in sorted(parts.items()):
        steps.setdefault(step, []).extend(ids)
    return steps


def test_from_shards_to_a_probed_encoder(recipe, shards, tmp_path, capfd):
    probes = [
        "--probe.train",
        shards["train"],
        "--probe.test",
        shards["test"],
        "--probe.every-epochs",
        "2",
        # So that the data of a stretch ends at each probe.
        "--probe.hold-mib",
        "0",
        "--log.every",
        "1",
        "--batch.micro-size",
        "0",
        "--profile",
    ]
    command = arguments(recipe(30), shards, tmp_path, "whole", *probes)
    assert main(command) == 0
    folder = tmp_path / "whole"
    out = capfd.readouterr().out
    assert "step 30 of 30  loss" in out
    # Each stretch between two probes had its own data, no more: else the workers fail, and are started again.
    assert CONTINUED not in out
    assert "left out of the probe, because they could not be read: 1 truncated" in out
    assert "mlflow ui --backend-store-uri sqlite:///" in out

    # Both workers look for the micro-batch, and the run has one; the next attempt would not look again.
    ((rows, fastest),) = re.findall(r"micro-batches of (\d+) images \(the fastest of those tried: (\d+)\)", out)
    assert len(re.findall("micro-batches of", out)) == 1
    turns = -(-20 // int(fastest))  # of each worker's half of a batch
    assert int(rows) == -(-20 // turns)
    assert json.loads((folder / "micro_size.json").read_text())["rows"] == int(fastest)

    loss = losses(folder)
    assert sorted(loss) == list(range(1, 31))
    assert loss[30] < 0.9 * loss[1]
    result = json.loads((folder / "result.json").read_text())
    assert result["skipped"] == {"truncated": 4}
    scores = result["scores"]
    assert scores["test/linear_top1"] > 80
    assert {"test/knn_top1", "test/random_knn_top1", "test/random_linear_top1", "probe/effective_rank"} <= set(scores)
    # 300 images in batches of 40, a probe every 2 epochs: at the start, after 15 steps, and at the end
    assert sum("probe/knn_top1" in values for values in points(folder).values()) == 3

    # how long it takes, by arithmetic and by the first steps; and what it has not come to
    assert re.search(r"this will take [\d.]+ (?:min|s) at least: [\d.e-]+ TFLOP, at the [\d.e-]+ TFLOP/s", out)
    assert len(re.findall(r"about [\d.]+ (?:min|s) left, by the first steps: [\d,.e+]+ images/s", out)) == 1
    worse = any(scores[f"test/{name}"] <= scores[f"test/random_{name}"] for name in ("knn_top1", "linear_top1"))
    assert any("do not beat the random encoder" in note for note in result["notes"]) == worse
    assert [line[6:] for line in out.splitlines() if line.startswith("note: ")] == result["notes"]

    # the broken image: weight 0, counted at each of its four visits, listed once
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in skipped] == ["class1_0001"]
    assert points(folder)[30]["data/skipped"] == 4

    # the encoder loads into timm
    model = load_official(folder / "checkpoints" / "step-00000030" / "model.safetensors", decoder_num_heads=2)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=0
    )
    vit.load_state_dict(encoder_state(model), strict=True)

    check_speed(points(folder), out)
    check_record(folder)
    assert main(command) == 0
    again = capfd.readouterr().out
    assert re.search(r"has finished already on \d{4}-\d\d-\d\d at \d\d:\d\d: 30 steps; nothing to do", again)
    assert " min" not in again
    assert f"{scores['test/linear_top1']:.1f} %" in again
    # fed back, the resolved configuration is the same run; changed, it is refused
    assert main(["--config", str(folder / "config.toml")]) == 0
    assert "has finished already" in capfd.readouterr().out
    with pytest.raises(UserError, match=r"model\.mask_ratio was 0\.75, is now 0\.5"):
        main([*command, "--model.mask-ratio", "0.5"])


def check_speed(told, shown):
    shares = ", ".join(
        rf"{part} \d+" for part in ("data", "forward", "backward", "communication", "optimizer", "other")
    )
    line = rf"images/s  [\d.e-]+ TFLOP/s  MFU \d+ %  \({shares} %\)  waiting \d+ %  \d+\.\d GiB  left 0:00"
    assert re.search(line, shown)
    for values in (values for values in told.values() if "train/loss" in values):
        parts = {name: values[f"perf/{name}_s"] for name in (*PARTS, "other")}
        assert min(parts[name] for name in PARTS) > 0
        assert sum(parts.values()) == pytest.approx(40 / values["perf/images_per_s"])
        assert 0 < values["perf/mfu"] < 1
        assert values["perf/flops_per_s"] > 0
        assert 100 < values["perf/peak_memory_mib"] < 20_000


def check_profile(folder):
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        trace = json.load(file)
    names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 10
    assert "aten::_fused_adamw_" in names
    assert "aten::" in (folder / "operators.txt").read_text()  # of the slowest


def check_record(folder):
    from mlflow.tracking import MlflowClient

    record = json.loads((folder / "run.json").read_text())
    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent}/mlflow.db")
    run = client.get_run(record["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.mask_ratio"] == "0.75"
    assert run.data.tags["data.digest"] == record["tags"]["data.digest"]
    assert "git.commit" in run.data.tags
    products = run.data.tags["cpu_products"]
    assert all(kind in products for kind in ("forward ", "values ", "weight ")), products
    notes = json.loads((folder / "result.json").read_text())["notes"]
    assert run.data.tags.get("mae.notes", "") == "; ".join(notes)
    # What fills the columns of the UI's table; the commit's only where the code is in a repository.
    assert run.data.tags["mlflow.source.name"] == "pipelines/pretrain.py"
    assert run.data.tags["mlflow.source.type"] == "LOCAL"
    assert run.data.tags["mlflow.user"] == run.info.user_id == provenance.user()
    if (commit := provenance.git_commit()) != "unknown":
        assert run.data.tags["mlflow.source.git.commit"] == commit.removesuffix("-dirty")
    fed_back = Path(client.download_artifacts(run.info.run_id, "config.toml", str(folder / "..")))
    assert fed_back.read_text() == (folder / "config.toml").read_text()
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, 31))
    assert run.inputs is not None
    assert run.inputs.dataset_inputs[0].dataset.digest
    assert any("reconstruction" in item.path for item in client.list_artifacts(run.info.run_id, "images"))
    check_profile(Path(client.download_artifacts(run.info.run_id, "profile", str(folder / ".."))))


@contextlib.contextmanager
def command(arguments, log, **environment):
    """A pretraining command as its user starts it, in its own temporary folder for Ray; its whole tree ends with it."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        variables = {**os.environ, "RAY_TMPDIR": folder, **environment}
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.pretrain", *arguments],
                cwd=ROOT, env=variables, stdout=file, stderr=file,
            )  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            # Ray's processes end by themselves when their driver is killed; it takes them some seconds.
            wait_until(lambda: not left_behind(folder), 60, lambda: f"still there: {left_behind(folder)}")


def steps_done(folder):
    try:
        return max(points(folder), default=0)
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


@pytest.mark.timeout(900)
def test_kills_change_nothing(recipe, shards, tmp_path, capfd):
    steps = 160
    reference = arguments(recipe(steps), shards, tmp_path, "undisturbed", "--log.pictures", "0", *OPTIONS)
    assert main(reference) == 0
    capfd.readouterr()

    killed = arguments(recipe(steps), shards, tmp_path, "killed", "--log.pictures", "0", *OPTIONS)
    folder, log = tmp_path / "killed", tmp_path / "log.txt"
    with command(killed, log) as process:
        told = lambda: log.read_text()[-3000:]  # noqa: E731
        wait_until(lambda: steps_done(folder) >= 50, 120, told)
        workers = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "RayTrainWorker" in " ".join(child.cmdline())
        ]
        assert len(workers) == 2
        workers[1].kill()
        wait_until(lambda: "continuing from the checkpoint of step" in log.read_text(), 120, told)
        before = steps_done(folder)
        wait_until(lambda: steps_done(folder) >= before + 20, 120, told)
        # The driver and, before they find out and have done more steps, its workers: as when a machine stops.
        orphans = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        for orphan in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()
        psutil.wait_procs(orphans, timeout=60)
    assert 50 < steps_done(folder) < steps, "the driver was killed too late to show anything"

    # and then the newest checkpoint is damaged as well
    newest = max(path.parent for path in (folder / "checkpoints").glob("*/manifest.json"))
    model = newest / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    assert main(killed) == 0
    out = capfd.readouterr().out
    assert f"{newest.name} model.safetensors has" in out

    assert delivered(folder) == delivered(tmp_path / "undisturbed")
    plan = Plan(300, seed=0)
    for step, ids in delivered(folder).items():
        np.testing.assert_array_equal(ids, plan.samples(step * 40, (step + 1) * 40)[0])
    assert losses(folder) == losses(tmp_path / "undisturbed")
    # every third step, and every twentieth, where a checkpoint is
    assert sorted(losses(folder)) == [step for step in range(1, steps + 1) if step % 3 == 0 or step % 20 == 0]
    final = f"checkpoints/step-{steps:08d}/model.safetensors"
    weights = safetensors.torch.load_file(folder / final)
    for name, value in safetensors.torch.load_file(tmp_path / "undisturbed" / final).items():
        assert np.array_equal(value, weights[name]), name

    # what one of the workers has fitted is what any process fits
    config = resolve(read_config(reference))
    fitted = build_model(config)
    fit_target(fitted, make_stream(config, load_manifest(config.data.train), 1), config)
    assert torch.equal(weights["target.basis"], fitted.target.state_dict()["basis"])


@pytest.mark.timeout(600)
def test_as_a_job_on_a_cluster_without_its_mlflow_server(cluster, recipe, shards, tmp_path):
    (nobody,) = free_ports(1)
    recipe_in_checkout = ROOT / "pipelines" / "recipes" / "digits.toml"
    submitted = arguments(str(recipe_in_checkout.relative_to(ROOT)), shards, tmp_path, "job")
    tiny = ["--train.steps", "8", "--log.every", "4", "--data.image-size", "16", "16", "--model.patch-size", "4",
            "--model.depth", "1", "--probe.train", "", "--probe.test", ""]  # fmt: skip
    command = ["pipelines/pretrain.py", *submitted, *tiny]
    done = submit(cluster, command, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{nobody}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 8 of 8  loss" in done.stdout
    assert "no MLflow run yet" in done.stdout + done.stderr
    assert json.loads((tmp_path / "job" / "result.json").read_text())["step"] == 8

    # the record waited in the spool; any store takes it later
    from mlflow.tracking import MlflowClient

    store = f"sqlite:///{tmp_path}/late.db"
    synced = subprocess.run(
        [sys.executable, "-m", "pipelines.sync", "job", "--storage", str(tmp_path), "--tracking-uri", store],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert synced.returncode == 0, synced.stderr
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("mae-on-ray")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [4, 8]
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--data.train", "nowhere"], "nowhere"),
        (["--data.train", ""], "data.train is not given"),
        (["--data.image-size", "18", "16"], "not divisible by the patch size 4"),
        (["--model.mask-ratio", "0.99"], "mask"),
        (["--model.arch", "vit_bsae_patch16_224"], "vit_bsae_patch16_224"),
        (["--model.heads", "5"], "heads"),
        (["--scale.workers", "64"], "64 workers with 0.5 CPUs each"),
        (["--run.storage", "http://127.0.0.1:1/runs"], "nothing can be written to http"),
        (["--run.init-from", "nothing.pth"], "no file"),
        (["--run.init-from", __file__], "cannot be read as a checkpoint"),
        (["--probe.test", "x"], "probe.test is given without probe.train"),
    ],
)
def test_wrong_input_is_one_line(recipe, shards, tmp_path, flags, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main(arguments(recipe(4), shards, tmp_path / "runs", "wrong", *flags))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs" / "wrong" / "checkpoints").exists()


def test_a_result_counts_for_its_own_configuration_only(recipe, tmp_path):
    def opened(*flags):
        config = resolve(read_config(arguments(recipe(4), {"train": "x"}, tmp_path, "run", *flags)))
        return open_run(config, "digest"), config

    assert opened()[0] is None
    # nothing was trained yet, so a corrected mistake is no other run
    result, config = opened("--model.mask-ratio", "0.6")
    assert result is None
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    done = {"identity": identity_hash(identity(config, "digest")), "step": 4}
    (folder / "result.json").write_text(json.dumps(done))
    assert opened("--model.mask-ratio", "0.6")[0] == done
    with pytest.raises(UserError, match=r"train\.steps was 4, is now 9"):
        opened("--model.mask-ratio", "0.6", "--train.steps", "9")
    longer = ["--model.mask-ratio", "0.6", "--train.steps", "9", "--run.allow-change"]
    assert opened(*longer)[0] is None
    assert opened(*longer)[0] is None, "the shorter run's result is not the longer one's"


def test_the_command_exits_with_2_and_one_line(recipe, shards, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.pretrain", *arguments(recipe(4), shards, tmp_path, "wrong"),
         "--data.train", str(tmp_path / "none")],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        (["--model.mask-ratio", "2"], "runs"),
        # Root writes anywhere, so the folder's place is taken by a file.
        ([], "file"),
    ],
)
def test_what_anything_below_refuses_is_one_line(recipe, shards, tmp_path, capsys, flags, folder):
    (tmp_path / "file").write_text("")
    command = arguments(recipe(4), shards, tmp_path / folder, "wrong", *flags)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: main(command))
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
