"""What the decoder has to predict: pixels cut into patches, raw or normalised.

Shapes: B batch, C H W image, N patches (row by row), P values a patch (by row, column and channel in it).
"""

import torch

PatchSize = int | tuple[int, int]


def _height_width(size: PatchSize) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def patchify(images_BCHW: torch.Tensor, patch_size: PatchSize) -> torch.Tensor:
    """Cuts images into patches.

    Args:
        images_BCHW: Any dtype; the patch size divides height and width.
        patch_size: Pixels a side, or (height, width).

    Returns:
        ``patches_BNP`` of the same dtype, with P = patch height * patch width * C.
    """
    p, q = _height_width(patch_size)
    B, C, H, W = images_BCHW.shape
    grid = images_BCHW.reshape(B, C, H // p, p, W // q, q)  # b, c, row, y, column, x
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // q), p * q * C)


def unpatchify(
    patches_BNP: torch.Tensor, patch_size: PatchSize, image_size: tuple[int, int], channels: int
) -> torch.Tensor:
    """Puts patches back together: the inverse of ``patchify``.

    Args:
        patches_BNP: All N patches of each image.
        patch_size: Pixels a side, or (height, width).
        image_size: (H, W).
        channels: C.

    Returns:
        ``images_BCHW`` of the same dtype.
    """
    p, q = _height_width(patch_size)
    H, W = image_size
    grid = patches_BNP.reshape(len(patches_BNP), H // p, W // q, p, q, channels)  # b, row, column, y, x, c
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches_BNP), channels, H, W)


def normalize_patches(patches_BNP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gives every patch mean 0 and variance 1 over its own values (the paper's normalised-pixel target).

    The variance is the unbiased one, and 1e-6 is added to it under the root, as in the paper's code.

    Args:
        patches_BNP: Floating point.

    Returns:
        The normalised patches and, each [B, N, 1], the ``mean`` and ``std`` that put a prediction back into
        pixels: ``prediction * std + mean``.
    """
    mean_BN1 = patches_BNP.mean(dim=-1, keepdim=True)
    std_BN1 = (patches_BNP.var(dim=-1, keepdim=True, unbiased=True) + 1e-6).sqrt()
    return (patches_BNP - mean_BN1) / std_BN1, mean_BN1, std_BN1
