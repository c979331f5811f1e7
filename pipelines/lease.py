"""A lease on a folder: one command at a time works in it, also where several clusters share the storage.

``lease.json`` names the owner and counts its heartbeats. Clocks of machines differ, so no time in it is read: an owner
is dead when its process is known to be gone, or when its heart has not beaten while somebody watched for long enough.
Object stores have no atomic creation here (pyarrow). Whoever takes a lease there writes it, waits until others who were
about to have written theirs, and reads whose it is: the last one has it. An owner looks at each heartbeat whether it
still has the lease, and whoever writes for it does before a checkpoint.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.errors import USAGE_ERROR, UserError
from pipelines.kinds import Kind, refuse_other
from pipelines.reading import ReadError, ReadPolicy
from pipelines.storage import Store

FILE = "lease.json"
_TRY = ReadPolicy(deadline_s=2.0)  # a heartbeat that does not get through is followed by the next


class LeaseLostError(UserError):
    """Another command has taken the folder over."""


@dataclass(frozen=True)
class Timing:
    """How leases are watched.

    Args:
        beat_s: Seconds between two heartbeats.
        stale_s: An owner whose heart has not beaten for so long, while somebody watched, has lost its lease.
        settle_s: Seconds after which all who were about to take a lease have written it.
    """

    beat_s: float = 5.0
    stale_s: float = 30.0
    settle_s: float = 1.0


TIMING = Timing()


@dataclass(frozen=True)
class Owner:
    """What ``lease.json`` says.

    Args:
        token: Tells this lease from every other.
        host: The machine's name, for messages.
        place: The machine since it was started, and what numbers its processes: where equal, ``pid`` means the same.
        pid: The process.
        started: When it was, in ticks of its machine: numbers of processes are used again.
        since: When it took the lease, by its own clock, for messages.
        beats: Heartbeats so far.
    """

    token: str = ""
    host: str = "an unknown machine"
    place: str = ""
    pid: int = 0
    started: int = 0
    since: str = "an unknown time"
    beats: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


@dataclass(frozen=True)
class Lease:
    """A lease that is held. It travels to the processes that work for its holder.

    Args:
        store: The folder.
        owner: Whose it is.
    """

    store: Store
    owner: Owner

    def check(self) -> None:
        """Looks whether the lease is still held: while the storage is away, nobody can have taken it.

        Raises:
            LeaseLostError: Somebody else has it.
        """
        try:
            found = _read(self.store)
        except (OSError, ReadError):
            return
        # Where the file is gone, somebody has tidied up: nobody else has it.
        if found is not None and found.token != self.owner.token:
            raise LeaseLostError(
                f"{self.store.shown()} was taken over by {found}, since nothing was heard of this command for a while "
                "(it stood still, or its storage was away): it ends here and leaves the folder alone"
            )


def check_of(lease: Lease | None) -> Callable[[], None]:
    """What is called before something is written that only the holder of a lease may write; None: anybody may."""
    return lease.check if lease else lambda: None


def leave_at_once(error: LeaseLostError) -> None:
    """Ends this process without a further touch at what another command works on now; exit code 2."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(USAGE_ERROR)


@contextlib.contextmanager
def hold(
    store: Store,
    what: str,
    kind: Kind,
    on_loss: Callable[[LeaseLostError], None] = leave_at_once,
    timing: Timing = TIMING,
) -> Iterator[Lease]:
    """Holds the lease of a folder for the length of a block.

    Args:
        store: The folder.
        what: As messages name it: ``run 'cells'``.
        kind: What it is: nothing of another kind may lie in the folder.
        on_loss: Called in a thread when somebody else has taken the lease: ends this process.
        timing: How it is watched.

    Raises:
        UserError: Somebody else has it, and is alive; or the folder holds another kind of thing.
    """
    refuse_other(store, kind)
    lease = Lease(store, _take(store, what, timing))
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(lease, ended, on_loss, timing), name="mae-lease", daemon=True)
    heart.start()
    try:
        refuse_other(store, kind)  # once more: another command may have ended there meanwhile
        yield lease
    finally:
        ended.set()
        heart.join(_TRY.deadline_s)  # a store that hangs is not waited for
        with contextlib.suppress(OSError, UserError):
            lease.check()
            store.remove(FILE, policy=_TRY)
            if store.is_local:
                store.local().rmdir()  # only where nothing came of it


def _take(store: Store, what: str, timing: Timing) -> Owner:
    """Makes the lease one's own.

    Raises:
        UserError: Somebody else has it, and is alive.
    """
    place = this_machine()
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    mine = Owner(secrets.token_hex(8), socket.gethostname(), place, os.getpid(), _started(os.getpid()), since)
    found = _read(store)
    if found is None and store.is_local:
        # The file system decides who was first.
        store.local().mkdir(parents=True, exist_ok=True)
        if _create(store.local(FILE), _text(mine)):
            return mine
        found = _read(store)
    known_gone = found is not None and bool(place) and found.place == place and _started(found.pid) != found.started
    if found is not None and not known_gone:
        _watch(store, found, what, timing)
    store.write(FILE, _text(mine))
    time.sleep(timing.settle_s)
    last = _read(store)
    if last is not None and last.token != mine.token:
        raise UserError(_refusal(what, last))
    return mine


def _create(path: Path, text: str) -> bool:
    """Makes a file; says whether there was none."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _watch(store: Store, found: Owner, what: str, timing: Timing) -> None:
    """Returns when an owner has ended, or its heart has not beaten for long enough.

    Raises:
        UserError: It beats.
    """
    print(
        f"{what} is held by {found}: waiting to see whether that is alive, {timing.stale_s:.0f} s at most", flush=True
    )
    began = time.monotonic()
    while time.monotonic() - began < timing.stale_s:
        time.sleep(timing.beat_s / 8)
        last = _read(store)
        if last is None:
            return
        if last != found:
            raise UserError(_refusal(what, last))
    print(f"nothing was heard of it for {timing.stale_s:.0f} s: {what} is taken over", flush=True)


def _beat(lease: Lease, ended: threading.Event, on_loss: Callable[[LeaseLostError], None], timing: Timing) -> None:
    beats = 0
    while not ended.wait(timing.beat_s):
        try:
            lease.check()
            beats += 1
            lease.store.write(FILE, _text(replace(lease.owner, beats=beats)), policy=_TRY)
        except LeaseLostError as error:
            on_loss(error)
            return
        except (OSError, UserError):
            # A storage that is away, or a disk that is full: the next beat may get through.
            continue


def _refusal(what: str, owner: Owner) -> str:
    return (
        f"{what} is being worked on by {owner}, which is alive: wait for its end, stop it there, or choose another name"
    )


def _text(owner: Owner) -> str:
    return json.dumps(asdict(owner), indent=2) + "\n"


def _read(store: Store) -> Owner | None:
    """Whose the lease is; None where there is none. One that is just being written is an unknown one's."""
    try:
        data = store.read(FILE, policy=_TRY)
    except FileNotFoundError:
        return None
    try:
        values: dict[str, Any] = json.loads(data)
        return Owner(**{name: values[name] for name in Owner.__dataclass_fields__})
    except (ValueError, TypeError, KeyError):
        return Owner()


def this_machine() -> str:
    """This machine since it was started, and its numbering of processes, which each container has of its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> int:
    """When a process of this machine was started, in ticks; 0 where it is gone."""
    try:
        # What follows the name, which may hold anything: the state, ..., and the start as the 20th.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
