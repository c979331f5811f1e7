"""Which patches the encoder sees: keys in, noise out, patch indices from the noise.

A mask of each kind is noise whose K smallest values are kept, a pure function of the samples' keys. A new kind is one
more function here with its name in ``MASKS``.

Shapes: B batch, N patches, K kept, M masked (K + M = N), T rectangles.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mae_core.randomness import mask_noise

GridSize = tuple[int, int]

# BEiT's masks (Bao et al., 2021, algorithm 1): 16 of 14 x 14 patches at least, and aspect ratios from 0.3 to 1 / 0.3.
_SMALLEST = 16 / 14**2
_ASPECT = 0.3
_RECTANGLES = 64


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


@dataclass(frozen=True)
class Masking:
    """How masks are drawn.

    Args:
        kind: A name in ``MASKS``.
        grid_size: Patches down and across.
        mask_ratio: Share of the patches that is hidden.
        cell: Masks are drawn for cells of ``cell * cell`` patches, all of them masked or all kept (Pixio's are of
            4 x 4); 1: for patches.

    Raises:
        ValueError: They do not go together.
    """

    kind: str
    grid_size: GridSize
    mask_ratio: float
    cell: int = 1

    def __post_init__(self) -> None:
        H, W = self.grid_size
        if self.kind not in MASKS:
            raise ValueError(f"mask '{self.kind}' is unknown: choose {', '.join(MASKS)}")
        if self.cell < 1 or H % self.cell or W % self.cell:
            fine = ", ".join(str(n) for n in range(1, min(H, W) + 1) if H % n == 0 and W % n == 0)
            raise ValueError(
                f"mask cells of {self.cell}x{self.cell} do not divide the grid of {H}x{W} patches: {fine} do"
            )
        # Drawn for no sample, so that what does not go together is said now.
        self.noise(torch.empty(0, dtype=torch.int64, device="cpu"))

    @property
    def _cells(self) -> GridSize:
        return self.grid_size[0] // self.cell, self.grid_size[1] // self.cell

    @property
    def num_keep(self) -> int:
        """K."""
        return num_kept(math.prod(self._cells), self.mask_ratio) * self.cell**2

    def noise(self, keys_B: torch.Tensor) -> torch.Tensor:
        """Noise as ``random_masking`` takes it.

        Args:
            keys_B: int64, one hash a sample, as from ``mask_keys``.

        Returns:
            int64 ``noise_BN``, non-negative, on the device of the keys.
        """
        rows, columns = self._cells
        noise = MASKS[self.kind](keys_B, (rows, columns), self.num_keep // self.cell**2)
        if self.cell == 1:
            return noise
        # The patches of a cell tie, and as many are kept as make whole cells.
        noise = noise.view(-1, rows, columns).repeat_interleave(self.cell, 1).repeat_interleave(self.cell, 2)
        return noise.flatten(1)


def _random(keys_B: torch.Tensor, grid_size: GridSize, num_keep: int) -> torch.Tensor:  # noqa: ARG001
    return mask_noise(keys_B, math.prod(grid_size))


def _grid(keys_B: torch.Tensor, grid_size: GridSize, num_keep: int) -> torch.Tensor:
    """One patch kept of each 2 x 2, at the same place in all of an image's; which one differs between samples."""
    H, W = grid_size
    if H % 2 or W % 2 or 4 * num_keep != H * W:
        raise ValueError(
            f"mask 'grid' keeps one patch of each 2x2: it needs a mask ratio of 0.75 and an even grid, found "
            f"{num_keep} of {H}x{W} patches kept"
        )
    # Counted on the device: a GPU would be waited for, to give it a table.
    row_H1, column_W = torch.arange(H, device=keys_B.device)[:, None], torch.arange(W, device=keys_B.device)
    place_HW = 2 * (row_H1 % 2) + column_W % 2
    kept_B = mask_noise(keys_B, 4).argmin(dim=1)
    return (place_HW.flatten() != kept_B[:, None]).long()


def _block(keys_B: torch.Tensor, grid_size: GridSize, num_keep: int) -> torch.Tensor:
    """Rectangles are masked one after the other until there are enough masked patches, as in BEiT.

    As there, an area is uniform from a least one to what is left to mask, and the logarithm of the aspect ratio
    uniform. All rectangles are drawn at once, where BEiT draws one, looks what it covers, and draws the next: what
    earlier ones leave to mask is reckoned without their overlap; none is thrown away, but the last one that is
    needed is cut off at a row so that the count is exact; and what all of them should leave is filled up by single
    patches.
    """
    (H, W), T = grid_size, _RECTANGLES
    N = H * W
    bits = mask_noise(keys_B, N + 4 * T)
    draws = (bits[:, N:] >> 20).double().mul(2.0**-43).unflatten(1, (4, T))  # [B, 4, T]
    share_BT, aspect_BT, top_BT, left_BT = draws.unbind(dim=1)
    most_H, most_W = max(1, H - 1), max(1, W - 1)  # none is as high or as wide as the image
    least = _SMALLEST * N
    remaining_BT = (N - num_keep) * (1 - share_BT).cumprod(dim=1) / (1 - share_BT)
    area_BT = (least + share_BT * (remaining_BT - least).clamp(min=0)).clamp(max=most_H * most_W)
    log_low = (area_BT / most_W**2).clamp(min=_ASPECT).log()
    log_high = (most_H**2 / area_BT).clamp(max=1 / _ASPECT).log()
    ratio_BT = (log_low + aspect_BT * (log_high - log_low)).exp()
    height_BT = (area_BT * ratio_BT).sqrt().round().clamp(1, most_H)
    width_BT = (area_BT / ratio_BT).sqrt().round().clamp(1, most_W)
    inside = []
    for place_BT, extent_BT, size in ((top_BT, height_BT, H), (left_BT, width_BT, W)):
        first_BT1 = (place_BT * (size - extent_BT + 1)).floor()[:, :, None]
        line = torch.arange(size, device=keys_B.device)
        inside.append((line >= first_BT1) & (line < first_BT1 + extent_BT[:, :, None]))
    inside_BTN = (inside[0][:, :, :, None] & inside[1][:, :, None, :]).flatten(2)
    # The earlier the first rectangle that covers a patch, the larger its noise; 0 where none does.
    turn_T1 = torch.arange(T, 0, -1, device=keys_B.device, dtype=torch.int8)[:, None]
    covered_BN = (inside_BTN * turn_T1).amax(dim=1).long()
    index_N = torch.arange(N, device=keys_B.device)
    index_BN = torch.where(keys_B[:, None] & 1 == 0, index_N, N - 1 - index_N)  # cut from above or from below
    return covered_BN << 56 | torch.where(covered_BN > 0, index_BN, bits[:, :N] >> 7)


MASKS: dict[str, Callable[[torch.Tensor, GridSize, int], torch.Tensor]] = {
    "random": _random,
    "block": _block,
    "grid": _grid,
}
"""Noise of each kind of mask: from keys, the grid and K."""
