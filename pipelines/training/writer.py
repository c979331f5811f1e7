"""Writes a run's checkpoints from a thread while training goes on, through what a disk or a store does wrong."""

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from mae_core import weights
from mae_core.model import MaskedAutoencoder
from pipelines.errors import UserError
from pipelines.lease import LeaseLostError
from pipelines.reading import ReadError, phrase
from pipelines.storage import Store
from pipelines.training import checkpoint
from pipelines.training.snapshot import Snapshot

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0
# How much the writing thread gives way to training, where threads have a niceness of their own: a third of a core's
# time beside one thread of training. With more, a machine whose cores are busy takes minutes for seconds of writing.
_NICER = 5


class Writer:
    """Writes checkpoints one at a time.

    One that cannot be written (a full disk, a store that is away) is tried again while training goes on: what is in
    memory is worth more than the seconds of a step. Nothing is lost where the disk is cleaned or the store comes back
    in time; after ``patience_s`` the run ends with the reason.

    Args:
        checkpoints: The run's ``checkpoints`` folder.
        keep: How many are kept.
        after: Called in the thread after each checkpoint has been written.
        say: Takes a line for the user.
        guard: As ``checkpoint.write`` takes it.
        patience_s: How long one checkpoint is tried, from its first failure.
    """

    def __init__(
        self,
        checkpoints: Store,
        keep: int,
        after: Callable[[], None] = lambda: None,
        *,
        say: Callable[[str], None] = lambda _: None,
        guard: Callable[[], None] = lambda: None,
        patience_s: float = 1800.0,
    ):
        self._checkpoints, self._keep, self._after = checkpoints, keep, after
        self._say, self._guard, self._patience_s = say, guard, patience_s
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closed = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written, or waits for its disk or store."""
        return self._thread is not None and self._thread.is_alive()

    def save(
        self, step: int, model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Begins to copy and to write the state of this moment; waits first where the last one is still on its way.

        The optimiser's next step waits for the copy. What else changes weights must call ``wait`` before.

        Raises:
            UserError: The last checkpoint could not be written.
        """
        self.wait()
        self._snapshot.begin(checkpoint.tensors_of(model, optimizer), optimizer)
        parts = (step, weights.file_metadata(model), state)
        self._thread = threading.Thread(target=self._run, args=parts, name="mae-checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits for the checkpoint that is on its way.

        Raises:
            UserError: It could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Tells of a checkpoint that could not be written, without waiting.

        Raises:
            UserError: There is one.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Ends what is tried again; waits only for what is being written at this moment."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, step: int, metadata: dict[str, str], state: dict[str, Any]) -> None:
        try:
            tensors = self._snapshot.finish()
            if sys.platform == "linux":
                thread = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICER)
            parts = (self._checkpoints, step, tensors, metadata, state, self._guard)
            self._keep_at(step, lambda: checkpoint.write(*parts))
            try:
                checkpoint.prune(self._checkpoints, self._keep, step)
                self._after()
            except (OSError, ReadError) as error:
                # The checkpoint is there; the rest comes with the next one.
                self._say(f"warning: beside the checkpoint of step {step}: {phrase(error)}")
        except BaseException as error:  # raised where the next checkpoint is asked for
            self._error = error

    def _keep_at(self, step: int, act: Callable[[], None]) -> None:
        """Does it again and again while it fails by a disk or a store.

        Raises:
            UserError: It has failed for too long.
        """
        failed = None
        for attempts in itertools.count(1):
            try:
                act()
            except LeaseLostError:
                raise
            except (OSError, UserError) as error:
                name = self._checkpoints.shown(checkpoint.folder_name(step))
                now = time.monotonic()
                reason = error.reason if isinstance(error, ReadError) else phrase(error)
                failed = failed or now
                pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (attempts - 1))
                left = failed + self._patience_s - now
                if left <= 0 or self._closed.is_set():
                    raise UserError(
                        f"no checkpoint could be written for {_minutes(now - failed)}: {name}: {reason}; mend the "
                        "storage, then start the same run again: it goes on from its last whole checkpoint"
                    ) from error
                if attempts == 1:
                    self._say(
                        f"warning: {name} could not be written: {reason}; training goes on, and it is tried again for "
                        f"{_minutes(self._patience_s)}"
                    )
                self._closed.wait(min(pause, left))
            else:
                if attempts > 1:
                    self._say(f"{checkpoint.folder_name(step)} is written, at attempt {attempts}")
                return


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
