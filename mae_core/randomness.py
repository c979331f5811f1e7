"""Random choices as pure functions of (seed, epoch, source, sample, repeat), never of a stream.

A choice is a 64-bit hash of a key. The same arithmetic runs in NumPy (orders, crops) and in PyTorch on any
device (masks); both wrap modulo 2**64, so the bits agree everywhere. The finaliser is the 64-bit mixer of
SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    # Packing and planning have no use for it, and would wait 1.5 s for its import.
    import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1

Integers = int | np.ndarray


class Purpose(IntEnum):
    """What a hash is drawn for: two purposes never share bits. Values are part of every run's identity."""

    RANGES = 1
    PHASE = 2
    ORDER = 3
    CROP = 4
    MASK = 5
    SPLIT = 6
    PROBE = 7
    AUGMENT = 8
    MIX = 9
    JITTER = 10


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
    return x ^ (x >> np.uint64(31))


def hash_u64(purpose: Purpose, *key: Integers) -> np.ndarray:
    """Hashes a key of integers and integer arrays, broadcast together, to uniform uint64.

    Args:
        purpose: What the bits are for.
        *key: The parts of the key in a fixed order, for example ``seed, epoch, source, sample_B, repeat_B``.

    Returns:
        uint64 array of the broadcast shape (0-d for integers alone).
    """
    # One-element arrays, not scalars: NumPy warns when a scalar wraps, and wrapping is the point.
    state = _mix(np.full(1, (int(purpose) * _GOLDEN) & _MASK_64, np.uint64))
    for part in key:
        value = np.asarray(part & _MASK_64 if isinstance(part, int) else part)
        value = value.astype(np.uint64, copy=False)
        state = _mix((state ^ value) * np.uint64(_GOLDEN) + np.uint64(_MIX_2))
    shape = np.broadcast_shapes(*(np.shape(part) for part in key)) if key else ()
    return state.reshape(shape)


def uniform(purpose: Purpose, *key: Integers) -> np.ndarray:
    """The same as ``hash_u64`` as float64 in [0, 1), from the upper 53 bits."""
    return (hash_u64(purpose, *key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Maps positions through a keyed pseudo-random permutation of ``range(size)``, without a table.

    An eight-round Feistel network on the next even number of bits, walked until the value falls below ``size``
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): O(1) memory, any position at the same cost.
    With four rounds neighbours stayed neighbours a quarter too often.

    Args:
        index: int64 array of positions in ``[0, size)``.
        size: Size of the permuted range, at least 1.
        *key: What the permutation is a function of.

    Returns:
        int64 array of ``index``'s shape.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = hash_u64(Purpose.RANGES, *key, np.arange(8))
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, bool)
    while outside.any():
        x = value[outside]
        left, right = x >> np.uint64(half), x & low
        for key_ in keys:
            left, right = right, left ^ (_mix((right ^ key_) * np.uint64(_GOLDEN)) >> np.uint64(64 - half))
        value[outside] = (left << np.uint64(half)) | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def mask_noise(keys_B: "torch.Tensor", num_patches: int) -> "torch.Tensor":
    """Noise whose order masks a sample: the patches with the smallest values are kept.

    The patch's own index fills the low bits, so that no two patches of a sample ever tie.

    Args:
        keys_B: int64, one hash a sample (the bits of ``hash_u64(Purpose.MASK, seed, epoch, ...)``).
        num_patches: N, at most 2**20.

    Returns:
        int64 [B, N], non-negative, computed on the device of ``keys_B``.
    """
    import torch

    patch_N = torch.arange(num_patches, device=keys_B.device, dtype=torch.int64)
    x_BN = (keys_B[:, None] ^ patch_N) * _signed(_GOLDEN) + _signed(_MIX_2)
    # int64 shifts are arithmetic: the masks make them logical, as in the NumPy form above.
    x_BN = (x_BN ^ ((x_BN >> 30) & ((1 << 34) - 1))) * _signed(_MIX_1)
    x_BN = (x_BN ^ ((x_BN >> 27) & ((1 << 37) - 1))) * _signed(_MIX_2)
    x_BN = x_BN ^ ((x_BN >> 31) & ((1 << 33) - 1))
    return (((x_BN >> 21) & ((1 << 43) - 1)) << 20) | patch_N


def mask_keys(seed: int, epoch_B: np.ndarray, sample_B: np.ndarray, repeat_B: Integers = 0, source: Integers = 0):
    """The int64 tensor [B] of mask keys on the CPU, as ``mask_noise`` takes it."""
    import torch

    keys_B = hash_u64(Purpose.MASK, seed, epoch_B, source, sample_B, repeat_B)
    return torch.from_numpy(keys_B.view(np.int64))
