"""Sends a run's spool to MLflow. Only processes that talk to MLflow import this.

How a point arrives exactly once, although an answer can be lost and a process killed at any line:

1. ``sent.json`` moves forward only after MLflow has accepted what lies before it, so nothing is left out;
2. steps only grow in the spool for each metric, and they are sent in this order, so what MLflow has of a metric is a
   beginning of it: a process that starts, or whose last request failed, asks for the largest step of each metric and
   drops the points up to it, so nothing is sent twice;
3. one process at a time does this for a run folder, under a lock.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from PIL import Image

from pipelines.mlflow_client import TAG_CHARACTERS, CannotSendError, attach, connect, locked, reason
from pipelines.sent import SENT_FILE, Cursor, SentState, digest
from pipelines.spool import SPOOL_FILE, read_spool
from pipelines.storage import Store
from pipelines.tracking import Sent

LOCK_FILE = "sync.lock"
BATCH_METRICS = 1000
NONFINITE_TAG = "mae.nonfinite"


class Sender:
    """Sends what MLflow does not have of a run folder's spool. Keeps what it knows of MLflow between attempts."""

    def __init__(self, folder: Path, uri: str, *, may_create: bool, lock_s: float = 5.0):
        self._folder = folder
        self._spool = folder / SPOOL_FILE
        self._uri = uri
        self._may_create = may_create
        self._lock_s = lock_s
        self._connected: MlflowClient | None = None
        self._run_id: str | None = None
        self._state = SentState()
        self._steps: dict[str, int] | None = None
        self._pictures: set[str] | None = None

    @property
    def _client(self) -> MlflowClient:
        if self._connected is None:
            self._connected = connect(self._uri, may_create=self._may_create)
        return self._connected

    def create(self) -> tuple[str | None, str]:
        """Makes the run, or finds it.

        Returns:
            The run id, or None and the reason.
        """
        try:
            with locked(self._folder / LOCK_FILE, self._lock_s):
                return attach(self._client, self._folder, self._uri), ""
        except CannotSendError as error:
            return None, str(error)
        except Exception as error:
            # What stores raise is open-ended: HTTP, SQL, boto.
            return None, reason(error, self._uri)

    def send(self, deadline: float = math.inf) -> Sent:
        """Sends all that it can; what goes wrong is told in the result.

        Args:
            deadline: When to begin no further request, in seconds of ``time.monotonic``.
        """
        sent = Sent()
        try:
            with locked(self._folder / LOCK_FILE, self._lock_s):
                if self._run_id is None:
                    self._run_id = attach(self._client, self._folder, self._uri)
                self._load(self._run_id)
                self._send_points(self._run_id, sent, deadline)
                self._send_files(self._run_id, sent, deadline)
        except CannotSendError as error:
            sent.problem = str(error)
        except Exception as error:
            # What stores raise is open-ended (HTTP, SQL, boto). Whatever it was, ask what has arrived before going on.
            self._run_id = self._steps = self._pictures = None
            sent.problem = reason(error, self._uri)
        sent.left = self._count_left()
        return sent

    def _load(self, run_id: str) -> None:
        path = self._folder / SENT_FILE
        state = SentState.model_validate_json(path.read_bytes()) if path.exists() else SentState()
        if state.run_id != run_id:
            state = SentState(run_id=run_id)
        if digest(self._spool, state.points.offset) != state.points.digest:
            # Another spool than the one that was sent, such as an older copy: all of it again, without what is there.
            state = SentState(run_id=run_id)
        if state != self._state:
            self._steps = self._pictures = None
        if self._steps is None and self._has_lost(run_id, state.points.offset):
            # MLflow's database is one from before: the same.
            state = SentState(run_id=run_id)
        self._state = state

    def _has_lost(self, run_id: str, offset: int) -> bool:
        """Whether MLflow lacks points that it had once: those before an offset of the spool."""
        had: dict[str, int] = {}
        for line, end in read_spool(self._spool):
            if end > offset:
                break
            finite = (name for name, value in (line or {}).get("metrics", {}).items() if not isinstance(value, str))
            had.update((name, line["step"]) for name in finite if line)
        largest = self._largest_steps(run_id)
        return any(step > largest.get(name, -1) for name, step in had.items())

    def _move(self, cursor: Cursor, offset: int) -> None:
        cursor.offset, cursor.digest = offset, digest(self._spool, offset)
        Store(str(self._folder)).write(SENT_FILE, self._state.model_dump_json() + "\n")

    def _send_points(self, run_id: str, sent: Sent, deadline: float) -> None:
        cursor = self._state.points
        batch: list[Metric] = []
        counts = dict(self._state.nonfinite)
        end = cursor.offset

        def flush() -> None:
            if end == cursor.offset:
                return
            tags = []
            if counts != self._state.nonfinite:
                tags.append(RunTag(NONFINITE_TAG, json.dumps(counts, sort_keys=True)[:TAG_CHARACTERS]))
            for start in range(0, max(len(batch), len(tags)), BATCH_METRICS):
                part = batch[start : start + BATCH_METRICS]
                self._client.log_batch(run_id, metrics=part, tags=tags, synchronous=True)
            sent.points += len(batch)
            batch.clear()
            self._state.nonfinite = dict(counts)
            self._move(cursor, end)

        for line, line_end in read_spool(self._spool, cursor.offset):
            values = (line or {}).get("metrics", {})
            if len(batch) + len(values) > BATCH_METRICS:
                flush()
                if time.monotonic() > deadline:
                    raise CannotSendError("the time to send was up")
            for name, value in values.items():
                assert line is not None
                if isinstance(value, str):
                    counts[name] = counts.get(name, 0) + 1
                elif line["step"] > self._largest_steps(run_id).get(name, -1):
                    batch.append(Metric(name, value, round(line["time"] * 1000), line["step"]))
            if line and ("tags" in line or "status" in line):
                flush()
                self._send_state(run_id, line)
            end = line_end
        flush()

    def _largest_steps(self, run_id: str) -> dict[str, int]:
        if self._steps is None:
            latest = self._client.get_run(run_id).data.to_proto().metrics
            self._steps = {metric.key: metric.step for metric in latest}
        return self._steps

    def _send_state(self, run_id: str, line: dict[str, Any]) -> None:
        if "tags" in line:
            tags = [RunTag(name, value[:TAG_CHARACTERS]) for name, value in line["tags"].items()]
            self._client.log_batch(run_id, tags=tags, synchronous=True)
        elif line["status"] == "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        else:
            self._client.set_terminated(run_id, line["status"], round(line["time"] * 1000))

    def _send_files(self, run_id: str, sent: Sent, deadline: float) -> None:
        cursor = self._state.files
        end = cursor.offset
        for line, end in read_spool(self._spool, cursor.offset):
            if line is None or not {"image", "artifact"} & line.keys():
                continue
            if time.monotonic() > deadline:
                raise CannotSendError("the time to send was up")
            what = line.get("image") or line["artifact"]
            path = self._folder / what["file"]
            if not path.is_file():
                print(f"warning: {path} is gone and left out of the record", file=sys.stderr, flush=True)
            elif "artifact" in line:
                self._client.log_artifact(run_id, str(path), what["folder"] or None)
                sent.files += 1
            elif self._picture_name(what["key"], line["step"]) not in self._sent_pictures(run_id):
                with Image.open(path) as image:
                    key, when = what["key"], round(line["time"] * 1000)
                    self._client.log_image(run_id, image, key=key, step=line["step"], timestamp=when, synchronous=True)
                sent.files += 1
            self._move(cursor, end)
        if end != cursor.offset:
            self._move(cursor, end)

    @staticmethod
    def _picture_name(key: str, step: int) -> str:
        return f"{key.replace('/', '~')}+step+{step}"

    def _sent_pictures(self, run_id: str) -> set[str]:
        """Pictures that MLflow has: those with the second of the two files that it keeps of each."""
        if self._pictures is None:
            names = [Path(file.path).name for file in self._client.list_artifacts(run_id, "images")]
            self._pictures = {name.partition("+timestamp+")[0] for name in names if "+compressed" in name}
        return self._pictures

    def _count_left(self) -> int:
        points = sum(
            line is not None and not {"image", "artifact"} & line.keys()
            for line, _ in read_spool(self._spool, self._state.points.offset)
        )
        files = sum(
            line is not None and bool({"image", "artifact"} & line.keys())
            for line, _ in read_spool(self._spool, self._state.files.offset)
        )
        return points + files
