"""Augmentation: the same for the same key, wherever it is made."""

import random

import numpy as np
import pytest

from mae_core.augment import auto_augment, check_policy

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


def test_no_image_fails():
    # Among so many are all operations, and the strongest that there are.
    for sample in range(1500):
        auto_augment(image(), "rand-m9-mstd0.5-inc1", (0, 0, sample))
