"""Files in a folder or in an object store, behind one small interface.

A file is there whole or not at all: locally it is written beside its place and renamed, in an object store it
appears when its upload ends.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from pipelines.errors import UserError

REMOTE_SCHEMES = ("s3", "gs")


def absolute(location: str) -> str:
    """A location that means the same in every process: an absolute path, or a URI as it is.

    Raises:
        UserError: The scheme is none that is read or written here (``pipe:`` never is).
    """
    scheme = urlsplit(location).scheme
    if location.startswith("pipe:"):
        raise UserError(f"'{location}' would run a command: name a folder or an s3:// or gs:// address instead")
    if scheme == "file":
        return urlsplit(location).path.rstrip("/") or "/"
    if scheme in REMOTE_SCHEMES:
        return location.rstrip("/")
    if "://" in location:
        raise UserError(f"'{location}': unknown scheme '{scheme}'; known are folders, file://, s3:// and gs://")
    return str(Path(location).expanduser().absolute())


@dataclass(frozen=True)
class Store:
    """A folder, local or in an object store. Paths are relative to it, with forward slashes."""

    location: str

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a file system of this machine."""
        return "://" not in self.location

    def _filesystem(self) -> tuple[pafs.FileSystem, str]:
        if self.location not in _FILESYSTEMS:
            _FILESYSTEMS[self.location] = pafs.FileSystem.from_uri(self.location)
        return _FILESYSTEMS[self.location]

    def path(self, name: str) -> str:
        """The full address of a file in this folder."""
        return f"{self.location.rstrip('/')}/{name}" if name else self.location

    def child(self, name: str) -> "Store":
        """The folder ``name`` inside this one."""
        return Store(self.path(name))

    def local(self, name: str = "") -> Path:
        """The file's path; only for a local folder."""
        assert self.is_local, f"{self.location} is not local"
        return Path(self.location) / name

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Reads a file, or ``length`` bytes of it from ``offset``.

        Raises:
            FileNotFoundError: It does not exist.
            EOFError: It ends before ``offset + length``.
        """
        if self.is_local:
            with self.local(name).open("rb") as file:
                data = os.pread(file.fileno(), length, offset) if length is not None else file.read()
                while length is not None and len(data) < length:
                    more = os.pread(file.fileno(), length - len(data), offset + len(data))
                    if not more:
                        break
                    data += more
        else:
            filesystem, root = self._filesystem()
            with filesystem.open_input_file(f"{root}/{name}") as file:
                data = file.read_at(length, offset) if length is not None else file.read()
        if length is not None and len(data) != length:
            raise EOFError(f"{self.path(name)}: wanted {length} bytes at {offset}, found {len(data)}")
        return data

    @contextmanager
    def open_output(self, name: str) -> Iterator[BinaryIO]:
        """Opens a file for writing; it takes its name only when the block ends without an error."""
        if not self.is_local:
            filesystem, root = self._filesystem()
            with tempfile.SpooledTemporaryFile(max_size=64 << 20) as spool:
                yield spool  # type: ignore[misc]
                spool.seek(0)
                with filesystem.open_output_stream(f"{root}/{name}") as out:
                    while chunk := spool.read(8 << 20):
                        out.write(chunk)
            return
        path = self.local(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def write(self, name: str, data: bytes | str) -> None:
        """Writes a whole file, or none."""
        with self.open_output(name) as file:
            file.write(data.encode() if isinstance(data, str) else data)

    def size(self, name: str) -> int | None:
        """The file's size in bytes; None where there is no such file."""
        if self.is_local:
            path = self.local(name)
            return path.stat().st_size if path.is_file() else None
        filesystem, root = self._filesystem()
        info = filesystem.get_file_info(f"{root}/{name}")
        return info.size if info.type == pafs.FileType.File else None

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.size(name) is not None

    def names(self) -> list[str]:
        """Names of the files and folders directly in this folder, sorted; empty where it does not exist."""
        if self.is_local:
            path = self.local()
            return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        filesystem, root = self._filesystem()
        infos = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
        return sorted(info.base_name for info in infos)

    def delete(self) -> None:
        """Deletes this folder with all that it holds; nothing happens where it does not exist."""
        filesystem, root = self._filesystem()
        if filesystem.get_file_info(root).type == pafs.FileType.Directory or not self.is_local:
            filesystem.delete_dir_contents(root, missing_dir_ok=True)
            if self.is_local:
                filesystem.delete_dir(root)


_FILESYSTEMS: dict[str, tuple[pafs.FileSystem, str]] = {}
