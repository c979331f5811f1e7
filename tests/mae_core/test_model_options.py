"""The method's options: what each changes, and that weights of each come back from a file."""

from typing import Any

import numpy as np
import pytest
import timm
import torch

from mae_core.classifier import Classifier
from mae_core.looking import cls_attention
from mae_core.masking import random_masking
from mae_core.model import MaskedAutoencoder
from mae_core.randomness import mask_keys
from mae_core.weights import encoder_state, load_official, load_weights, save

SMALL: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "num_heads": 3, "decoder_width": 16, "decoder_depth": 2,
    "decoder_heads": 2,
}  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {"decoder": "mlp"},
    {"encoder_mask_tokens": True},
    {"encoder_mask_tokens": True, "decoder": "mlp", "loss_on": "all", "class_tokens": 3},
    {"target": "pca", "target_components": 7},
    {"loss_on": "all"},
    {"class_tokens": 8},
    {"mask": "block"},
    {"mask": "grid"},
    {"mask_cell": 2},
]


def model_of(**options) -> MaskedAutoencoder:
    model = MaskedAutoencoder("vit_tiny_patch16_224", **{**SMALL, **options})
    if model.target.needs_fit:
        model.target.fit([model.patches(images(50)).flatten(0, 1)])
    return model


def images(num, seed=0):
    return torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def noise(model, num):
    return model.masking.noise(mask_keys(0, np.zeros(num, np.int64), np.arange(num)))


def randomize(model):
    """Random values everywhere but in the position tables, so that tokens count too."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=generator)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_learns_and_a_sample_of_weight_0_leaves_no_trace(options):
    model = model_of(**options)
    images_BCHW, weight_B = images(4), torch.tensor([1.0, 1.0, 0.0, 1.0])
    noise_BN = noise(model, 4)
    images_BCHW[2] = torch.nan
    out = model(images_BCHW, noise_BN, weight_B=weight_B, denominator=3)
    out["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, grad in gradients.items() if grad is None or not grad.abs().sum() > 0]
    assert not missing, "workers would wait for these in an all-reduce"
    rest = torch.tensor([0, 1, 3])
    torch.testing.assert_close(out["loss"], model(images_BCHW[rest], noise_BN[rest])["loss"])
    assert out["pred"].shape == (4, 16 - model.num_keep, model.target.size)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weights_come_back_from_a_file(tmp_path, options):
    model = model_of(**options)
    randomize(model)
    save(model, tmp_path / "model.safetensors")
    loaded = load_official(tmp_path / "model.safetensors", decoder_num_heads=2)
    again, whole = load_weights(tmp_path / "model.safetensors")
    assert whole
    out = model(images(3), noise(model, 3))
    for other in (loaded, again):
        assert other.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(other.features(images(3), "cls"), model.features(images(3), "cls"))
        latent = other.encode(images(3), out["keep"], out["masked"])
        torch.testing.assert_close(other.decode(latent, out["keep"], out["masked"]), out["pred"])


@pytest.mark.parametrize("decoder", ["transformer", "mlp"])
def test_a_prediction_depends_on_no_order_but_on_every_visible_patch(decoder):
    model = model_of(decoder=decoder)
    randomize(model)
    images_BCHW = images(2)
    keep_BK, masked_BM = random_masking(noise(model, 2), model.num_keep)
    latent = model.encode(images_BCHW, keep_BK)
    pred_BMQ = model.decode(latent, keep_BK, masked_BM)
    # Tokens in another order, or asked for in another order: the same predictions.
    turned = torch.cat([latent[:, :1], latent[:, 1:].flip(1)], dim=1)
    torch.testing.assert_close(model.decode(turned, keep_BK.flip(1), masked_BM), pred_BMQ)
    torch.testing.assert_close(model.decode(latent, keep_BK, masked_BM.flip(1)).flip(1), pred_BMQ)
    for token in range(latent.shape[1]):
        other = latent.clone()
        other[:, token] += 1.0
        moved = (model.decode(other, keep_BK, masked_BM) - pred_BMQ).abs().amax(dim=2)
        assert (moved > 1e-6).all(), f"a masked patch does not see token {token}"


def test_a_mixer_holds_no_attention():
    names = [name for name, _ in model_of(decoder="mlp").named_parameters() if name.startswith("decoder_blocks.")]
    assert names
    assert not any("attn" in name for name in names)


def test_with_mask_tokens_the_encoder_sees_all_places_but_not_what_is_masked():
    model, plain = model_of(encoder_mask_tokens=True), model_of()
    randomize(model)
    images_BCHW = images(2)
    keep_BK, masked_BM = random_masking(noise(model, 2), model.num_keep)
    latent = model.encode(images_BCHW, keep_BK, masked_BM)
    assert latent.shape == (2, 17, 24)
    # As timm's encoder on tokens in the image's order, with mask tokens in place of the masked patches.
    encoder: Any = model.encoder
    patches_BND = encoder.patch_embed(images_BCHW)
    patches_BND[torch.arange(2)[:, None], masked_BM] = model.encoder_mask_token
    expected = encoder.norm(encoder.blocks(encoder._pos_embed(patches_BND)))
    order = torch.cat([keep_BK, masked_BM], dim=1)
    torch.testing.assert_close(latent[:, 1:], expected[:, 1:].gather(1, order[:, :, None].expand(-1, -1, 24)))
    # Whole images have no masked patches, and the one token is moved, not added.
    torch.testing.assert_close(model.features(images_BCHW), encoder.forward_features(images_BCHW)[:, 1:].mean(1))
    moved = model.state_dict().keys() ^ plain.state_dict().keys()
    assert moved == {"mask_token", "encoder_mask_token"}


def test_the_loss_on_all_patches_is_the_mean_over_them():
    masked, both = model_of(), model_of(loss_on="all")
    out, whole = masked(images(3), noise(masked, 3)), both(images(3), noise(masked, 3))
    torch.testing.assert_close(whole["pred"], out["pred"])
    latent = both.encode(images(3), out["keep"])
    pred_BNQ = both.decode(latent, out["keep"], out["masked"], visible=True)
    visible_B = both.loss(images(3), pred_BNQ[:, : both.num_keep], out["keep"])
    torch.testing.assert_close(16 * whole["loss_B"], 12 * out["loss_B"] + 4 * visible_B)


def test_several_class_tokens_load_into_timm_as_registers():
    model = model_of(class_tokens=4)
    randomize(model)
    vit: Any = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3,
        reg_tokens=3,
    )  # fmt: skip
    vit.load_state_dict(encoder_state(model), strict=True)
    with torch.no_grad():
        tokens = vit.eval().forward_features(images(2))
        torch.testing.assert_close(model.features(images(2)), tokens[:, 4:].mean(1))
        torch.testing.assert_close(model.features(images(2), "cls"), tokens[:, :4].mean(1))
    assert not encoder_state(model)["pos_embed"][:, :4].any()
    # They begin apart from each other, or they would stay the same.
    fresh = torch.cat(model_of(class_tokens=4)._encoder_extras()[0], dim=1)
    assert (fresh[0, :, None] - fresh[0, None]).abs().sum(dim=2).fill_diagonal_(1.0).min() > 0.1


def test_a_classifier_and_attention_know_several_class_tokens():
    model = model_of(class_tokens=4)
    randomize(model)
    for pool in ("mean", "cls"):
        classifier = Classifier(model, 3, pool=pool).eval()
        torch.testing.assert_close(classifier.features(images(2)), model.features(images(2), pool))
        keep_BK = random_masking(noise(model, 2), model.num_keep)[0]
        assert classifier.encode(images(2), keep_BK).shape == (2, 8, 24)
    assert Classifier(model, 3, image_size=32).eval()(images(2).repeat(1, 1, 2, 2)).shape == (2, 3)
    attention_BhHW = cls_attention(model, images(2))
    assert attention_BhHW.shape == (2, 3, 4, 4)
    assert (attention_BhHW.flatten(2).sum(dim=2) < 1).all()


def test_a_target_that_was_not_fitted_shows_itself():
    model = MaskedAutoencoder("vit_tiny_patch16_224", **SMALL, target="pca", target_components=7)
    assert model(images(2))["loss"].isnan()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"decoder": "lstm"}, "decoder 'lstm' is unknown: choose transformer, mlp"),
        ({"target": "pca"}, "96 target components of patches of 48 values"),
        ({"class_tokens": 0}, "choose at least 1"),
        ({"loss_on": "some"}, "choose masked or all"),
        ({"mask": "grid", "mask_ratio": 0.5}, "mask ratio of 0.75"),
    ],
)
def test_unfit_options_say_what_to_do(options, told):
    with torch.device("meta"), pytest.raises(ValueError, match=told):
        MaskedAutoencoder("vit_tiny_patch16_224", **{**SMALL, **options})
