"""What is known at once is said at once: before PyTorch, timm, Ray and MLflow are imported, which takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from mae_core.architectures import patch_size, vit_names
from mae_core.plain_vit import plain_vit
from pipelines.config import Scale
from pipelines.early import check_gpus
from pipelines.errors import UserError

ROOT = Path(__file__).parents[2]
SLOW = ("torch", "timm", "ray", "mlflow", "matplotlib")
# Runs commands as `python -m` does, and says after each how it ended, what it said and what is imported by then.
PROBE = f"""
import contextlib, io, json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv, said, told = words, io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    print(json.dumps([said.getvalue(), [name for name in {SLOW} if name in sys.modules]]))
"""
PRETRAIN = ["pretrain", "--data.train", "{shards}", "--storage", "{folder}/runs"]
TRANSFER = ["transfer", "--storage", "{folder}", "--data.train", "{shards}", "--data.test", "{shards}"]
SEARCH = ["--storage", "{folder}", "--probe.train", "{shards}", "--data.train", "{shards}"]
MISTAKES = [
    ([*PRETRAIN, "--model.mask-ration", "0.5"], "did you mean --model.mask-ratio"),
    ([*PRETRAIN, "--model.mask-ratio", "1.5"], "less than 1"),
    ([*PRETRAIN, "--data.image-size", "100"], "image size 100x100 is not divisible by the patch size 16"),
    ([*PRETRAIN, "--model.patch-size", "5"], "not divisible by the patch size 5"),
    ([*PRETRAIN, "--model.arch", "vit_bose_patch16_224"], "did you mean vit_base_patch16_224"),
    ([*PRETRAIN, "--scale.gpu", "--scale.workers", "64"], "scale.gpu asks for 64 GPUs; there are"),
    ([*PRETRAIN, "--config", "nowhere.toml"], "no configuration file"),
    (["pretrain", "--data.train", "{folder}/nowhere"], "nowhere"),
    (["pretrain"], "data.train is not given"),
    ([*PRETRAIN, "--run", "taken"], "taken is a search, not a pretraining run"),
    (["tune.search", *SEARCH, "--space", "s.toml", "--storage", "{folder}/runs", "--run", "begun"], "begun is a pret"),
    (["estimate", "--data.train", "{folder}/nowhere"], "nowhere"),
    (["estimate", "--data.train", "{shards}", "--data.image-size", "100"], "not divisible"),
    (["estimate", "--secnds", "3"], "did you mean --seconds"),
    ([*TRANSFER, "--protocol", "liner"], "did you mean linear"),
    ([*TRANSFER, "--run", "nobody"], "no run 'nobody'"),
    ([*TRANSFER, "--weights", "w.pth", "--scale.gpu", "--scale.workers", "64"], "scale.gpu asks for 64 GPUs"),
    ([*TRANSFER[:-1], "{folder}/nowhere", "--weights", "w.pth"], "nowhere"),
    (["reconstruct", "--run", "nobody", "--storage", "{folder}"], "no run 'nobody'"),
    (["reconstruct", "--weights", "w.pth", "--data", "{folder}/nowhere"], "nowhere"),
    (["reconstruct", "--heds"], "did you mean --heads"),
    (["compare", "nobody", "--storage", "{folder}"], "no run 'nobody'"),
    (["sync", "nobody", "--storage", "{folder}"], "no run 'nobody'"),
    (["make_shards", "--source", "{folder}/nowhere", "--out", "{folder}/out"], "nowhere"),
    (["check_shards", "{folder}/nowhere"], "nowhere"),
    (["tune.search", *SEARCH, "--samples", "0"], "samples"),
    (["tune.search", *SEARCH, "--space", "s.toml", "--data.image-size", "100"], "not divisible"),
    (["tune.search", *SEARCH, "--space", "s.toml", "--scale.gpu", "--scale.workers", "64"], "asks for 64 GPUs"),
    (["tune.ablate", *SEARCH, "--table", "1f", "--data.image-size", "100"], "not divisible"),
    (["tune.ablate", "--tabel", "1f"], "did you mean --table"),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The smallest labelled shards."""
    from pipelines.make_shards import main
    from tests.conftest import write_images

    root = tmp_path_factory.mktemp("early")
    write_images(root / "images", 6)
    assert main(["--source", str(root / "images"), "--out", str(root / "shards")]) == 0
    return root / "shards"


def ends(commands):
    """What each command says on stderr, and the slow modules that are imported when it has ended."""
    command = [sys.executable, "-W", "ignore", "-c", PROBE, json.dumps(commands)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_mistake_waits_for_no_heavy_import(packed, tmp_path):
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "search.json").write_text("{}")
    (tmp_path / "runs" / "begun").mkdir()
    (tmp_path / "runs" / "begun" / "config.json").write_text("{}")
    commands = [[word.format(shards=packed, folder=tmp_path) for word in words] for words, _ in MISTAKES]
    commands = [[words[0] if "." in words[0] else f"pipelines.{words[0]}", *words[1:]] for words in commands]
    for words, (_, told), (said, slow) in zip(commands, MISTAKES, ends(commands), strict=True):
        assert said.startswith("error: "), words
        assert said.count("\n") == 1, said
        assert told in said
        assert slow == [], words


def test_help_waits_for_no_heavy_import():
    for said, slow in ends(
        [[module, "--help"] for module in ("pipelines.pretrain", "pipelines.transfer", "tune.search")]
    ):
        assert (said, slow) == ("", [])


def test_architectures_are_known_by_name_as_timm_knows_them():
    assert vit_names() == set(timm.list_models(module="vision_transformer"))
    sides = {
        name: patch_size(name) for name in ("vit_base_patch16_224", "vit_huge_patch14_224", "vit_small_patch8_224")
    }
    assert sides == {name: plain_vit(name).patch_embed.patch_size[0] for name in sides}
    assert patch_size("flexivit_base") is None


def test_gpus_are_left_to_a_cluster_to_have(monkeypatch):
    many = Scale(gpu=True, workers=64)
    with pytest.raises(UserError, match="asks for 64 GPUs"):
        check_gpus(many)
    check_gpus(Scale(workers=64))
    check_gpus(many.model_copy(update={"address": "auto"}))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    check_gpus(many)
