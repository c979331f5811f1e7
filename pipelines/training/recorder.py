"""Tells of a run from a thread, so that no step waits for a disk, a store or Ray."""

import queue
import threading
import time
from collections.abc import Callable

_PAUSE_S = 2.0


class Recorder:
    """Does one thing after another in a thread, in the order in which they were handed over.

    What fails by a disk is tried again until it succeeds: a full disk may be cleaned, and a step is worth more than its
    point. After ``patience_s`` the reason is raised.

    Args:
        say: Takes a line for the user.
        patience_s: How long one thing is tried, from its first failure.
    """

    def __init__(self, say: Callable[[str], None], patience_s: float = 1800.0):
        self._say, self._patience_s = say, patience_s
        self._acts: queue.SimpleQueue[Callable[[], object] | threading.Event] = queue.SimpleQueue()
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="mae-recorder", daemon=True).start()

    def do(self, act: Callable[[], object]) -> None:
        """Hands something over; after a failure nothing more is done.

        Raises:
            OSError: What was handed over before has failed; whatever it raised.
        """
        self._acts.put(act)
        self._check()

    def flush(self) -> None:
        """Waits for everything that was handed over.

        Raises:
            OSError: As ``do``.
        """
        done = threading.Event()
        self._acts.put(done)
        done.wait()
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            act = self._acts.get()
            if isinstance(act, threading.Event):
                act.set()
            elif self._error is None:
                try:
                    self._keep_at(act)
                except BaseException as error:  # raised where the next thing is handed over
                    self._error = error

    def _keep_at(self, act: Callable[[], object]) -> None:
        failed = None
        while True:
            try:
                act()
                break
            except OSError as error:
                if failed is None:
                    failed = time.monotonic()
                    self._say(f"warning: no record can be written: {error}; training goes on, it is tried again")
                elif time.monotonic() > failed + self._patience_s:
                    raise
                time.sleep(_PAUSE_S)
        if failed is not None:
            self._say("the record is written again")
