"""What the decoder has to predict: pixels cut into patches, raw, normalised, or their principal components.

A target turns patches into what is predicted, and a prediction back into pixels. A new one is one more class here
with its name in ``TARGETS``.

Shapes: B batch, C H W image, N patches (row by row), P values a patch (by row, column and channel in it), Q values
predicted for a patch, X patches of any images.
"""

from collections.abc import Iterable

import torch
from torch import nn

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
    centred_BNP = patches_BNP - mean_BN1
    # Tensor.var is slow on a CPU: it does not vectorise.
    variance_BN1 = centred_BNP.square().sum(dim=-1, keepdim=True) / (patches_BNP.shape[-1] - 1)
    std_BN1 = (variance_BN1 + 1e-6).sqrt()
    return centred_BNP / std_BN1, mean_BN1, std_BN1


def fit_pca(parts: Iterable[torch.Tensor], num_components: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal components of patches, those of the largest variance first.

    A component's sign is free; here its entry of the largest size is positive.

    Args:
        parts: Patches [X, P], some at a time; sums are in float64 on the CPU, where equal parts give equal results.
        num_components: Q, at most P.

    Returns:
        float32 ``mean_P`` and ``basis_PQ``, whose columns have length 1.

    Raises:
        ValueError: Fewer than two patches, or patches that are not finite.
    """
    num, sum_P, product_PP = 0, torch.zeros(()), torch.zeros(())
    for part_XP in parts:
        part_XP = part_XP.double().cpu()
        num += len(part_XP)
        sum_P, product_PP = sum_P + part_XP.sum(dim=0), product_PP + part_XP.T @ part_XP
    if num < 2 or not product_PP.isfinite().all():
        raise ValueError(f"principal components need two patches or more, all of them finite; found {num}")
    mean_P = sum_P / num
    _, direction_PP = torch.linalg.eigh(product_PP / num - mean_P.outer(mean_P))  # in rising order of variance
    basis_PQ = direction_PP.flip(1)[:, :num_components]
    sign_1Q = basis_PQ.gather(0, basis_PQ.abs().argmax(dim=0, keepdim=True)).sign()
    return mean_P.float(), (basis_PQ * sign_1Q).float()


class Raw(nn.Module):
    """Pixels as they are.

    Attributes:
        size: Q.
        note: What a picture of a reconstruction says of it; empty: nothing.
        needs_fit: Whether ``fit`` has to be called before the first loss.
    """

    note = ""
    needs_fit = False

    def __init__(self, patch_values: int, num_components: int) -> None:  # noqa: ARG002
        """Takes P, and the Q of targets that leave it open."""
        super().__init__()
        self.size = patch_values

    def forward(self, patches_BNP: torch.Tensor) -> torch.Tensor:
        """What is to be predicted of float32 patches: [B, N, Q]."""
        return patches_BNP

    def fit(self, parts: Iterable[torch.Tensor]) -> None:
        """Learns from patches of the training data, given some at a time, what is to be predicted of others."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to fit")

    def pixels(self, pred_BNQ: torch.Tensor, patches_BNP: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """A prediction as pixels [B, N, P]; the true patches give what was not predicted."""
        return pred_BNQ

    def flops(self, num_patches: int) -> int:  # noqa: ARG002
        """Of the matrix products that turn so many patches into what is to be predicted."""
        return 0


class Normalized(Raw):
    """Pixels normalised within each patch."""

    note = "Predicted patches: true mean and standard deviation put back."

    def forward(self, patches_BNP: torch.Tensor) -> torch.Tensor:
        """As ``Raw.forward``."""
        return normalize_patches(patches_BNP)[0]

    def pixels(self, pred_BNQ: torch.Tensor, patches_BNP: torch.Tensor) -> torch.Tensor:
        """As ``Raw.pixels``."""
        _, mean_BN1, std_BN1 = normalize_patches(patches_BNP)
        return pred_BNQ * std_BN1 + mean_BN1


class PCA(Raw):
    """The first principal components of a patch, not scaled (table 1d of the paper, where they are 96).

    The components are buffers, which a checkpoint holds. Until ``fit`` they are NaN, so that a fit that is forgotten
    shows itself in the first loss.
    """

    needs_fit = True

    def __init__(self, patch_values: int, num_components: int) -> None:
        """As ``Raw``.

        Raises:
            ValueError: A patch has fewer values than components are asked for.
        """
        super().__init__(patch_values, num_components)
        if not 1 <= num_components <= patch_values:
            found = f"{num_components} target components of patches of {patch_values} values"
            raise ValueError(f"{found}: choose 1 to {patch_values}")
        self.size = num_components
        self.note = f"Predicted patches: from {num_components} principal components of {patch_values}."
        self.mean: torch.Tensor
        self.basis: torch.Tensor
        self.register_buffer("mean", torch.empty(patch_values))
        self.register_buffer("basis", torch.empty(patch_values, num_components))

    def fit(self, parts: Iterable[torch.Tensor]) -> None:
        """Takes the components of these patches, as ``fit_pca`` finds them."""
        mean_P, basis_PQ = fit_pca(parts, self.size)
        self.mean.copy_(mean_P)
        self.basis.copy_(basis_PQ)

    def forward(self, patches_BNP: torch.Tensor) -> torch.Tensor:
        """As ``Raw.forward``."""
        # Autocast would round the target, not only what is learned.
        with torch.autocast(patches_BNP.device.type, enabled=False):
            return (patches_BNP - self.mean) @ self.basis

    def pixels(self, pred_BNQ: torch.Tensor, patches_BNP: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """As ``Raw.pixels``."""
        return pred_BNQ @ self.basis.T + self.mean

    def flops(self, num_patches: int) -> int:
        """As ``Raw.flops``."""
        return 2 * num_patches * self.basis.numel()


TARGETS: dict[str, type[Raw]] = {"raw": Raw, "normalized": Normalized, "pca": PCA}


def make_target(kind: str, patch_values: int, num_components: int) -> Raw:
    """The target of a name.

    Raises:
        ValueError: There is none of that name, or it does not go with the patches.
    """
    if kind not in TARGETS:
        raise ValueError(f"target '{kind}' is unknown: choose {', '.join(TARGETS)}")
    return TARGETS[kind](patch_values, num_components)
