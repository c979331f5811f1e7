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
from pipelines.tracking import RunRecord, Sent, adopt, client_tracking_uri, recorded

POLL_S = 2.0
RETRY_LIMIT_S = 60.0
LAST_ATTEMPT_S = 30.0
DYING_S = 10.0


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


class Followed:
    """A run's folder, and those of its trials as they come, on their way to one MLflow."""

    def __init__(self, folder: Path, uri: str):
        self._folder, self._uri = folder, uri
        self._senders: dict[Path, Sender] = {}

    def folders(self) -> list[Path]:
        """Those that have a record now, the run's own first."""
        found = recorded(self._folder)
        return [folder for folder in found if folder == self._folder or folder.parent.name == "trials"]

    def send(self) -> Sent:
        """Sends what there is; the first problem stands for all."""
        whole = Sent()
        for folder in self.folders():
            if folder not in self._senders:
                if folder != self._folder:
                    adopt(folder, self._folder)
                self._senders[folder] = Sender(folder, self._uri, may_create=False)
            sent = self._senders[folder].send()
            whole = Sent(left=whole.left + sent.left, problem=whole.problem or sent.problem)
            if sent.problem and folder == self._folder:
                # The trials would wait for the same server, and they need their parent's run.
                break
        return whole


def is_dead(writer: str, parent: str) -> bool:
    """Whether who wrote a status is known to have ended: the parent, or a process of this machine.

    Args:
        writer: As ``writer_name`` names it.
        parent: The parent, which has ended.
    """
    host, _, pid = writer.rpartition(":")
    here = parent.rpartition(":")[0]
    return writer == parent or (host == here and not Path(f"/proc/{pid}").exists())


def follow(folder: Path, uri: str, trainer_pid: int) -> int:
    """Sends the spool until the trainer ends or asks for the end; then tries once more.

    Args:
        folder: The run's local folder; the trials in it, if any, are followed too.
        uri: Where to send.
        trainer_pid: The parent, which may be dead before this process has imported all that it needs.

    Returns:
        0 where MLflow has everything.
    """
    parent = Parent(trainer_pid)
    os.nice(10)
    sender = Followed(folder, uri)
    wait_s, problem = POLL_S, ""
    while not parent.wait(wait_s):
        sent = sender.send()
        if sent.problem != problem:
            log(sent.problem or "MLflow is back")
            problem = sent.problem
        wait_s = min(2 * wait_s, RETRY_LIMIT_S) if problem else POLL_S
    words = parent.said.split()
    end_after(float(words[1]) if words else LAST_ATTEMPT_S)
    deadline = time.monotonic() + DYING_S
    for one in sender.folders() if not words else ():
        status, writer = last_status(one)
        # A trial's process finds out after its driver's death that its Ray is gone.
        while status == "RUNNING" and not is_dead(writer, writer_name(trainer_pid)) and time.monotonic() < deadline:
            time.sleep(POLL_S / 4)
            status, writer = last_status(one)
        # The trainer died without a word. Unless it has begun again elsewhere, nobody else will say so.
        if status == "RUNNING" and is_dead(writer, writer_name(trainer_pid)):
            spool = Spool(one)
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
