"""Looking into an encoder without labels: where it attends, what its patches share, which images it finds alike.

B images, C channels, H and W height and width in pixels, N patches, D feature width, Q queries, K neighbours.
"""

from typing import Any

import numpy as np
import torch

from mae_core.model import MaskedAutoencoder
from mae_core.probes import _checked

_BASE_ROWS = 1 << 16
# Percent of the patches; what lies outside takes the first or the last shade.
_RANGE = (1, 99)
_GREY = 128


@torch.no_grad()
def cls_attention(model: MaskedAutoencoder, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Where the class token looks in the last encoder block, when all patches are visible; of several the mean.

    The share that class tokens get is left out and not made up for: the values of a head sum to less than 1, and
    what is missing is that share.

    Args:
        model: A masked autoencoder.
        images_BCHW: Floating point, normalised as in training.

    Returns:
        float32 ``attention_BhHW``: [B, heads, rows, columns] of the patch grid, on the model's device.

    Raises:
        ValueError: The images are not of the model's shape.
    """
    block: Any = model.encoder.blocks[-1]
    attn = block.attn
    caught = []
    # The fused attention never holds its weights. Its queries and keys are caught on their way in, so that nothing
    # of the encoder is written a second time here.
    handle = attn.qkv.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    try:
        model.encode(images_BCHW)
    finally:
        handle.remove()
    (qkv,) = caught
    S = model.class_tokens
    query, key, _ = qkv.float().unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    logits = (query[:, :, :S, None] * attn.scale * key[:, :, None]).sum(dim=4)  # [B, heads, S, S + N]
    return logits.softmax(dim=3).mean(dim=2)[:, :, S:].unflatten(2, model.grid_size)


def pca_colours(patches_BND: torch.Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Colours patches by the first three principal components of their features: red, green, blue.

    The components are those of all given images together, so one colour means one thing in all of them, but not
    between two calls. A component's sign is free; here the rarer side is the brighter one (its third moment is not
    negative), which does not depend on the basis of the features. The shades span the 1st to 99th percentile. A
    component in which nothing varies is a constant grey.

    Args:
        patches_BND: Patch features, without the class token.
        grid: Patches down and across.

    Returns:
        uint8 [B, rows, columns, 3].

    Raises:
        ValueError: Features are not finite, narrower than 3, or not as many as the grid has patches.
    """
    B, N, D = patches_BND.shape
    if grid[0] * grid[1] != N or D < 3:
        raise ValueError(
            f"patch features of shape {[B, N, D]} do not fit a grid of {grid[0]}x{grid[1]}: expected "
            f"{grid[0] * grid[1]} patches without the class token, and a width of at least 3"
        )
    features_XD = _checked(patches_BND.flatten(0, 1), "patch").double()  # X: the patches of all images
    energy = features_XD.square().sum()
    features_XD = features_XD - features_XD.mean(dim=0)
    # Through the D x D matrix: images have many more patches than features are wide.
    variance_D, direction_DD = torch.linalg.eigh(features_XD.T @ features_XD)
    variance_3, direction_D3 = variance_D[-3:].flip(0), direction_DD[:, -3:].flip(1)
    score_X3 = features_XD @ direction_D3
    score_X3 = torch.where(score_X3.pow(3).sum(dim=0) < 0, -score_X3, score_X3).cpu().numpy()
    low_3, high_3 = np.percentile(score_X3, _RANGE, axis=0)
    # Without this, rounding errors would be stretched to full colours.
    varies_3 = (variance_3 > 1e-12 * energy).cpu().numpy() & (high_3 > low_3)
    shade_X3 = ((score_X3 - low_3) / np.where(varies_3, high_3 - low_3, 1)).clip(0, 1) * 255
    return np.where(varies_3, shade_X3.round(), _GREY).astype(np.uint8).reshape(B, *grid, 3)


def nearest(
    query_QD: torch.Tensor, base_ND: torch.Tensor, k: int, exclude_self: bool = False, *, block: int = 1 << 24
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the k most similar base samples of each query, by cosine similarity.

    Args:
        query_QD: Features to find neighbours of.
        base_ND: Features to find them among, on the same device. Here N counts samples.
        k: Neighbours of a query; all where there are fewer.
        exclude_self: The queries are the first Q of the base (or all), and none is a neighbour of itself.
        block: Similarities held at once; bounds the memory beside the features (64 MiB by default).

    Returns:
        int64 indices into the base and float32 similarities in [-1, 1], both [Q, K], the most similar first. A
        feature of zeros has similarity 0 to all. Equal similarities come in any order.

    Raises:
        ValueError: Features are not finite or do not fit together, or there is no neighbour to find.
    """
    query_QD, base_ND = _checked(query_QD, "query"), _checked(base_ND, "base")
    if query_QD.shape[1] != base_ND.shape[1]:
        raise ValueError(f"query features are {query_QD.shape[1]} wide, base features {base_ND.shape[1]}")
    if exclude_self and len(query_QD) > len(base_ND):
        raise ValueError(
            f"{len(query_QD)} queries cannot be the first of {len(base_ND)} base samples: give the same features "
            "twice, or leave exclude_self out"
        )
    k = min(k, len(base_ND) - exclude_self)
    if k < 1:
        raise ValueError("no neighbour to find: k must be at least 1, and the base larger than the query itself")
    base_rows = min(len(base_ND), _BASE_ROWS, block)
    query_rows = max(1, block // base_rows)
    found = [
        _nearest_of_block(query_QD[start : start + query_rows], start, base_ND, k, exclude_self, base_rows)
        for start in range(0, len(query_QD), query_rows)
    ]
    index_QK, similarity_QK = (torch.cat(parts) for parts in zip(*found, strict=True))
    return index_QK, similarity_QK.clamp(-1, 1)


def _nearest_of_block(
    query_QD: torch.Tensor, first: int, base_ND: torch.Tensor, k: int, exclude_self: bool, base_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``nearest`` of queries ``first`` and following, with a running list of the best over parts of the base."""
    unit_QD = torch.nn.functional.normalize(query_QD, dim=1)
    self_Q1 = torch.arange(first, first + len(query_QD), device=query_QD.device)[:, None]
    best_QK = unit_QD.new_empty(len(unit_QD), 0)
    index_QK = self_Q1.new_empty(len(unit_QD), 0)
    for start in range(0, len(base_ND), base_rows):
        part_RD = torch.nn.functional.normalize(base_ND[start : start + base_rows], dim=1)
        number_R = torch.arange(start, start + len(part_RD), device=query_QD.device)
        similarity_QR = unit_QD @ part_RD.T
        if exclude_self:
            similarity_QR.masked_fill_(number_R == self_Q1, -torch.inf)
        part_QK, place_QK = similarity_QR.topk(min(k, len(part_RD)), dim=1)
        both, numbers = torch.cat((best_QK, part_QK), dim=1), torch.cat((index_QK, number_R[place_QK]), dim=1)
        best_QK, order_QK = both.topk(min(k, both.shape[1]), dim=1)
        index_QK = numbers.gather(1, order_QK)
    return index_QK, best_QK
