"""The spool of a run: ``metrics.jsonl``, every fact of a run in the order in which it happened, one a line.

    {"step": 120, "time": 1795190000.1, "metrics": {"train/loss": 0.61}}
    {"step": 120, "time": 1795190000.2, "image": {"key": "reconstruction", "file": "pictures/step-00000120.png"}}
    {"time": 1795190000.3, "artifact": {"file": "config.json", "folder": ""}}
    {"time": 1795190000.4, "tags": {"note": "second try"}}
    {"time": 1795190000.5, "status": "FINISHED", "by": "host:4711"}

Not-a-number and infinities are the strings ``nan``, ``inf`` and ``-inf``, so that every line is valid JSON.
"""

import errno
import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

SPOOL_FILE = "metrics.jsonl"

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_NAME = re.compile(r"[/\w.\- :]{1,250}")


def redact(text: str) -> str:
    """The text without ``user:password@`` in its addresses."""
    return _CREDENTIALS.sub("", text)


def writer_name(pid: int) -> str:
    """Names a process among those of all machines, as a status line does."""
    return f"{socket.gethostname()}:{pid}"


def read_spool(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """The whole lines of a spool from a byte offset on, each with the offset of its end.

    A last line without its end is still being written and is left out. A line that is no JSON object (a machine that
    lost power) comes as None.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for text in file:
            if not text.endswith(b"\n"):
                return
            offset += len(text)
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            yield line if isinstance(line, dict) else None, offset


class Spool:
    """The append side of ``metrics.jsonl``; one process writes it, from any of its threads.

    Opening cuts off a torn last line. A point is written once: at a step at or below the last spooled one of its
    metric it is dropped, so that a run that resumes from an older step leaves no point twice.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / SPOOL_FILE
        self._last: dict[str, int] = {}
        self._writing = threading.Lock()
        whole = 0
        for line, end in read_spool(self._path):
            whole = end
            if line is None:
                continue
            names = [f"image:{line['image']['key']}"] if "image" in line else line.get("metrics", ())
            for name in names:
                self._last[name] = max(line["step"], self._last.get(name, line["step"]))
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._file, whole)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a step's values; a new metric's name must be one that MLflow takes."""
        new: dict[str, float | str] = {}
        for name, value in values.items():
            if self._is_new(step, name):
                number = float(value)
                new[name] = number if math.isfinite(number) else str(number)
        if new:
            self._write({"step": step, "time": time.time(), "metrics": new})
            self._last.update(dict.fromkeys(new, step))

    def image(self, step: int, key: str, file: str) -> None:
        """Notes a picture that lies in the run folder, complete; ``file`` is relative to it."""
        if self._is_new(step, f"image:{key}"):
            self._write({"step": step, "time": time.time(), "image": {"key": key, "file": file}})
            self._last[f"image:{key}"] = step

    def artifact(self, file: str, folder: str = "") -> None:
        """Notes a file of the run folder to be uploaded into ``folder`` of the run's artifacts."""
        self._write({"time": time.time(), "artifact": {"file": file, "folder": folder}})

    def tags(self, tags: Mapping[str, str]) -> None:
        """Notes tags of the run; a later value replaces an earlier one."""
        self._write({"time": time.time(), "tags": {name: redact(str(value)) for name, value in tags.items()}})

    def status(self, status: Status) -> None:
        """Notes what the run is doing: RUNNING when it starts or goes on, then how it ended."""
        self._write({"time": time.time(), "status": status, "by": writer_name(os.getpid())})

    def close(self) -> None:
        """Closes the file; everything written is in it already."""
        os.close(self._file)

    def _is_new(self, step: int, name: str) -> bool:
        if name not in self._last:
            assert _NAME.fullmatch(name), f"'{name}' is no name of a metric or picture for MLflow"
            return True
        return step > self._last[name]

    def _write(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        with self._writing:
            written = os.write(self._file, data)
            if written != len(data):
                # Half a line fitted on the disk.
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
        if written != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
