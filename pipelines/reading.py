"""Reads ranges of files through every fault that passes by itself. Knows no Ray.

A read that breaks goes on from the byte where it stopped, after a pause that grows; one that is slow or stands still
gets a second one beside it, and what comes first counts. What does not pass becomes one ``ReadError``.
"""

import contextlib
import errno
import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.storage import Store

Result = TypeVar("Result")
# From (first byte, byte after the last one or None for the file's end) to the bytes, as they come. It ends only when
# all have come. What it raises: FileNotFoundError, PermissionError, EOFError (the file is shorter) and UserError are
# there to stay; any other OSError may pass.
Fetch = Callable[[int, int | None], Generator[bytes, None, None]]

# Faults of file systems (network disks above all) that may pass.
_TRANSIENT_ERRNOS = {
    errno.EIO,
    errno.ESTALE,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ETIMEDOUT,
    errno.EREMOTEIO if hasattr(errno, "EREMOTEIO") else errno.EIO,
    errno.ENOTCONN,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.EPIPE,
    errno.ESHUTDOWN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
}
_PERMANENT = (FileNotFoundError, PermissionError, EOFError, UserError)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 15.0
# A read is quiet when nothing has come for so long.
_QUIET_S = 1.0
_MIB = 1 << 20
THREAD = "mae-read"
# How long recent reads took per MiB, by store; and a generator of our own, so that nobody's draws move.
_SECONDS_PER_MIB: dict[str, deque[float]] = {}
_JITTER = random.Random()


@dataclass(frozen=True)
class ReadPolicy:
    """How long a read is kept at.

    Args:
        deadline_s: Seconds until a range that is not complete becomes an error.
        least_bytes_per_s: What arrives buys time: a large file may take as long as it needs at this speed.
        stall_s: Seconds without a byte until a second read starts beside the first; twice as many until a third.
        slow_factor: A read also gets a second one when it takes so many times as long as the store's usual.
        slow_least_s: But not before so many seconds.
    """

    deadline_s: float = 300.0
    least_bytes_per_s: float = math.inf
    stall_s: float = 10.0
    slow_factor: float = 5.0
    slow_least_s: float = 2.0


DEFAULT_POLICY = ReadPolicy()


class ReadError(UserError):
    """A range could not be read: the fault stayed, or is one that stays.

    Attributes:
        address: The file.
        offset: The byte where it stopped; all before it, from the range's beginning, had come.
        attempts: How often it was tried.
        seconds: For how long.
        reason: The last cause, in one phrase.
    """

    def __init__(self, address: str, offset: int, attempts: int, seconds: float, reason: str):
        super().__init__(address, offset, attempts, seconds, reason)  # these make it anew where it is unpickled
        self.address, self.offset, self.attempts, self.seconds = address, offset, attempts, seconds
        self.reason = reason

    def __str__(self) -> str:
        times = "attempt" if self.attempts == 1 else "attempts"
        return (
            f"{self.address}: stopped at byte {self.offset}: {self.reason} "
            f"({self.attempts} {times}, {self.seconds:.1f} s)"
        )


def read_range(store: "Store", name: str, offset: int, length: int, policy: ReadPolicy = DEFAULT_POLICY) -> bytes:
    """Reads ``length`` bytes of a file from ``offset``, through every fault that passes within the deadline.

    A local file is read here and now, at the cost of opening it and one ``pread``; a disk that hangs is waited for.

    Raises:
        ReadError: The range is not complete at the deadline; or at once, where the file does not exist, is shorter,
            or may not be read.
    """
    if store.is_local:
        return read_local(f"{store.location}/{name}", offset, length, policy)
    return fetch_range(
        lambda start, stop: store.fetch(name, start, stop),
        store.location,
        store.shown(name),
        offset,
        offset + length,
        policy,
    )


def read_local(path: str, offset: int, length: int | None, policy: ReadPolicy) -> bytes:
    """Reads a range of a local file, or all from ``offset`` on where ``length`` is None.

    Raises:
        ReadError: As ``read_range``.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if length is None:
                length = os.fstat(file).st_size - offset
            data = os.pread(file, length, offset)
        finally:
            os.close(file)
        if len(data) == length:
            return data
    except OSError:
        data = b""  # again, with patience
    return _read_patiently(path, offset, length, data, policy)


def retried(act: Callable[[], Result], address: str, policy: ReadPolicy) -> Result:
    """Does something whole, again and again while its fault may pass: a listing, an upload.

    Raises:
        ReadError: It still fails when the deadline has gone since it first did. What stays (see ``Fetch``) is raised
            at once as it is.
    """
    failed, attempts = math.inf, 0
    while True:
        attempts += 1
        try:
            return act()
        except OSError as error:
            if isinstance(error, _PERMANENT):
                raise
            failed = min(failed, time.monotonic())  # a long upload has its second chance all the same
            pause, seconds = _pause_s(attempts, error), time.monotonic() - failed
            if seconds + pause > policy.deadline_s:
                raise ReadError(address, 0, attempts, seconds, phrase(error)) from error
        time.sleep(pause)


def fetch_range(fetch: Fetch, key: str, address: str, start: int, stop: int | None, policy: ReadPolicy) -> bytes:
    """Reads a range by way of ``fetch``, each attempt in a thread that nobody has to wait for.

    Args:
        fetch: Brings the bytes.
        key: What the usual time of a read is remembered by: the store.
        address: The file, for errors.
        start: The first byte.
        stop: The byte after the last one; None: the file's end.
        policy: How long to keep at it.

    Raises:
        ReadError: As ``read_range``; its ``__cause__`` is the last attempt's error.
    """
    if start == stop:
        return b""
    reading = _Reading(fetch, start, stop)
    usual = _SECONDS_PER_MIB.setdefault(key, deque(maxlen=32))
    began = time.monotonic()
    failures, failed_at, retry_at = 0, start, began
    with reading.changed, contextlib.ExitStack() as at_end:
        at_end.callback(reading.end)
        while not reading.ended:
            now = time.monotonic()
            deadline = began + policy.deadline_s + (reading.position - start) / policy.least_bytes_per_s
            if error := reading.take_error():
                stays = isinstance(error, _PERMANENT) or not isinstance(error, OSError)
                failures = failures + 1 if reading.position == failed_at else 1
                failed_at, retry_at = reading.position, now + _pause_s(failures, error)
                deadline = now if stays else deadline
            if now >= deadline:
                raise reading.failure(address, now - began)
            wake = retry_at if not reading.running else _when_to_read_beside(reading, retry_at, usual, policy)
            if now >= wake:
                reading.begin()
                retry_at = math.inf
            else:
                reading.changed.wait(min(wake, deadline) - now)
        data = b"".join(reading.pieces)
    usual.append((time.monotonic() - began) / max(1.0, len(data) / _MIB))
    return data


def _when_to_read_beside(reading: "_Reading", retry_at: float, usual: deque[float], policy: ReadPolicy) -> float:
    """When the next attempt begins beside those that run, if nothing happens until then."""
    # 1. In the place of one that failed, where the others bring nothing either.
    # 2. When nothing has come for a while; each time that did not help, twice as long.
    wake = min(max(retry_at, reading.moved + _QUIET_S), reading.moved + policy.stall_s * 2**reading.in_vain)
    # 3. When a read alone takes many times as long as usual, though something comes.
    if usual and reading.running == 1 and reading.asked:
        expected = sorted(usual)[len(usual) // 2] * max(1.0, reading.asked / _MIB)
        wake = min(wake, reading.begun + max(policy.slow_least_s, policy.slow_factor * expected))
    return wake


def phrase(error: BaseException) -> str:
    """An error's cause in one short line, without an address that may hold a secret."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _pause_s(failures: int, error: BaseException) -> float:
    pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(failures - 1, 20)) * _JITTER.uniform(0.5, 1.0)
    # A server that says when to come back (Retry-After) is believed, up to a point.
    return max(pause, min(getattr(error, "retry_after_s", 0.0), 2 * _LONGEST_PAUSE_S))


def _read_patiently(path: str, offset: int, length: int | None, data: bytes, policy: ReadPolicy) -> bytes:
    """Goes on with a local read that gave an error or too little; opens the file anew each time."""
    began, attempts, failures = time.monotonic(), 1, 0
    while True:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(file).st_size
                if length is None:
                    length = size - offset
                while len(data) < length:
                    piece = os.pread(file, length - len(data), offset + len(data))
                    if not piece:
                        raise EOFError(f"it ends at byte {size}, and should go on to {offset + length}")
                    data, failures = data + piece, 0
            finally:
                os.close(file)
        except (OSError, EOFError) as error:
            attempts, failures = attempts + 1, failures + 1
            pause, seconds = _pause_s(failures, error), time.monotonic() - began
            passes = isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS
            if not passes or seconds + pause > policy.deadline_s:
                raise ReadError(path, offset + len(data), attempts, seconds, phrase(error)) from error
        else:
            return data
        time.sleep(pause)


class _Reading:
    """A range on its way: what has arrived, and the attempts that are at it. Its fields belong to ``changed``."""

    def __init__(self, fetch: Fetch, start: int, stop: int | None):
        self.changed = threading.Condition()
        self.pieces: list[bytes] = []
        self.position = start
        self.ended = False
        self.attempts = self.running = 0
        # Of the newest attempt: when it began, how much was missing (0 where unknown), and how many before it began
        # since anything came.
        self.begun = self.moved = time.monotonic()
        self.asked = self.in_vain = 0
        self._fetch, self._stop = fetch, stop
        self._new_error: BaseException | None = None
        self._last_error: BaseException | None = None

    def begin(self) -> None:
        """Starts an attempt at what is missing."""
        self.in_vain = self.in_vain + 1 if self.running else 0
        self.attempts += 1
        self.running += 1
        self.begun = self.moved = time.monotonic()
        self.asked = 0 if self._stop is None else self._stop - self.position
        # A daemon: a read that never comes back must not hold up the process's end.
        threading.Thread(target=self._attempt, args=(self.position,), name=THREAD, daemon=True).start()

    def end(self) -> None:
        """Lets attempts that are still at it stop at the next byte."""
        self.ended = True

    def take_error(self) -> BaseException | None:
        """The error that an attempt ended with, once."""
        error, self._new_error = self._new_error, None
        self._last_error = error or self._last_error
        return error

    def failure(self, address: str, seconds: float) -> BaseException:
        """The error to raise now."""
        cause = self._last_error
        if cause is not None and not isinstance(cause, OSError | EOFError | UserError):
            return cause  # not the store's fault, but ours
        reason = phrase(cause) if cause is not None else "nothing comes"
        error = ReadError(address, self.position, self.attempts, seconds, reason)
        error.__cause__ = cause
        return error

    def _attempt(self, position: int) -> None:
        failed: BaseException | None = None
        try:
            with contextlib.closing(self._fetch(position, self._stop)) as pieces:
                for piece in pieces:
                    if not self._take(position, piece):
                        return
                    position += len(piece)
        except BaseException as error:
            failed = error
        finally:
            with self.changed:
                self.running -= 1
                if failed is not None:
                    self._new_error = failed
                elif position >= self.position and (self._stop is None or position == self._stop):
                    self.ended = True
                self.changed.notify_all()

    def _take(self, position: int, piece: bytes) -> bool:
        """Keeps what is new of a piece; False where it is all done."""
        with self.changed:
            new = position + len(piece) - self.position
            if self.ended:
                return False
            if new > 0:
                self.pieces.append(piece if new == len(piece) else piece[-new:])
                self.position += new
                self.moved, self.in_vain = time.monotonic(), 0
            return True
