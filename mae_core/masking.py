"""Which patches the encoder sees: noise in, patch indices out.

Shapes: B batch, N patches, K kept, M masked (K + M = N).
"""

import torch


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """How many patches stay visible: ``int(N * (1 - mask_ratio))``, as in the paper's code.

    Args:
        num_patches: N.
        mask_ratio: Share of the patches that is hidden, between 0 and 1.

    Returns:
        K, with ``1 <= K < N``.

    Raises:
        ValueError: No patch would be visible, or none masked.
    """
    kept = int(num_patches * (1 - mask_ratio)) if 0 < mask_ratio < 1 else 0
    if 1 <= kept < num_patches:
        return kept
    if num_patches < 2:
        raise ValueError("an image of one patch cannot be masked: choose a smaller patch size or a larger image")
    what, mend = ("masked", "higher") if mask_ratio <= 0 or kept == num_patches else ("visible", "lower")
    raise ValueError(
        f"mask ratio {mask_ratio} leaves none of the {num_patches} patches {what}: choose a {mend} one, for example "
        f"{0.75 if num_patches >= 4 else 0.5}"
    )


def random_masking(noise_BN: torch.Tensor, num_keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps the patches with the smallest noise of each sample (section 3 of the paper).

    Args:
        noise_BN: Any sortable dtype; among equal values the patch with the lower index is kept.
        num_keep: K.

    Returns:
        ``keep_BK`` and ``masked_BM``: int64 patch indices in the order of their noise. That order carries no
        meaning (attention does not see it), and a second sort for an ascending one would be work for nothing.
    """
    order_BN = torch.argsort(noise_BN, dim=1, stable=True)
    return order_BN[:, :num_keep], order_BN[:, num_keep:]


def take(tokens_BNX: torch.Tensor, index_BK: torch.Tensor) -> torch.Tensor:
    """Picks tokens of each sample: [B, N, X] and int64 [B, K] give [B, K, X]."""
    return tokens_BNX.gather(1, index_BK[:, :, None].expand(-1, -1, tokens_BNX.shape[2]))
