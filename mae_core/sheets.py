"""Sheets of what an encoder does: neighbours, heat maps, grids with titles, confusion matrices.

Q queries, K neighbours, R rows, L columns, H W C height, width and channels (1 or 3) of an image, C C of a
confusion matrix its classes. Images are uint8 NumPy arrays.
"""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mae_core.mask_images import IGNORE
from mae_core.names import printable
from mae_core.pictures import _GAP, _MARGIN, _NOTE_COLOUR, _NOTE_SIZE, _TILE, _TITLE_COLOUR, _TITLE_SIZE, _sheet, _tiles

# Lightness rises evenly, so the order survives without colour: five points of matplotlib's "inferno" (CC0).
_HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
_HEAT_SHARE = 0.5
_BLUES = ((255, 255, 255), (158, 202, 225), (49, 130, 189), (8, 48, 107))
_NOTHING = (232, 232, 232)
_LEGEND = (0, 0.01, 0.05, 0.25, 0.5, 1)
_NAME_WIDTH = 160
_MAX_CLASSES = 100

Values = np.ndarray | torch.Tensor


def neighbour_sheet(query_images: np.ndarray, neighbour_images: np.ndarray, similarities: Values) -> Image.Image:
    """Draws a row for each query: the query, then its nearest neighbours with their cosine similarity.

    Args:
        query_images: uint8 [Q, H, W, C].
        neighbour_images: uint8 [Q, K, H, W, C], the nearest first.
        similarities: [Q, K].

    Raises:
        ValueError: The shapes do not go together, or these are no images of 8 bits.
    """
    query_QHWC, neighbours_QKHWC, similarity_QK = query_images, neighbour_images, _numbers(similarities)
    Q, K = similarity_QK.shape
    if neighbours_QKHWC.shape != (Q, K, *query_QHWC.shape[1:]) or len(query_QHWC) != Q:
        raise ValueError(
            f"queries {query_QHWC.shape}, neighbours {neighbours_QKHWC.shape} and similarities {similarity_QK.shape} "
            "do not go together: expected [Q, H, W, C], [Q, K, H, W, C] and [Q, K]"
        )
    columns = {"query": _captioned(query_QHWC, [""] * Q)}
    for number in range(K):
        captions = [f"{value:.3f}" for value in similarity_QK[:, number]]
        columns[str(number + 1)] = _captioned(neighbours_QKHWC[:, number], captions)
    return _sheet(columns, [])


def heat_overlay(image_HWC: np.ndarray, heat_hw: Values) -> np.ndarray:
    """Lays a heat map over an image in grey: dark where it is least, light yellow where it is most.

    Every cell of the map is one block, as no finer place is known. The shades span the map's own values, so two maps
    compare by form, not by strength. Values that are not finite count as least.

    Args:
        image_HWC: uint8.
        heat_hw: Any numbers, for example the attention of one head on the patch grid.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: This is no image of 8 bits, or the map is not two-dimensional.
    """
    (image_HWC,) = _as_colour(image_HWC[None])
    heat_hw = _numbers(heat_hw)
    if heat_hw.ndim != 2 or 0 in heat_hw.shape:
        raise ValueError(f"heat of shape {heat_hw.shape}: expected rows x columns, not empty")
    finite = heat_hw[np.isfinite(heat_hw)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    share_hw = (np.where(np.isfinite(heat_hw), heat_hw, low) - low) / ((high - low) or 1.0)
    height, width = image_HWC.shape[:2]
    heat = Image.fromarray(_ramp(share_hw, _HEAT)).resize((width, height), Image.Resampling.NEAREST)
    grey = Image.fromarray(image_HWC).convert("L").convert("RGB")
    return np.array(Image.blend(grey, heat, _HEAT_SHARE))


def titled_grid(
    rows: Sequence[Sequence[np.ndarray]] | np.ndarray, row_titles: Sequence[str], column_titles: Sequence[str]
) -> Image.Image:
    """Lays images of one size out in a grid, each row and each column under its title.

    Args:
        rows: R rows of L uint8 images [H, W, C]; also one array [R, L, H, W, C].
        row_titles: R titles, at the left.
        column_titles: L titles, at the top, no two alike.

    Raises:
        ValueError: Images differ in size, are not of 8 bits, or do not match the titles.
    """
    sizes = sorted({np.shape(image) for row in rows for image in row})
    if len(sizes) != 1:
        raise ValueError(f"images of the sizes {sizes} in one grid: bring them to one size")
    lengths = [len(row) for row in rows]
    if lengths != [len(column_titles)] * len(row_titles):
        raise ValueError(
            f"rows of {lengths} images for {len(row_titles)} row and {len(column_titles)} column titles: expected a "
            "title for every row and every column"
        )
    if len(set(column_titles)) != len(column_titles):
        raise ValueError(f"column titles {list(column_titles)}: no two may be alike")
    grid_RLHWC = np.array(rows)
    columns = {title: _enlarged(grid_RLHWC[:, number]) for number, title in enumerate(column_titles)}
    sheet = _sheet(columns, [])

    font = ImageFont.load_default(_TITLE_SIZE)
    indent = int(max(font.getlength(title) for title in row_titles)) + _GAP
    page = Image.new("RGB", (sheet.width + indent, sheet.height), "white")
    page.paste(sheet, (indent, 0))
    draw = ImageDraw.Draw(page)
    tile_height = columns[column_titles[0]][0].height
    for number, title in enumerate(reversed(row_titles)):
        centre = sheet.height - _MARGIN - number * (tile_height + _GAP) - tile_height // 2
        draw.text((_MARGIN + indent - _GAP, centre), title, _TITLE_COLOUR, font, anchor="rm")
    return page


def confusion_picture(confusion_CC: Values, class_names: Sequence[str]) -> Image.Image:
    """Draws a confusion matrix, each row as shares of its true class.

    The colour goes with the root of the share, so that rare confusions show; a legend says so. Up to some 25 classes
    the percentages stand in the cells. The row of a class without samples is grey.

    Args:
        confusion_CC: Counts, true class down, predicted class across.
        class_names: A name each; long ones are cut, and what no font shows is escaped.

    Raises:
        ValueError: The matrix is not square, has negative counts, does not fit the names, or has less than 2 or more
            than 100 classes.
    """
    count_CC = _numbers(confusion_CC)
    C = len(class_names)
    if count_CC.shape != (C, C) or not 2 <= C <= _MAX_CLASSES:
        raise ValueError(
            f"a confusion matrix of shape {count_CC.shape} and {C} names: expected a row, a column and a name for each "
            f"of 2 to {_MAX_CLASSES} classes"
        )
    if not np.isfinite(count_CC).all() or count_CC.min() < 0:
        raise ValueError("a confusion matrix holds counts: expected finite numbers, none below 0")
    total_C1 = count_CC.sum(axis=1, keepdims=True)
    share_CC = count_CC / np.where(total_C1 > 0, total_C1, 1)
    colour_CC3 = np.where(total_C1[:, :, None] > 0, _ramp(np.sqrt(share_CC), _BLUES), np.array(_NOTHING, np.uint8))

    cell = max(14, min(56, 640 // C))
    font = ImageFont.load_default(_NOTE_SIZE)
    names = [_cut(printable(name), font) for name in class_names]
    indent = _MARGIN + int(max(font.getlength(name) for name in names)) + _GAP
    left = top = indent + _TITLE_SIZE + _GAP  # the names are as long upwards as to the left
    legend_width = len(_LEGEND) * 60
    page = Image.new("RGB", (left + max(C * cell, legend_width) + _MARGIN, top + C * cell + 60), "white")
    matrix = Image.fromarray(colour_CC3).resize((C * cell, C * cell), Image.Resampling.NEAREST)
    page.paste(matrix, (left, top))
    draw = ImageDraw.Draw(page)
    draw.rectangle((left - 1, top - 1, left + C * cell, top + C * cell), outline=_NOTE_COLOUR)
    for number, name in enumerate(names):
        centre = number * cell + cell // 2
        draw.text((left - _GAP, top + centre), name, _TITLE_COLOUR, font, anchor="rm")
        _write_upwards(page, name, font, _TITLE_COLOUR, (left + centre, top - _GAP), "ls")
    draw.text((left + C * cell // 2, _MARGIN), "predicted", _NOTE_COLOUR, font, anchor="mm")
    _write_upwards(page, "true", font, _NOTE_COLOUR, (_MARGIN, top + C * cell // 2), "ms")
    if cell >= 24:
        for row, column in np.argwhere(np.broadcast_to(total_C1 > 0, (C, C))):
            percent = round(100 * float(share_CC[row, column]))
            if percent or row == column:
                place = (left + column * cell + cell // 2, top + row * cell + cell // 2)
                ink = "white" if share_CC[row, column] > 0.3 else _TITLE_COLOUR
                draw.text(place, str(percent), ink, font, anchor="mm")
    for number, share in enumerate(_LEGEND):
        x, y = left + number * 60, top + C * cell + 24
        colour = tuple(_ramp(np.sqrt(np.array([share])), _BLUES)[0].tolist())
        draw.rectangle((x, y, x + 14, y + 14), fill=colour, outline=_NOTE_COLOUR)
        draw.text((x + 20, y + 7), f"{share:.0%}", _NOTE_COLOUR, font, anchor="lm")
    return page


def segmentation_sheet(
    images_BHWC: np.ndarray, masks_BHW: np.ndarray, predictions_BHW: np.ndarray, class_names: Sequence[str]
) -> Image.Image:
    """Draws a row for each image: the image, its label map, and a prediction; below them the colour of each class.

    Args:
        images_BHWC: uint8.
        masks_BHW: Integer classes, ``IGNORE`` for what does not count, which is drawn in grey.
        predictions_BHW: Integer classes.
        class_names: A name each; the legend has those classes that are seen.

    Raises:
        ValueError: The shapes do not go together, or a class has no name.
    """
    shape = images_BHWC.shape[:3]
    if masks_BHW.shape != shape or predictions_BHW.shape != shape:
        raise ValueError(
            f"images {images_BHWC.shape}, label maps {masks_BHW.shape} and predictions {predictions_BHW.shape} do not "
            "go together: expected [B, H, W, C], [B, H, W] and [B, H, W]"
        )
    seen = np.unique(np.concatenate([masks_BHW.ravel(), predictions_BHW.ravel()]))
    classes = [int(value) for value in seen if value != IGNORE]
    if classes and not 0 <= classes[0] <= classes[-1] < len(class_names):
        raise ValueError(f"classes {classes[0]} to {classes[-1]} for {len(class_names)} names: give a name for each")
    colours_V3 = np.array([_class_colour(value) for value in range(256)], np.uint8)
    colours_V3[IGNORE] = _NOTHING
    maps = {"label map": masks_BHW, "prediction": predictions_BHW}
    columns = {"image": _enlarged(images_BHWC)} | {
        title: _enlarged(colours_V3[values_BHW.astype(np.int64)]) for title, values_BHW in maps.items()
    }
    sheet = _sheet(columns, [])
    font = ImageFont.load_default(_NOTE_SIZE)
    entries = [(_cut(printable(class_names[value]), font), tuple(colours_V3[value].tolist())) for value in classes]
    if (masks_BHW == IGNORE).any():
        entries.append(("does not count", _NOTHING))
    places, x, line = [], _MARGIN, 0
    for name, _ in entries:
        width = 20 + int(font.getlength(name)) + 2 * _GAP
        if x > _MARGIN and x + width > sheet.width - _MARGIN:
            x, line = _MARGIN, line + 1
        places.append((x, sheet.height + line * 20))
        x += width
    page = Image.new("RGB", (sheet.width, sheet.height + (line + 1) * 20 + _GAP), "white")
    page.paste(sheet, (0, 0))
    draw = ImageDraw.Draw(page)
    for (name, colour), (left, top) in zip(entries, places, strict=True):
        draw.rectangle((left, top, left + 14, top + 14), fill=colour, outline=_NOTE_COLOUR)
        draw.text((left + 20, top + 7), name, _NOTE_COLOUR, font, anchor="lm")
    return page


def _class_colour(value: int) -> tuple[int, int, int]:
    """A colour for each class: hues a golden section apart, so that neighbours differ, light and dark in turns."""
    red, green, blue = colorsys.hsv_to_rgb(value * 0.618034 % 1, 0.75, (0.95, 0.65)[value % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def _write_upwards(
    page: Image.Image,
    text: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    colour: tuple[int, int, int],
    place: tuple[int, int],
    anchor: str,
) -> None:
    """Writes bottom to top around the vertical through ``place``: from there on ("ls"), or about it ("ms")."""
    length, height = int(font.getlength(text)) + 2, _NOTE_SIZE + 4
    ink = Image.new("L", (length, height), 0)
    ImageDraw.Draw(ink).text((0, height // 2), text, 255, font, anchor="lm")
    ink = ink.rotate(90, expand=True)
    top = place[1] - (length if anchor == "ls" else length // 2)
    page.paste(Image.new("RGB", ink.size, colour), (place[0] - height // 2, top), ink)


def _cut(name: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    if font.getlength(name) <= _NAME_WIDTH:
        return name
    while font.getlength(name + "...") > _NAME_WIDTH:
        name = name[:-1]
    return name.rstrip() + "..."


def _captioned(images_BHWC: np.ndarray, captions: list[str]) -> list[Image.Image]:
    """Enlarged images over a small line of text."""
    font = ImageFont.load_default(_NOTE_SIZE)
    captioned = []
    for tile, caption in zip(_enlarged(images_BHWC), captions, strict=True):
        width = max(tile.width, int(font.getlength("-0.000")) + 2)
        canvas = Image.new("RGB", (width, tile.height + _NOTE_SIZE + 4), "white")
        canvas.paste(tile, ((width - tile.width) // 2, 0))
        ImageDraw.Draw(canvas).text((width // 2, canvas.height - 2), caption, _NOTE_COLOUR, font, anchor="ms")
        captioned.append(canvas)
    return captioned


def _enlarged(images_BHWC: np.ndarray) -> list[Image.Image]:
    images_BCHW = torch.from_numpy(_as_colour(images_BHWC)).permute(0, 3, 1, 2)
    return _tiles(images_BCHW / 255, max(1, round(_TILE / max(images_BCHW.shape[2:]))))


def _as_colour(images_BHWC: np.ndarray) -> np.ndarray:
    """A writable copy with three channels."""
    if images_BHWC.dtype != np.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[3] not in (1, 3):
        raise ValueError(f"{images_BHWC.dtype} images of shape {images_BHWC.shape[1:]}: expected uint8 [H, W, 1 or 3]")
    return np.array(np.broadcast_to(images_BHWC, (*images_BHWC.shape[:3], 3)))


def _numbers(values: Values) -> np.ndarray:
    tensor = torch.from_numpy(np.array(values)) if isinstance(values, np.ndarray) else values.detach()
    return tensor.double().cpu().numpy()


def _ramp(share: np.ndarray, colours: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Shares in [0, 1] as uint8 colours on the line through ``colours``: one axis of 3 more."""
    points = np.linspace(0, 1, len(colours))
    channels = [np.interp(share, points, channel) for channel in zip(*colours, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
