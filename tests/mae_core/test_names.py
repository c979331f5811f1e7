"""Names that came from elsewhere, where they are shown."""

import os

import numpy as np
import pytest

from mae_core.mask_images import IGNORE
from mae_core.names import printable
from mae_core.sheets import confusion_picture, segmentation_sheet

STRANGE = (os.fsdecode(b"caf\xe9"), "two\nlines\t", "cat 🐈", "100 %", "a|b", "$x_1$", "日本", "\u2028", "a\rb")


def test_names_are_shown_on_one_line_and_can_be_encoded():
    shown = [printable(name) for name in STRANGE]
    assert shown == ["caf\\xe9", "two\\nlines\\t", "cat 🐈", "100 %", "a|b", "$x_1$", "日本", "\\u2028", "a\\rb"]
    assert [name.encode().decode() for name in shown] == shown
    # Two emoji that a joiner makes one, and half of a pair.
    assert printable("🐈\u200d⬛ \ud800") == "🐈\u200d⬛ \\ud800"


def test_a_confusion_matrix_takes_any_names():
    counts = np.eye(len(STRANGE), dtype=int)
    picture = confusion_picture(counts, STRANGE)
    # What is escaped is drawn as it is written.
    assert picture.tobytes() == confusion_picture(counts, [printable(name) for name in STRANGE]).tobytes()


def test_a_sheet_shows_images_label_maps_and_predictions():
    images = np.full((2, 16, 32, 3), 200, np.uint8)
    masks, predictions = np.zeros((2, 16, 32), np.uint8), np.zeros((2, 16, 32), np.int64)
    masks[0, :8], masks[1, :, :4], predictions[0, :, :16] = 1, IGNORE, 2
    sheet = segmentation_sheet(images, masks, predictions, STRANGE)
    shown = np.array(sheet)
    pixels = [int((shown == colour).all(axis=2).sum()) for colour in ((200, 200, 200), (232, 232, 232))]
    # Enlarged by 4: two images of 16x32, and 16x4 pixels that do not count beside their place in the legend.
    assert pixels[0] >= 2 * 16 * 32 * 16
    assert pixels[1] >= 16 * 4 * 16
    assert sheet.tobytes() != segmentation_sheet(images, masks, masks % IGNORE, STRANGE).tobytes()
    with pytest.raises(ValueError, match="classes 0 to 2 for 2 names"):
        segmentation_sheet(images, masks, predictions, ["a", "b"])
    with pytest.raises(ValueError, match="do not go together"):
        segmentation_sheet(images, masks[:1], predictions, STRANGE)
