"""Weights in the official layout and timm's, from real files."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mae_core.model import MaskedAutoencoder
from mae_core.weights import encoder_state, load_official, official_state, save


def tiny_model(**changes) -> MaskedAutoencoder:
    sizes = {
        "image_size": 16, "patch_size": 4, "channels": 5, "width": 192, "depth": 2, "mlp_ratio": 500 / 192,
        "decoder_width": 32, "decoder_depth": 3, "decoder_heads": 4, "target": "normalized", "seed": 7,
    }  # fmt: skip
    return MaskedAutoencoder("vit_tiny_patch16_224", **{**sizes, **changes})


def loss_of(model: MaskedAutoencoder) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(2, model.channels, *model.image_size, generator=generator)
    return model(images_BCHW, torch.rand(2, model.num_patches, generator=generator))["loss"]


@pytest.mark.parametrize("extra", [{}, {"args": argparse.Namespace(lr=0.1, resume="x"), "epoch": 3}])
def test_official_file_makes_the_same_model(tmp_path, extra):
    model = tiny_model()
    torch.save({"model": official_state(model), **extra}, tmp_path / "checkpoint.pth")
    loaded = load_official(tmp_path / "checkpoint.pth", decoder_num_heads=4, target="normalized")
    assert torch.equal(loss_of(loaded), loss_of(model))
    assert (loaded.num_heads, loaded.image_size) == (3, (16, 16))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_official_keys_are_timms_and_the_decoders(tmp_path):
    state = official_state(tiny_model())
    decoder = {name for name in state if name.startswith(("decoder_", "mask_token"))}
    assert (
        state.keys() - decoder == timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2).state_dict().keys()
    )
    assert {
        "decoder_embed.weight",
        "decoder_pos_embed",
        "decoder_blocks.2.attn.qkv.bias",
        "decoder_norm.bias",
    } < decoder
    assert state["decoder_pos_embed"].shape == (1, 17, 32)


def test_saved_file_remembers_what_shapes_do_not_tell(tmp_path):
    model = tiny_model(image_size=(8, 24), width=96, num_heads=6)
    path = tmp_path / "model.safetensors"
    save(model, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert load_file(path).keys() == official_state(model).keys()
    loaded = load_official(path, decoder_num_heads=4, target="normalized")
    assert (loaded.num_heads, loaded.image_size) == (6, (8, 24))
    assert torch.equal(loss_of(loaded), loss_of(model))
    with pytest.raises(ValueError, match="decoder_num_heads=4"):
        load_official(path)


@pytest.mark.parametrize(
    ("ours", "timms", "both"),
    [
        ({"image_size": 64}, {"img_size": 64}, {}),
        (
            {"image_size": (32, 48), "channels": 1, "width": 48},
            {"img_size": (32, 48), "in_chans": 1, "embed_dim": 48},
            {"patch_size": 8, "depth": 3, "num_heads": 4, "mlp_ratio": 3.0},
        ),
    ],
)
def test_encoder_loads_strictly_into_timm_with_equal_features(ours, timms, both):
    ours, timms = {**ours, **both}, {**timms, **both}
    model = MaskedAutoencoder("vit_tiny_patch16_224", decoder_width=16, decoder_heads=2, decoder_depth=1, **ours)
    vit: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, **timms)
    vit.load_state_dict(encoder_state(model), strict=True)
    images_BCHW = torch.randn(2, model.channels, *model.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = vit.eval().forward_features(images_BCHW)
        torch.testing.assert_close(model.features(images_BCHW, "cls"), tokens[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.features(images_BCHW), tokens[:, 1:].mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.features(images_BCHW, "cls"), vit(images_BCHW), rtol=1e-5, atol=1e-5)


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_hostile_pickle_is_refused_without_effect(tmp_path):
    torch.save({"model": official_state(tiny_model()), "args": Touch(tmp_path / "touched")}, tmp_path / "bad.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    for name in ("bad.pth", "bare.pth"):
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            load_official(tmp_path / name)
    assert not (tmp_path / "touched").exists()


def without(name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: {k: v for k, v in state.items() if not k.startswith(("decoder", "mask"))}, "encoder alone"),
        (lambda state: without("pos_embed", state), "pos_embed is missing"),
        (lambda state: without("decoder_norm.bias", state), "decoder_norm.bias"),
        (lambda state: {**state, "head.weight": torch.zeros(1)}, "head.weight"),
        (lambda state: {**state, "pos_embed": state["pos_embed"][:, :-1]}, "no square grid"),
        (lambda state: {**state, "patch_embed.proj.weight": torch.zeros(192, 80)}, "another layout"),
        (lambda _: {"fc.weight": torch.zeros(2)}, "no checkpoint in the official layout: cls_token is missing"),
    ],
)
def test_what_is_no_full_checkpoint_says_why(tmp_path, spoil, words):
    state = {name: tensor.contiguous() for name, tensor in spoil(official_state(tiny_model())).items()}
    torch.save({"model": state}, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        with pytest.raises(ValueError, match=words):
            load_official(tmp_path / name, decoder_num_heads=4)


def test_files_that_are_no_checkpoint_say_so(tmp_path):
    save(tiny_model(), tmp_path / "whole.safetensors")
    torch.save({"model": official_state(tiny_model())}, tmp_path / "whole.pth")
    for name in ("whole.safetensors", "whole.pth"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"cut.{name}").write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match="cannot be read"):
            load_official(tmp_path / f"cut.{name}")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        load_official(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no state dict"):
        load_official(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path / "none.pth")


def test_heads_that_do_not_fit_are_named(tmp_path):
    torch.save({"model": official_state(tiny_model())}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="5 heads do not divide the encoder's width 192"):
        load_official(tmp_path / "a.pth", num_heads=5, decoder_num_heads=4)
    with pytest.raises(ValueError, match="decoder heads do not divide"):
        load_official(tmp_path / "a.pth", decoder_num_heads=5)
