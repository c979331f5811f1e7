"""The arithmetic of a pretraining step: FLOPs of its matrix products, two a multiply-add, for one image.

A forward pass counts every product of a layer, attention's two included. Its backward counts twice as much, the
gradients of the weights (or of attention's second factor) and of the input, but for two: the patch projection is the
first layer and pixels want no gradient, and targets are computed without one. Norms, activations, softmax, masks and
the optimiser are no matrix products; what a fused attention computes anew in its backward does not count.

Letters: S class tokens, N patches, K kept, M masked (K + M = N), P values a patch, Q values predicted for a patch,
D encoder width, E decoder width, T tokens.
"""

from dataclasses import dataclass

from mae_core.layers import transformer_flops
from mae_core.model import MaskedAutoencoder


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a training step for one image.

    Attributes:
        encoder: Forward, with the projection of the patches.
        decoder: Forward, with the layer that leads to it and the head.
        target: Of what is to be predicted; above 0 for principal components alone.
        training: Forward and backward of all of it.
    """

    encoder: int
    decoder: int
    target: int
    training: int

    @property
    def forward(self) -> int:
        """Forward of all of it."""
        return self.encoder + self.decoder + self.target


def step_flops(model: MaskedAutoencoder) -> StepFlops:
    """FLOPs of a training step as this model does it, for one image.

    It does less than the official code, which projects all patches before it drops the masked ones, and runs the head
    on all tokens: here the projection sees the K kept patches, the head the M masked ones (all N with the loss on
    all).

    Args:
        model: Any, also on the ``meta`` device.
    """
    S, N, K, D, E = model.class_tokens, model.num_patches, model.num_keep, model.width, model.decoder_embed.out_features
    P, Q = model.channels * model.patch_size**2, model.target.size
    predicted = N if model.loss_on == "all" else N - K
    encoder_tokens = S + (K if model.encoder_mask_token is None else N)
    projection = 2 * K * P * D
    encoder = projection + transformer_flops(model.encoder.blocks, encoder_tokens)
    decoder = 2 * encoder_tokens * D * E + model.decoder_blocks.flops(S + N) + 2 * predicted * E * Q
    target = model.target.flops(predicted)
    return StepFlops(encoder, decoder, target, 3 * (encoder + decoder) - projection + target)


def theory_speedup(slow: MaskedAutoencoder, fast: MaskedAutoencoder) -> float:
    """How much faster a step of one model is than that of another, if FLOPs were all: the paper's tables 1c and 2.

    A larger measured speed-up is a mistake of the measurement.
    """
    return step_flops(slow).training / step_flops(fast).training
