"""The encoder of a file: its heads, its size and its normalisation."""

import hashlib

import pytest
import safetensors.torch
import torch

from mae_core import weights
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.training.build import build_model
from pipelines.transfer_config import Transfer, TransferData
from pipelines.transfer_identity import as_pretrained
from pipelines.transfer_source import normalised, source

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
SMALL = Config.model_validate({
    "data": {"image_size": (8, 16), "mean": MEAN, "std": STD},
    "model": {"arch": "vit_tiny_patch16_224", "patch_size": 4, "width": 48, "depth": 2, "heads": 4,
              "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
})  # fmt: skip


@pytest.fixture
def model():
    return build_model(SMALL)


def features(config, state):
    model = build_model(config)
    weights.load_state(model, state)
    images_BCHW = torch.randn(2, 3, *config.data.image_size, generator=torch.Generator().manual_seed(0))
    return model.eval().features(images_BCHW)


def test_our_own_file_says_everything(model, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    weights.save(model, path)
    asked = Transfer(weights=str(path))
    parent, config, state, step, digest = source(asked)
    assert (parent, step) == (None, 0)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (config.data.mean, config.data.std, config.data.image_size) == (MEAN, STD, (8, 16))
    assert (config.model.heads, config.model.width, config.model.depth) == (4, 48, 2)
    assert "as the file says" in capsys.readouterr().out
    torch.testing.assert_close(features(config, state), features(SMALL, weights.official_state(model)))
    assert normalised(asked, config) == config
    # The same, said once more, is no other transfer.
    again = Transfer(weights=str(path), data=TransferData(mean=MEAN, image_size=(8, 16)))
    assert as_pretrained(again, config) == asked


def test_other_files_are_asked_about(tmp_path, capsys):
    # An encoder alone, as timm keeps it, with nothing but tensors.
    path = tmp_path / "encoder.pth"
    square = Config.model_validate(SMALL.model_dump() | {"data": SMALL.data.model_dump() | {"image_size": (8, 8)}})
    state = weights.encoder_state(build_model(square))
    torch.save(state, path)
    with pytest.raises(UserError, match="0 heads do not divide the encoder's width 48"):
        source(Transfer(weights=str(path)))
    given = Transfer(weights=str(path), num_heads=4, data=TransferData(std=STD))
    _, config, loaded, *_ = source(given)
    assert "4 heads; images are normalised by mean (0.485, 0.456, 0.406) and std (0.4, 0.5, 0.6): as given" in (
        capsys.readouterr().out
    )
    assert (normalised(given, config).data.mean, normalised(given, config).data.std) == (Config().data.mean, STD)
    assert config.model.heads == 4
    assert torch.equal(loaded["blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"])
    with pytest.raises(UserError, match="one value for each of the 3"):
        normalised(Transfer(weights=str(path), data=TransferData(mean=(0.5,))), config)
    source(Transfer(weights=str(path), num_heads=4))
    assert "ImageNet's, as the file does not say" in capsys.readouterr().out


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_heads_of_official_encoders_are_known_by_their_width(width, heads, tmp_path):
    config = Config.model_validate({
        "data": {"image_size": (32, 32)},
        "model": {"width": width, "depth": 1, "heads": heads, "decoder_width": 16, "decoder_depth": 1},
    })  # fmt: skip
    path = tmp_path / "encoder.safetensors"
    safetensors.torch.save_file(weights.encoder_state(build_model(config)), path)
    _, found, *_ = source(Transfer(weights=str(path)))
    assert found.model.heads == heads
