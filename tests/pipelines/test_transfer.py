"""Transfer of a real pretrained run: the protocols, their record, stops in the middle, wrong input."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from mae_core.classifier import Classifier
from mae_core.model import MaskedAutoencoder
from pipelines import pretrain
from pipelines.cli import load_toml
from pipelines.config import Config
from pipelines.data.shards import load_manifest
from pipelines.errors import DIVERGED, UserError
from pipelines.provenance import user
from pipelines.training import checkpoint
from pipelines.training.runfolder import RunFolder
from pipelines.training.scores import interval, summarise
from pipelines.training.transfer_cached import Look
from pipelines.transfer import check_labels, main
from pipelines.transfer_config import Transfer
from tests.masks import pack, write_scenes
from tests.stores import spoil

ROOT = Path(__file__).parents[2]
RECIPE = """
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
global_size = 64
micro_size = 32
[train]
steps = 6
[scale]
cpus_per_worker = 0.5
[log]
pictures = 0
"""


@pytest.fixture(scope="module")
def pretrained(shards, tmp_path_factory):
    """A pretraining run that has finished."""
    root = tmp_path_factory.mktemp("transfer")
    (root / "tiny.toml").write_text(RECIPE)
    command = ["--config", str(root / "tiny.toml"), "--data.train", shards["train"], "--run.storage", str(root)]
    assert pretrain.main([*command, "--run.name", "base"]) == 0
    return root


def arguments(root, shards, protocol, *more):
    flags = {
        "run": "base",
        "storage": root,
        "protocol": protocol,
        "data.train": shards["train"],
        "data.test": shards["test"],
        "data.name": "shapes",
        "scale.cpus-per-worker": 0.5,
    }
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))] + list(more)


TRAINED = ["--train.epochs", "2", "--train.global-size", "57", "--train.micro-size", "32", "--train.warmup-epochs", "1"]
TRIED = ["--train.base-lrs", "0.001", "0.1", "--train.ema", "0.9"]


def scores(root):
    """The transfer scores on the pretraining run."""
    lines = RunFolder(pretrain.Store(str(root)).child("base")).read_lines("metrics.jsonl")
    values = [line["metrics"] for line in lines if "metrics" in line]
    return [(key, value) for each in values for key, value in each.items() if key.startswith("transfer/")]


def result_of(root, start):
    (folder,) = [path for path in (root / "base" / "transfer").iterdir() if path.name.startswith(start)]
    return json.loads((folder / "result.json").read_text()), folder


def test_a_linear_score_stands_on_its_pretraining_run(pretrained, shards, ray_local, capfd, monkeypatch):
    def watched(job):
        """A worker that writes down what it computes and reads with; in here, as workers do not know this file."""
        from pipelines.training import transfer

        class Watched(transfer.Worker):
            def __init__(self, job):
                super().__init__(job)
                job.store.write("watched.json", json.dumps([torch.get_num_threads(), self.crew.limit]))

        transfer.Worker, before = Watched, transfer.Worker
        try:
            transfer.transfer_worker(job)
        finally:
            transfer.Worker = before

    monkeypatch.setattr("pipelines.training.transfer.transfer_worker", watched)
    # Images of its own to choose on: all of data.train are learned from.
    val = ["--data.val", shards["test"]]
    command = arguments(pretrained, shards, "linear-fast", "--seeds", "0", "1", "--visible", "0.1", "1", *val)
    assert main([*command, "--scale.threads", "3", "--scale.reading-cpus", "0.7"]) == 0
    told = [json.loads(path.read_text()) for path in (pretrained / "base" / "transfer").glob("*/watched.json")]
    assert told == [[3, 0.7]] * 2
    picture = pretrained / "base" / "pictures" / "transfer-shapes-linear-fast-visible.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capfd.readouterr().out
    assert str(picture) in out
    assert "linear_fast: 300 images to learn from, 60 to choose on, 60 to test on, 3 classes" in out
    few, _ = result_of(pretrained, "shapes-linear_fast_visible_0.1-")
    assert len(few["seeds"]) == 2
    # A random encoder stands beside each, scored once.
    assert f"random     {few['scores']['test/random_top1']:.2f} % from a random encoder" in out
    assert 0 <= few["scores"]["test/random_top1"] <= 100
    two, folder = result_of(pretrained, "shapes-linear_fast-")
    # another seed: the two that have been scored are not scored again
    command = arguments(pretrained, shards, "linear-fast", "--seeds", "0", "1", "2", *val)
    before = [(folder / f"seed-{seed}" / "scored.json").stat().st_mtime_ns for seed in (0, 1)]
    assert main(command) == 0
    assert [(folder / f"seed-{seed}" / "scored.json").stat().st_mtime_ns for seed in (0, 1)] == before
    result, _ = result_of(pretrained, "shapes-linear_fast-")
    assert result["seeds"][:2] == two["seeds"]
    assert len(result["seeds"]) == 3
    test = [one["test"] for one in result["seeds"]]
    assert result["scores"]["test/top1"] == pytest.approx(np.mean(test))
    assert result["scores"]["test/top1_interval"] == pytest.approx(interval(test))
    confusion_CC = np.array(result["confusion"])
    assert confusion_CC.sum() == 3 * load_manifest(shards["test"]).num_samples
    chosen_on = json.loads((folder / "seed-2" / "scored.json").read_text())["val"]
    assert np.array(chosen_on).sum() == 60
    assert 100 * confusion_CC.trace() / confusion_CC.sum() == pytest.approx(np.mean(test))
    assert (folder / "confusion.png").read_bytes().startswith(b"\x89PNG")
    key = "transfer/shapes/linear_fast_top1"
    noted = [(key, value) for value in dict.fromkeys(one["scores"]["test/top1"] for one in (two, result))]
    assert [one for one in scores(pretrained) if one[0] == key] == noted
    client = MlflowClient(tracking_uri=f"sqlite:///{pretrained}/mlflow.db")
    parent_id, child_id = (
        json.loads((path / "run.json").read_text())["mlflow_run_id"] for path in (pretrained / "base", folder)
    )
    parent, child = client.get_run(parent_id), client.get_run(child_id)
    assert child.data.tags["mlflow.parentRunId"] == parent_id
    assert child.info.status == "FINISHED"
    assert parent.data.metrics[key] == pytest.approx(noted[-1][1])
    assert parent.data.tags[f"mae.{key}"] == folder.name
    assert parent.info.status == "FINISHED"
    history = client.get_metric_history(child_id, "test/top1_interval")
    assert [point.step for point in history] == [0, 1]
    assert history[-1].value == pytest.approx(result["scores"]["test/top1_interval"])
    assert child.data.tags["mae.seeds"] == "0 1 2"
    assert child.data.tags["mae.at_chance"] == "false"
    assert parent.data.tags[f"mae.{key}_at_chance"] == "false"
    assert child.data.metrics["test/random_top1"] == pytest.approx(two["scores"]["test/random_top1"])
    artifacts = {file.path for file in client.list_artifacts(child_id)}
    assert artifacts == {"config.toml", "result.json", "confusion.png", "confusion.npy", "per_class.csv"}
    # again: nothing is done, and nothing is noted twice
    capfd.readouterr()
    assert main(command) == 0
    again = capfd.readouterr().out
    assert re.search(r"finished already on \d{4}-\d\d-\d\d at \d\d:\d\d; nothing to do", again)
    assert "in 0 s" not in again
    assert load_toml(Transfer, str(folder / "config.toml")).protocol == "linear-fast"
    assert child.data.tags["mlflow.user"] == user()
    assert [one for one in scores(pretrained) if one[0] == key] == noted


@pytest.mark.chaos
def test_images_that_cannot_be_read_end_a_transfer(pretrained, shards, ray_local, tmp_path):
    data = {"train": spoil(shards["train"], tmp_path / "train"), "test": shards["test"]}
    with pytest.raises(UserError, match=r"none of the 57 images read so far of .*/train can be read"):
        main(arguments(pretrained, data, "linear", *TRAINED, "--data.name", "broken"))


@pytest.mark.chaos
def test_images_that_cannot_be_read_end_a_score_on_features(pretrained, shards, ray_local, tmp_path):
    data = {"train": shards["train"], "test": spoil(shards["test"], tmp_path / "test", keep=50)}
    with pytest.raises(UserError, match=r"10 of the 60 images read so far of .* data\.max_unreadable allows 1 %"):
        main(arguments(pretrained, data, "knn", "--data.name", "broken"))


def test_which_patches_are_seen_is_a_function_of_seed_and_sample():
    model = MaskedAutoencoder("vit_tiny_patch16_224", image_size=16, patch_size=4, width=24, depth=2, num_heads=2)
    classifier = Classifier(model, 2).eval()
    images_BCHW = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sample_B = np.array([7, 8, 9])
    seen = Look(classifier, 0.25, 1).look(images_BCHW, sample_B)
    again = Look(classifier, 0.25, 1).look(images_BCHW.flip(0), sample_B[::-1].copy()).flip(0)
    torch.testing.assert_close(again, seen)
    for other in (
        Look(classifier, 0.25, 2).look(images_BCHW, sample_B),
        Look(classifier, 0.25, 1).look(images_BCHW, sample_B + 3),
    ):
        assert (other - seen).abs().amax(dim=1).min() > 1e-4
    torch.testing.assert_close(Look(classifier, 1.0, 1).look(images_BCHW, sample_B), model.features(images_BCHW))


@pytest.mark.chaos
def test_nearest_neighbours_are_those_of_the_features(pretrained, shards, ray_local):
    assert main(arguments(pretrained, shards, "knn", "--knn-k", "3")) == 0
    result, _ = result_of(pretrained, "shapes-knn_k3-")
    assert result["seeds"][0]["chosen"] == {"k": 3}
    assert np.array(result["confusion"]).sum() == load_manifest(shards["test"]).num_samples


@pytest.mark.chaos
def test_fine_tuning_on_two_workers_at_another_resolution(pretrained, shards, ray_local):
    more = ["--scale.workers", "2", "--data.image-size", "24", "24", "--blocks", "1", "--data.label-fraction", "0.5"]
    assert main(arguments(pretrained, shards, "partial", *TRAINED, *TRIED, *more)) == 0
    result, _ = result_of(pretrained, "shapes-partial_1_labels_0.5_24x24_2_epochs-")
    assert result["scores"]["train/flops"] > 0
    assert np.array(result["confusion"]).sum() == load_manifest(shards["test"]).num_samples
    assert result["unreadable"] <= 1, "one image of the fixture is truncated, and counts once"
    check_tried(result)


# What they have in common with the above runs there, and what not, in mae_core/test_classifier.py.
@pytest.mark.chaos
@pytest.mark.parametrize("protocol", ["linear", "scratch"])
def test_the_papers_linear_probe_and_scratch_run(pretrained, shards, ray_local, protocol):
    assert main(arguments(pretrained, shards, protocol, *TRAINED, *TRIED)) == 0
    result, _ = result_of(pretrained, f"shapes-{protocol}_2_epochs-")
    check_tried(result)


def check_tried(result):
    """Of two learning rates the better one has been scored."""
    assert [one["base_lr"] for one in result["tried"]] == [0.001, 0.1]
    assert max(one["validation"] for one in result["tried"]) == pytest.approx(result["scores"]["val/top1"])


def test_segmentation_learns_masks(pretrained, shards, ray_local, tmp_path):
    data = {}
    for split, num, seed in (("train", 120, 0), ("test", 40, 1), ("val", 20, 2)):
        write_scenes(tmp_path / split, num, seed=seed)
        _, manifest = pack(tmp_path / split, tmp_path / split / "shards")
        data[split] = manifest.location
    # Crops so small that a mask which is not cut as its image teaches something else: the score is then below 75.
    more = ["--data.image-size", "64", "64", "--data.crop-scale", "0.1", "0.4", "--data.name", "scenes"]
    more += ["--seeds", "0", "1", "--train.epochs", "8", "--train.base-lr", "0.16"]
    more += ["--data.val", data.pop("val"), "--data.class-names", "ground", "light | $box$", "dark"]
    assert main(arguments(pretrained, data, "segment", *more)) == 0
    result, folder = result_of(pretrained, "scenes-segment_64x64_8_epochs-")
    test = [one["test"] for one in result["seeds"]]
    assert min(test) > 80
    assert result["scores"]["test/miou_interval"] == pytest.approx(interval(test))
    confusion_CC = np.array(result["confusion"])
    iou_C = confusion_CC.diagonal() / (confusion_CC.sum(0) + confusion_CC.sum(1) - confusion_CC.diagonal())
    assert result["per_class"] == pytest.approx(100 * iou_C)
    assert confusion_CC.sum() == 2 * 40 * 64 * 64
    assert (folder / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert np.array(json.loads((folder / "seed-0" / "scored.json").read_text())["val"]).sum() == 20 * 64 * 64
    # Eight rows of an image, its label map and the prediction.
    with Image.open(folder / "segmentation.png") as sheet:
        assert sheet.height > 8 * 64
        assert len(np.unique(np.array(sheet).reshape(-1, 3), axis=0)) > 100
    with (folder / "per_class.csv").open() as file:
        assert [line.split(",")[0] for line in file][1:] == ["ground", "light | $box$", "dark"]
    # The frozen random encoder's head is trained too, with the first seed.
    assert 0 < result["scores"]["test/random_miou"] <= 100
    assert not list(folder.glob("**/checkpoints/*"))
    client = MlflowClient(tracking_uri=f"sqlite:///{pretrained}/mlflow.db")
    run_id = json.loads((folder / "run.json").read_text())["mlflow_run_id"]
    assert "segmentation.png" in {file.path for file in client.list_artifacts(run_id)}
    assert ("transfer/scenes/segment_64x64_8_epochs_miou", result["scores"]["test/miou"]) in scores(pretrained)


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_killed_fine_tuning_ends_as_one_that_was_not(pretrained, shards, tmp_path):
    # All augmentation on: it is a function of (seed, epoch, sample) and (seed, step), so nothing of it is lost.
    train = [*TRAINED, "--train.epochs", "30", "--checkpoint-minutes", "0.005", "--log-every", "5"]
    command = [sys.executable, "-m", "pipelines.transfer", *arguments(pretrained, shards, "finetune", *train)]
    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = pretrained / "base" / "transfer"

    def checkpoints():
        return list(folder.glob("shapes-finetune_30_epochs-*/seed-0/checkpoints/*/manifest.json"))

    deadline = time.monotonic() + 120
    while not checkpoints() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() != 0, "it had ended before it was killed"
    assert checkpoints()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "continuing from the checkpoint of step" in again.stdout
    stopped, path = result_of(pretrained, "shapes-finetune_30_epochs-")
    path.rename(tmp_path / "stopped")
    whole = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "continuing" not in whole.stdout
    undisturbed, _ = result_of(pretrained, "shapes-finetune_30_epochs-")
    assert stopped["confusion"] == undisturbed["confusion"]
    lines = [
        [line for line in text.stdout.splitlines() if "loss" in line][-1].split("images/s")[0].rsplit(None, 1)[0]
        for text in (again, whole)
    ]
    assert lines[0] == lines[1]


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_fine_tuning_keeps_its_steps(pretrained, shards, number):
    train = [*TRAINED, "--train.epochs", str(3000 + number), "--log-every", "5"]
    command = [sys.executable, "-m", "pipelines.transfer", *arguments(pretrained, shards, "finetune", *train)]
    pattern = f"base/transfer/shapes-finetune_{3000 + number}_epochs-*"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        steps = lambda: [path.read_text() for path in pretrained.glob(f"{pattern}/metrics.jsonl")]  # noqa: E731
        deadline = time.monotonic() + 200
        while not any("train/loss" in text for text in steps()) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        told, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + number, told
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if "the same command continues it" in line]
    (folder,) = pretrained.glob(pattern)
    (saved,) = checkpoint.steps(pretrain.Store(str(folder)).child("seed-0").child("checkpoints"))
    assert f"finetune_{3000 + number}_epochs stopped after step {saved}; the same command continues it" in line
    client = MlflowClient(tracking_uri=f"sqlite:///{pretrained}/mlflow.db")
    run_id = json.loads((folder / "run.json").read_text())["mlflow_run_id"]
    assert client.get_run(run_id).info.status == "KILLED"
    assert not (folder / "result.json").exists()


@pytest.mark.chaos
def test_a_fine_tuning_that_diverges_is_no_score(pretrained, shards, ray_local, capfd):
    before = scores(pretrained)
    flags = [*TRAINED, "--train.epochs", "7", "--train.base-lr", "1e30"]
    assert main(arguments(pretrained, shards, "finetune", *flags)) == DIVERGED
    told = capfd.readouterr()
    assert told.out.count("going back to the last checkpoint") == 1
    (line,) = [line for line in told.err.splitlines() if line.startswith("error:")]
    assert "as it was before" in line
    assert "lower train.base_lr" in line
    assert scores(pretrained) == before
    (folder,) = (pretrained / "base" / "transfer").glob("shapes-finetune_7_epochs-*")
    assert not (folder / "result.json").exists()
    assert (folder / "nonfinite.jsonl").exists()
    client = MlflowClient(tracking_uri=f"sqlite:///{pretrained}/mlflow.db")
    run = client.get_run(json.loads((folder / "run.json").read_text())["mlflow_run_id"])
    assert run.info.status == "FAILED"
    assert "mae.nonfinite_steps" in run.data.tags


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--run", "bse"], "did you mean base?"),
        (["--run", ""], "give either --run NAME or --weights FILE"),
        (["--weights", "x.pth"], "give either --run NAME or --weights FILE"),
        (["--run", "", "--weights", "x.pth"], "no file"),
        (["--protocol", "finetun"], "did you mean finetune?"),
        (["--data.train", ""], "give labelled shards"),
        (["--data.test", "nowhere"], "nowhere"),
        (["--protocol", "partial", "--blocks", "7"], "1 to 2"),
        (["--blocks", "some"], "blocks"),
        (["--num-heads", "2"], "num_heads goes with weights"),
        (["--data.mean", "0.5"], "one value for each of the 3"),
        (["--data.image-size", "18", "18"], "not divisible by the patch size 4"),
        (["--data.auto-augment", "best"], "is no RandAugment policy"),
        (["--train.micro-size", "1", "--train.mixup", "1"], "must be 2 or more"),
        (["--seeds", "1", "1"], "seeds must be different"),
        (["--visible", "0.5"], "visible is for the protocols"),
        (["--data.label-fraction", "0"], "shares above 0"),
        (["--train.base-lrs", "0.1", "0"], "train.base_lrs must be different numbers above 0"),
        (["--train.base-lrs", "0.1", "0.1"], "train.base_lrs must be different numbers above 0"),
        (["--protocol", "knn", "--train.base-lrs", "0.1"], "for the protocols that train, not for knn"),
        (["--protocol", "linear-fast", "--train.ema", "0.9"], "for the protocols that train, not for linear-fast"),
        (["--train.ema", "1"], "less than 1"),
    ],
)
def test_wrong_input_is_one_line(pretrained, shards, flags, told):
    with pytest.raises(UserError) as caught:
        main(arguments(pretrained, shards, "finetune", *flags))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_classes_must_be_known_and_numbered_alike(shards):
    train = load_manifest(shards["train"])
    with pytest.raises(UserError, match="have no labels"):
        check_labels({"train": train, "test": replace(train, classes=())})
    with pytest.raises(UserError, match=r"data\.test has the class 'zebra'"):
        check_labels({"train": train, "test": replace(train, classes=(*train.classes, "zebra"))})
    with pytest.raises(UserError, match="do not number the same classes: label"):
        check_labels({"train": train, "test": replace(train, classes=train.classes[::-1])})


def test_the_interval_is_students():
    # t(0.975, 2) = 4.3027
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 * 1.0 / 3**0.5)
    assert interval([1.0]) is None
    one = {"seed": 0, "val": [[1, 0], [0, 1]], "test": [[3, 1], [1, 3]], "seconds": 1.0, "chosen": {}}
    one["unreadable"] = [["train-000000.tar", "a"]]
    result = summarise(Transfer(), [one])
    assert result["unreadable"] == 1
    assert result["scores"]["test/top1"] == 75
    assert result["per_class"] == [75, 75]
    assert torch.tensor(result["confusion"]).sum() == 8
    assert Config()
