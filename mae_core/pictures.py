"""Pictures for the eye: what the model saw, what it made of it, and what was there.

B images, C channels, H and W height and width, N patches, M masked patches, P values a patch, Q predicted for one.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mae_core.masking import take
from mae_core.targets import Raw, patchify, unpatchify

_TILE = 128
_MARGIN = 16
_GAP = 8
_TITLE_SIZE = 15
_NOTE_SIZE = 12
_TITLE_COLOUR = (32, 32, 32)
_NOTE_COLOUR = (112, 112, 112)
_HIDDEN = 0.82  # light grey: apart from the white page, and from black and white images


def reconstruction_sheet(
    originals_BCHW: torch.Tensor,
    pred_BMQ: torch.Tensor,
    masked_BM: torch.Tensor,
    *,
    patch_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    target: Raw,
    scale: int | None = None,
) -> Image.Image:
    """Draws a row for each image: masked, reconstructed (visible patches as they are), original.

    Where the model predicts something else than pixels, the sheet says what was done to it: with normalised pixels
    the true mean and standard deviation of each patch are put back, and a part of what one sees is the original's.

    Args:
        originals_BCHW: The images as the model takes them, normalised by ``mean`` and ``std``.
        pred_BMQ: The predicted patches in the space of the model's target.
        masked_BM: int64, which patches they are.
        patch_size: Pixels a side, or (height, width).
        mean: Of each channel, of pixels in [0, 1].
        std: As ``mean``.
        target: The model's.
        scale: Whole factor that enlarges the images; by default some 128 pixels a side are aimed at.
    """
    originals_BCHW, masked_BM = originals_BCHW.detach().float().cpu(), masked_BM.cpu()
    num_channels, height, width = originals_BCHW.shape[1:]
    patches_BNP = patchify(originals_BCHW, patch_size)
    target = copy.deepcopy(target).cpu()
    pred_BMP = target.pixels(pred_BMQ.detach().float().cpu(), take(patches_BNP, masked_BM))
    index_BMP = masked_BM[:, :, None].expand(pred_BMP.shape)
    reconstructed_BNP = patches_BNP.scatter(1, index_BMP, pred_BMP)
    hidden_BNP = torch.zeros_like(patches_BNP).scatter(1, index_BMP, 1.0)

    def pixels(patches_BNP: torch.Tensor) -> torch.Tensor:
        images_BCHW = unpatchify(patches_BNP, patch_size, (height, width), num_channels)
        mean_C11, std_C11 = (torch.tensor(list(value))[:, None, None] for value in (mean, std))
        return images_BCHW * std_C11 + mean_C11

    hidden_BCHW = unpatchify(hidden_BNP, patch_size, (height, width), num_channels)
    original_BCHW = pixels(patches_BNP)
    columns = {
        "masked": original_BCHW.lerp(torch.full_like(original_BCHW, _HIDDEN), hidden_BCHW),
        "reconstructed": pixels(reconstructed_BNP),
        "original": original_BCHW,
    }
    notes = [target.note] if target.note else []
    shown = 3 if num_channels >= 3 else 1
    if shown != num_channels:
        notes.append(f"Shown: the first {'three channels' if shown == 3 else 'channel'} of {num_channels}.")
    factor = scale or max(1, round(_TILE / max(height, width)))
    return _sheet({title: _tiles(images[:, :shown], factor) for title, images in columns.items()}, notes)


def _tiles(images_BCHW: torch.Tensor, factor: int) -> list[Image.Image]:
    images_BHWC = images_BCHW.nan_to_num(0).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1)
    if images_BHWC.shape[3] == 1:
        images_BHWC = images_BHWC.expand(-1, -1, -1, 3)
    tiles = [Image.fromarray(np.ascontiguousarray(image.numpy())) for image in images_BHWC]
    return [tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST) for tile in tiles]


def _sheet(columns: dict[str, list[Image.Image]], notes: list[str]) -> Image.Image:
    """Lays tiles of one size out in titled columns on white, under the notes."""
    title_font, note_font = ImageFont.load_default(_TITLE_SIZE), ImageFont.load_default(_NOTE_SIZE)
    tiles = list(columns.values())
    tile_width, tile_height = tiles[0][0].size
    # Tiles narrower than their title would let the titles run into each other.
    step = max(tile_width, *(int(title_font.getlength(title)) for title in columns)) + _GAP
    page_width = 2 * _MARGIN + len(columns) * step - _GAP
    lines = [line for note in notes for line in _wrap(note, note_font, page_width - 2 * _MARGIN)]
    line_height = _NOTE_SIZE + 4
    header = _MARGIN + _TITLE_SIZE + 8 + (len(lines) * line_height + 6 if lines else 0)
    page_height = header + len(tiles[0]) * (tile_height + _GAP) - _GAP + _MARGIN

    page = Image.new("RGB", (page_width, page_height), "white")
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN - 4 + number * line_height), line, _NOTE_COLOUR, note_font)
    for column, (title, images) in enumerate(columns.items()):
        centre = _MARGIN + column * step + (step - _GAP) // 2
        draw.text((centre, header - 8), title, _TITLE_COLOUR, title_font, anchor="ms")
        for row, image in enumerate(images):
            page.paste(image, (centre - tile_width // 2, header + row * (tile_height + _GAP)))
    return page


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
