"""What talks to MLflow: makes a run from ``run.json`` and sends its spool. Only processes made for that import it.

How a point arrives exactly once, although an answer can be lost and a process killed at any line:

1. ``sent.json`` moves forward only after MLflow has accepted what lies before it, so nothing is left out;
2. steps only grow in the spool for each metric, and they are sent in this order, so what MLflow has of a metric is a
   beginning of it: a process that starts, or whose last request failed, asks for the largest step of each metric and
   drops the points up to it, so nothing is sent twice;
3. one process at a time does this for a run folder, under a lock.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic

from pipelines.spool import SPOOL_FILE, read_spool, redact
from pipelines.storage import Store
from pipelines.tracking import RunRecord, Sent, quiet_environment

# MLflow reads these when it is imported.
os.environ.update(quiet_environment())

import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from PIL import Image

SENT_FILE = "sent.json"
LOCK_FILE = "sync.lock"
BATCH_METRICS = 1000
UID_TAG = "mae.run_uid"
NONFINITE_TAG = "mae.nonfinite"
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 5000
DIGEST_CHARACTERS = 36


class CannotSendError(Exception):
    """Nothing is wrong with MLflow, but this process cannot send now; the text says why."""


def reason(error: Exception, uri: str) -> str:
    """One line on why MLflow did not take something, without credentials."""
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    # Without retries, a request that timed out arrives as a refused one; only its text tells.
    if any("timed out" in str(cause) for cause in chain):
        return f"MLflow at {redact(uri)} gave no answer in time"
    if any(isinstance(cause, requests.exceptions.ConnectionError) for cause in chain):
        return f"MLflow at {redact(uri)} is not reachable"
    words = " ".join(str(error).split())
    return redact(f"MLflow at {redact(uri)}: {words[:300] or type(error).__name__}")


@contextlib.contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Holds a lock file; the system lets it go when the process dies.

    Raises:
        CannotSendError: Another process held it all the time.
    """
    deadline = time.monotonic() + timeout_s
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CannotSendError(f"another process is sending: it holds {path}") from None
                time.sleep(0.05)
        yield


def connect(uri: str, *, may_create: bool) -> MlflowClient:
    """Opens MLflow.

    Args:
        uri: Address of a server or database.
        may_create: Whether a SQLite database that is not there is made, with its folder.

    Raises:
        CannotSendError: It is not there and must not be made.
    """
    if not uri.startswith("sqlite:///"):
        return MlflowClient(uri)
    database = Path(uri.removeprefix("sqlite:///"))
    if may_create:
        database.parent.mkdir(parents=True, exist_ok=True)
    elif not database.exists():
        # On another machine than the driver's, a second database of the same name would hide the points from the first.
        raise CannotSendError(f"the database {database} is not on this machine")
    # Two processes that find no tables both create them, and one fails halfway.
    with locked(Path(f"{database}.lock"), 60):
        return MlflowClient(uri)


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        location = None
        if uri.startswith("sqlite:///"):
            location = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:
            # Somebody else's run made it in between, or it is the error that it looks like.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        mend = f"mlflow experiments restore --experiment-id {found.experiment_id}"
        raise CannotSendError(f"experiment '{name}' was deleted in MLflow: restore it with '{mend}'")
    return found.experiment_id


def attach(client: MlflowClient, folder: Path, uri: str) -> str:
    """Makes the MLflow run of a folder, or finds it, and brings its parameters, tags and data sets up to date.

    The order: the run id in ``run.json``, if it is of this MLflow; else the run with the tag ``mae.run_uid`` (its id
    was lost with an answer, or the folder goes to another MLflow); else a new run.

    Returns:
        The run id, which is in ``run.json`` then.

    Raises:
        CannotSendError: Somebody deleted it.
    """
    record = RunRecord.read(folder)
    experiment_id = _experiment(client, record.experiment, uri)
    run = None
    if record.mlflow_run_id and record.tracking_uri == redact(uri):
        try:
            run = client.get_run(record.mlflow_run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    if run is None:
        query = f"tags.`{UID_TAG}` = '{record.uid}'"
        run = next(iter(client.search_runs([experiment_id], query, ViewType.ALL, max_results=1)), None)
    if run is None:
        tags = {UID_TAG: record.uid}
        if record.parent_run_id:
            tags["mlflow.parentRunId"] = record.parent_run_id
        run = client.create_run(experiment_id, tags=tags, run_name=record.name)
    run_id = run.info.run_id
    if run.info.lifecycle_stage == "deleted":
        mend = f"mlflow runs restore --run-id {run_id}"
        raise CannotSendError(f"run '{record.name}' was deleted in MLflow: restore it with '{mend}'")
    _describe(client, run, record)
    if (record.mlflow_run_id, record.tracking_uri) != (run_id, redact(uri)):
        record.model_copy(update={"mlflow_run_id": run_id, "tracking_uri": redact(uri)}).write(folder)
    return run_id


def _describe(client: MlflowClient, run: Run, record: RunRecord) -> None:
    """Adds what the run lacks. MLflow lets no parameter change, so a changed one becomes a tag."""
    wanted = {name: value[:PARAM_CHARACTERS] for name, value in record.params.items()}
    had = run.data.params
    tags = {name: value[:TAG_CHARACTERS] for name, value in record.tags.items()}
    for name, value in wanted.items():
        tag = f"mae.changed.{name}"
        if had.get(name, value) != value or tag in run.data.tags:
            tags[tag] = value[:TAG_CHARACTERS]
    params = [Param(name, value) for name, value in wanted.items() if name not in had]
    changed = [RunTag(name, value) for name, value in tags.items() if run.data.tags.get(name) != value]
    client.log_batch(run.info.run_id, params=params, tags=changed, synchronous=True)
    listed = run.inputs.dataset_inputs if run.inputs else []
    there = {(item.dataset.name, item.dataset.digest) for item in listed}
    new = []
    for data in record.datasets:
        digest = data.digest[:DIGEST_CHARACTERS]
        if (data.name, digest) not in there:
            source = json.dumps({"uri": redact(data.source)})
            kind = data.source.partition("://")[0] if "://" in data.source else "local"
            profile = json.dumps({"num_samples": data.num_samples, "digest": data.digest})
            dataset = Dataset(data.name, digest, kind, source, profile=profile)
            new.append(DatasetInput(dataset, [InputTag("mlflow.data.context", data.context)]))
    if new:
        client.log_inputs(run.info.run_id, datasets=new)


class Cursor(pydantic.BaseModel):
    """How far a spool has been sent: an offset in bytes, and a digest of what lies before it."""

    offset: int = 0
    digest: str = ""


class SentState(pydantic.BaseModel):
    """``sent.json``. Points and files have a cursor each: an artifact store that fails holds up no metric."""

    run_id: str = ""
    points: Cursor = Cursor()
    files: Cursor = Cursor()
    nonfinite: dict[str, int] = {}
    """How many values that are no number each metric has had."""


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
        if self._digest(state.points.offset) != state.points.digest:
            # Another spool than the one that was sent, such as an older copy: all of it again, without what is there.
            state = SentState(run_id=run_id)
        if state != self._state:
            self._steps = self._pictures = None
        self._state = state

    def _digest(self, offset: int) -> str:
        if offset == 0 or not self._spool.exists():
            return ""
        with self._spool.open("rb") as file:
            file.seek(max(0, offset - 256))
            return hashlib.sha256(file.read(min(256, offset))).hexdigest()[:16]

    def _move(self, cursor: Cursor, offset: int) -> None:
        cursor.offset, cursor.digest = offset, self._digest(offset)
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
