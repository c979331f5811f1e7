import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from scipy.stats import ks_2samp
from torchvision import transforms

from mae_core.images import ImageError, center_crops, crop_resize, decode, normalize, random_resized_crops


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A photograph-like RGB image: smooth colours, edges and a little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    image[height // 3 : height // 2, width // 4 : width // 2] = (200, 30, 90)
    return np.clip(image + rng.integers(-6, 7, image.shape), 0, 255).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason_of(data: bytes, **options) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    return caught.value.reason


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_exif(jpeg: bytes, orientation: int, order: str) -> bytes:
    entries = [(0x010F, 2, 4, b"cam\0"), (0x0112, 3, 1, struct.pack(order + "HH", orientation, 0))]
    ifd = struct.pack(order + "H", len(entries)) + b"".join(
        struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries
    )
    mark = b"II" if order == "<" else b"MM"
    body = b"Exif\0\0" + mark + struct.pack(order + "HI", 42, 8) + ifd + bytes(4)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


@pytest.mark.parametrize("options", [{"quality": 90}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_has_pillows_pixels(options: dict, channels: int) -> None:
    for source in (scene(61, 83), scene(61, 83)[..., 0]):
        data = encode(source, "JPEG", **options)
        reference = Image.open(io.BytesIO(data))
        reference.draft("RGB" if channels == 3 else "L", reference.size)  # grey is the stored luminance
        expected = np.asarray(reference.convert("RGB" if channels == 3 else "L"))
        decoded = decode(data, channels)
        assert decoded.shape == (61, 83, channels)
        assert decoded.dtype == np.uint8
        assert np.abs(decoded.squeeze().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM", "WEBP", "JPEG2000"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_formats_keep_every_pixel(kind: str, channels: int) -> None:
    image = Image.fromarray(scene(40, 30))
    expected = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    decoded = decode(encode(image, kind, **({"lossless": True} if kind == "WEBP" else {})), channels)
    np.testing.assert_array_equal(decoded.squeeze(), expected)
    decoded[:] = 0  # ours to write to


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "L", "1", "CMYK", "PA"])
def test_colour_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(scene(40, 30)).convert(mode)
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    data = encode(image, "TIFF" if mode in ("CMYK", "PA") else "PNG", **options)
    np.testing.assert_array_equal(decode(data), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_has_pillows_colours() -> None:
    data = encode(Image.fromarray(scene(40, 30)).convert("CMYK"), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_the_upper_eight(kind: str) -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    for channels in (1, 3):
        decoded = decode(encode(values, kind), channels)
        np.testing.assert_array_equal(decoded, np.repeat((values >> 8)[..., None], channels, axis=2))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation: int, order: str) -> None:
    data = with_exif(encode(scene(24, 40), "JPEG", quality=95), orientation, order)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    decoded = decode(data)
    assert decoded.shape == ((40, 24, 3) if orientation >= 5 else (24, 40, 3))
    assert np.abs(decoded.astype(int) - expected).max() <= 1

    exif = Image.Exif()
    exif[0x0112] = orientation
    flat = Image.fromarray(scene(24, 40))
    assert decode(encode(flat, "PNG", exif=exif)).shape == decoded.shape


@pytest.mark.parametrize("before", ["", "FFE20006AAAA5555", "FFFFFF", "FFE20004AAAA616263"])
def test_a_large_photograph_stands_upright_too(before: str) -> None:
    # Its EXIF is found by going from segment to segment: behind another one, fill bytes, or what does not belong there.
    noise = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    data = with_exif(encode(noise, "JPEG", quality=95), 6, ">")
    assert len(data) > 8192
    exif = data.find(b"Exif") - 4
    odd = data[:exif] + bytes.fromhex(before) + data[exif:]
    assert np.array_equal(decode(memoryview(odd)), np.rot90(decode(encode(noise, "JPEG", quality=95)), -1))
    # What looks like EXIF within the pixels is none.
    plain = encode(noise, "JPEG", quality=95)
    assert decode(plain + data[exif : exif + 200]).shape == (80, 120, 3)


def test_harmless_oddities_of_a_jpeg_are_forgiven() -> None:
    data = encode(scene(50, 60), "JPEG")
    table = data.find(b"\xff\xc4")
    for odd in (data[:table] + b"abc" + data[table:], data + b"trailing"):
        assert np.abs(decode(odd).astype(int) - decode(data)).max() <= 1


_TURNED = b"II*\0\x08\0\0\0\x01\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"  # EXIF of an orientation of 6
_TURNED_AMONG_BROKEN = (
    b"II*\0\x08\0\0\0\x03\0\x1a\1\5\0\1\0\0\0\xff\xff\0\0\x12\1\3\0\1\0\0\0\6\0\0\0"
    b"\x69\x87\4\0\1\0\0\0\xff\xff\0\0\0\0\0\0"
)
_HUGE = zlib.compress(bytes(3 << 20))


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"eXIf", b"no TIFF at all"),
        chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff"),
        chunk(b"zTXt", b"k\0\0" + _HUGE),
        chunk(b"zTXt", b"k\0\5odd"),
        chunk(b"iTXt", b"k\0\1\0\0\0" + _HUGE),
        b"".join(chunk(b"zTXt", b"k%d\0\0" % n + zlib.compress(bytes(10**6))) for n in range(70)),
        chunk(b"iCCP", b"k\0\0" + _HUGE),
        chunk(b"iCCP", b"k\0\5odd"),
        chunk(b"iCCP", b""),
        chunk(b"gAMA", b"a"),
        chunk(b"cHRM", b"abc"),
        chunk(b"sRGB", b""),
        chunk(b"pHYs", b"ab"),
        chunk(b"acTL", b"ab"),
        chunk(b"tEXt", b"a\0b")[:-4] + b"crc!",
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 10\nzz"),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe<x tiff:Orientation="),
    ],
    ids=lambda metadata: f"{metadata[4:8].decode()}-{len(metadata)}",
)
def test_pixels_of_a_png_are_not_thrown_away_for_its_metadata(metadata: bytes) -> None:
    pixels = scene(24, 40)
    data = encode(pixels, "PNG")
    for at in (33, len(data) - 12):  # behind the header, behind the pixels
        np.testing.assert_array_equal(decode(data[:at] + metadata + data[at:]), pixels)
    # An orientation that can be read beside it is applied.
    for turned in (chunk(b"eXIf", _TURNED), chunk(b"eXIf", _TURNED_AMONG_BROKEN), chunk(b"iTXt", _XMP)):
        if metadata[4:8] != turned[4:8]:
            np.testing.assert_array_equal(decode(data[:33] + turned + metadata + data[33:]), np.rot90(pixels, -1))
    # What is wrong with the pixels is still said.
    broken = data[:33] + metadata + data[33:-60]
    assert reason_of(broken) in ("truncated", "corrupt", "not_an_image")


_XMP = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) & 1) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize(
    ("kind", "metadata", "flag"),
    [(b"EXIF", b"no TIFF at all", 8), (b"EXIF", b"x", 8), (b"XMP ", b"\xff<x", 4), (b"ICCP", b"odd", 32)],
)
def test_pixels_of_a_webp_are_not_thrown_away_for_its_metadata(kind: bytes, metadata: bytes, flag: int) -> None:
    pixels = scene(24, 40)
    plain = encode(pixels, "WEBP", lossless=True)
    picture = (b"VP8L", plain[20 : 20 + struct.unpack_from("<I", plain, 16)[0]])

    def extended(*chunks: tuple[bytes, bytes], flags: int) -> bytes:
        size = struct.pack("<I", 39)[:3] + struct.pack("<I", 23)[:3]
        return riff((b"VP8X", struct.pack("<I", flags) + size), *chunks)

    for chunks in ((picture, (kind, metadata)), ((kind, metadata), picture)):
        np.testing.assert_array_equal(decode(extended(*chunks, flags=flag)), pixels)
    turned = extended(picture, (b"EXIF", _TURNED), (kind, metadata), flags=8 | flag)
    if kind != b"EXIF":
        np.testing.assert_array_equal(decode(turned), np.rot90(pixels, -1))


def test_a_webp_whose_exif_is_cut_has_all_its_pixels() -> None:
    pixels = scene(24, 40)
    exif = Image.Exif()
    exif[0x010E] = "a description"
    data = encode(pixels, "WEBP", lossless=True, exif=exif.tobytes())
    for cut in (2, 5, 9):
        np.testing.assert_array_equal(decode(data[:-cut]), pixels)


def test_how_a_png_is_turned_is_found_beside_what_pillow_refuses() -> None:
    pixels = scene(24, 40)
    data = encode(pixels, "PNG")
    raw = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n" % len(_TURNED) + _TURNED.hex().encode())
    profile = b"odd\0\0" + zlib.compress(bytes(2 << 20))
    found = decode(data[:33] + chunk(b"zTXt", raw) + chunk(b"iCCP", profile) + data[33:])
    np.testing.assert_array_equal(found, np.rot90(pixels, -1))


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
@pytest.mark.parametrize(
    ("marker", "metadata"),
    [
        (0xE0, b"JFIF"),
        (0xE1, b"Exif\0\0no TIFF at all"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe"),
        (0xE2, b"MPF\0odd"),
        (0xE2, b"ICC_PROFILE\0\1"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\0\4ab"),
        (0xEE, b"Adobe\0"),
        (0xFE, b""),
    ],
)
def test_pixels_of_a_jpeg_are_not_thrown_away_for_its_metadata(mode: str, marker: int, metadata: bytes) -> None:
    data = encode(Image.fromarray(scene(24, 40)).convert(mode), "JPEG", quality=95)
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(metadata) + 2) + metadata
    pixels = decode(data)
    np.testing.assert_array_equal(decode(data[:2] + segment + data[2:]), pixels)
    if not metadata.startswith(b"Exif"):
        for exif in (_TURNED, _TURNED_AMONG_BROKEN):
            turn = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
            turned = decode(data[:2] + segment + turn + data[2:])
            assert turned.shape == (40, 24, 3)
            # Pillow's decoder and simplejpeg's differ by one here and there.
            assert np.abs(turned.astype(int) - np.rot90(pixels, -1)).max() <= 1


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [(34665, 4, 999_999), (34675, 7, b"odd"), (700, 1, b"\xff<x"), (34377, 7, b"8BIM\1"), (33723, 7, b"odd")],
)
def test_pixels_of_a_tiff_are_not_thrown_away_for_its_metadata(tag, kind, value, compression) -> None:
    pixels = scene(24, 40)
    for orientation, expected in ((1, pixels), (6, np.rot90(pixels, -1))):
        tags = ImageFileDirectory_v2()
        tags.tagtype[tag] = kind
        tags[tag], tags[0x0112] = value, orientation
        data = encode(pixels, "TIFF", tiffinfo=tags, compression=compression)
        np.testing.assert_array_equal(decode(data), expected)


def test_a_broken_image_says_why_in_one_word() -> None:
    jpeg, png = encode(scene(120, 160), "JPEG"), encode(scene(120, 160), "PNG")
    assert reason_of(b"") == "empty"
    assert reason_of(b"<html>404 Not Found</html>") == "not_an_image"
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not_an_image"
    for length in (100, 400, len(jpeg) // 2, len(jpeg) - 100, len(jpeg) - 2):
        assert reason_of(jpeg[:length]) == "truncated", length
        assert reason_of(with_exif(jpeg, 6, "<")[:length]) == "truncated", length
    for length in (len(png) // 2, len(png) - 50):
        assert reason_of(png[:length]) == "truncated", length
    middle = len(jpeg) // 2
    assert reason_of(jpeg[:middle] + b"\xff\xd9") == "truncated"
    assert reason_of(jpeg[:middle] + b"\xff\xd0" + jpeg[middle + 2 :]) in ("corrupt", "truncated")
    assert reason_of(png[:300] + bytes(200) + png[500:]) == "corrupt"
    assert reason_of(encode(Image.new("F", (4, 4)), "TIFF")) == "unsupported"
    assert reason_of(encode(np.full((4, 4), 1 << 20, np.int32), "TIFF")) == "unsupported"
    with pytest.raises(ValueError, match="channels is 4"):
        decode(jpeg, 4)


def test_an_image_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("truncated", "half of it")))
    assert (error.reason, str(error)) == ("truncated", "truncated: half of it")


def test_bombs_are_refused_by_their_header() -> None:
    jpeg = encode(scene(16, 16), "JPEG")
    frame = jpeg.find(b"\xff\xc0") + 5
    assert reason_of(jpeg[:frame] + struct.pack(">HH", 65500, 65500) + jpeg[frame + 4 :]) == "too_large"
    # One between Pillow's warning (89 million pixels) and its error (179 million), one above.
    for side in (10_000, 60_000):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
        assert reason_of(png) == "too_large"
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        data = encode(scene(20, 20), kind)
        assert decode(data, max_pixels=400).shape == (20, 20, 3)
        assert reason_of(data, max_pixels=399) == "too_large"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000", "PPM"])
def test_hostile_bytes_never_raise_anything_else(kind: str) -> None:
    data = encode(scene(20, 24), kind)
    rng = np.random.default_rng(1)
    outcomes = set()
    for _ in range(300):
        bad = bytearray(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data)
        # Headers are where the harm is done.
        for place in rng.integers(0, min(len(bad), int(rng.choice([64, len(data)]))), rng.integers(1, 8)):
            bad[place] = rng.integers(256)
        try:
            image = decode(bytes(bad), max_pixels=10_000)
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
            outcomes.add("decoded")
        except ImageError as error:
            outcomes.add(error.reason)
    assert outcomes <= {"decoded", "not_an_image", "truncated", "corrupt", "too_large", "unsupported"}
    assert len(outcomes) >= 2


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (100, 700), (900, 40)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    num = 6000
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    transform = transforms.RandomResizedCrop.get_params
    expected = np.array([transform(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(num)])
    crops = random_resized_crops(
        np.full(num, height), np.full(num, width), seed=3, epoch_B=0, sample_B=np.arange(num), repeat_B=0
    )
    for column, drawn in enumerate((crops.top, crops.left, crops.height, crops.width)):
        if np.ptp(expected[:, column]) == 0:
            np.testing.assert_array_equal(drawn, expected[0, column])
        else:
            assert ks_2samp(drawn, expected[:, column]).pvalue > 0.001, column  # pyright: ignore
    assert (crops.top + crops.height).max() <= height
    assert (crops.left + crops.width).max() <= width
    assert abs(crops.flip.mean() - 0.5) < 4 * 0.5 / num**0.5
    # Place and mirror are drawn apart from the size.
    for drawn in (crops.top, crops.left, crops.height):
        assert np.ptp(drawn) == 0 or abs(np.corrcoef([crops.flip, drawn])[0, 1]) < 0.05


def test_a_crop_is_a_function_of_its_own_key_alone() -> None:
    sizes = np.random.default_rng(0).integers(20, 600, (2, 50))
    key = {"epoch_B": np.arange(50) % 3, "sample_B": np.arange(50) * 7, "repeat_B": np.arange(50) % 2}
    block = random_resized_crops(*sizes, seed=5, source_B=1, **key)
    boxes = list(block.boxes())
    for i in (0, 17, 49):
        alone = random_resized_crops(
            sizes[0, i : i + 1],
            sizes[1, i : i + 1],
            seed=5,
            source_B=1,
            epoch_B=int(key["epoch_B"][i]),
            sample_B=key["sample_B"][i : i + 1],
            repeat_B=int(key["repeat_B"][i]),
        )
        assert list(alone.boxes()) == [boxes[i]]


def test_every_part_of_the_key_changes_the_crop() -> None:
    large = np.array([10**6])

    def box(seed: int = 5, epoch: int = 1, sample: int = 2, repeat: int = 3, source: int = 4) -> tuple:
        crops = random_resized_crops(
            large,
            large,
            seed=seed,
            epoch_B=epoch,
            sample_B=np.array([sample]),
            repeat_B=repeat,
            source_B=source,
        )
        return next(crops.boxes())[:4]

    boxes = {box(), box(seed=9), box(epoch=9), box(sample=9), box(repeat=9), box(source=9)}
    assert len(boxes) == 6


def test_no_images_have_no_crops() -> None:
    none = np.zeros(0, np.int64)
    assert list(random_resized_crops(none, none, seed=0, epoch_B=0, sample_B=none, repeat_B=0).boxes()) == []


def test_crops_never_change_silently() -> None:
    crops = random_resized_crops(
        np.array([375, 32, 10]),
        np.array([500, 32, 900]),
        seed=1,
        epoch_B=2,
        sample_B=np.arange(3),
        repeat_B=0,
        source_B=0,
    )
    assert list(crops.boxes()) == [
        (12, 24, 362, 406, False),
        (9, 6, 23, 24, True),
        (0, 443, 10, 13, False),
    ]
    without = random_resized_crops(
        np.full(99, 64), np.full(99, 64), seed=1, epoch_B=2, sample_B=np.arange(99), repeat_B=0, flip=False
    )
    assert not without.flip.any()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (301, 97)])
def test_the_central_crop_is_torchvisions_resize_and_cut(height: int, width: int) -> None:
    # Each pixel knows its place, so the resized and cut image shows which box was taken.
    place = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()
    cut = transforms.CenterCrop(224)(transforms.Resize(256, antialias=True)(place))
    crops = center_crops(np.array([height]), np.array([width]), out_size=(224, 224))
    top, left, box_height, box_width, flip = next(crops.boxes())
    assert not flip
    for begin, extent, line in ((top, box_height, cut[0, :, 0]), (left, box_width, cut[1, 0, :])):
        pixel = extent / 224
        assert abs(begin + pixel / 2 - 0.5 - line[0].item()) < 1
        assert abs(begin + extent - pixel / 2 - 0.5 - line[-1].item()) < 1


def test_the_whole_share_is_the_largest_box_of_the_output() -> None:
    height_B, width_B = np.array([100, 400, 300, 1]), np.array([400, 100, 200, 1])
    crops = center_crops(height_B, width_B, out_size=(96, 64), share=1.0)
    assert list(crops.boxes()) == [
        (0, 166, 100, 67, False),
        (125, 0, 150, 100, False),
        (0, 0, 300, 200, False),
        (0, 0, 1, 1, False),
    ]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("box", "limit"),
    [
        ((10, 20, 300, 320), 0.1),
        ((0, 0, 375, 500), 0.1),
        ((100, 100, 60, 45), 0.1),
        ((5, 200, 224, 100), 0.25),  # shrunk one way, enlarged the other: more values fall on a half
    ],
)
def test_resized_crops_have_pillows_pixels(box: tuple[int, int, int, int], limit: float, channels: int) -> None:
    image = scene(375, 500)[..., :channels]
    image.setflags(write=False)
    top, left, height, width = box
    mode = Image.fromarray(image.squeeze())
    cut = mode.crop((left, top, left + width, top + height)).resize((224, 160), Image.Resampling.BICUBIC)
    expected = np.asarray(cut).reshape(160, 224, channels)
    batch = np.zeros((3, 160, 224, channels), np.uint8)
    crop_resize(image, *box, False, batch[1])
    crop_resize(image, *box, True, batch[2])
    difference = np.abs(batch[1].astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < limit
    np.testing.assert_array_equal(batch[2], batch[1][:, ::-1])
    assert not batch[0].any()


def test_a_crop_of_the_output_size_is_copied() -> None:
    image = scene(50, 60)
    out = np.zeros((32, 32, 3), np.uint8)
    crop_resize(image, 3, 4, 32, 32, False, out)
    np.testing.assert_array_equal(out, image[3:35, 4:36])
    crop_resize(image, 3, 4, 32, 32, True, out)
    np.testing.assert_array_equal(out, image[3:35, 4:36][:, ::-1])


def test_normalize_is_the_formula() -> None:
    images = np.stack([scene(8, 6, seed) for seed in range(4)])
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = ((images / 255.0 - mean) / std).transpose(0, 3, 1, 2)
    for given in ((mean, std), (torch.tensor(mean), torch.tensor(std))):
        normalized = normalize(torch.from_numpy(images), *given)
        assert normalized.dtype == torch.float32
        assert normalized.is_contiguous()
        np.testing.assert_allclose(normalized.numpy(), expected, atol=2e-6)
