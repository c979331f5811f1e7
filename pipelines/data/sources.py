"""What a source of images holds, and its bytes: a folder, a tar, tar.gz or zip, scikit-learn's digits.

An archive is never extracted to disk. Listing reads names and sizes; reading takes chosen images: a folder, a
tar and a zip at random, a tar.gz in one pass from its beginning, in the archive's order.
"""

import functools
import gzip
import itertools
import os
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tarfile import EOFHeaderError, HeaderError  # type: ignore[attr-defined]
from typing import BinaryIO, Literal, cast

import numpy as np

from pipelines.data.digits import digit_jpeg, list_digits
from pipelines.errors import UserError

Kind = Literal["folder", "tar", "tar.gz", "zip", "digits"]

# What a file name may end with, and what a member of a shard ends with: all that the decoder reads.
IMAGE_EXTENSIONS = {
    "jpg": "jpg",
    "jpeg": "jpg",
    "jpe": "jpg",
    "jfif": "jpg",
    "png": "png",
    "apng": "png",
    "webp": "webp",
    "tif": "tif",
    "tiff": "tif",
    "bmp": "bmp",
    "dib": "bmp",
    "gif": "gif",
    "ppm": "ppm",
    "pgm": "ppm",
    "pbm": "ppm",
    "pnm": "ppm",
    "jp2": "jp2",
    "j2k": "jp2",
    "j2c": "jp2",
    "jpc": "jp2",
    "jpf": "jp2",
    "jpx": "jp2",
}
# How files of these formats begin, for those whose names do not say it.
_BEGINNINGS = (
    (rb"\xff\xd8\xff", "jpg"),
    (rb"\x89PNG\r\n\x1a\n", "png"),
    (rb"RIFF....WEBP", "webp"),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "tif"),
    (rb"BM....\0\0\0\0....[\x0c-\x7c]\0\0\0", "bmp"),
    (rb"GIF8[79]a", "gif"),
    (rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s", "ppm"),
    (rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
)
_BEGINNING_BYTES = 64
_MOST_KINDS = 12  # of left-out files, in one line
# What folders and shards of a split are called: train, training_images, valset.
_SPLIT = re.compile(
    r"(?:(?P<train>train)|(?P<val>val|valid|validation|dev)|(?P<test>test)|(?P<eval>eval|evaluation)|(?P<holdout>holdout)"
    r"|(?P<extra>extra)|(?P<unlabeled>unlabell?ed))(?:ing|set|data|split|images|imgs?)*"
)


@dataclass(frozen=True)
class Source:
    """A source of images: its kind, and its absolute path (empty for digits)."""

    kind: Kind
    path: str

    @property
    def streamed(self) -> bool:
        """Whether it can only be read from its beginning on."""
        return self.kind == "tar.gz"


@dataclass(frozen=True)
class Listing:
    """The images of a source, sorted by path.

    Attributes:
        source: Where they lie.
        paths: Relative to the source, with forward slashes.
        sizes_S: int64, bytes of each image.
        wheres_S: int64, what finds each one: offset in a tar, ordinal of the member in a tar.gz or zip.
        left_out: How many other files there are, by reason.
    """

    source: Source
    paths: list[str]
    sizes_S: np.ndarray
    wheres_S: np.ndarray
    left_out: dict[str, int]


@dataclass(frozen=True)
class Masks:
    """The segmentation masks of a listing's images, in its order.

    Attributes:
        paths: Absolute.
        sizes_S: int64, bytes of each mask.
    """

    paths: list[str]
    sizes_S: np.ndarray


def image_extension(name: str) -> str | None:
    """The extension that a shard gives to an image of this name; None where it is no image's name."""
    return IMAGE_EXTENSIONS.get(posixpath.splitext(name)[1][1:].lower())


def image_kind(data: bytes) -> str | None:
    """The extension that a shard gives to an image with this beginning; None where it is no image."""
    return next((kind for begins, kind in _BEGINNINGS if re.match(begins, data, re.DOTALL)), None)


def extension_of(name: str) -> str:
    """What a file's name ends with, for people: ``.gif``, or that it has no extension."""
    extension = posixpath.splitext(posixpath.basename(name))[1].lower()
    return valid_text(extension) if len(extension) > 1 else "without extension"


def is_hidden(path: str) -> bool:
    """Whether a path is hidden, or what macOS keeps beside an archive's files."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def valid_text(name: str) -> str:
    """A file's name as text that can be written anywhere: bytes that are no UTF-8 are written as in a bytes literal."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def split_of(word: str) -> str:
    """The split that a word means, ``val`` for ``Validation``; empty where it means none."""
    match = _SPLIT.fullmatch(re.sub(r"[^a-z]", "", word.lower()))
    return (match.lastgroup or "") if match else ""


def named_split(shard_name: str) -> str:
    """The split that a shard's name tells, ``val`` for ``imagenet-val-0000.tar``; empty where it tells none."""
    return next((split for word in re.split(r"[^A-Za-z]+", shard_name) if (split := split_of(word))), "")


def find_source(text: str) -> Source:
    """Recognises a source; archives by their first bytes, not by their name.

    Raises:
        UserError: There is no such file or folder, or it is of another kind.
    """
    if text == "digits":
        return Source("digits", "")
    if "://" in text:
        raise UserError(f"source '{text}' is a URI: images are packed from a folder or archive on a file system")
    path = Path(text).expanduser().absolute()
    if path.is_dir():
        return Source("folder", str(path))
    if not path.is_file():
        raise UserError(f"no source '{text}': name a folder, a .tar, .tar.gz or .zip file, or 'digits'")
    with path.open("rb") as file:
        start = file.read(512)
    if start[:2] == b"\x1f\x8b":
        return Source("tar.gz", str(path))
    if start[:2] == b"PK":
        return Source("zip", str(path))
    if start[257:262] == b"ustar" or _is_old_tar(start):
        return Source("tar", str(path))
    found = f"{path.stat().st_size} bytes, beginning with {start[:8]!r}"
    raise UserError(f"source '{text}' ({found}) is no folder and no whole tar, tar.gz or zip")


def _is_old_tar(start: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "replace")
    except tarfile.HeaderError:
        return False
    return True


def list_images(source: Source, split: str, progress: Callable[[int], None] = lambda _: None) -> Listing:
    """Lists the images of a source by reading names and sizes only.

    An image is what has an image's name, or begins like one. Hidden files and folders (and ``__MACOSX``) are left out.
    Of a path that an archive holds twice, the last one is taken, as extracting would. What is left out is counted.

    Args:
        source: Where to look.
        split: ``train`` or ``test``, where the source is divided by itself (digits).
        progress: Called with the number of images so far, often.

    Raises:
        UserError: An archive is truncated or unreadable, or there is no image.
    """
    left_out: Counter[str] = Counter()
    found: dict[str, tuple[int, int]] = {}
    for path, size, where, read_start in _entries(source, split, left_out):
        path = posixpath.normpath(path).lstrip("/")
        if is_hidden(path):
            left_out["hidden"] += 1
        elif size == 0:
            left_out["empty"] += 1
        elif image_extension(path) is None and image_kind(read_start()) is None:
            left_out[extension_of(path)] += 1
        else:
            left_out["twice in the archive"] += path in found
            found[path] = (size, where)
            if len(found) % 1000 == 0:
                progress(len(found))
    if not found:
        known = " ".join(IMAGE_EXTENSIONS)
        raise UserError(
            f"source '{source.path}' holds no image ({counted(left_out) or 'it is empty'}): looked for {known}"
        )
    paths = sorted(found)
    columns = np.array([found[path] for path in paths], np.int64)
    reasons = {reason: count for reason, count in left_out.items() if count}
    return Listing(source, paths, columns[:, 0].copy(), columns[:, 1].copy(), reasons)


def counted(left_out: Mapping[str, int]) -> str:
    """``3 .txt, 1 hidden``, the most frequent first; of very many kinds not each is named."""
    kinds = sorted(((count, reason) for reason, count in left_out.items() if count), reverse=True)
    shown = [f"{count:,} {reason}" for count, reason in kinds[:_MOST_KINDS]]
    if rest := kinds[_MOST_KINDS:]:
        shown.append(f"{sum(count for count, _ in rest):,} of {len(rest):,} other kinds")
    return ", ".join(shown)


def list_masks(listing: Listing, folder: str) -> Masks:
    """Finds the mask of each image: ``FOLDER/<the image's path>``, its extension replaced by ``.png``.

    Raises:
        UserError: There is no such folder, or it lacks masks.
    """
    root = Path(folder).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f"no folder of masks '{folder}'")
    paths = [f"{root}/{posixpath.splitext(path)[0]}.png" for path in listing.paths]
    sizes = [os.stat(path).st_size if os.path.isfile(path) else 0 for path in paths]  # noqa: PTH113, PTH116 (as in a folder)
    missing = [path for path, size in zip(paths, sizes, strict=True) if not size]
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise UserError(
            f"{len(missing):,} of {len(paths):,} images have no mask: {', '.join(missing[:3])}{more} should be there"
        )
    return Masks(paths, np.array(sizes, np.int64))


def read_images(
    source: Source, paths: Sequence[str], sizes_S: np.ndarray, wheres_S: np.ndarray
) -> Iterator[tuple[int, bytes]]:
    """Reads chosen images of a listing.

    Yields:
        The image's position in ``paths`` and its bytes: in the order of ``paths``, or in the archive's where
        it is streamed.

    Raises:
        UserError: The archive is unreadable, or an image is not as it was when listed.
    """
    if source.streamed:
        found = _read_stream(source, {int(where): position for position, where in enumerate(wheres_S)})
    else:
        found = ((n, _read(source, path, int(sizes_S[n]), int(wheres_S[n]))) for n, path in enumerate(paths))
    for position, data in found:
        if len(data) != sizes_S[position]:
            raise UserError(
                f"'{paths[position]}' in '{source.path}' had {sizes_S[position]} bytes and now has "
                f"{len(data)}: the source changed while it was packed; run again when it is at rest"
            )
        yield position, data


# Path, size, where, and what reads the file's first bytes, which is called before the next entry is asked for.
_Entry = tuple[str, int, int, Callable[[], bytes]]


def _entries(source: Source, split: str, left_out: Counter[str]) -> Iterator[_Entry]:
    """Yields all regular files."""
    if source.kind == "folder":
        yield from _folder_entries(source.path, left_out)
    elif source.kind == "digits":
        for path, size, where in list_digits(split):
            yield path, size, where, bytes
    elif source.kind == "zip":
        with _told(source.path), zipfile.ZipFile(source.path) as archive:
            for where, info in enumerate(archive.infolist()):
                if info.external_attr >> 28 == 0o12:
                    left_out["links"] += 1
                elif info.flag_bits & 1:
                    raise UserError(f"'{source.path}' is encrypted: unpack it and name the folder")
                elif not info.is_dir():
                    start = functools.partial(_zip_start, archive, info)
                    yield info.filename.replace("\\", "/"), info.file_size, where, start
    else:
        for where, member, archive in _tar_members(source):
            if reason := not_a_file(member):
                left_out[reason] += 1
            elif not member.isdir():
                start = functools.partial(_tar_start, archive, member)
                yield member.name, member.size, where if source.streamed else member.offset_data, start


def not_a_file(member: tarfile.TarInfo) -> str:
    """Why the bytes of a tar's member cannot be read where they lie; empty for files and folders."""
    if member.issym() or member.islnk():
        return "links"
    if member.issparse():
        return "sparse"
    return "" if member.isreg() or member.isdir() else "not a file"


def _tar_start(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read(_BEGINNING_BYTES) if file else b""


def _zip_start(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as file:
        return file.read(_BEGINNING_BYTES)


def _file_start(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123 (as below)
        return file.read(_BEGINNING_BYTES)


def _folder_entries(root: str, left_out: Counter[str]) -> Iterator[_Entry]:
    # Links to folders are followed, each folder once, so that a link to a parent ends.
    seen = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        info = Path(root, folder).stat()
        if (info.st_dev, info.st_ino) in seen:
            continue
        seen.add((info.st_dev, info.st_ino))
        with os.scandir(os.path.join(root, folder)) as entries:  # noqa: PTH118 (a Path for each of a million files)
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = f"{folder}/{entry.name}" if folder else entry.name
                if is_hidden(entry.name):
                    left_out["hidden"] += 1
                elif entry.is_dir():
                    waiting.append(path)
                elif entry.is_file():
                    yield path, entry.stat().st_size, 0, functools.partial(_file_start, entry.path)
                else:
                    left_out["not a file"] += 1


class _StrictHeader(tarfile.TarInfo):
    """A header that must be whole: tarfile takes a damaged one for the end, and so drops what follows."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile):
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if isinstance(error, EOFHeaderError) or not tarfile.offset:
                raise
            raise EOFError(f"at byte {tarfile.offset}: {error}") from None


def walk_tar(file: BinaryIO) -> Iterator[tuple[int, tarfile.TarInfo, tarfile.TarFile]]:
    """Reads the headers of an uncompressed tar stream, seeking forward over what lies between.

    Unlike ``tarfile`` alone it does not take a tar that is cut between two members for a whole one.

    Yields:
        Ordinal, member, and the archive, from which the member can be extracted until the next step.

    Raises:
        EOFError, tarfile.TarError: The tar is damaged or cut, with the byte.
    """
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_StrictHeader) as archive:
        for ordinal in itertools.count():
            try:
                member = archive.next()
            except tarfile.ReadError as error:
                raise EOFError(f"before byte {archive.offset}: {error}") from None
            if member is None:
                return
            yield ordinal, member, archive
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps a kilobyte a member


def _tar_members(source: Source) -> Iterator[tuple[int, tarfile.TarInfo, tarfile.TarFile]]:
    with _told(source.path):
        if not source.streamed:
            with Path(source.path).open("rb") as file:
                yield from walk_tar(file)
            return
        with gzip.open(source.path) as file:
            yield from walk_tar(cast(BinaryIO, file))
            while file.read(1 << 20):  # to the checksum at the end
                pass


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Says what is wrong with an archive in one line."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"'{path}' is truncated or damaged ({error}): fetch it again") from None
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): unpack it and name the folder") from None


def _read(source: Source, path: str, size: int, where: int) -> bytes:
    if source.kind == "folder":
        return Path(source.path, path).read_bytes()
    if source.kind == "digits":
        return digit_jpeg(where)
    with _told(source.path):
        archive, members = _opened(source)
        if isinstance(archive, zipfile.ZipFile):
            return archive.read(members[where])
        return os.pread(archive.fileno(), size, where)


# The archive that was read last: it stays open for the next shard, as a zip of a million members takes seconds to open.
_open: dict[str, tuple[BinaryIO | zipfile.ZipFile, list[zipfile.ZipInfo]]] = {}


def _opened(source: Source) -> tuple[BinaryIO | zipfile.ZipFile, list[zipfile.ZipInfo]]:
    if source.path not in _open:
        close_archive()
        if source.kind == "tar":
            _open[source.path] = Path(source.path).open("rb"), []  # noqa: SIM115 (closed by close_archive)
        else:
            archive = zipfile.ZipFile(source.path)
            _open[source.path] = archive, archive.infolist()
    return _open[source.path]


def close_archive() -> None:
    """Closes the archive that this process has read images of, if any."""
    while _open:
        archive, _ = _open.popitem()[1]
        archive.close()


def _read_stream(source: Source, positions: dict[int, int]) -> Iterator[tuple[int, bytes]]:
    missing = len(positions)
    for ordinal, member, archive in _tar_members(source):
        position = positions.get(ordinal)
        if position is not None:
            data = archive.extractfile(member)
            assert data is not None, member.name
            yield position, data.read()
            missing -= 1
            if not missing:
                return  # the rest was found whole when it was listed
