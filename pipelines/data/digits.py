"""scikit-learn's handwritten digits as a source of images: real, small, and there without a network."""

import functools
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from mae_core.randomness import Purpose, hash_u64
from pipelines.errors import UserError

_NUM_DIGITS = 1797
_NUM_TEST_DIGITS = 297
_SIZE = 32
_QUALITY = 90


def list_digits(split: str) -> Iterator[tuple[str, int, int]]:
    """Yields path, bytes and number of each digit of a split: 1,500 for training, 297 to test.

    Raises:
        UserError: It is another split.
    """
    if split not in ("train", "test"):
        raise UserError(f"digits are divided into the splits train and test, not '{split}'")
    # Fixed whatever the seed, so that no digit is ever in both.
    order = np.argsort(hash_u64(Purpose.SPLIT, 0, np.arange(_NUM_DIGITS)), kind="stable")
    chosen = order[:_NUM_TEST_DIGITS] if split == "test" else order[_NUM_TEST_DIGITS:]
    _, labels = _digits()
    for number in sorted(chosen.tolist()):
        yield f"{labels[number]}/digit_{number:04d}.jpg", len(digit_jpeg(number)), number


@functools.lru_cache(maxsize=_NUM_DIGITS)
def digit_jpeg(number: int) -> bytes:
    """A digit as an RGB JPEG of 32x32 pixels, enlarged from its 8x8 grey ones."""
    grey_HW = np.round(_digits()[0][number] * (255 / 16)).astype(np.uint8)
    image = Image.fromarray(grey_HW).resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    image.convert("RGB").save(data, "JPEG", quality=_QUALITY)
    return data.getvalue()


@functools.lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # a second to import, for this source only

    pixels_SP, labels_S = load_digits(return_X_y=True)
    return np.asarray(pixels_SP).reshape(-1, 8, 8), np.asarray(labels_S)
