"""Objects of S3 and GCS by way of pyarrow's file systems, which leave it to us what is tried again and for how long."""

import atexit
import contextlib
import ctypes
import errno
import functools
import os
import re
import threading
from collections.abc import Generator, Iterator
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.errors import UserError
from pipelines.reading import THREAD

# Both longer than a reader waits before it tries beside. On Linux, too, the second one ends a read that stands still.
_CONNECT_TIMEOUT_S, _REQUEST_TIMEOUT_S = 10.0, 30.0
_PART_ATTEMPTS = 4
# Arrow gives a read of an object whole or not at all: no larger ones, so that little is read again; and not smaller,
# so that a range of some dozen images is one request.
_PIECE = 8 << 20
# What the AWS SDK says of faults that stay; all others may pass.
_MISSING = re.compile(r"NO_SUCH_KEY|NO_SUCH_BUCKET|RESOURCE_NOT_FOUND|HTTP status 404")
_DENIED = re.compile(r"ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED")
_STAYS = re.compile(r"HTTP status (301|400|401|403|416)|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH")
# Objects that were opened for ranges, each with its size: not asked for again with every range.
_OPENED: dict[tuple[str, str], pa.NativeFile] = {}
_MOST_OPENED = 4096


def fetch(location: str, name: str, start: int, stop: int | None, *, fresh: bool) -> Generator[bytes, None, None]:
    """Yields the bytes of an object in pieces of a few MiB.

    Args:
        location: The folder's address.
        name: The object's name in it.
        start: The first byte.
        stop: The byte after the last one; None: the object's end.
        fresh: Ask for the object's size, also where it is known from another range.

    Raises:
        FileNotFoundError, PermissionError, EOFError, UserError: What stays.
        OSError: What may pass.
    """
    with faults():
        file = _open(location, name, fresh=fresh)
        if stop is not None and stop > file.size() and not fresh:
            file = _open(location, name, fresh=True)
        size = file.size()
        stop = size if stop is None else stop
        if stop > size:
            raise EOFError(f"it holds {size} bytes, and should hold {stop} at least")
        while start < stop:
            piece = file.read_at(min(_PIECE, stop - start), start)
            start += len(piece)
            yield piece


def locate(location: str, *, uploads: bool = False) -> tuple[pafs.FileSystem, str]:
    """The file system of a folder's address, and the folder's path in it.

    Args:
        location: The address.
        uploads: For files that are written: the client itself tries a part again, else every fault would begin all
            of a large file anew.
    """
    place, query = split_query(location)
    scheme, _, rest = place.partition("://")
    bucket, _, folder = rest.partition("/")
    filesystem, root = _bucket(f"{scheme}://{bucket}{query}", _PART_ATTEMPTS if uploads else 1)
    return filesystem, f"{root}/{unquote(folder).strip('/')}".rstrip("/")


def split_query(location: str) -> tuple[str, str]:
    """An address and its query, with the mark. ``train-?.tar`` is none: a query has a ``key=``."""
    found = re.search(r"\?[\w.-]+=", location) if "://" in location else None
    return (location[: found.start()], location[found.start() :]) if found else (location, "")


@contextlib.contextmanager
def faults() -> Iterator[None]:
    """Tells faults that stay from those that may pass, which Arrow gives as one kind of error."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
    except pa.ArrowInvalid as error:
        raise UserError(str(error)) from None
    except OSError as error:
        text = str(error)
        if _MISSING.search(text):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        if _DENIED.search(text) or isinstance(error, PermissionError):
            raise PermissionError(errno.EACCES, "access denied") from None
        if _STAYS.search(text):
            raise UserError(text) from None
        raise


def _open(location: str, name: str, *, fresh: bool) -> pa.NativeFile:
    """Opens an object, which asks the store for its size."""
    key = (location, name)
    if not fresh and (known := _OPENED.get(key)) is not None:
        return known
    filesystem, root = locate(location)
    file = filesystem.open_input_file(f"{root}/{name}")
    # A file that is read whole is not opened again; one that has changed is known anew.
    if not fresh or key in _OPENED:
        if len(_OPENED) >= _MOST_OPENED:
            _OPENED.clear()
        _OPENED[key] = file
    return file


@functools.lru_cache(maxsize=64)
def _bucket(uri: str, attempts: int) -> tuple[pafs.FileSystem, str]:
    """A bucket's file system, whose client itself tries each request so many times."""
    if uri.startswith("gs://") and "retry_limit_seconds" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds=1"
    filesystem, bucket = pafs.FileSystem.from_uri(uri)
    if isinstance(filesystem, pafs.S3FileSystem):
        # Its URI has no options for these; pickling is the public way to all the others.
        _, (options,) = filesystem.__reduce__()
        filesystem = pafs.S3FileSystem(
            **options
            | {
                "connect_timeout": _CONNECT_TIMEOUT_S,
                "request_timeout": _REQUEST_TIMEOUT_S,
                # Else parts that wait to be sent are copied, without a limit: as much memory as the file is large.
                "background_writes": False,
                "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
            }
        )
    return filesystem, bucket.rstrip("/")


def _leave_at_once() -> None:
    """At the process's end: does not wait for reads that are stuck in an object store's client.

    Arrow's S3 finalizer waits until they come back, and without it the client's statics would be destroyed beneath
    them; so the process ends right after Python has, with the exit code that it has anyway.
    """
    if any(thread.name == THREAD for thread in threading.enumerate()):
        with contextlib.suppress(AttributeError):  # no on_exit outside of glibc: then the finalizer waits
            libc = ctypes.CDLL(None)
            libc.on_exit(libc._exit, None)
            atexit.unregister(pafs.ensure_s3_finalized)


atexit.register(_leave_at_once)  # after pyarrow's own, so that it runs before
