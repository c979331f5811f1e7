"""Files on plain HTTP(S) servers, read by ranges."""

import contextlib
import email.utils
import errno
import functools
import os
import time
import urllib.request
from collections.abc import Generator, Iterator
from urllib.parse import urlsplit

import urllib3

from pipelines.errors import UserError

# Both longer than a reader waits before it tries beside.
_CONNECT_TIMEOUT_S, _SOCKET_TIMEOUT_S = 10.0, 30.0
_CHUNK = 1 << 20
# Only redirects are followed here: all else is decided by who reads.
_RETRIES = urllib3.Retry(
    total=None,
    connect=0,
    read=0,
    status=0,
    other=0,
    redirect=5,
    raise_on_status=False,
    respect_retry_after_header=False,
)


class HTTPReadError(OSError):
    """An answer that may be another one the next time.

    Args:
        reason: What it was, in a phrase.
        retry_after_s: When the server wants to be asked again.
    """

    def __init__(self, reason: str, retry_after_s: float = 0.0):
        super().__init__(reason)
        self.retry_after_s = retry_after_s


def fetch(url: str, start: int, stop: int | None) -> Generator[bytes, None, None]:
    """Yields the bytes of a file as they come, each as soon as it is there.

    Raises:
        FileNotFoundError, PermissionError, EOFError, UserError: What stays: no such file, no access, a file that is
            shorter, a server without ranges.
        HTTPReadError: What may pass.
    """
    whole = start == 0 and stop is None
    with _request(url, "" if whole else f"bytes={start}-{'' if stop is None else stop - 1}") as response:
        first, total = _content_range(response)
        if stop is not None and total is not None and stop > total:
            raise EOFError(f"it holds {total} bytes, and should hold {stop} at least")
        if response.status == 200 and start > 0 and stop is not None:
            raise UserError(f"the server of {shown(url)} does not serve ranges: use one that does, or copy the files")
        if first > start:
            raise HTTPReadError(f"the answer begins at byte {first} instead of {start}")
        end = total if stop is None else stop
        position = first
        while end is None or position < end:
            piece = response.read1(_CHUNK if end is None else min(_CHUNK, end - position))
            if not piece:
                break
            position += len(piece)
            if position > start:
                yield piece[max(0, start - (position - len(piece))) :]
        if end is not None and position < end:
            raise HTTPReadError(f"the body ended {end - position} bytes early")
        if response.status == 206:
            response.read1(1)  # the end, so that the connection can be used again
            response.release_conn()


def size(url: str) -> int | None:
    """A file's size; None where there is no such file. Asks for a byte, which shows more than HEAD does.

    Raises:
        PermissionError, UserError: What stays; the server does not tell sizes.
        HTTPReadError: What may pass.
    """
    try:
        with _request(url, "bytes=0-0") as response:
            total = _content_range(response)[1]
    except FileNotFoundError:
        return None
    except EOFError:
        return 0
    if total is None:
        raise UserError(f"the server does not say how many bytes {shown(url)} has: use one that serves ranges")
    return total


def shown(url: str) -> str:
    """An address as messages name it: without a user's name and password, and without a signature."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


@contextlib.contextmanager
def _request(url: str, byte_range: str) -> Iterator[urllib3.HTTPResponse]:
    """An answer of status 200 or 206; all others become errors."""
    parts = urlsplit(url)
    headers = {"Accept-Encoding": "identity"}
    if byte_range:
        headers["Range"] = byte_range
    if parts.username is not None:
        headers |= urllib3.make_headers(basic_auth=f"{parts.username}:{parts.password or ''}")
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    response = None
    try:
        response = _pool(parts.scheme, parts.hostname or "").request(
            "GET", url, headers=headers, retries=_RETRIES, preload_content=False, decode_content=False
        )
        _check(response, url)
        yield response  # type: ignore[misc]
    except urllib3.exceptions.HTTPError as error:
        raise HTTPReadError(_cause(error)) from None
    finally:
        if response is not None and not response.closed and response.connection is not None:
            response.close()  # not read to its end: the connection is of no more use


def _check(response: urllib3.BaseHTTPResponse, url: str) -> None:
    status = response.status
    if status in (200, 206):
        return
    if status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shown(url))
    if status in (401, 403, 407):
        raise PermissionError(errno.EACCES, f"access denied (HTTP {status})", shown(url))
    if status == 416:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        raise EOFError(f"it holds {total or 'fewer'} bytes, and the range begins behind")
    reason = f"HTTP {status} {response.reason or ''}".rstrip()
    if status >= 500 or status in (408, 421, 425, 429):
        raise HTTPReadError(reason, _seconds(response.headers.get("Retry-After", "")))
    raise UserError(f"{shown(url)}: {reason}")


def _content_range(response: urllib3.BaseHTTPResponse) -> tuple[int, int | None]:
    """The first byte of the body in the file, and the file's size where the server says it."""
    if response.status == 200:
        length = response.headers.get("Content-Length")
        return 0, int(length) if length is not None else None
    place, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    try:
        return int(place.partition("-")[0]), int(total) if total != "*" else None
    except ValueError:
        raise HTTPReadError("an answer without a Content-Range that can be read") from None


def _seconds(retry_after: str) -> float:
    """The seconds that a Retry-After header asks for, given so or as a date."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        date = email.utils.parsedate_tz(retry_after)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0


def _cause(error: BaseException) -> str:
    """What went wrong with a connection, without the address that urllib3 puts into it."""
    while isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason is not None:
        error = error.reason
    if isinstance(error, urllib3.exceptions.NameResolutionError):
        return "its host's name cannot be resolved"
    if isinstance(error, urllib3.exceptions.TimeoutError):
        return "timed out"
    if isinstance(error, urllib3.exceptions.IncompleteRead):
        return "the body was cut short"
    inner = error.__cause__ or (error.args[-1] if error.args and isinstance(error.args[-1], BaseException) else None)
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return type(inner or error).__name__


@functools.lru_cache(maxsize=64)
def _pool(scheme: str, host: str) -> urllib3.PoolManager:
    """A process's connections, through the proxy that the environment names, if any."""
    timeout = urllib3.Timeout(connect=_CONNECT_TIMEOUT_S, read=_SOCKET_TIMEOUT_S)
    proxy = urllib.request.getproxies().get(scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        return urllib3.ProxyManager(proxy, timeout=timeout, maxsize=16)
    return urllib3.PoolManager(timeout=timeout, maxsize=16)
