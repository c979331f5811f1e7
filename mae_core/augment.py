"""Augmentation of single images by timm's policies, as a pure function of (seed, epoch, sample)."""

import functools
import random
from typing import Any

import numpy as np
from PIL import Image

from mae_core.randomness import Purpose, hash_u64

_FILL = (124, 116, 104)  # what moves into a picture at its edges: ImageNet's mean
_TRANSLATE = 0.45  # of the side, at most, as timm has it


def check_policy(policy: str) -> None:
    """Sees that timm knows a policy.

    Raises:
        ValueError: It does not.
    """
    try:
        _policy(policy, 1)
    except (AssertionError, KeyError, ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"'{policy}' is no RandAugment policy: write it as rand-m9-mstd0.5-inc1 ({error})") from None


def auto_augment(image_HWC: np.ndarray, policy: str, key: tuple[int, int, int]) -> None:
    """Augments an image in place.

    timm draws from the global generators of ``random`` and NumPy. They are seeded from the key each time, so that an
    image is the same wherever and whenever it is made.

    Args:
        image_HWC: uint8, 1 or 3 channels.
        policy: In timm's words, as ``rand-m9-mstd0.5-inc1`` (magnitude 9, deviation 0.5, increasing severity).
        key: Seed, epoch, sample.
    """
    drawn = int(hash_u64(Purpose.AUGMENT, *key))
    random.seed(drawn)
    np.random.seed(drawn & 0xFFFFFFFF)
    grey = image_HWC.shape[2] == 1
    image = Image.fromarray(image_HWC[..., 0] if grey else image_HWC).convert("RGB")
    augmented = _policy(policy, int(_TRANSLATE * min(image.size)))(image)
    image_HWC[...] = np.asarray(augmented.convert("L"))[..., None] if grey else np.asarray(augmented)


@functools.lru_cache(maxsize=8)
def _policy(policy: str, translate: int) -> Any:
    # Not at the top: a reading task of pretraining has no use for it, and it takes its time.
    from timm.data.auto_augment import rand_augment_transform

    # At a magnitude of 10 posterising keeps 0 bits, which Pillow refuses.
    options = {"translate_const": translate, "img_mean": _FILL, "magnitude_max": 9.99}
    return rand_augment_transform(policy, options)
