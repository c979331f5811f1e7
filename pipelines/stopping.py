"""A run that its user stops: by SIGTERM, as `ray job stop` and schedulers do, or by Ctrl-C."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError

REACH_A_STEP_S = 60.0  # so long the workers have to end a step together; then what the last checkpoint has is kept


class StoppedError(Exception):
    """The run was stopped before its end; the text says where it stands.

    Args:
        number: The signal.
        is_recorded: Whether the workers have written it into the record.
    """

    def __init__(self, text: str, number: int, *, is_recorded: bool = False):
        super().__init__(text)
        self.is_recorded = is_recorded
        self.code = 128 + number
        """The command's exit code, as a shell has it: 143 for SIGTERM, 130 for Ctrl-C."""


class Signals:
    """Takes SIGTERM and SIGINT: the first is noted, a second one raises ``KeyboardInterrupt`` at once."""

    number = 0
    """The one that came; 0: none."""

    def _handle(self, number: int, _: Any) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number


@contextlib.contextmanager
def take_signals() -> Iterator[Signals]:
    """Takes the signals for the length of a block, in the main thread."""
    taken = Signals()
    before = {number: signal.signal(number, taken._handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield taken
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def do_until_stopped(
    work: Callable[[], None],
    console: Any,
    signals: Signals,
    *,
    what: str = "the run",
    patience_s: float = REACH_A_STEP_S,
) -> None:
    """Does a run's work; where a signal comes, the workers are told to stop after their next step.

    Args:
        work: What waits for the workers; it is done in a thread, since Ray Train would take Ctrl-C for itself.
        console: The workers'.
        signals: Those that come.
        what: Whose work it is, as it is named in the terminal.
        patience_s: So long the workers have to end a step together; 0: there are no steps, and it ends at once.

    Raises:
        StoppedError: A signal came before the run's end.
        Exception: Whatever the work raises.
    """
    raised: list[BaseException] = []

    def do() -> None:
        try:
            work()
        except BaseException as error:  # raised below, where somebody hears it
            raised.append(error)

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    told = 0.0
    while thread.is_alive():
        thread.join(0.1)
        if signals.number and not told:
            told = time.monotonic()
            name = signal.Signals(signals.number).name
            how = "at its next step, with a checkpoint; once more: now" if patience_s else "here"
            print(f"{name}: {what} stops {how}", flush=True)
            console.stop.remote()
        if told and time.monotonic() - told > patience_s and _stopped_at(console) is None:
            late = f", though no step ended within {patience_s:g} s" if patience_s else ""
            raise StoppedError(f"stopped{late}", signals.number)
    if raised:
        raise raised[0]
    if told and (step := _stopped_at(console)) is not None:
        raise StoppedError(f"stopped after step {step}", signals.number, is_recorded=True)
    if told and not ray.get(console.has_finished.remote()):
        raise StoppedError("stopped before the first step", signals.number)


def _stopped_at(console: Any) -> int | None:
    try:
        return ray.get(console.stopped_at.remote(), timeout=10)
    except RayError:
        return None
