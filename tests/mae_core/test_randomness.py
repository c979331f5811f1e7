import numpy as np
import pytest
import torch

from mae_core.randomness import Purpose, hash_u64, mask_keys, mask_noise, permute, uniform

MODULUS = 1 << 64


def mixed(x: int) -> int:
    """SplitMix64's finaliser in exact integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % MODULUS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % MODULUS
    return x ^ (x >> 31)


def slow_hash(purpose: int, *key: int) -> int:
    state = mixed(purpose * 0x9E3779B97F4A7C15 % MODULUS)
    for part in key:
        state = mixed(((state ^ (part % MODULUS)) * 0x9E3779B97F4A7C15 + 0x94D049BB133111EB) % MODULUS)
    return state


def slow_noise(key: int, patch: int) -> int:
    mixing = mixed(((key % MODULUS ^ patch) * 0x9E3779B97F4A7C15 + 0x94D049BB133111EB) % MODULUS)
    return mixing >> 21 << 20 | patch


def test_hashes_are_those_of_exact_integers() -> None:
    rng = np.random.default_rng(0)
    columns = rng.integers(-(1 << 62), 1 << 62, (4, 40))
    columns[:, 0] = (0, 1, -1, (1 << 63) - 1)
    seed = MODULUS - 1  # a seed of any size, as a Python integer
    hashes = hash_u64(Purpose.CROP, seed, *columns, 3)
    assert hashes.dtype == np.uint64
    expected = [slow_hash(Purpose.CROP, seed, *(int(part) for part in column), 3) for column in columns.T]
    assert hashes.tolist() == expected
    uniforms = uniform(Purpose.CROP, seed, *columns, 3)
    assert uniforms.tolist() == [(value >> 11) / (1 << 53) for value in expected]


def test_keys_broadcast() -> None:
    table = hash_u64(Purpose.CROP, 0, np.arange(3)[:, None], np.arange(5))
    assert table.shape == (3, 5)
    assert int(table[2, 4]) == int(hash_u64(Purpose.CROP, 0, 2, 4))
    assert hash_u64(Purpose.CROP, 0, 2, 4).shape == ()
    assert hash_u64(Purpose.CROP, 0, np.zeros(0, np.int64)).shape == (0,)


def test_every_bit_is_uniform_and_no_part_of_the_key_shows_in_another() -> None:
    num = 1 << 14
    tolerance = 5 / num**0.5
    count = np.arange(num)
    for key in ((0, count), (count, 0), (count, count), (count * 1000, 7), (3, 0, count, 0), (-count, 5)):
        bits = (hash_u64(Purpose.MASK, *key)[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
        signs = 2.0 * bits - 1
        assert np.abs(signs.mean(axis=0)).max() < tolerance
        # Neighbours in the key, and bits of one hash, know nothing of each other.
        assert np.abs((signs[1:] * signs[:-1]).mean(axis=0)).max() < tolerance
        together = signs.T @ signs / num
        assert np.abs(together - np.eye(64)).max() < tolerance
    parts = [
        uniform(Purpose.CROP, 0, count, 0),
        uniform(Purpose.CROP, 1, count, 0),
        uniform(Purpose.CROP, 0, count, 1),
        uniform(Purpose.CROP, count, 0, 0),
        uniform(Purpose.CROP, 0, 0, count),
        uniform(Purpose.MASK, 0, count, 0),
        uniform(Purpose.CROP, 0, count),
    ]
    assert np.abs(np.corrcoef(parts) - np.eye(len(parts))).max() < tolerance
    assert all(len(np.unique(part)) == num for part in parts)
    assert np.min(parts) >= 0
    assert np.max(parts) < 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 63, 64, 65, 100, 1000, 4095, 4097, 50_000])
def test_permute_is_a_permutation(size: int) -> None:
    once = permute(np.arange(size), size, 1, 2)
    np.testing.assert_array_equal(np.sort(once), np.arange(size))
    # Any position alone, in any order and shape, has the same place.
    some = np.random.default_rng(0).integers(0, size, (3, 4))
    np.testing.assert_array_equal(permute(some, size, 1, 2), once[some])
    if size >= 63:
        assert (once != permute(np.arange(size), size, 1, 3)).mean() > 0.9
        assert (once != permute(np.arange(size), size, 2, 2)).mean() > 0.9


@pytest.mark.parametrize("size", [2, 3, 5, 8, 20])
def test_permute_sends_every_position_everywhere_equally_often(size: int) -> None:
    num = 2000
    drawn = np.array([permute(np.arange(size), size, 0, key) for key in range(num)])
    counts = np.array([np.bincount(drawn[:, position], minlength=size) for position in range(size)])
    expected = num / size
    assert np.abs(counts - expected).max() < 5 * (expected * (1 - 1 / size)) ** 0.5


@pytest.mark.parametrize("size", [200, 1000, 5000])
def test_permute_parts_neighbours(size: int) -> None:
    num = 500
    drawn = np.array([permute(np.arange(size), size, 0, key) for key in range(num)])
    adjacent = (np.abs(np.diff(drawn, axis=1)) == 1).sum()
    expected = num * (size - 1) * 2 / size
    assert abs(adjacent - expected) < 5 * expected**0.5


def test_mask_noise_is_that_of_exact_integers() -> None:
    epochs, samples = np.array([0, 0, 3, 900]), np.array([0, 1, 12345, 1 << 40])
    keys = mask_keys(7, epochs, samples, repeat_B=1, source=2)
    assert keys.dtype == torch.int64
    exact = [slow_hash(Purpose.MASK, 7, int(e), 2, int(s), 1) for e, s in zip(epochs, samples, strict=True)]
    assert [key % MODULUS for key in keys.tolist()] == exact
    noise = mask_noise(keys, 200)
    assert noise.tolist() == [[slow_noise(key, patch) for patch in range(200)] for key in exact]


def test_mask_noise_never_ties_and_keeps_every_patch_as_often() -> None:
    num, num_patches, num_kept = 8000, 64, 16
    noise = mask_noise(mask_keys(0, np.zeros(num, np.int64), np.arange(num)), num_patches)
    assert noise.min() >= 0
    assert all(len(row.unique()) == num_patches for row in noise[:200])
    kept = torch.zeros(num, num_patches).scatter(1, noise.argsort(dim=1)[:, :num_kept], 1.0)
    share = num_kept / num_patches
    assert (kept.mean(dim=0) - share).abs().max() < 5 * (share * (1 - share) / num) ** 0.5
    # Two patches are kept together as often as chance has it: no pattern over the grid.
    together = (kept.T @ kept / num)[~torch.eye(num_patches, dtype=torch.bool)]
    chance = share * (num_kept - 1) / (num_patches - 1)
    assert (together - chance).abs().max() < 5.5 * (chance * (1 - chance) / num) ** 0.5
    # Nor does a patch's fate in one sample tell of the next sample's.
    following = (kept[1:] * kept[:-1]).mean(dim=0)
    assert (following - share**2).abs().max() < 5 * share / num**0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_mask_noise_is_the_same_on_a_gpu() -> None:
    keys = mask_keys(0, np.zeros(100, np.int64), np.arange(100))
    assert torch.equal(mask_noise(keys.cuda(), 196).cpu(), mask_noise(keys, 196))


# What follows is part of the identity of every run there is: a change breaks resuming and comparing them.


def test_hashes_never_change_silently() -> None:
    assert {int(purpose): int(hash_u64(purpose, 1, 2, 3, 4, 5)) for purpose in Purpose} == {
        1: 0x7BBED4C123E0C6FE,
        2: 0xB6AD26DC0E665780,
        3: 0xBDEF628B1BBEF4E7,
        4: 0xEB8748A69DE42E71,
        5: 0xFD729F8728C73C4E,
        6: 0xB374CD2E16B0EDC5,
        7: 0x2114759C52034E79,
        8: 0xA7E622FF35B51ED3,
        9: 0x9F3AD35993EAA3E8,
        10: 0x815087C2256BFE19,
    }
    assert uniform(Purpose.SPLIT, 7, 11).item() == 0.5990121745633169


def test_masks_never_change_silently() -> None:
    keys = mask_keys(0, np.array([0, 1]), np.array([5, 6]))
    assert keys.tolist() == [-3523948824793283571, -1450537489488182194]
    assert mask_noise(keys, 16).argsort(dim=1)[:, :4].tolist() == [[7, 8, 11, 10], [9, 4, 7, 2]]


def test_permutations_never_change_silently() -> None:
    assert permute(np.arange(10), 10, 1, 2).tolist() == [0, 5, 3, 9, 2, 6, 4, 7, 8, 1]
    assert permute(np.arange(5), 1000, 3).tolist() == [871, 616, 658, 309, 998]
