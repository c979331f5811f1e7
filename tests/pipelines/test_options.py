"""Options of model and data through pretraining's own step, from real shards."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_core.optim import make_optimizer
from pipelines.config import Config, identity, identity_hash, younger_defaults
from pipelines.data.index import encode_index, index_name, index_tar
from pipelines.data.plan import Cut, Plan
from pipelines.data.readers import MicroBatch, Stream, View, parse_block, read_blocks
from pipelines.data.shards import Manifest
from pipelines.errors import UserError
from pipelines.pretrain import open_run
from pipelines.storage import Store
from pipelines.training import checkpoint
from pipelines.training.build import build_model, check_model, fit_target
from pipelines.training.pictures import save_reconstructions
from pipelines.training.step import Trainer, train_step
from pipelines.training.writer import Writer

NUM, STEPS = 40, 3
TINY: dict[str, Any] = {
    "data": {"image_size": (16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3},
    "model": {
        "arch": "vit_tiny_patch16_224", "patch_size": 4, "width": 24, "depth": 1, "heads": 2, "decoder_width": 16,
        "decoder_depth": 1, "decoder_heads": 2, "target_components": 10,
    },
    "batch": {"global_size": 20, "micro_size": 10},
}  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {"decoder": "mlp"},
    {"encoder_mask_tokens": True},
    {"target": "raw"},
    {"target": "pca"},
    {"augment": "none"},
    {"augment": "fixed_crop"},
    {"augment": "random_crop_jitter"},
    {"mask": "block"},
    {"mask": "grid"},
    {"mask_cell": 2},
    {"loss_on": "all"},
    {"class_tokens": 8},
]


def config_of(**options) -> Config:
    """A small run with some options, each of the section that has it."""
    sections = {name: dict(values) for name, values in TINY.items()}
    for key, value in options.items():
        sections["data" if key == "augment" else "model"][key] = value
    return Config.model_validate(sections)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Manifest:
    """One shard of images of all shapes; the fourth cannot be read."""
    folder, rng = tmp_path_factory.mktemp("shard"), np.random.default_rng(0)
    tar = folder / "train-000000.tar"
    with tarfile.open(tar, "w") as archive:
        for number in range(NUM):
            png = io.BytesIO()
            size = rng.integers(12, 40, 2)
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(png, "PNG")
            data = png.getvalue()[: 60 if number == 3 else None]
            member = tarfile.TarInfo(f"{number:04d}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    digest = hashlib.sha256(tar.read_bytes()).hexdigest()
    with tar.open("rb") as file:
        index = encode_index(index_tar(file), tar_bytes=tar.stat().st_size, tar_sha256=digest)
    (folder / index_name(tar.name)).write_bytes(index)
    return Manifest(str(folder), "train", (tar.name,), (NUM,), (tar.stat().st_size,), (digest,), ())


def stream_of(config: Config, manifest: Manifest) -> Stream:
    data, batch = config.data, config.batch
    view = View(data.image_size, data.channels, config.run.seed, data.crop_scale, data.flip, augment=data.augment)
    cut = Cut(batch.global_size, batch.micro_size, 1)
    return Stream(manifest, Plan(manifest.num_samples, config.run.seed, end=STEPS * batch.global_size), cut, view)


def batches_of(stream: Stream, start: int) -> Iterator[MicroBatch]:
    for index in range(start * stream.cut.micros, STEPS * stream.cut.micros):
        (table,) = read_blocks(stream, [[[index]]])
        yield from parse_block(table, stream)


def pretrain(config: Config, manifest: Manifest, checkpoints: Store, stop: int = STEPS) -> tuple[list[str], Any]:
    """Steps up to ``stop``, from the newest checkpoint if there is one, then a checkpoint: the losses' every bit."""
    stream, model = stream_of(config, manifest), build_model(config)
    optimizer = make_optimizer(model)
    start = checkpoint.newest_whole(checkpoints, print) or 0
    if start:
        checkpoint.restore(checkpoints, start, model, optimizer)
    elif model.target.needs_fit:
        fit_target(model, stream, config)
    trainer = Trainer(
        model, optimizer, stream.cut, model.masking, config.run.seed, torch.tensor(config.data.mean),
        torch.tensor(config.data.std), torch.device("cpu"), lambda: torch.autocast("cpu", enabled=False),
    )  # fmt: skip
    batches = batches_of(stream, start)
    losses = [float(train_step(trainer, batches, 1e-3)[0]).hex() for _ in range(start, stop)]
    writer = Writer(checkpoints, 2)
    writer.save(stop, model, optimizer, {"step": stop, "skipped": {}})
    writer.wait()
    return losses, model


def numbers(losses: list[str]) -> np.ndarray:
    return np.array([float.fromhex(loss) for loss in losses])


@pytest.fixture(scope="module")
def usual(shard, tmp_path_factory):
    """The losses without any option."""
    return pretrain(config_of(), shard, Store(str(tmp_path_factory.mktemp("usual"))))[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_option_trains_resumes_bit_for_bit_and_is_drawn(options, usual, shard, tmp_path):
    config = config_of(**options)
    losses, model = pretrain(config, shard, Store(str(tmp_path / "whole")))
    assert np.isfinite(numbers(losses)).all()
    assert losses != usual, "the option changes nothing"
    before, _ = pretrain(config, shard, Store(str(tmp_path / "parts")), stop=1)
    after, again = pretrain(config, shard, Store(str(tmp_path / "parts")))
    assert before + after == losses
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    view = View(config.data.image_size, config.data.channels)
    assert save_reconstructions(again.eval(), config, shard, view, tmp_path / "picture.png")
    assert again.features(torch.zeros(2, 3, 16, 16), "cls").shape == (2, 24)


def test_the_fit_is_of_training_images_and_is_not_made_again(shard, tmp_path, monkeypatch):
    config = config_of(target="pca")
    store = Store(str(tmp_path))
    _, model = pretrain(config, shard, store, stop=1)
    other, third = build_model(config), build_model(Config.model_validate({**config.model_dump(), "run": {"seed": 1}}))
    fit_target(other, stream_of(config, shard), config)
    basis = [one.target.state_dict()["basis"] for one in (model, other)]
    assert torch.equal(*basis)
    fit_target(third, stream_of(Config.model_validate({**config.model_dump(), "run": {"seed": 1}}), shard), config)
    assert not torch.equal(third.target.state_dict()["basis"], basis[0]), "the crops are the run's own"
    monkeypatch.setattr(type(model.target), "fit", lambda *_: pytest.fail("fitted again"))
    pretrain(config, shard, store)


def test_a_run_from_before_an_option_keeps_its_identity():
    # Of the commit before there were options.
    assert identity_hash(identity(Config(), "d")) == "52f46679188baae9"
    mine = identity(config_of(mask="block"), "d")
    assert mine["model.mask"] == "block"
    assert not mine.keys() & (younger_defaults().keys() - {"model.mask", "model.target_components"})
    for options in OPTIONS:
        assert identity(config_of(**options), "d") != identity(config_of(), "d"), options


def test_a_run_with_another_option_is_refused_by_its_name(shard, tmp_path):
    config = Config.model_validate({**TINY, "run": {"name": "a", "storage": str(tmp_path)}})
    assert open_run(config, "d") is None
    Store(str(tmp_path)).child("a").child("checkpoints").write("step-00000001/manifest.json", "{}")
    assert open_run(config, "d") is None
    values = config.model_dump()
    values["model"]["mask"] = "block"
    with pytest.raises(UserError, match=r"model\.mask was 'random', is now 'block'"):
        open_run(Config.model_validate(values), "d")
    identity_of = json.loads(Store(str(tmp_path)).child("a").read("identity.json"))
    assert "model.mask" not in identity_of


def test_options_that_do_not_go_together_are_told_before_anything_starts():
    for options, told in (
        ({"mask": "grid", "mask_ratio": 0.5}, "mask 'grid' keeps one patch of each 2x2"),
        ({"mask_cell": 3}, "3x3 do not divide the grid of 4x4 patches"),
        ({"target": "pca", "target_components": 96}, "96 target components of patches of 48 values"),
    ):
        with pytest.raises(UserError, match=f"model: .*{told}"):
            check_model(config_of(**options))
