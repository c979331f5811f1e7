import numpy as np
import pytest
import torch
from PIL import Image

from mae_core.pictures import reconstruction_sheet
from mae_core.targets import make_target, patchify

MEAN, STD = (0.4, 0.5, 0.6, 0.5, 0.5), (0.2, 0.25, 0.3, 0.2, 0.2)


def drawn(
    channels: int, *, target: str, size: tuple[int, int] = (32, 32), scale: int | None = None
) -> tuple[Image.Image, np.ndarray]:
    """A sheet of two images whose prediction is their own target, and the images as uint8 [B, H, W, C]."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, channels), dtype=np.uint8)
    mean, std = MEAN[:channels], STD[:channels]
    normalized = (torch.from_numpy(pixels) / 255 - torch.tensor(mean)) / torch.tensor(std)
    originals = normalized.permute(0, 3, 1, 2)
    patches = patchify(originals, 8)
    predicted = make_target(target, patches.shape[2], patches.shape[2])
    if predicted.needs_fit:
        predicted.fit([patches.flatten(0, 1)])
    values = predicted(patches)
    masked = torch.tensor([[0, 2, 3], [5, 1, 7]])
    pred = values.gather(1, masked[:, :, None].expand(-1, -1, values.shape[2])).to(torch.float64)
    sheet = reconstruction_sheet(
        originals,
        pred,
        masked,
        patch_size=8,
        mean=mean,
        std=std,
        target=predicted,
        scale=scale,
    )
    return sheet, pixels


def tiles(sheet: Image.Image, size: tuple[int, int], scale: int) -> np.ndarray:
    """Finds the tiles by the white around them: [row, column, H, W, 3], at the size of the images."""
    page = np.asarray(sheet)
    height, width = size[0] * scale, size[1] * scale
    bottom = page.shape[0] - 16 - height
    tops = [bottom - height - 8, bottom]
    step = (page.shape[1] - 2 * 16 + 8) // 3
    lefts = [16 + column * step + (step - 8) // 2 - width // 2 for column in range(3)]
    large = np.array([[page[t : t + height, x : x + width] for x in lefts] for t in tops])
    np.testing.assert_array_equal(large, large[:, :, ::scale, ::scale].repeat(scale, 2).repeat(scale, 3))
    return large[:, :, ::scale, ::scale]


@pytest.mark.parametrize("target", ["raw", "normalized", "pca"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_a_perfect_prediction_is_the_original(channels: int, target: str) -> None:
    sheet, pixels = drawn(channels, target=target)
    shown = np.broadcast_to(pixels[..., : 3 if channels >= 3 else 1], (2, 32, 32, 3))
    cut = tiles(sheet, (32, 32), 4)
    np.testing.assert_array_equal(cut[:, 2], shown)
    assert np.abs(cut[:, 1].astype(int) - shown).max() <= 1
    hidden = np.zeros((2, 4, 4), bool)
    hidden[0].flat[[0, 2, 3]] = True
    hidden[1].flat[[5, 1, 7]] = True
    hidden = hidden.repeat(8, axis=1).repeat(8, axis=2)
    np.testing.assert_array_equal(cut[:, 0][~hidden], shown[~hidden])
    assert len(np.unique(cut[:, 0][hidden])) == 1


def test_a_wrong_prediction_shows_where_it_was_made() -> None:
    originals = torch.zeros(2, 3, 16, 24)
    masked = torch.tensor([[1], [5]])
    pred = torch.full((2, 1, 192), 2.0)
    pred[1] = torch.nan  # a diverged model still gets its picture
    sheet = reconstruction_sheet(
        originals,
        pred,
        masked,
        patch_size=8,
        mean=MEAN[:3],
        std=STD[:3],
        target=make_target("raw", 192, 1),
        scale=5,
    )
    original, changed = (tiles(sheet, (16, 24), 5)[:, column].astype(int) for column in (2, 1))
    assert (original == np.array([102, 128, 153])).all()
    wrong = np.zeros((2, 16, 24), bool)
    wrong[0, :8, 8:16] = True
    wrong[1, 8:, 16:] = True
    np.testing.assert_array_equal((original != changed).any(axis=3), wrong)
    assert (changed[0, 0, 8] == np.array([204, 255, 255])).all()


def test_the_sheet_says_what_is_borrowed_and_what_is_left_out() -> None:
    # More is written above the tiles, and none of it runs off the page.
    heights = {}
    for channels, target in ((3, "raw"), (3, "normalized"), (5, "raw"), (5, "normalized")):
        page = np.asarray(drawn(channels, target=target)[0])
        heights[channels, target] = page.shape[0]
        assert (page[:, -8:] == 255).all()
        assert (page[:, :8] == 255).all()
        assert (page[:4] == 255).all()
    assert heights[3, "raw"] < heights[3, "normalized"] == heights[5, "raw"] < heights[5, "normalized"]


def test_tiles_are_large_enough_to_see() -> None:
    assert drawn(3, target="raw", size=(8, 64), scale=1)[0].width < 500
    for size in ((32, 32), (224, 224), (64, 24)):
        sheet, _ = drawn(3, target="raw", size=size)
        assert 300 <= sheet.width <= 750
