"""Activation checkpointing: less memory, the same gradients."""

import itertools
from typing import Any

import pytest
import torch
from torch.profiler import profile

from mae_core.checkpointing import checkpoint_activations
from mae_core.model import MaskedAutoencoder


def build(checkpointed, **options):
    model = MaskedAutoencoder("vit_tiny_patch16_224", image_size=64, patch_size=8, depth=4, decoder_width=64, **options)
    if checkpointed:
        checkpoint_activations(model)
    return model


def step(model, num_images=8):
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(num_images, 3, 64, 64, generator=generator)
    noise_BN = torch.rand(num_images, 64, generator=generator)
    loss = model(images_BCHW, noise_BN)["loss"]
    loss.backward()
    return loss


@pytest.mark.parametrize("decoder", ["transformer", "mlp"])
def test_gradients_and_names_are_the_same(decoder):
    plain, checkpointed = (build(flag, decoder=decoder, decoder_depth=2) for flag in (False, True))
    assert torch.equal(step(plain), step(checkpointed))
    found = dict(checkpointed.named_parameters())
    assert found.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            ours, theirs = parameter.grad, found[name].grad
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs), name
    images_BCHW = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(plain.features(images_BCHW), checkpointed.features(images_BCHW))


def test_a_step_takes_less_memory():
    peaks = []
    for flag in (False, True):
        model = build(flag)
        step(model)  # gradients are there from now on
        with profile(profile_memory=True) as seen:
            step(model)
        profiler: Any = seen.profiler
        events = profiler.kineto_results.events()
        peaks.append(max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")))
    assert peaks[1] < 0.4 * peaks[0]
