"""Augmentation as a pure function of (seed, epoch, sample): pretraining's kinds, and timm's policies.

A new kind for pretraining is one more entry of ``AUGMENTS``. B images of a block, C channels, H and W height and width.
"""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mae_core.images import Crops, center_crops, random_resized_crops
from mae_core.randomness import Integers, Purpose, hash_u64, uniform

_FILL = (124, 116, 104)  # what moves into a picture at its edges: ImageNet's mean
_TRANSLATE = 0.45  # of the side, at most, as timm has it
_PAD = 1 / 8  # of the side: 4 pixels of 32
_JITTER = 0.4  # largest change of a factor: SimCLR's at strength 0.5


class _DrawCrops(Protocol):
    """Boxes of a block; arguments as those of ``random_resized_crops``, and the size they are resized to."""

    def __call__(
        self,
        height_B: np.ndarray,
        width_B: np.ndarray,
        *,
        out_size: tuple[int, int],
        seed: int,
        epoch_B: Integers,
        sample_B: np.ndarray,
        repeat_B: Integers,
        scale: tuple[float, float],
        flip: bool,
    ) -> Crops: ...


@dataclass(frozen=True)
class Augment:
    """A kind of augmentation.

    Args:
        crops: Draws the crops.
        pixels: Changes the pixels of a crop, uint8 [H, W, C], in place; its key is seed, epoch, sample, repeat.
    """

    crops: _DrawCrops
    pixels: Callable[[np.ndarray, tuple[int, int, int, int]], None] | None = None


def fixed_size_crops(
    height_B: np.ndarray,
    width_B: np.ndarray,
    *,
    out_size: tuple[int, int],
    seed: int,
    epoch_B: Integers,
    sample_B: np.ndarray,
    repeat_B: Integers,
    flip: bool,
) -> Crops:
    """Crops of one size for all images of a shape: the largest that fit, shifted over the image's edges.

    What "resize to ``out_size``, pad an eighth on each side, cut ``out_size`` anywhere" keeps: on images of 32 x 32
    the usual crop with a padding of 4. The padding is ``crop_resize``'s mirror.

    Args:
        height_B: int64 heights of the images.
        width_B: int64 widths of the images.
        out_size: (H, W) that the crop will be resized to; the box has its aspect ratio.
        seed: Seed of the run.
        epoch_B: Epoch of each sample, or one for all.
        sample_B: int64 sample ids.
        repeat_B: Which of several views of the sample in the epoch, or one for all.
        flip: Whether half of the crops are mirrored.
    """
    largest = center_crops(height_B, width_B, out_size=out_size, share=1.0)
    parts = [np.reshape(np.asarray(part), (-1, 1)) for part in (epoch_B, 0, sample_B, repeat_B)]
    top_B, left_B, flip_B = uniform(Purpose.CROP, seed, *parts, np.arange(20, 23)).T  # as random_resized_crops draws

    def first(draw_B: np.ndarray, size_B: np.ndarray, extent_B: np.ndarray) -> np.ndarray:
        pad_B = np.rint(extent_B * _PAD).astype(np.int64)
        return (draw_B * (size_B - extent_B + 2 * pad_B + 1)).astype(np.int64) - pad_B

    return Crops(
        top=first(top_B, np.asarray(height_B), largest.height),
        left=first(left_B, np.asarray(width_B), largest.width),
        height=largest.height,
        width=largest.width,
        flip=(flip_B < 0.5) & flip,
    )


def color_jitter(image_HWC: np.ndarray, key: tuple[int, int, int, int]) -> None:
    """Changes brightness, contrast and saturation by factors in [0.6, 1.4], in a random order.

    What torchvision's ``ColorJitter(0.4, 0.4, 0.4)`` does. The hue stays: it would cost more than all else of a reading
    task (3 ms for 224 x 224 pixels). A grey image has no saturation.

    Args:
        image_HWC: uint8, 1 or 3 channels; changed in place.
        key: Seed, epoch, sample, repeat.
    """
    # Not at the top: a reading task that has no use for it would wait for its import.
    import torch
    from torchvision.transforms.v2 import functional

    draws = uniform(Purpose.JITTER, *key, np.arange(6))
    changes = functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation
    image_CHW = torch.from_numpy(image_HWC.transpose(2, 0, 1).copy())
    for number in np.argsort(draws[3:]):
        image_CHW = changes[number](image_CHW, 1 + _JITTER * float(2 * draws[number] - 1))
    image_HWC[...] = image_CHW.numpy().transpose(1, 2, 0)


def _whole(height_B: np.ndarray, width_B: np.ndarray, *, out_size: tuple[int, int], **_: Any) -> Crops:
    return center_crops(height_B, width_B, out_size=out_size, share=1.0)


def _fixed(
    height_B: np.ndarray,
    width_B: np.ndarray,
    *,
    scale: tuple[float, float],  # noqa: ARG001
    **key: Any,
) -> Crops:
    return fixed_size_crops(height_B, width_B, **key)


def _random(height_B: np.ndarray, width_B: np.ndarray, *, out_size: tuple[int, int], **key: Any) -> Crops:  # noqa: ARG001
    return random_resized_crops(height_B, width_B, **key)


AUGMENTS = {
    "none": Augment(_whole),
    "fixed_crop": Augment(_fixed),
    "random_crop": Augment(_random),
    "random_crop_jitter": Augment(_random, color_jitter),
}
"""The kinds of the paper's table 1e. "none" is the largest central crop of the output's shape, not mirrored."""


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
