"""Segmentation masks as PNG files: bytes to class indices, and the crop that their image gets.

B images of a block, H and W height and width. A value is a class; 255 does not count.
"""

import struct

import numpy as np

from mae_core.images import ImageError, decode_by_pillow

IGNORE = 255
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3  # of the colour types in a PNG's header


def decode_mask(data: bytes) -> np.ndarray:
    """Decodes a segmentation mask.

    Args:
        data: The bytes of a PNG, grey with 8 bits or with a palette, whose indices are the classes.

    Returns:
        uint8 array [H, W] of classes, ``IGNORE`` where a pixel does not count.

    Raises:
        ImageError: The bytes are cut or damaged; ``reason`` says why in one word.
        ValueError: They are no PNG, or one whose values are no classes.
    """
    if not data.startswith(_PNG_MAGIC):
        raise ValueError(f"no PNG, beginning with {data[:8]!r}: a mask is a PNG with 8-bit grey values or a palette")
    if len(data) < 33:
        raise ImageError("truncated", f"{len(data)} bytes")
    depth, colour = struct.unpack_from("BB", data, 24)
    if colour != _PALETTE and (colour, depth) != (_GREY, 8):
        raise ValueError(
            f"a PNG of colour type {colour} with {depth} bits: a mask has 8-bit grey values or a palette, whose "
            "indices are the classes"
        )
    return decode_by_pillow(data, "P" if colour == _PALETTE else "L")[..., 0]


def num_mask_classes(mask_HW: np.ndarray) -> int:
    """The highest class in a mask, and 1; 0 where no pixel counts."""
    classes = mask_HW[mask_HW != IGNORE]
    return 1 + int(classes.max()) if len(classes) else 0


def check_mask_size(mask_HW: np.ndarray, height: int, width: int) -> None:
    """Sees that a mask is of its image's size.

    Raises:
        ValueError: It is not.
    """
    H, W = mask_HW.shape
    if (height, width) != (H, W):
        raise ValueError(f"it has {W}x{H} pixels, and its image {width}x{height}")


def crop_mask(mask_HW: np.ndarray, top: int, left: int, height: int, width: int, flip: bool, out: np.ndarray) -> None:
    """What ``crop_resize`` does to an image, for its mask: by the nearest neighbour.

    Args:
        mask_HW: uint8 mask.
        top: First row of the box.
        left: First column of the box.
        height: Rows of the box.
        width: Columns of the box.
        flip: Whether the result is mirrored left to right.
        out: uint8 [H, W] that receives the result.
    """
    H, W = out.shape
    # The pixel under the centre of each pixel of the result.
    row_H = top + (2 * np.arange(H) + 1) * height // (2 * H)
    column_W = left + (2 * np.arange(W) + 1) * width // (2 * W)
    out[...] = mask_HW[row_H[:, None], column_W[::-1] if flip else column_W]
