"""The model against transformers' and against what the paper says of it."""

import pytest
import timm
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from benchmarks.step_arms import transformers_state
from mae_core.masking import num_kept, random_masking
from mae_core.model import MaskedAutoencoder
from mae_core.targets import normalize_patches, patchify, unpatchify

SMALL = {
    "patch_size": 4, "width": 24, "depth": 2, "num_heads": 3, "decoder_width": 16, "decoder_depth": 2,
    "decoder_heads": 2,
}  # fmt: skip


def small_model(**changes) -> MaskedAutoencoder:
    return MaskedAutoencoder("vit_tiny_patch16_224", **{"image_size": 16, **SMALL, **changes})


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_noise(batch: int, num_patches: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, num_patches, generator=torch.Generator().manual_seed(seed))


def randomize(model: torch.nn.Module) -> None:
    """Random values everywhere, so that biases and norms count too."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=generator)


@pytest.mark.parametrize("target", ["raw", "normalized"])
def test_equal_to_transformers(target):
    ours = small_model(target=target)
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
            intermediate_size=96, decoder_hidden_size=16, decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2, decoder_intermediate_size=64, layer_norm_eps=1e-6, mask_ratio=0.75,
            norm_pix_loss=target == "normalized", hidden_act="gelu",
        )
    )  # fmt: skip
    randomize(ours)
    theirs.load_state_dict(transformers_state(dict(ours.state_dict())), strict=True)

    images_BCHW, noise_BN = random_images(3, 3, 16, 16), random_noise(3, 16)
    out, expected = ours(images_BCHW, noise_BN), theirs(images_BCHW, noise=noise_BN)
    out["loss"].backward()
    expected.loss.backward()
    torch.testing.assert_close(out["loss"], expected.loss, rtol=1e-5, atol=1e-5)
    masked = out["masked"]
    assert torch.equal(masked.sort(dim=1).values, expected.mask.nonzero()[:, 1].reshape(3, 12))
    logits_BMP = expected.logits.gather(1, masked[:, :, None].expand(-1, -1, 48))
    torch.testing.assert_close(out["pred"], logits_BMP, rtol=1e-5, atol=1e-5)
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    gradients = transformers_state(gradients)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("image_size", "channels"), [((8, 24), 1), ((24, 8), 5)])
def test_any_shape_and_channels_encode_like_timm(image_size, channels):
    model = small_model(image_size=image_size, channels=channels)
    randomize(model)
    images_BCHW = random_images(2, channels, *image_size)
    with torch.no_grad():
        tokens = model.encoder.forward_features(images_BCHW)
        torch.testing.assert_close(model.encode(images_BCHW), tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.features(images_BCHW), tokens[:, 1:].mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.features(images_BCHW, "cls"), tokens[:, 0], rtol=1e-5, atol=1e-5)
    out = model(images_BCHW, random_noise(2, model.num_patches))
    assert out["pred"].shape == (2, 9, 16 * channels)
    assert out["loss"].isfinite()


def test_positions_are_the_official_ones_and_fixed():
    tables = dict(small_model(image_size=(8, 24)).named_parameters())
    for name, width in (("encoder.pos_embed", 24), ("decoder_pos_embed", 16)):
        rows_first = build_2d_sinusoidal_position_embedding(2, 6, embed_dim=width, cls_token=True)
        columns_first = rows_first.roll(width // 2, dims=1)  # the order of MAE's checkpoints
        assert not tables[name].requires_grad
        torch.testing.assert_close(tables[name][0].detach(), columns_first)


def test_masked_pixels_do_not_reach_the_latent_and_visible_ones_do():
    model = small_model()
    images_BCHW, noise_BN = random_images(2, 3, 16, 16), random_noise(2, 16)
    keep_BK, masked_BM = random_masking(noise_BN, model.num_keep)
    for changed_BX, reaches in ((masked_BM, False), (keep_BK, True)):
        patches_BNP = patchify(images_BCHW, 4)
        patches_BNP[torch.arange(2)[:, None], changed_BX] = 7.0
        other_BCHW = unpatchify(patches_BNP, 4, (16, 16), 3)
        same = torch.equal(model.encode(images_BCHW, keep_BK), model.encode(other_BCHW, keep_BK))
        assert same != reaches
        assert torch.equal(model(images_BCHW, noise_BN)["pred"], model(other_BCHW, noise_BN)["pred"]) != reaches


def test_smallest_noise_is_kept_in_any_dtype():
    noise_BN = torch.tensor([[30, 10, 20, 0], [2**62, 5, 2**62 + 1, 6]])
    keep_BK, masked_BM = random_masking(noise_BN, 2)
    assert keep_BK.tolist() == [[3, 1], [1, 3]]
    assert masked_BM.tolist() == [[2, 0], [0, 2]]
    assert random_masking(torch.zeros(1, 64), 16)[0].tolist() == [list(range(16))]


def test_without_noise_masks_differ_between_samples():
    keep = small_model()(random_images(8, 3, 16, 16))["keep"].sort(dim=1).values
    assert len(keep.unique(dim=0)) > 1


@pytest.mark.parametrize("target", ["raw", "normalized"])
@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_a_sample_of_weight_0_leaves_no_trace(bad, target):
    model = small_model(target=target)
    images_BCHW, noise_BN = random_images(4, 3, 16, 16), random_noise(4, 16)
    images_BCHW[2] = bad
    weight_B = torch.tensor([1.0, 1.0, 0.0, 0.5])
    out = model(images_BCHW, noise_BN, weight_B=weight_B, denominator=8)
    out["loss"].backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    rest = [0, 1, 3]
    alone = model(images_BCHW[rest], noise_BN[rest])
    ((alone["loss_B"] * weight_B[rest]).sum() / 8).backward()
    torch.testing.assert_close(out["loss"], (alone["loss_B"] * weight_B[rest]).sum() / 8)
    torch.testing.assert_close(out["loss_B"][rest], alone["loss_B"])
    assert out["loss_B"][2] == 0
    for ours, wanted in zip(gradients, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)


def test_loss_stays_float32_under_autocast():
    model = small_model(target="normalized")
    images_BCHW, noise_BN = random_images(4, 3, 16, 16), random_noise(4, 16)
    expected = model(images_BCHW, noise_BN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images_BCHW, noise_BN)
    assert out["pred"].dtype == torch.bfloat16
    assert out["loss"].dtype == out["loss_B"].dtype == torch.float32
    torch.testing.assert_close(out["loss"], expected["loss"], rtol=0.02, atol=0.0)


def test_initialisation_is_the_papers():
    model = small_model(width=192)
    parameters = dict(model.named_parameters())
    qkv, projection = parameters["encoder.blocks.0.attn.qkv.weight"], parameters["encoder.patch_embed.proj.weight"]
    for weight, fans in ((qkv, 192 + 3 * 192), (projection, 192 + 48)):
        bound = (6 / fans) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert parameters["encoder.cls_token"].std().item() == pytest.approx(0.02, rel=0.3)
    for name, parameter in parameters.items():
        if parameter.ndim == 1:
            assert (parameter == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name


def test_initialisation_depends_on_the_seed_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = small_model(seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"
    torch.manual_seed(4)
    second, third = small_model(seed=1), small_model(seed=2)
    assert all(torch.equal(tensor, first[name]) for name, tensor in second.state_dict().items())
    assert not torch.equal(third.state_dict()["decoder_pred.weight"], first["decoder_pred.weight"])
    third.init_weights(1)
    assert all(torch.equal(tensor, first[name]) for name, tensor in third.state_dict().items())


def test_a_forgotten_parameter_is_named():
    model = small_model()
    model.decoder_norm.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match=r"decoder_norm\.extra"):
        model.init_weights(0)


def test_on_the_meta_device_only_shapes_are_made():
    with torch.device("meta"):
        model = MaskedAutoencoder("vit_huge_patch14_224")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert (model.num_patches, model.num_keep) == (256, 64)


def test_compiles_into_one_graph_once():
    model = small_model()
    images_BCHW, weight_B = random_images(4, 3, 16, 16), torch.tensor([1.0, 0.0, 1.0, 1.0])
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(
        compiled(images_BCHW, random_noise(4, 16), weight_B=weight_B, denominator=8)["loss"],
        model(images_BCHW, random_noise(4, 16), weight_B=weight_B, denominator=8)["loss"],
    )
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(images_BCHW * 2, random_noise(4, 16, seed=9), weight_B=1 - weight_B, denominator=8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "vit_tiny_patch16_225"}, "did you mean vit_tiny_patch16_224"),
        ({"arch": "resnet50"}, "no Vision Transformer"),
        ({"arch": "vit_base_patch14_reg4_dinov2"}, "no plain ViT"),
        ({"arch": "vit_base_patch16_clip_224"}, "no plain ViT"),
        ({"image_size": (16, 18)}, "16x18 is not divisible by the patch size 4"),
        ({"mask_ratio": 0.99}, r"none of the 16 patches visible: choose a lower one, for example 0\.75"),
        ({"mask_ratio": 1.0}, "visible"),
        ({"mask_ratio": 0.0}, "none of the 16 patches masked"),
        ({"mask_ratio": float("nan")}, "nan"),
        ({"num_heads": 5}, "5 encoder heads do not divide the encoder width 24"),
        ({"decoder_heads": 3}, "3 decoder heads do not divide the decoder width 16"),
        ({"width": 27}, "27 is not divisible by 4"),
        ({"decoder_width": 18}, "18 is not divisible by 4"),
    ],
)
def test_unfit_sizes_say_what_to_do(changes, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        MaskedAutoencoder(**{"arch": "vit_tiny_patch16_224", "image_size": 16, **SMALL, **changes})


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 1, 16, 16\] do not fit"):
        small_model()(random_images(2, 1, 16, 16))


def test_a_ratio_keeps_what_the_papers_code_keeps():
    assert [num_kept(196, ratio) for ratio in (0.1, 0.5, 0.75, 0.9)] == [176, 98, 49, 19]
    assert (num_kept(2, 0.5), num_kept(4, 0.75)) == (1, 1)


def test_patches_are_rows_columns_and_channels_last():
    images_BCHW = random_images(2, 3, 6, 8)
    patches_BNP = patchify(images_BCHW, (3, 2))
    for patch in range(8):
        top, left = 3 * (patch // 4), 2 * (patch % 4)
        block = images_BCHW[:, :, top : top + 3, left : left + 2].permute(0, 2, 3, 1)
        assert torch.equal(patches_BNP[:, patch], block.reshape(2, -1))
    assert torch.equal(unpatchify(patches_BNP, (3, 2), (6, 8), 3), images_BCHW)


def test_normalised_patches_go_back_into_pixels():
    patches_BNP = random_images(2, 4, 48) * 3 + 5
    normalised, mean, std = normalize_patches(patches_BNP)
    torch.testing.assert_close(normalised.var(dim=-1, unbiased=True), torch.ones(2, 4), rtol=1e-5, atol=0)
    torch.testing.assert_close(normalised * std + mean, patches_BNP)
    assert normalize_patches(torch.ones(1, 1, 12))[0].eq(0).all()


def test_timms_own_sizes_are_taken_where_none_are_given():
    with torch.device("meta"):
        encoder = MaskedAutoencoder("vit_large_patch14_224").encoder
        expected = timm.create_model("vit_large_patch14_224", num_classes=0)
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in expected.state_dict().items()}
