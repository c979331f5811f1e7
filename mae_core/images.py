"""Bytes to RGB pixels, crops as pure functions of the sample, and normalisation on the device.

B images of a block, C channels, H and W height and width, A attempts, U draws. What can be is computed for a
whole block at once: for tiny images the Python around the decoder costs as much as the decoder.
"""

import contextlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from mae_core.randomness import Integers, Purpose, uniform

if TYPE_CHECKING:
    # What only decodes, or hands images on, would wait 1.5 s for its import.
    import torch

MAX_PIXELS = 89_000_000

_COLOURS = {1: "GRAY", 3: "RGB"}
_MODES = {1: "L", 3: "RGB"}
_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_TURNED = (b"XML:com.adobe.xmp\0\0", b"Raw profile type exif\0")  # texts that may say how a PNG is turned
# What is read at all. Pillow knows more, among it formats that start other programs (EPS runs Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_EXIF_MAGIC = b"Exif\0\0"
# APP1 comes first or right after JFIF in practice, and no segment is longer than this.
_EXIF_WITHIN = 1 << 16
_START_OF_SCAN = 0xDA
_SMALL = 1 << 12
_NUM_ATTEMPTS = 10


def decode(data: bytes | memoryview, channels: int = 3, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an encoded image, upright by its EXIF orientation.

    Alpha is dropped, the first frame of an animation is taken, and of 16 bits the upper 8 are kept.

    Args:
        data: The bytes of a JPEG, PNG, WebP, TIFF, BMP, GIF, PPM or JPEG 2000 file.
        channels: 3 for RGB, 1 for grey.
        max_pixels: Larger images are refused by their header, before any pixel is decoded.

    Returns:
        Writable uint8 array [H, W, C].

    Raises:
        ImageError: The bytes are no readable image; ``reason`` says why in one word.
        ValueError: ``channels`` is neither 1 nor 3.
    """
    if channels not in _COLOURS:
        raise ValueError(f"channels is {channels}: images are decoded to 3 channels (RGB) or 1 (grey)")
    if not data:
        raise ImageError("empty", "no bytes")
    if data[: len(_JPEG_MAGIC)] == _JPEG_MAGIC:
        image_HWC = _decode_plain_jpeg(data, _COLOURS[channels], max_pixels)
        if image_HWC is not None:
            return image_HWC
    return decode_by_pillow(data, _MODES[channels], max_pixels)


def decode_by_pillow(data: bytes | memoryview, mode: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """What ``decode`` does for all but plain JPEGs, to one of Pillow's modes: ``P`` keeps the indices of a palette."""
    try:
        return _decode_once(data, mode, max_pixels)
    except ImageError as error:
        # First with what says how the picture is turned, then without it.
        for turned in (True, False) if error.reason != "too_large" else ():
            bare = _without_metadata(data, turned)
            if bare is None:
                break
            with contextlib.suppress(ImageError):
                return _decode_once(bare, mode, max_pixels)
        raise


def _decode_once(data: bytes | memoryview, mode: str, max_pixels: int) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: oddities of files that it reads all the same
            with Image.open(io.BytesIO(data), formats=_FORMATS) as file:
                _check_pixels(*file.size, max_pixels)
                file.load()
                turn = _TURNS.get(_orientation(file))
                image = file.transpose(turn) if turn is not None else file
                if image.mode.startswith("I"):
                    image = _upper_byte(image)
                elif image.mode == "F":
                    raise ImageError("unsupported", "pixels are floating-point numbers")
                pixels = np.array(image.convert(mode))
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not_an_image", str(error)) from None
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ImageError("too_large", str(error)) from None
    except Exception as error:  # a hostile file can make a decoder raise anything
        raise ImageError(_reason(error), f"{type(error).__name__}: {error}") from None
    return pixels.reshape(*pixels.shape[:2], -1)


def _orientation(file: Image.Image) -> int:
    """The orientation (1 to 8) that an image's EXIF or XMP gives; 1 where there is none or it cannot be read."""
    exif = file.info.get("exif", b"")
    found = _tiff_orientation(exif, len(_EXIF_MAGIC) if exif.startswith(_EXIF_MAGIC) else 0)
    if found is not None:
        return found
    try:
        return file.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # an EXIF that is damaged says nothing, takes no pixel with it, and keeps no XMP from being read
        xmp = file.info.get("XML:com.adobe.xmp") or file.info.get("xmp") or b""
        match = _XMP_ORIENTATION.search(xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp)
        return int(match[1]) if match else 1


def _without_metadata(data: bytes | memoryview, turned: bool) -> bytes | None:
    """The same pixels without what else a PNG, WebP or JPEG says of itself; None for other bytes.

    Pillow refuses whole files for damaged or large texts, colour profiles and the like.

    Args:
        data: The file.
        turned: Keep what says how the picture is turned: EXIF and XMP.
    """
    data = bytes(data)
    parts = []
    if data.startswith(_PNG_MAGIC):
        for kind, body, whole in _png_chunks(data):
            if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
                parts.append(whole)
            elif turned and (kind == b"eXIf" or body.startswith(_PNG_TURNED)):
                parts += [whole[:8], body, struct.pack(">I", zlib.crc32(kind + body))]
        return _PNG_MAGIC + b"".join(parts)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _bare_webp(data, turned)
    if data.startswith(_JPEG_MAGIC):
        at = 2
        while at + 4 <= len(data):
            start, marker, length = struct.unpack_from(">BBH", data, at)
            if start != 0xFF or marker == 0xFF or length < 2:
                return None
            if marker == _START_OF_SCAN:
                return data[:2] + b"".join(parts) + data[at:]
            whole = data[at : at + 2 + length]
            # EXIF and XMP have the orientation, Adobe's segment the colour space.
            if not 0xE0 <= marker <= 0xFE or (turned and marker == 0xE1) or (marker == 0xEE and length >= 14):
                parts.append(whole)
            at += 2 + length
    return None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Kind, body, and all bytes of each chunk."""
    at = len(_PNG_MAGIC)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, data[at + 8 : at + 8 + length], data[at : at + 12 + length]
        at += 12 + length


def _bare_webp(data: bytes, turned: bool) -> bytes | None:
    """A WebP of one picture with its EXIF and XMP, or None where it has none or is an animation."""
    chunks, at = {}, 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        chunks[kind] = data[at : at + 8 + length + (length & 1)]
        at += 8 + length + (length & 1)
    picture = chunks.get(b"VP8 ") or chunks.get(b"VP8L")
    if picture is None or len(picture) < 8 + struct.unpack_from("<I", picture, 4)[0]:
        return None
    exif, xmp = (chunks.get(kind, b"") if turned else b"" for kind in (b"EXIF", b"XMP "))
    if b"VP8X" in chunks and exif + xmp:
        header = chunks[b"VP8X"]
        flags = (8 if exif else 0) | (4 if xmp else 0)  # no profile, no alpha, no animation
        picture = header[:8] + bytes([flags]) + header[9:] + picture + exif + xmp
    return b"RIFF" + struct.pack("<I", 4 + len(picture)) + b"WEBP" + picture


def random_resized_crops(
    height_B: np.ndarray,
    width_B: np.ndarray,
    *,
    seed: int,
    epoch_B: Integers,
    sample_B: np.ndarray,
    repeat_B: Integers,
    source_B: Integers = 0,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
) -> "Crops":
    """Crops distributed as torchvision's ``RandomResizedCrop``, each a pure function of its sample's key.

    The share of the area is uniform in ``scale``, the logarithm of the aspect ratio uniform between those of
    ``ratio``. Of ten draws the first that fits is taken, else the largest central box within ``ratio``.

    Args:
        height_B: int64 heights of the images.
        width_B: int64 widths of the images.
        seed: Seed of the run.
        epoch_B: Epoch of each sample, or one for all.
        sample_B: int64 sample ids.
        repeat_B: Which of several views of the sample in the epoch, or one for all.
        source_B: Data source of each sample, or one for all.
        scale: Least and greatest share of the area.
        ratio: Least and greatest width over height.
        flip: Whether half of the crops are mirrored.
    """
    column = [np.reshape(np.asarray(part), (-1, 1)) for part in (epoch_B, source_B, sample_B, repeat_B)]
    # Draws 0-9 the area, 10-19 the aspect, 20 and 21 the place, 22 the flip: part of every run's identity.
    draw_BU = uniform(Purpose.CROP, seed, *column, np.arange(2 * _NUM_ATTEMPTS + 3))
    H_B1, W_B1 = (np.reshape(np.asarray(size, np.int64), (-1, 1)) for size in (height_B, width_B))

    area_BA = H_B1 * W_B1 * (scale[0] + (scale[1] - scale[0]) * draw_BU[:, :_NUM_ATTEMPTS])
    log_low, log_high = np.log(ratio[0]), np.log(ratio[1])
    aspect_BA = np.exp(log_low + (log_high - log_low) * draw_BU[:, _NUM_ATTEMPTS : 2 * _NUM_ATTEMPTS])
    width_BA = np.rint(np.sqrt(area_BA * aspect_BA)).astype(np.int64)
    height_BA = np.rint(np.sqrt(area_BA / aspect_BA)).astype(np.int64)
    fits_BA = (width_BA > 0) & (width_BA <= W_B1) & (height_BA > 0) & (height_BA <= H_B1)

    first_B1 = fits_BA.argmax(axis=1)[:, None]
    fits_B = fits_BA.any(axis=1)
    H_B, W_B = H_B1[:, 0], W_B1[:, 0]
    central_width_B = np.clip(np.rint(H_B * ratio[1]).astype(np.int64), 1, W_B)
    central_height_B = np.clip(np.rint(W_B / ratio[0]).astype(np.int64), 1, H_B)
    box_width_B = np.where(fits_B, np.take_along_axis(width_BA, first_B1, 1)[:, 0], central_width_B)
    box_height_B = np.where(fits_B, np.take_along_axis(height_BA, first_B1, 1)[:, 0], central_height_B)

    room_top_B, room_left_B = H_B - box_height_B, W_B - box_width_B
    top_B = (draw_BU[:, -3] * (room_top_B + 1)).astype(np.int64)
    left_B = (draw_BU[:, -2] * (room_left_B + 1)).astype(np.int64)
    return Crops(
        top=np.where(fits_B, np.minimum(top_B, room_top_B), room_top_B // 2),
        left=np.where(fits_B, np.minimum(left_B, room_left_B), room_left_B // 2),
        height=box_height_B,
        width=box_width_B,
        flip=(draw_BU[:, -1] < 0.5) & flip,
    )


def center_crops(
    height_B: np.ndarray, width_B: np.ndarray, *, out_size: tuple[int, int], share: float = 0.875
) -> "Crops":
    """Evaluation crops: what "resize to ``out_size / share``, cut ``out_size`` from the centre" keeps.

    Args:
        height_B: int64 heights of the images.
        width_B: int64 widths of the images.
        out_size: (H, W) that the crop will be resized to; the box has its aspect ratio.
        share: Side of the box over the side of the largest box that fits; 224 of 256 in most papers.
    """
    height_B, width_B = np.asarray(height_B, np.int64), np.asarray(width_B, np.int64)
    out_height, out_width = out_size
    largest_B = np.minimum(height_B / out_height, width_B / out_width) * share
    box_height_B = np.clip(np.rint(largest_B * out_height).astype(np.int64), 1, height_B)
    box_width_B = np.clip(np.rint(largest_B * out_width).astype(np.int64), 1, width_B)
    return Crops(
        top=(height_B - box_height_B) // 2,
        left=(width_B - box_width_B) // 2,
        height=box_height_B,
        width=box_width_B,
        flip=np.zeros(height_B.shape, bool),
    )


def crop_resize(
    image_HWC: np.ndarray, top: int, left: int, height: int, width: int, flip: bool, out: np.ndarray
) -> None:
    """Cuts a box, resizes it (bicubic with antialias, as Pillow does) and mirrors it, into ``out``.

    Args:
        image_HWC: uint8 image. Where the box leaves it, it goes on as in a mirror that stands on its last pixel.
        top: First row of the box.
        left: First column of the box.
        height: Rows of the box.
        width: Columns of the box.
        flip: Whether the result is mirrored left to right.
        out: uint8 [H, W, C] that receives the result, for example one image of a batch.
    """
    H, W = image_HWC.shape[:2]
    if top < 0 or left < 0 or top + height > H or left + width > W:
        rows, columns = (_mirrored(first, num, size) for first, num, size in ((top, height, H), (left, width, W)))
        box_HWC = image_HWC[rows[:, None], columns]
    else:
        box_HWC = image_HWC[top : top + height, left : left + width]
    if box_HWC.shape == out.shape and not flip:
        out[...] = box_HWC
        return
    import torch

    # The copy, and unsqueeze before permute, make the strides channels-last: more than twice as fast.
    box_1CHW = torch.from_numpy(box_HWC.copy()).unsqueeze(0).permute(0, 3, 1, 2)
    if box_HWC.shape != out.shape:
        box_1CHW = torch.nn.functional.interpolate(box_1CHW, out.shape[:2], mode="bicubic", antialias=True)
    if flip:  # PyTorch mirrors pixels eight times as fast as NumPy
        box_1CHW = box_1CHW.flip(3)
    out[...] = box_1CHW.numpy()[0].transpose(1, 2, 0)


def _mirrored(first: int, num: int, size: int) -> np.ndarray:
    """Indices ``first`` to ``first + num`` of a line of ``size`` pixels that is mirrored at both ends."""
    period = max(1, 2 * size - 2)
    index = np.arange(first, first + num) % period
    return np.minimum(index, period - index)


def normalize(
    images_BHWC: "torch.Tensor", mean: "Sequence[float] | torch.Tensor", std: "Sequence[float] | torch.Tensor"
) -> "torch.Tensor":
    """Pixels as the model takes them: ``(x / 255 - mean) / std`` on the device of the images.

    Args:
        images_BHWC: uint8.
        mean: One value a channel, of pixels in [0, 1]. A tensor on the device spares a copy at each call.
        std: As ``mean``.

    Returns:
        float32 [B, C, H, W], contiguous.
    """
    import torch

    mean_C = torch.as_tensor(mean, dtype=torch.float32, device=images_BHWC.device)
    std_C = torch.as_tensor(std, dtype=torch.float32, device=images_BHWC.device)
    images_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return (images_BCHW - 255 * mean_C[:, None, None]) * (1 / (255 * std_C))[:, None, None]


def _decode_plain_jpeg(data: bytes | memoryview, colour: str, max_pixels: int) -> np.ndarray | None:
    """Decodes an upright JPEG in grey, YCbCr or RGB; None where Pillow should look at it instead."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_pixels(int(width), int(height), max_pixels)
    if space not in ("YCbCr", "Gray", "RGB") or _jpeg_orientation(data) != 1:
        return None
    try:
        return simplejpeg.decode_jpeg(data, colour)
    except ValueError as error:
        text = str(error)
        if "remature end" in text:
            raise ImageError("truncated", text) from None
        if "Corrupt" in text and "extraneous" not in text:
            raise ImageError("corrupt", text) from None
        # Extraneous bytes between segments and the like: the pixels are all there.
        return None


def _jpeg_orientation(data: bytes | memoryview) -> int:
    """The EXIF orientation (1 to 8) of a JPEG; 1 where there is none or it cannot be read."""
    tiff = _find_exif(data) + len(_EXIF_MAGIC)
    if tiff < len(_EXIF_MAGIC):
        return 1
    return _tiff_orientation(data, tiff) or 1


def _tiff_orientation(data: bytes | memoryview, tiff: int) -> int | None:
    """The orientation in an EXIF whose TIFF header is at ``tiff``; None where there is none."""
    order = "<" if data[tiff : tiff + 2] == b"II" else ">"
    try:
        (ifd,) = struct.unpack_from(order + "I", data, tiff + 4)
        (num_entries,) = struct.unpack_from(order + "H", data, tiff + ifd)
        for entry in range(tiff + ifd + 2, tiff + ifd + 2 + 12 * num_entries, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", data, entry)
            if tag == _ORIENTATION_TAG:
                return value
    except struct.error:
        pass
    return None


def _find_exif(data: bytes | memoryview) -> int:
    """Where a JPEG's EXIF begins, -1 where it has none.

    From segment to segment, which in a photograph is 30 microseconds, a fiftieth of its decoding, faster than to search
    its beginning; in what is small it is the other way round.
    """
    at = len(_JPEG_MAGIC) - 1
    while len(data) > _SMALL and at + 4 <= len(data):
        start, marker, length = struct.unpack_from(">BBH", data, at)
        if start != 0xFF or marker == 0xFF or length < 2:  # fill bytes, or what does not belong there
            break
        if marker == _START_OF_SCAN:
            return -1
        if data[at + 4 : at + 4 + len(_EXIF_MAGIC)] == _EXIF_MAGIC:
            return at + 4
        at += 2 + length
    return bytes(data[:_EXIF_WITHIN]).find(_EXIF_MAGIC)


def _upper_byte(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ImageError("unsupported", "pixels are 32-bit integers")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _reason(error: Exception) -> str:
    text = str(error).lower()
    if isinstance(error, EOFError) or "truncated" in text:
        return "truncated"
    if isinstance(error, NotImplementedError) or "conversion" in text or "unsupported" in text:
        return "unsupported"
    return "corrupt"


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width}x{height} pixels; at most {max_pixels:,} are decoded")


class ImageError(ValueError):
    """Bytes that are no readable image.

    Attributes:
        reason: A stable word to count by: "empty", "not_an_image", "truncated", "corrupt", "too_large" or
            "unsupported".
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)  # both in args, so that it survives pickling
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


@dataclass(frozen=True)
class Crops:
    """One box an image, in pixels, and whether it is mirrored: int64 and bool arrays [B]."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    flip: np.ndarray

    def boxes(self) -> Iterator[tuple[int, int, int, int, bool]]:
        """(top, left, height, width, flip) of each image as Python numbers, ready for ``crop_resize``."""
        columns = (self.top, self.left, self.height, self.width, self.flip)
        return zip(*(column.tolist() for column in columns), strict=True)
