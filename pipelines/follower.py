"""The process between a run and MLflow, started by ``pipelines.tracking``; nobody waits for it without a limit.

``python -m pipelines.follower create|send FOLDER TIMEOUT_S`` prints one JSON object. ``... follow FOLDER PID``
sends the spool as it grows, until the process PID, at the other end of its standard input, ends or asks for the end.
"""

import json
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

from pipelines.sender import Sender
from pipelines.spool import SPOOL_FILE, Spool, read_spool, redact, writer_name
from pipelines.tracking import RunRecord, client_tracking_uri

POLL_S = 2.0
RETRY_LIMIT_S = 60.0
LAST_ATTEMPT_S = 30.0


def answer(**fields: object) -> None:
    """Prints the process's answer."""
    print(json.dumps(fields), flush=True)


def end_after(timeout_s: float, **fields: object) -> None:
    """Ends the process when a time is up, whatever it is doing then; with an answer, if there is one to give."""

    def end() -> None:
        if fields:
            answer(**fields)
        os._exit(1)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()


def log(text: str) -> None:
    """Writes a line into ``sync.log``, where standard error goes."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=sys.stderr, flush=True)


def last_status(folder: Path) -> tuple[str, str]:
    """The newest status in the spool, and who wrote it; empty strings where there is none."""
    status = writer = ""
    for line, _ in read_spool(folder / SPOOL_FILE):
        if line and "status" in line:
            status, writer = line["status"], line.get("by", "")
    return status, writer


class Parent:
    """The trainer, seen through the pipe that it holds open."""

    def __init__(self, pid: int):
        self._pid = pid
        self.said = b""
        self.is_gone = False

    def wait(self, timeout_s: float) -> bool:
        """Waits for the parent to end or to ask for the end, and says whether it did."""
        deadline = time.monotonic() + timeout_s
        # A process forked from the parent may hold the pipe open when the parent is dead: look for both.
        while not self.is_gone and time.monotonic() < deadline:
            ready, _, _ = select.select([0], [], [], min(POLL_S, max(0, deadline - time.monotonic())))
            if ready:
                self.said = os.read(0, 100)
                self.is_gone = True
            elif os.getppid() != self._pid:
                self.is_gone = True
        return self.is_gone


def follow(folder: Path, uri: str, trainer_pid: int) -> int:
    """Sends the spool until the trainer ends or asks for the end; then tries once more.

    Args:
        folder: The run's local folder.
        uri: Where to send.
        trainer_pid: The parent, which may be dead before this process has imported all that it needs.

    Returns:
        0 where MLflow has everything.
    """
    parent = Parent(trainer_pid)
    os.nice(10)
    sender = Sender(folder, uri, may_create=False)
    wait_s, problem = POLL_S, ""
    while not parent.wait(wait_s):
        sent = sender.send()
        if sent.problem != problem:
            log(sent.problem or "MLflow is back")
            problem = sent.problem
        wait_s = min(2 * wait_s, RETRY_LIMIT_S) if problem else POLL_S
    words = parent.said.split()
    end_after(float(words[1]) if words else LAST_ATTEMPT_S)
    if not words and last_status(folder) == ("RUNNING", writer_name(trainer_pid)):
        # The trainer died without a word. Unless it has begun again elsewhere, nobody else will say so.
        spool = Spool(folder)
        spool.status("KILLED")
        spool.close()
    sent = sender.send()
    if sent.problem:
        log(sent.problem)
    return 1 if sent.left or sent.problem else 0


def main(action: str, folder: Path, number: str) -> int:
    """Does what the parent asked for."""
    # Ctrl-C is for the trainer, which then says what is to be done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    uri = client_tracking_uri(RunRecord.read(folder))
    if action == "follow":
        return follow(folder, uri, int(number))
    timeout_s = float(number)
    late = f"MLflow at {redact(uri)} gave no answer in {timeout_s:g} s"
    if action == "create":
        if not uri.startswith("sqlite:"):
            # A new database is never left half made; it takes seconds, and there is no network to wait for.
            end_after(timeout_s, problem=late)
        run_id, problem = Sender(folder, uri, may_create=True).create()
        answer(run_id=run_id, problem=problem)
    else:
        end_after(timeout_s, problem=late)
        sent = Sender(folder, uri, may_create=False).send(time.monotonic() + timeout_s)
        answer(**sent.model_dump())
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    # Not through exit handlers: MLflow's may wait for a server.
    os._exit(code)
