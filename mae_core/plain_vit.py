"""The encoder's architecture: which of timm's Vision Transformers are plain ones, and their fixed positions."""

from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from mae_core.architectures import EXAMPLES, check_name
from mae_core.layers import is_plain_attention, is_plain_mlp


def sincos_table(grid_size: tuple[int, int], width: int, class_tokens: int = 1) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions: the first half of the width is the column's, the second the row's.

    Each half is ``width / 4`` sines, then as many cosines, of the coordinate at wavelengths from 2 pi to
    20,000 pi (Vaswani et al., 2017, in two dimensions). The class tokens, in front, have position 0.

    Args:
        grid_size: Patches down and across.
        width: Width of a token, divisible by 4.
        class_tokens: S.

    Returns:
        float32 [1, S + N, width], computed in float64.
    """
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    row, column = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64, device="cpu") for n in grid_size), indexing="ij"
    )
    angles = [coordinate.reshape(-1, 1) * frequency for coordinate in (column, row)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return nn.functional.pad(table, (0, 0, class_tokens, 0))[None].float()


def _is_plain(vit: nn.Module) -> bool:
    if type(vit) is not VisionTransformer or vit.cls_token is None or vit.num_prefix_tokens != 1:
        return False
    block: Any = vit.blocks[0]
    attention: Any = block.attn
    return (
        vit.pos_embed is not None
        and not vit.no_embed_class
        and isinstance(vit.norm_pre, nn.Identity)
        and isinstance(vit.norm, nn.LayerNorm)
        and vit.norm.eps == 1e-6
        and type(block) is Block
        and isinstance(block.ls1, nn.Identity)
        and attention.qkv.bias is not None
        and is_plain_attention(attention)
        and is_plain_mlp(block.mlp)
    )


def plain_vit(arch: str) -> Any:
    """The architecture with timm's own sizes, without memory.

    Raises:
        ValueError: timm does not know it, or it is no plain ViT.
    """
    check_name(arch, timm.list_models(module="vision_transformer"))
    with torch.device("meta"):
        vit = timm.create_model(arch, pretrained=False, num_classes=0)
    if not _is_plain(vit):
        raise ValueError(
            f"arch '{arch}' is no plain ViT (class token, no registers, pre-norm, layer scale or average "
            f"pooling): use for example {EXAMPLES}, and set width, depth and heads"
        )
    return vit
