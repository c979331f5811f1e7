"""The FLOPs of a pretraining step against those that PyTorch counts, and against the published arithmetic."""

import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mae_core.checkpointing import checkpoint_activations
from mae_core.flops import StepFlops, step_flops, theory_speedup
from mae_core.model import MaskedAutoencoder

SMALL: dict[str, Any] = {
    "arch": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4, "width": 24, "depth": 3, "num_heads": 3,
    "decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shape": {"image_size": (16, 24), "channels": 1, "mlp_ratio": 3.0, "mask_ratio": 0.5, "class_tokens": 4},
    "large patches": {"patch_size": 8, "image_size": 24, "decoder_depth": 1, "decoder_width": 40},
    "mask tokens in the encoder": {"encoder_mask_tokens": True},
    "loss on all": {"loss_on": "all", "target": "normalized"},
    "mlp": {"decoder": "mlp", "class_tokens": 2},
    "mlp behind mask tokens": {"decoder": "mlp", "encoder_mask_tokens": True, "loss_on": "all"},
    "principal components": {"target": "pca", "target_components": 10},
    "principal components of all": {"target": "pca", "target_components": 48, "loss_on": "all", "mask_cell": 2},
}


def counted(model: MaskedAutoencoder, num_images: int = 2) -> tuple[int, int]:
    """FLOPs that PyTorch counts for one image: of the forward pass, and of the whole step."""
    block: Any
    for block in (*model.encoder.blocks, *model.decoder_blocks):
        if hasattr(block, "attn"):
            block.attn.fused_attn = False  # older counters do not know the CPU's fused kernel
    images_BCHW = torch.zeros(num_images, model.channels, *model.image_size)
    with FlopCounterMode(display=False) as counter:
        loss = model(images_BCHW)["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    return forward // num_images, counter.get_total_flops() // num_images


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_counted(kind):
    model = MaskedAutoencoder(**SMALL | KINDS[kind])
    flops = step_flops(model)
    assert (flops.forward, flops.training) == counted(model)
    assert flops.forward == flops.encoder + flops.decoder + flops.target
    assert (flops.target > 0) == ("components" in kind)
    with torch.device("meta"):
        assert step_flops(MaskedAutoencoder(**SMALL | KINDS[kind])) == flops


OPTIONS: dict[str, tuple[Any, ...]] = {
    "decoder": ("transformer", "mlp"), "encoder_mask_tokens": (False, True), "class_tokens": (1, 3),
    "loss_on": ("masked", "all"), "target": ("raw", "normalized", "pca"), "mask_ratio": (0.75, 0.3),
}  # fmt: skip


def test_flops_are_those_counted_whatever_goes_together():
    for values in itertools.islice(itertools.product(*OPTIONS.values()), 0, None, 5):  # every pair is among them
        options = dict(zip(OPTIONS, values, strict=True))
        model = MaskedAutoencoder(**SMALL | options, target_components=7)
        flops = step_flops(model)
        assert (flops.forward, flops.training) == counted(model, num_images=1), options


def test_what_is_computed_anew_does_not_count():
    model = MaskedAutoencoder(**SMALL)
    flops = step_flops(model)
    checkpoint_activations(model)
    assert step_flops(model) == flops
    assert counted(model)[1] > flops.training


def shapes(arch: str, **options: Any) -> MaskedAutoencoder:
    with torch.device("meta"):
        return MaskedAutoencoder(arch, **options)


def official(model: MaskedAutoencoder) -> StepFlops:
    """The FLOPs of the official code, which projects the masked patches too and runs the head on all tokens."""
    flops, masked = step_flops(model), model.num_patches - model.num_keep
    values = model.channels * model.patch_size**2
    projection = 2 * masked * values * model.width
    head = 2 * (model.num_keep + model.class_tokens) * model.decoder_embed.out_features * values
    training = flops.training + 2 * projection + 3 * head  # pixels want no gradient
    return StepFlops(flops.encoder + projection, flops.decoder + head, 0, training)


# Encoder forward, decoder forward, training (all in GF), and the theoretical speed-up of a step without mask tokens in
# the encoder over one with them, with a decoder of 8 blocks and of 1 (that with mask tokens always has 8).
PUBLISHED = {
    "vit_tiny_patch16_224": (0.61, 10.72, 33.9, 1.17, 6.37),
    "vit_small_patch16_224": (2.29, 10.73, 38.9, 1.54, 5.33),
    "vit_base_patch16_224": (8.82, 10.75, 58.5, 2.36, 4.48),
    "vit_large_patch16_224": (30.75, 10.76, 124.2, 3.23, 4.16),
    "vit_huge_patch14_224": (82.87, 14.26, 291.0, 3.60, 4.12),
}


@pytest.mark.parametrize("arch", PUBLISHED)
def test_flops_of_the_official_code_are_the_published_ones(arch):
    encoder, decoder, training, eight, one = PUBLISHED[arch]
    slow, fast, shallow = shapes(arch, encoder_mask_tokens=True), shapes(arch), shapes(arch, decoder_depth=1)
    found = official(fast)
    assert found.encoder / 1e9 == pytest.approx(encoder, abs=0.0051)
    assert found.decoder / 1e9 == pytest.approx(decoder, abs=0.0051)
    assert found.training / 1e9 == pytest.approx(training, abs=0.051)
    assert official(slow).training / found.training == pytest.approx(eight, abs=0.0051)
    assert official(slow).training / official(shallow).training == pytest.approx(one, abs=0.0051)
    # Ours does less of what both kinds have in common.
    assert eight < theory_speedup(slow, fast) < 1.03 * eight
    assert one < theory_speedup(slow, shallow) < 1.2 * one
