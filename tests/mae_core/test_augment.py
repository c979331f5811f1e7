"""Augmentation: the same for the same key, wherever it is made."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from mae_core.augment import AUGMENTS, auto_augment, check_policy, color_jitter, fixed_size_crops
from mae_core.images import crop_resize, random_resized_crops

POLICY = "rand-m9-mstd0.5-inc1"


def image(channels=3):
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 256, (8, 8, channels), np.uint8), np.ones((4, 4, 1), np.uint8))


def augmented(key, channels=3):
    out = image(channels)
    auto_augment(out, POLICY, key)
    return out


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_the_same_for_the_same_key_and_another_for_another(channels):
    first = augmented((0, 3, 17), channels)
    random.random()
    np.random.rand()
    np.testing.assert_array_equal(augmented((0, 3, 17), channels), first)
    for part in range(3):
        keys = [tuple(n if place == part else 5 for place in range(3)) for n in range(20)]
        assert len({augmented(key, channels).tobytes() for key in keys}) > 10, f"part {part} of the key changes nothing"
    many = [augmented((0, 0, sample), channels) for sample in range(40)]
    changed = sum(not np.array_equal(one, image(channels)) for one in many)
    # Two operations, each with probability one half.
    assert 20 <= changed <= 38
    assert len({one.tobytes() for one in many}) > changed * 0.8


def test_a_policy_that_timm_does_not_know_is_refused():
    check_policy(POLICY)
    with pytest.raises(ValueError, match="is no RandAugment policy"):
        check_policy("best")


def test_the_pixels_are_those_of_the_operations():
    """Among so many are all operations alone, and the strongest: each makes of an image what its definition says."""
    pixels, found = image(), [augmented((0, 0, sample)) for sample in range(1500)]
    picture, made = Image.fromarray(pixels), {one.tobytes() for one in found}
    known = {
        "nothing": pixels,
        "invert": 255 - pixels,
        "equalize": np.asarray(ImageOps.equalize(picture)),
        "autocontrast": np.asarray(ImageOps.autocontrast(picture)),
        "posterize to 1 bit, the strongest": pixels & np.uint8(128),
    }
    assert not [name for name, expected in known.items() if expected.tobytes() not in made]
    solarized = {at for at in range(257) if np.where(pixels < at, pixels, 255 - pixels).tobytes() in made}
    assert len(solarized & set(range(60))) > 10, "magnitude 9 of 10 leaves a tenth of the range, give or take"

    def filled(one):
        """Whole columns at the left that have moved in: the mean colour of ImageNet."""
        return int(np.cumprod((one == (124, 116, 104)).all(axis=(0, 2))).sum())

    # 45 % of 32, and a last column of which a part shows through.
    assert max(map(filled, found)) in (13, 14)


def boxes(kind, size, out_size=(32, 32), num=400, **key):
    key = {"seed": 0, "epoch_B": 1, "sample_B": np.arange(num), "repeat_B": 0, "flip": True} | key
    sizes = np.full(num, size[0]), np.full(num, size[1])
    return list(AUGMENTS[kind].crops(*sizes, out_size=out_size, scale=(0.2, 1.0), **key).boxes())


def test_without_augmentation_an_image_is_whole_and_never_mirrored():
    assert set(boxes("none", (32, 32))) == {(0, 0, 32, 32, False)}
    assert set(boxes("none", (60, 90))) == {(0, 15, 60, 60, False)}


def test_a_fixed_crop_is_the_usual_one_with_a_padding_of_4():
    found = np.array(boxes("fixed_crop", (32, 32), num=4000))
    assert (found[:, 2:4] == 32).all()
    for place in (found[:, 0], found[:, 1]):
        values, counts = np.unique(place, return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert np.abs(counts - 4000 / 9).max() < 5 * (4000 / 9) ** 0.5
    assert abs(np.corrcoef(found[:, 0], found[:, 1])[0, 1]) < 0.05
    assert 0.45 < found[:, 4].mean() < 0.55
    # What is beyond the edge is the image again, mirrored: NumPy's reflection.
    pixels = image()
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    out = np.zeros_like(pixels)
    for top, left, height, width, flip in boxes("fixed_crop", (32, 32), num=30):
        crop_resize(pixels, top, left, height, width, flip, out)
        expected = padded[4 + top : 36 + top, 4 + left : 36 + left]
        np.testing.assert_array_equal(out, expected[:, ::-1] if flip else expected)


def test_a_fixed_crop_of_another_shape_moves_over_the_whole_image():
    found = np.array(boxes("fixed_crop", (64, 200), (32, 16), num=2000))
    assert (found[:, 2:4] == (64, 32)).all()
    assert (found[:, 0].min(), found[:, 0].max()) == (-8, 8)
    assert (found[:, 1].min(), found[:, 1].max()) == (-4, 172)
    tiny = np.zeros((1, 1, 3), np.uint8)
    for box in boxes("fixed_crop", (1, 1), num=20):
        crop_resize(tiny, *box, out=np.empty((32, 32, 3), np.uint8))


def test_a_fixed_crop_is_a_function_of_its_own_key():
    block = boxes("fixed_crop", (32, 32), num=50)
    for part in ("seed", "epoch_B", "repeat_B"):
        assert boxes("fixed_crop", (32, 32), num=50, **{part: 7}) != block
    alone = fixed_size_crops(
        np.array([32]),
        np.array([32]),
        out_size=(32, 32),
        seed=0,
        epoch_B=1,
        sample_B=np.array([17]),
        repeat_B=0,
        flip=True,
    )
    assert list(alone.boxes()) == [block[17]]


def test_random_crops_are_those_of_every_run_before():
    sizes = np.full(50, 60), np.full(50, 90)
    expected = random_resized_crops(*sizes, seed=0, epoch_B=1, sample_B=np.arange(50), repeat_B=0)
    for kind in ("random_crop", "random_crop_jitter"):
        assert boxes(kind, (60, 90), num=50) == list(expected.boxes())


def jittered(key, channels=3):
    out = image(channels)
    color_jitter(out, key)
    return out


def test_jitter_is_a_function_of_its_key_and_stays_within_bounds():
    first = jittered((0, 3, 17, 0))
    np.testing.assert_array_equal(jittered((0, 3, 17, 0)), first)
    for part in range(4):
        keys = [tuple(n if place == part else 5 for place in range(4)) for n in range(10)]
        assert len({jittered(key).tobytes() for key in keys}) == 10, f"part {part} of the key changes nothing"
    # As torchvision's own: brightness and spread of many are alike.
    torch.manual_seed(0)
    theirs_of, pixels = v2.ColorJitter(0.4, 0.4, 0.4), torch.from_numpy(image()).permute(2, 0, 1)
    theirs = torch.stack([theirs_of(pixels) for _ in range(150)]).double()
    ours = torch.stack([torch.from_numpy(jittered((0, 0, n, 0))).permute(2, 0, 1) for n in range(150)]).double()
    for statistic in (
        lambda x: x.mean(dim=(1, 2, 3)),
        lambda x: x.std(dim=(1, 2, 3)),
        lambda x: x.std(dim=1).mean((1, 2)),
    ):
        mine, other = statistic(ours), statistic(theirs)
        assert abs(mine.mean() - other.mean()) < 4 * (2 / 150) ** 0.5 * other.std()
        assert 0.75 < mine.std() / other.std() < 1.33


def test_a_grey_image_keeps_one_channel():
    grey = jittered((0, 0, 1, 0), channels=1)
    assert grey.shape == (32, 32, 1)
    assert not np.array_equal(grey, image(1))
