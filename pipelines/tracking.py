"""The record of a run: every fact goes to a local spool first, and from there to MLflow in the background.

The run folder holds ``run.json`` (what MLflow must know to make the run), ``metrics.jsonl`` (the spool, one fact a
line), ``sent.json`` (how far MLflow has it) and ``sync.log`` (what the follower complains about). Nothing here imports
MLflow: whatever talks to it runs in a process of its own (``pipelines.follower``), which can hang or die alone.

A finite value goes to MLflow as it is. NaN and infinities stay in the spool, as the strings ``nan``, ``inf`` and
``-inf``: MLflow would store an infinity as 1.8e308. It counts them for each metric in the tag ``mae.nonfinite``.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import pydantic

from mae_core.names import printable
from pipelines.commands import open_record
from pipelines.errors import UserError
from pipelines.sent import has_all
from pipelines.spool import SPOOL_FILE, redact
from pipelines.storage import Store

RUN_FILE = "run.json"
LOG_FILE = "sync.log"
PROCESS_MODULE = "pipelines.follower"
STARTING_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before a follower that was killed is started again


def resolve_tracking_uri(storage: str) -> str:
    """Where the record goes: MLFLOW_TRACKING_URI, else a SQLite database beside the runs.

    For runs in an object store without a server, the database is ``runs/mlflow.db`` in the working directory: a
    database file cannot live in an object store.

    Args:
        storage: The folder or address that holds the runs.

    Returns:
        An address that means the same in every process of this machine. It may hold credentials: hand it on in the
        environment only, and show ``redact`` of it.

    Raises:
        UserError: The address is a plain folder, which MLflow no longer writes to, or of no known kind.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        folder = Path("runs" if "://" in storage else storage).expanduser().absolute()
        return f"sqlite:///{folder}/mlflow.db"
    return absolute_tracking_uri(uri)


def absolute_tracking_uri(uri: str) -> str:
    """An address of a server or database as the user gave it, with a database file made absolute.

    Raises:
        UserError: As ``resolve_tracking_uri``.
    """
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).expanduser().absolute()}"
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise UserError(
            f"tracking URI '{redact(uri)}' is a folder, which MLflow no longer writes to: "
            "use sqlite:///FOLDER/mlflow.db or the http:// address of a server"
        )
    return uri


def client_tracking_uri(record: "RunRecord") -> str:
    """The address to use for a record: the environment's where it is the same one with credentials."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    return uri if redact(uri) == record.tracking_uri else record.tracking_uri


def quiet_environment() -> dict[str, str]:
    """How MLflow behaves in a process of ours: nothing told to its makers, no waiting, no chatter."""
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
        # With MLflow's seven retries of two minutes each, one request to a dead server takes minutes.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "15"),
        "MLFLOW_LOGGING_LEVEL": "ERROR",
    }


class DatasetInput(pydantic.BaseModel):
    """A data set as MLflow lists it among a run's inputs."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: str
    source: str
    num_samples: int
    context: str = "training"


class RunDescription(pydantic.BaseModel):
    """What a run is, as known before it starts. Values of ``params`` and ``tags`` may be anything; they become text."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    experiment: str
    name: str
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    datasets: tuple[DatasetInput, ...] = ()
    parent_run_id: str | None = None

    @pydantic.field_validator("params", "tags", mode="before")
    @classmethod
    def _as_text(cls, values: Mapping[str, Any]) -> dict[str, str]:
        # What cannot be encoded, as of a path that is not UTF-8, no database takes.
        return {name: printable(redact(str(value))) for name, value in values.items()}


class RunRecord(RunDescription):
    """``run.json``: the description, and where the run is in MLflow."""

    uid: str
    """Random; the MLflow run carries it as tag ``mae.run_uid``, so that it is found again."""
    tracking_uri: str
    """Without credentials."""
    mlflow_run_id: str | None = None
    experiment_id: str | None = None
    """Of the experiment, in the same MLflow."""

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Reads a run folder's ``run.json``.

        Raises:
            FileNotFoundError: There is none.
            UserError: It is not one of ours.
        """
        try:
            return cls.model_validate_json((folder / RUN_FILE).read_bytes())
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(f"{folder / RUN_FILE} is no record of a run: {where} {first['msg']}") from None

    def write(self, folder: Path) -> None:
        """Writes ``run.json``, whole or not at all."""
        Store(str(folder)).write(RUN_FILE, self.model_dump_json(indent=2) + "\n")


def shown_record(folder: Path, tracking_uri: str) -> str:
    """A line that says where a run is seen in MLflow: a link to it, or the command that opens its database.

    Args:
        folder: The run's local folder.
        tracking_uri: As ``resolve_tracking_uri`` gives it.

    Returns:
        Empty where MLflow has no such run yet, or has no address that a browser opens.
    """
    if tracking_uri.startswith("sqlite:///"):
        return f"MLflow UI  {open_record(tracking_uri)}"
    record = RunRecord.read(folder) if (folder / RUN_FILE).is_file() else None
    if record is None or not tracking_uri.startswith("http") or not (record.experiment_id and record.mlflow_run_id):
        return ""
    address = redact(tracking_uri).rstrip("/")
    return f"MLflow     {address}/#/experiments/{record.experiment_id}/runs/{record.mlflow_run_id}"


def recorded(folder: Path) -> list[Path]:
    """The folders with a record: a run's own, then those of its transfers and trials."""
    children = (path for kind in ("transfer", "trials") for path in sorted(folder.glob(f"{kind}/*/{RUN_FILE}")))
    return [path.parent for path in (folder / RUN_FILE, *children) if path.is_file()]


def adopt(child: Path, folder: Path) -> None:
    """Tells a child its parent in MLflow, which that may not have had before, or not in this MLflow."""
    parent = RunRecord.read(folder).mlflow_run_id if (folder / RUN_FILE).is_file() else None
    record = RunRecord.read(child)
    if parent and record.parent_run_id != parent:
        record.model_copy(update={"parent_run_id": parent}).write(child)


def write_record(folder: Path, description: RunDescription, *, tracking_uri: str) -> None:
    """Writes ``run.json``; what a folder knows of its MLflow run already is kept.

    Args:
        folder: The run's local folder.
        description: What the run is.
        tracking_uri: As ``resolve_tracking_uri`` gives it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    address = redact(tracking_uri)
    uid, known = secrets.token_hex(16), None
    with contextlib.suppress(FileNotFoundError):
        old = RunRecord.read(folder)
        uid, known = old.uid, old if old.tracking_uri == address else None
    fields = {name: getattr(description, name) for name in RunDescription.model_fields}
    RunRecord(**fields, uid=uid, tracking_uri=address, mlflow_run_id=known.mlflow_run_id if known else None,
              experiment_id=known.experiment_id if known else None).write(folder)  # fmt: skip


def create_run(folder: Path, description: RunDescription, *, tracking_uri: str, timeout_s: float = 10.0) -> str | None:
    """Writes ``run.json`` and makes the MLflow run, or finds the one that this folder has already.

    A server that is down, hung or refusing costs ``timeout_s`` at most, beside the seconds in which a process imports
    MLflow; the follower or ``pipelines.sync`` then makes the run later. A parameter that differs from the one
    of the existing run is kept there as a tag ``mae.changed.<parameter>``.

    Args:
        folder: The run's local folder.
        description: What the run is.
        tracking_uri: As ``resolve_tracking_uri`` gives it.
        timeout_s: Seconds that MLflow has for its answer. A new SQLite database may take longer.

    Returns:
        The MLflow run id; None where the run could not be made now, which has been said in a line on stderr.
    """
    write_record(folder, description, tracking_uri=tracking_uri)
    answer = _ask_client("create", folder, timeout_s, tracking_uri)
    if answer.get("problem"):
        print(
            f"warning: no MLflow run yet: {answer['problem']}; the record is kept in {folder} and sent later",
            file=sys.stderr,
            flush=True,
        )
    return answer.get("run_id")


class Sent(pydantic.BaseModel):
    """What one attempt sent, and what is left."""

    points: int = 0
    """Metric values that MLflow has accepted."""
    files: int = 0
    """Pictures and other files uploaded."""
    left: int = 0
    """Lines of the spool that MLflow does not have yet."""
    problem: str = ""
    """Why something is left; empty where nothing went wrong."""


def send(folder: Path, *, timeout_s: float, tracking_uri: str | None = None) -> Sent:
    """Sends what MLflow does not have yet, in a process of its own, and waits for it up to ``timeout_s``.

    Args:
        folder: The run's local folder, with ``run.json``.
        timeout_s: Seconds that sending may take, beside the import of MLflow.
        tracking_uri: With credentials, if it has any; None for the one of the environment or of ``run.json``.
    """
    answer = _ask_client("send", folder, timeout_s, tracking_uri)
    return Sent(**{"left": count_lines(folder / SPOOL_FILE), **answer})


def send_rest(folder: Path, *, timeout_s: float) -> Sent:
    """As ``send``, after a follower: where that has sent everything, no process starts to find nothing to do."""
    if has_all(folder, RunRecord.read(folder).mlflow_run_id):
        return Sent()
    return send(folder, timeout_s=timeout_s)


def count_lines(path: Path) -> int:
    """Whole lines of a file; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _client_process(
    action: str,
    folder: Path,
    number: str,
    *,
    tracking_uri: str | None,
    log: IO[bytes],
    stdin: int | None = None,
    stdout: int | None = None,
) -> "subprocess.Popen[bytes]":
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, **quiet_environment()}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    if tracking_uri is not None:
        # In the environment, not among the arguments, which every user of the machine can list.
        environment["MLFLOW_TRACKING_URI"] = tracking_uri
    # -P: a file called mlflow.py in the working directory is not what is meant. A session of its own: Ctrl-C in the
    # terminal ends the trainer, and what the trainer still wrote must be sent.
    command = [sys.executable, "-P", "-m", PROCESS_MODULE, action, str(folder.absolute()), number]
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdin=stdin, stdout=stdout or log, stderr=log
    )


def _ask_client(action: str, folder: Path, timeout_s: float, tracking_uri: str | None) -> dict[str, Any]:
    """What the client process prints: a JSON object; with ``problem`` alone where it gave no answer."""
    with (folder / LOG_FILE).open("ab") as log:
        process = _client_process(
            action, folder, str(timeout_s), tracking_uri=tracking_uri, log=log, stdout=subprocess.PIPE
        )
        with process:
            try:
                # The process keeps timeout_s itself, from when it has MLflow imported; this is for one that cannot.
                out, _ = process.communicate(timeout=timeout_s + STARTING_S)
            except subprocess.TimeoutExpired:
                process.kill()
                return {"problem": f"the MLflow client did not start within {timeout_s + STARTING_S:.0f} s"}
    try:
        return json.loads(out.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"problem": f"the MLflow client ended with code {process.returncode}, see {folder / LOG_FILE}"}


def start_follower(folder: Path, *, tracking_uri: str | None = None) -> "Follower":
    """Starts the process that follows the spool, and those of trials, and sends it every other second.

    It retries for as long as this process lives, at low priority, and tells its troubles to ``sync.log`` only. One that
    is killed, as for memory, is started again. Where this process dies without ``Follower.stop``, it writes the status
    KILLED and tries once more to send the rest.

    Args:
        folder: The run's local folder, with ``run.json``.
        tracking_uri: With credentials, if it has any; None for the one of the environment or of ``run.json``.
    """

    def start() -> "subprocess.Popen[bytes] | None":
        try:
            with (folder / LOG_FILE).open("ab") as log:
                return _client_process(
                    "follow", folder, str(os.getpid()), tracking_uri=tracking_uri, log=log, stdin=subprocess.PIPE
                )
        except OSError as error:
            # No memory, no process left: training goes on, and the spool has everything.
            print(f"warning: nothing follows {folder / SPOOL_FILE}: {error}", file=sys.stderr, flush=True)
            return None

    return Follower(start)


class Follower:
    """A follower process, as its parent sees it.

    Args:
        start: Starts the process; None where it could not.
    """

    def __init__(self, start: "Callable[[], subprocess.Popen[bytes] | None]"):
        self._start = start
        self._process = start()
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int | None:
        """The process's id; None where it could not be started."""
        return self._process.pid if self._process else None

    def _watch(self) -> None:
        """Starts the process again where it was killed. One that ended by itself would do so again."""
        pause_s = FIRST_PAUSE_S
        while self._process and self._process.wait() < 0 and not self._stopped.wait(pause_s):
            _hang_up(self._process)
            self._process = self._start()
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def stop(self, timeout_s: float) -> bool:
        """Asks the follower to send the rest and to end; one that takes longer is killed.

        Args:
            timeout_s: Seconds that it has.

        Returns:
            Whether MLflow has everything. If not, ``pipelines.sync`` sends what is left.
        """
        deadline = time.monotonic() + timeout_s
        self._stopped.set()
        code = self._ask_to_end(timeout_s)
        if code < 0 and self._process:
            # Killed a moment ago: another one sends the rest, which the watcher may be starting now.
            self._watcher.join()
            if self._process and self._process.poll() is not None:
                self._process = self._start()
            code = self._ask_to_end(deadline - time.monotonic())
        return code == 0

    def _ask_to_end(self, timeout_s: float) -> int:
        """The follower's code; 1 where it was killed, as it took longer, or is not there."""
        process, timeout_s = self._process, max(0.0, timeout_s)
        if process is None:
            return 1
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(f"stop {timeout_s}\n".encode())
            process.stdin.flush()
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return 1
        finally:
            _hang_up(process)


def _hang_up(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
