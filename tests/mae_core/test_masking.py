"""Kinds of masks: what each promises, that it is a function of its keys alone, and that block masks are BEiT's."""

import math
import random

import numpy as np
import pytest
import torch

from mae_core.masking import Masking, random_masking
from mae_core.randomness import mask_keys, mask_noise

KINDS = [
    ("random", (8, 12), 0.6, 1),
    ("random", (8, 12), 0.75, 4),
    ("block", (9, 14), 0.5, 1),
    ("grid", (8, 6), 0.75, 1),
]


def keys(num, seed=0, epoch=0):
    return mask_keys(seed, np.full(num, epoch), np.arange(num))


def masks(masking, keys_B):
    """Masked patches as bool [B, H, W], and how many there are by right."""
    _, masked_BM = random_masking(masking.noise(keys_B), masking.num_keep)
    num = math.prod(masking.grid_size)
    hidden_BN = torch.zeros(len(keys_B), num, dtype=torch.bool).scatter(1, masked_BM, True)
    assert (hidden_BN.sum(dim=1) == num - masking.num_keep).all(), "a patch is masked twice"
    return hidden_BN.unflatten(1, masking.grid_size)


def edges(hidden_BHW):
    """Pairs of neighbours of which one is masked: few where masks hang together."""
    across, down = hidden_BHW[..., 1:] != hidden_BHW[..., :-1], hidden_BHW[:, 1:] != hidden_BHW[:, :-1]
    return (across.sum(dim=(1, 2)) + down.sum(dim=(1, 2))).float().mean().item()


@pytest.mark.parametrize(("kind", "grid", "ratio", "cell"), KINDS)
def test_a_mask_is_a_function_of_its_own_key(kind, grid, ratio, cell):
    masking = Masking(kind, grid, ratio, cell)
    together = masks(masking, keys(40))
    for i in (0, 7, 39):
        assert torch.equal(masks(masking, keys(40)[i : i + 1])[0], together[i])
    most = {"grid": 4}.get(kind, 6 if cell > 1 else 40)  # of 6 cells one is kept
    assert most - 2 <= len(together.flatten(1).unique(dim=0)) <= most
    for other in (masks(masking, keys(40, seed=1)), masks(masking, keys(40, epoch=1))):
        assert not torch.equal(other, together)
    assert masking.noise(keys(40)).dtype == torch.int64


def test_random_masks_are_those_of_every_run_before():
    masking = Masking("random", (4, 4), 0.75)
    assert torch.equal(masking.noise(keys(9)), mask_noise(keys(9), 16))
    assert masking.num_keep == 4


def test_cells_are_masked_as_a_whole():
    hidden_BHW = masks(Masking("random", (8, 12), 0.75, 4), keys(200))
    cells = hidden_BHW.unflatten(2, (3, 4)).unflatten(1, (2, 4)).float().mean(dim=(2, 4))  # [B, 2, 3]
    assert set(cells.unique().tolist()) == {0.0, 1.0}
    assert Masking("random", (8, 12), 0.75, 4).num_keep == 16  # int(6 * 0.25) cells
    assert (cells.mean(dim=0) - 5 / 6).abs().max() < 0.1


def test_grid_masks_keep_one_of_each_2x2_at_the_same_place():
    hidden_BHW = masks(Masking("grid", (8, 6), 0.75), keys(200))
    kept = ~hidden_BHW.unflatten(2, (3, 2)).unflatten(1, (4, 2)).transpose(2, 3)  # [B, 4, 3, 2, 2]
    assert (kept.sum(dim=(3, 4)) == 1).all()
    assert (kept == kept[:, :1, :1]).all()
    places = kept[:, 0, 0].flatten(1).float().mean(dim=0)
    assert (places - 0.25).abs().max() < 0.15, "one corner is kept more often than another"


@pytest.mark.parametrize(("kind", "first"), [("block", [3, 13, 12, 6]), ("grid", [5, 7, 13, 15])])
def test_masks_never_change_silently(kind, first):
    masking = Masking(kind, (4, 4), 0.75)
    assert random_masking(masking.noise(keys(1, seed=3)), 4)[0].tolist() == [first]


def beits(size, num_masked, rng):
    """BEiT's masks, one rectangle after the other, as its paper's algorithm 1 and its code draw them."""
    hidden, least = np.zeros((size, size), bool), 16 / 196 * size**2
    while hidden.sum() < num_masked:
        left = num_masked - hidden.sum()
        for _ in range(10):
            area, aspect = rng.uniform(least, left), math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= size or width >= size:
                continue
            top, at = rng.randint(0, size - height), rng.randint(0, size - width)
            box = hidden[top : top + height, at : at + width]
            if 0 < box.size - box.sum() <= left:
                box[:] = True
                break
        else:
            break
    return torch.from_numpy(hidden)


@pytest.mark.parametrize(("size", "ratio"), [(14, 0.4), (14, 0.75), (8, 0.5)])
def test_block_masks_hang_together_as_beits_do(size, ratio):
    masking = Masking("block", (size, size), ratio)
    ours, rng = masks(masking, keys(500)), random.Random(0)
    theirs = torch.stack([beits(size, size**2 - masking.num_keep, rng) for _ in range(500)])
    assert edges(ours) == pytest.approx(edges(theirs), rel=0.08)
    assert edges(ours) < 0.5 * edges(masks(Masking("random", (size, size), ratio), keys(500)))
    # Where they lie: rarely in the corners, symmetric, and as often everywhere as BEiT's.
    share = ours.float().mean(dim=0)
    assert (share - theirs.float().mean(dim=0)).abs().max() < 0.15
    for mirrored in (share.flip(0), share.flip(1), share.T):
        assert (share - mirrored).abs().max() < 0.12


@pytest.mark.parametrize("ratio", [0.1, 0.95])
def test_block_masks_have_the_count_at_any_ratio_and_grid(ratio):
    for grid in ((14, 14), (1, 30), (30, 2), (5, 64)):
        masks(Masking("block", grid, ratio), keys(50))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("grid", (8, 8), 0.6, 1), "needs a mask ratio of 0.75 and an even grid"),
        (("grid", (7, 8), 0.75, 1), "needs a mask ratio of 0.75 and an even grid"),
        (("random", (14, 14), 0.75, 4), r"4x4 do not divide the grid of 14x14 patches: 1, 2, 7, 14 do"),
        (("random", (8, 8), 0.75, 8), "cannot be masked"),
        (("spiral", (8, 8), 0.75, 1), "choose random, block, grid"),
    ],
)
def test_what_does_not_go_together_is_told(options, told):
    with pytest.raises(ValueError, match=told):
        Masking(*options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("kind", "grid", "ratio", "cell"), KINDS)
def test_masks_are_the_same_on_a_gpu(kind, grid, ratio, cell):
    masking = Masking(kind, grid, ratio, cell)
    assert torch.equal(masking.noise(keys(500).cuda()).cpu(), masking.noise(keys(500)))
