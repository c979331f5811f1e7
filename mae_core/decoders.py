"""What stands between the tokens of the visible patches and the predictions: blocks that mix all tokens.

A new decoder is one more class here with its name in ``DECODERS``. It takes the tokens [B, T, E] (class tokens, then
the patches in any order) and ``order_BN``, which says which patch each of them is, and gives as many in that order. It
knows the FLOPs of its matrix products (``mae_core.flops``).

Shapes: B batch, N patches, T tokens, E decoder width.
"""

from typing import Any

import torch
from timm.layers.norm import LayerNorm
from timm.models.mlp_mixer import MixerBlock
from timm.models.vision_transformer import Block
from torch import nn

from mae_core.layers import transformer_flops
from mae_core.masking import take


class TransformerBlocks(nn.ModuleList):
    """Blocks of a Vision Transformer (section 3 of the paper). Attention sees no order, so tokens keep theirs."""

    def __init__(self, width: int, depth: int, num_heads: int, num_tokens: int) -> None:  # noqa: ARG002
        """Makes ``depth`` blocks for ``num_tokens`` tokens of ``width`` values."""
        super().__init__(Block(width, num_heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth))

    def forward(self, tokens: torch.Tensor, order_BN: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Mixes the tokens."""
        for block in self:
            tokens = block(tokens)
        return tokens

    def flops(self, num_tokens: int) -> int:
        """Of a forward pass over the tokens of one image."""
        return transformer_flops(self, num_tokens)


class MixerBlocks(nn.ModuleList):
    """Blocks of an MLP-Mixer (Tolstikhin et al., 2021, as timm has them): MLPs alone, across tokens and within them.

    An MLP on each token by itself would tell a masked patch nothing of the visible ones. This one mixes the tokens
    by fixed weights for each place, so it works on them in the image's order.
    """

    def __init__(self, width: int, depth: int, num_heads: int, num_tokens: int) -> None:  # noqa: ARG002
        """Makes ``depth`` blocks for ``num_tokens`` tokens of ``width`` values; there are no heads."""
        super().__init__(MixerBlock(width, num_tokens) for _ in range(depth))

    def forward(self, tokens: torch.Tensor, order_BN: torch.Tensor) -> torch.Tensor:
        """Mixes the tokens."""
        num_class = tokens.shape[1] - order_BN.shape[1]
        place_BN = order_BN.argsort(dim=1)
        tokens = torch.cat([tokens[:, :num_class], take(tokens[:, num_class:], place_BN)], dim=1)
        for block in self:
            tokens = block(tokens)
        return torch.cat([tokens[:, :num_class], take(tokens[:, num_class:], order_BN)], dim=1)

    def flops(self, num_tokens: int) -> int:
        """Of a forward pass over the tokens of one image: two MLPs of two layers a block."""
        blocks: list[Any] = list(self)
        hidden = sum(block.mlp_tokens.fc1.out_features + block.mlp_channels.fc1.out_features for block in blocks)
        return 4 * num_tokens * blocks[0].mlp_channels.fc1.in_features * hidden


DECODERS: dict[str, type[TransformerBlocks] | type[MixerBlocks]] = {
    "transformer": TransformerBlocks,
    "mlp": MixerBlocks,
}


def make_decoder_blocks(
    kind: str, *, width: int, depth: int, num_heads: int, num_tokens: int
) -> TransformerBlocks | MixerBlocks:
    """The decoder's blocks of a name.

    Args:
        kind: A name in ``DECODERS``.
        width: E.
        depth: Blocks.
        num_heads: Attention heads, where there is attention.
        num_tokens: T: class tokens and all patches.

    Raises:
        ValueError: There is none of that name.
    """
    if kind not in DECODERS:
        raise ValueError(f"decoder '{kind}' is unknown: choose {', '.join(DECODERS)}")
    return DECODERS[kind](width, depth, num_heads, num_tokens)
