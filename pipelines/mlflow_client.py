"""Opens MLflow, and makes a run there from ``run.json``. Only processes that talk to MLflow import this.

MLflow reads its settings when it is imported: ``tracking.quiet_environment`` must be in the environment before.
"""

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path

import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

from pipelines.spool import redact
from pipelines.tracking import RunRecord

UID_TAG = "mae.run_uid"
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
    was lost with an answer, or the folder goes to another MLflow); else a new run. Empty doubles are deleted.

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
    run = _only(client, experiment_id, record.uid, run)
    if run is None:
        # MLflow takes its own from here alone, as that of the user.
        tags = {UID_TAG: record.uid, **{name: text for name, text in record.tags.items() if name.startswith("mlflow.")}}
        if record.parent_run_id:
            tags["mlflow.parentRunId"] = record.parent_run_id
        run = client.create_run(experiment_id, tags=tags, run_name=record.name)
    run_id = run.info.run_id
    if run.info.lifecycle_stage == "deleted":
        mend = f"mlflow runs restore --run-id {run_id}"
        raise CannotSendError(f"run '{record.name}' was deleted in MLflow: restore it with '{mend}'")
    _describe(client, run, record)
    place = {"mlflow_run_id": run_id, "experiment_id": run.info.experiment_id, "tracking_uri": redact(uri)}
    if record.model_copy(update=place) != record:
        record.model_copy(update=place).write(folder)
    return run_id


def _only(client: MlflowClient, experiment_id: str, uid: str, known: Run | None) -> Run | None:
    """The run with a uid: the known one, else the one to go on with, else None.

    A request to make it that was given up as lost may have arrived after all: the empty runs beside it are deleted.
    """
    found = client.search_runs([experiment_id], f"tags.`{UID_TAG}` = '{uid}'", ViewType.ALL)
    found.sort(key=lambda run: (run.info.lifecycle_stage == "deleted", not run.data.metrics, run.info.start_time))
    run = known or next(iter(found), None)
    for other in found:
        is_run = run is None or other.info.run_id == run.info.run_id
        if not is_run and not other.data.metrics and other.info.lifecycle_stage != "deleted":
            client.delete_run(other.info.run_id)
    return run


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
