"""Files in a folder, in an object store or on a web server, behind one small interface.

A file is there whole or not at all: locally it is written beside its place and renamed, in an object store it
appears when its upload ends. Web servers are only read. What a remote store does wrong is tried again
(``reading.py``).
"""

import contextlib
import errno
import functools
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import quote, urlsplit

import pyarrow.fs as pafs

from pipelines import objects, web
from pipelines.errors import UserError
from pipelines.reading import ReadError, ReadPolicy, fetch_range, read_local, retried

Result = TypeVar("Result")
# The bytes of a file that is written, from its beginning each time that it is called.
Content = Callable[[], Iterable[bytes | memoryview]]
WEB_SCHEMES = ("http", "https")
REMOTE_SCHEMES = ("s3", "gs", *WEB_SCHEMES)
# For what a person waits for: a manifest, a listing, a checkpoint.
_SHORT = ReadPolicy(deadline_s=60.0, least_bytes_per_s=1 << 20)


def absolute(location: str) -> str:
    """A location that means the same in every process: an absolute path, or a URI as it is.

    Raises:
        UserError: The scheme is none that is read or written here (``pipe:`` never is).
    """
    scheme = urlsplit(location).scheme
    if location.startswith("pipe:"):
        raise UserError(
            f"'{location}' would run a command: name a folder or an s3://, gs:// or https:// address instead"
        )
    if scheme == "file":
        return urlsplit(location).path.rstrip("/") or "/"
    if scheme in REMOTE_SCHEMES:
        return location.rstrip("/")
    if "://" in location:
        known = "folders, file://, s3://, gs:// and http(s)://"
        raise UserError(f"'{location}': unknown scheme '{scheme}'; known are {known}")
    return str(Path(location).expanduser().absolute())


def recordable(location: str, key: str) -> str:
    """Returns a location as ``absolute`` does, if a configuration file and a database can hold it.

    Args:
        location: As the user gave it.
        key: Of the configuration.

    Raises:
        UserError: It is not UTF-8, or of a scheme that is none.
    """
    found = absolute(location)
    try:
        found.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{key}: '{found}' is not UTF-8, so that neither a configuration file nor MLflow can hold it: give the "
            f"folder another name, or name a link to it"
        ) from None
    return found


@dataclass(frozen=True)
class Store:
    """A folder, local or in an object store. Paths are relative to it, with forward slashes."""

    location: str

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a file system of this machine."""
        return "://" not in self.location

    @property
    def is_web(self) -> bool:
        """Whether the folder is on a web server, where files are neither written nor listed."""
        return self.location.startswith(("http://", "https://"))

    def path(self, name: str) -> str:
        """The full address of a file in this folder; what follows a ``?key=`` stays behind it."""
        place, query = objects.split_query(self.location)
        return f"{place.rstrip('/')}/{name}{query}" if name else self.location

    def shown(self, name: str = "") -> str:
        """The address as messages name it: without names, passwords and signatures."""
        return self.path(name) if self.is_local else web.shown(self.path(name))

    def child(self, name: str) -> "Store":
        """The folder ``name`` inside this one."""
        return Store(self.path(name))

    def local(self, name: str = "") -> Path:
        """The file's path; only for a local folder."""
        assert self.is_local, f"{self.location} is not local"
        return Path(self.location) / name

    def read(self, name: str, offset: int = 0, length: int | None = None, *, policy: ReadPolicy = _SHORT) -> bytes:
        """Reads a file, or ``length`` bytes of it from ``offset``, through faults that pass.

        Raises:
            FileNotFoundError: It does not exist.
            EOFError: It ends before ``offset + length``.
            ReadError: The fault stays.
        """
        try:
            if self.is_local:
                return read_local(f"{self.location}/{name}", offset, length, policy)
            stop = None if length is None else offset + length
            # Not a file that was opened before: such files (a state, a checkpoint) change.
            fetch = functools.partial(self.fetch, name, fresh=True)
            return fetch_range(fetch, self.location, self.shown(name), offset, stop, policy)
        except ReadError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), error.address) from None
            if isinstance(error.__cause__, EOFError):
                raise EOFError(f"{error.address}: {error.reason}") from None
            if self.is_local and isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise

    def fetch(self, name: str, start: int, stop: int | None, *, fresh: bool = False) -> Generator[bytes, None, None]:
        """Yields the bytes of a remote file as they come, in one attempt: what ``reading.Fetch`` says."""
        if self.is_web:
            yield from web.fetch(self._url(name), start, stop)
        else:
            yield from objects.fetch(self.location, name, start, stop, fresh=fresh)

    @contextlib.contextmanager
    def open_output(self, name: str) -> Iterator[BinaryIO]:
        """Opens a file for writing; it takes its name only when the block ends without an error.

        That of an object store is kept here until then, on disk where it is large. What lies in memory already goes
        through ``write_content``.
        """
        if not self.is_local:
            self._refuse_web("written")
            with tempfile.SpooledTemporaryFile(max_size=64 << 20) as spool:
                yield spool  # type: ignore[misc]

                def content() -> Iterator[bytes]:
                    spool.seek(0)
                    while chunk := spool.read(8 << 20):
                        yield chunk

                self.write_content(name, content)
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

    def write(self, name: str, data: bytes | str, *, policy: ReadPolicy | None = None) -> None:
        """Writes a whole file, or none."""
        content = data.encode() if isinstance(data, str) else data
        self.write_content(name, lambda: [content], policy=policy)

    def write_content(self, name: str, content: Content, *, policy: ReadPolicy | None = None) -> None:
        """Writes a whole file, or none, from wherever its bytes lie: nothing of it is kept.

        Args:
            name: The file.
            content: Its bytes; asked for once more at each attempt.
            policy: How long a remote store is kept at; None: as long as a person would wait.

        Raises:
            ReadError: The fault of a remote store stays.
            OSError: The file system's own.
        """
        if self.is_local:
            with self.open_output(name) as file:
                file.writelines(content())
            return
        self._refuse_web("written")

        def upload() -> None:
            filesystem, root = objects.locate(self.location, uploads=True)
            with filesystem.open_output_stream(f"{root}/{name}") as out:
                for chunk in content():
                    out.write(chunk)

        self._retried(upload, name, policy)

    def size(self, name: str) -> int | None:
        """The file's size in bytes; None where there is no such file."""
        if self.is_local:
            path = self.local(name)
            return path.stat().st_size if path.is_file() else None
        if self.is_web:
            return self._retried(lambda: web.size(self._url(name)), name)

        def ask() -> pafs.FileInfo:
            filesystem, root = self._filesystem()
            return filesystem.get_file_info(f"{root}/{name}")

        info = self._retried(ask, name)
        return info.size if info.type == pafs.FileType.File else None

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.size(name) is not None

    def names(self) -> list[str]:
        """Names of the files and folders directly in this folder, sorted; empty where it does not exist."""
        if self.is_local:
            path = self.local()
            return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        return sorted(info.base_name for info in self._list(allow_not_found=True))

    def sizes(self) -> dict[str, int] | None:
        """Sizes of the files directly in this folder by name, in one listing; None where it does not exist.

        Raises:
            UserError: It is a file, or on a web server.
        """
        if self.is_local and not self.local().is_file():
            # Not through Arrow, for which a name must be UTF-8.
            try:
                with os.scandir(self.local()) as entries:
                    return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
            except FileNotFoundError:
                return None
        try:
            infos = self._list(allow_not_found=False)
        except FileNotFoundError:
            return None
        return {info.base_name: info.size for info in infos if info.type == pafs.FileType.File}

    def delete(self) -> None:
        """Deletes this folder with all that it holds; nothing happens where it does not exist."""
        self._refuse_web("deleted")

        def delete() -> None:
            filesystem, root = self._filesystem()
            if filesystem.get_file_info(root).type == pafs.FileType.Directory:
                filesystem.delete_dir(root)

        delete() if self.is_local else self._retried(delete)

    def remove(self, name: str, *, policy: ReadPolicy | None = None) -> None:
        """Deletes one file; nothing happens where it does not exist."""
        self._refuse_web("deleted")
        if self.is_local:
            self.local(name).unlink(missing_ok=True)
            return

        def delete() -> None:
            filesystem, root = self._filesystem()
            filesystem.delete_file(f"{root}/{name}")

        with contextlib.suppress(FileNotFoundError):
            self._retried(delete, name, policy)

    def _list(self, *, allow_not_found: bool) -> list[pafs.FileInfo]:
        self._refuse_web("listed")

        def ask() -> list[pafs.FileInfo]:
            filesystem, root = self._filesystem()
            if filesystem.get_file_info(root).type == pafs.FileType.File:
                raise UserError(f"'{self.shown()}' is a file: shards are named .tar, or by their directory")
            return filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=allow_not_found))

        return ask() if self.is_local else self._retried(ask)

    def _refuse_web(self, what: str) -> None:
        if self.is_web:
            raise UserError(
                f"{self.shown()} cannot be {what}: files on http(s):// are only read here, each by its name"
            )

    def _retried(self, act: Callable[[], Result], name: str = "", policy: ReadPolicy | None = None) -> Result:
        def once() -> Result:
            with objects.faults():
                return act()

        return retried(once, self.shown(name), policy or _SHORT)

    def _url(self, name: str) -> str:
        return self.path(quote(name, errors="surrogateescape"))

    def _filesystem(self) -> tuple[pafs.FileSystem, str]:
        """The file system, and this folder's path in it."""
        if self.is_local:
            return pafs.LocalFileSystem(), self.location
        return objects.locate(self.location)
