"""Segmentation masks: which files are any, and that they stay on their images."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_core.images import ImageError, center_crops, crop_resize, random_resized_crops
from mae_core.mask_images import IGNORE, crop_mask, decode_mask


def png(image: Image.Image, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", **options)
    return data.getvalue()


def shapes(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Boxes of some classes, and some pixels that do not count."""
    rng = np.random.default_rng(seed)
    mask_HW = np.zeros((height, width), np.uint8)
    for value in (1, 2, 3, IGNORE):
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        mask_HW[top : top + rng.integers(8, 20), left : left + rng.integers(8, 20)] = value
    return mask_HW


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_indices_of_a_palette_are_the_classes(bits):
    mask_HW = shapes(30, 41).clip(0, 2**bits - 1)
    image = Image.fromarray(mask_HW).convert("P")
    image.putdata(mask_HW.ravel().tolist())
    image.putpalette([7, 7, 7] * 2**bits)  # colours say nothing
    data = png(image, bits=bits)
    assert data[24] == bits
    np.testing.assert_array_equal(decode_mask(data), mask_HW)


def test_grey_values_are_the_classes():
    mask_HW = shapes(30, 41)
    np.testing.assert_array_equal(decode_mask(png(Image.fromarray(mask_HW))), mask_HW)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (Image.new("RGB", (8, 8)), "colour type 2 with 8 bits"),
        (Image.new("I;16", (8, 8)), "colour type 0 with 16 bits"),
        (Image.new("1", (8, 8)), "colour type 0 with 1 bits"),  # Pillow would make 0 and 255 of it
    ],
)
def test_other_pngs_are_no_masks(image, told):
    with pytest.raises(ValueError, match=told) as caught:
        decode_mask(png(image))
    assert not isinstance(caught.value, ImageError)


def test_broken_masks_are_told_as_broken_images_are():
    data = png(Image.fromarray(shapes(50, 60)))
    for cut in (20, 60, len(data) - 30):
        with pytest.raises(ImageError):
            decode_mask(data[:cut])
    with pytest.raises(ValueError, match="no PNG, beginning with b'GIF"):
        decode_mask(b"GIF89a" + bytes(50))


def test_a_mask_stays_on_its_image():
    # The image is its own mask in grey values so far apart that interpolation cannot take one for another.
    masks = [shapes(61, 83, seed).clip(0, 3) for seed in range(20)]
    sizes = np.array([mask.shape for mask in masks])
    random = random_resized_crops(sizes[:, 0], sizes[:, 1], seed=3, epoch_B=0, sample_B=np.arange(20), repeat_B=0)
    assert 0 < random.flip.sum() < 20
    for crops in (random, center_crops(sizes[:, 0], sizes[:, 1], out_size=(40, 56), share=1.0)):
        differ = []
        for mask_HW, box in zip(masks, crops.boxes(), strict=True):
            image_HWC, cut_HW = np.empty((40, 56, 1), np.uint8), np.empty((40, 56), np.uint8)
            crop_resize(mask_HW[..., None] * 60, *box, out=image_HWC)
            crop_mask(mask_HW, *box, out=cut_HW)
            assert set(np.unique(cut_HW)) <= set(np.unique(mask_HW))
            differ.append(np.mean(np.abs(image_HWC[..., 0].astype(int) - 60 * cut_HW.astype(int)) > 30))
        assert np.mean(differ) < 0.03, "only along edges"


@pytest.mark.parametrize("size", [(12, 20), (5, 31), (40, 7)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_takes_the_pixels_under_the_centres(size, flip):
    mask_HW = shapes(30, 40)
    box_11HW = torch.from_numpy(mask_HW[5:17, 7:27].copy())[None, None]
    expected_HW = torch.nn.functional.interpolate(box_11HW, size, mode="nearest-exact")[0, 0]
    out = np.empty(size, np.uint8)
    crop_mask(mask_HW, 5, 7, 12, 20, flip, out)
    np.testing.assert_array_equal(out, expected_HW.flip(1) if flip else expected_HW)
