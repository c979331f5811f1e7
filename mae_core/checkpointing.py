"""Activation checkpointing: a block's activations are computed anew in the backward pass instead of being kept."""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from mae_core.model import MaskedAutoencoder


def checkpoint_activations(model: MaskedAutoencoder) -> None:
    """Makes a model keep only the inputs of its encoder's and decoder's blocks for the backward pass.

    A step then computes the blocks' forward twice, a third more arithmetic, and gives the same gradients. Names of
    parameters, and passes that want no gradient, stay as they are.

    Args:
        model: Changed in place.
    """
    block: Any
    for block in (*model.encoder.blocks, *model.decoder_blocks):
        block.forward = functools.partial(_run, block.forward)


def _run(forward: Any, *args: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return forward(*args)
    # Nothing in a block is random, and keeping the generators' state would wait for a GPU.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
