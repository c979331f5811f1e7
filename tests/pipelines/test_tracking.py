"""The record on real stores: SQLite, and a real MLflow server that is down, hung, slow to answer, and back."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines.commands import open_record
from pipelines.errors import UserError
from pipelines.spool import Spool
from pipelines.tracking import (
    RunDescription,
    RunRecord,
    create_run,
    resolve_tracking_uri,
    send,
    shown_record,
    start_follower,
)
from tests.records import (
    ROOT,
    Server,
    client,
    description,
    eventually,
    free_port,
    pictures_of,
    proxied,
    steps_of,
    sync,
    write_picture,
    write_steps,
)

# MLflow's own SQLite store, read back in this process, uses what SQLAlchemy 2.1 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_sqlite_from_beginning_to_continued_run(tmp_path: Path):
    uri = resolve_tracking_uri(str(tmp_path))
    assert uri == f"sqlite:///{tmp_path}/mlflow.db"
    folder = tmp_path / "cells"
    plan = description("cells", **{"optim.base_lr": 1.5e-4, "data.train": ""})
    run_id = create_run(folder, plan, tracking_uri=uri)
    assert run_id is not None
    spool = Spool(folder)
    spool.status("RUNNING")
    follower = start_follower(folder)
    write_steps(spool, range(50))
    write_picture(folder, spool, 49)
    (folder / "config.json").write_text("{}")
    spool.artifact("config.json", "configuration")
    spool.status("FINISHED")
    spool.close()
    assert follower.stop(60)

    run = client(uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "cells"
    assert run.data.params == {"optim.base_lr": "0.00015", "data.train": ""}
    assert run.data.tags["mlflow.source.git.commit"] == "0123abc"
    assert run.data.tags["mlflow.source.name"] == "a/job.py"
    assert run.info.user_id == "somebody"
    assert shown_record(folder, uri) == f"MLflow UI  {open_record(uri)}"
    assert run.data.metrics["train/loss"] == 1 / 50
    assert run.inputs is not None
    assert run.info.artifact_uri is not None
    assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["photos"]
    assert run.info.artifact_uri.startswith((tmp_path / "mlartifacts").as_uri())
    assert steps_of(uri, run_id) == list(range(50))
    assert pictures_of(uri, run_id) == [49]
    assert [file.path for file in client(uri).list_artifacts(run_id, "configuration")] == ["configuration/config.json"]

    # The same name again, with another learning rate: the same MLflow run goes on.
    plan = description("cells", **{"optim.base_lr": 3e-4, "data.train": ""})
    assert create_run(folder, plan, tracking_uri=uri) == run_id
    spool = Spool(folder)
    spool.status("RUNNING")
    spool.close()
    assert send(folder, timeout_s=60).left == 0
    run = client(uri).get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params["optim.base_lr"] == "0.00015"
    assert run.data.tags["mae.changed.optim.base_lr"] == "0.0003"
    assert run.inputs is not None
    assert len(run.inputs.dataset_inputs) == 1
    assert len(client(uri).search_runs([run.info.experiment_id])) == 1


@pytest.mark.chaos
def test_server_down_from_the_start_and_back_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    server = Server(tmp_path)
    folder = tmp_path / "runs" / "night"
    assert create_run(folder, description("night"), tracking_uri=server.uri, timeout_s=60) is None
    assert "not reachable" in capsys.readouterr().err
    spool = Spool(folder)
    follower = start_follower(folder)
    write_steps(spool, range(2500))
    write_picture(folder, spool, 100)
    spool.status("FINISHED")
    spool.close()
    assert not follower.stop(10)

    down = sync("night", "--storage", str(tmp_path / "runs"))
    assert down.returncode == 2
    assert len(down.stderr.splitlines()) == 1
    assert "not reachable" in down.stderr

    try:
        server.start()
        done = sync("night", "--storage", str(tmp_path / "runs"))
        assert done.returncode == 0, done.stderr
        assert "sent 5000 points and 1 files" in done.stdout
        run_id = RunRecord.read(folder).mlflow_run_id
        assert run_id is not None
        assert steps_of(server.uri, run_id) == list(range(2500))
        assert pictures_of(server.uri, run_id) == [100]
        assert client(server.uri).get_run(run_id).info.status == "FINISHED"
        again = sync("night", "--storage", str(tmp_path / "runs"))
        assert "sent 0 points and 0 files" in again.stdout
    finally:
        server.stop()


def test_hung_server_costs_no_step_and_no_point(tmp_path: Path, mlflow_server: Server, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "hung"
    run_id = create_run(folder, description("hung"), tracking_uri=mlflow_server.uri, timeout_s=60)
    assert run_id is not None
    # The link that a browser opens, without the password, once MLflow has the run.
    with_password = mlflow_server.uri.replace("://", "://me:secret@")
    found = client(mlflow_server.uri).get_run(run_id)
    page = f"{mlflow_server.uri}/#/experiments/{found.info.experiment_id}/runs/{run_id}"
    assert shown_record(folder, with_password) == f"MLflow     {page}"
    assert shown_record(tmp_path, mlflow_server.uri) == ""
    spool = Spool(folder)
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
        follower = start_follower(folder)
    write_steps(spool, range(10))
    eventually(lambda: steps_of(mlflow_server.uri, run_id) == list(range(10)))

    mlflow_server.signal(signal.SIGSTOP)
    try:
        # If each of these waited, for 3 s and more, this would take hours.
        for step in range(10, 2010):
            write_steps(spool, range(step, step + 1))
            time.sleep(0.002)
        eventually(lambda: "no answer" in (folder / "sync.log").read_text())
        # A second run that starts now does not wait for the server either.
        assert create_run(tmp_path / "late", description("late"), tracking_uri=mlflow_server.uri, timeout_s=3) is None
    finally:
        mlflow_server.signal(signal.SIGCONT)

    from mlflow.exceptions import MlflowException

    def all_arrived() -> bool:
        # Awake again, the server's supervisor finds its worker overdue, kills it and starts another: until then
        # a question may be cut off.
        with contextlib.suppress(MlflowException):
            return steps_of(mlflow_server.uri, run_id)[-1] == 2009
        return False

    eventually(all_arrived)
    assert steps_of(mlflow_server.uri, run_id) == list(range(2010))
    spool.close()
    assert follower.stop(60)


@pytest.mark.timing
def test_no_step_waits_for_a_hung_server(tmp_path: Path, mlflow_server: Server, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "waiting"
    run_id = create_run(folder, description("waiting"), tracking_uri=mlflow_server.uri, timeout_s=60)
    assert run_id is not None
    spool = Spool(folder)

    def longest(steps: range) -> float:
        """Seconds of a step's lines, but for the slowest 1 %."""
        seconds = []
        for step in steps:
            began = time.perf_counter()
            write_steps(spool, range(step, step + 1))
            seconds.append(time.perf_counter() - began)
            time.sleep(0.002)
        return float(np.quantile(seconds, 0.99))

    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
        follower = start_follower(folder)
    awake = longest(range(1000))
    mlflow_server.signal(signal.SIGSTOP)
    try:
        hung = longest(range(1000, 2000))
        print(f"{1e6 * awake:.0f} us a step, {1e6 * hung:.0f} us with a hung server")
        # A request takes thousands of times as long as the line.
        assert hung < 10 * max(awake, 1e-4)
    finally:
        mlflow_server.signal(signal.SIGCONT)
    spool.close()
    follower.stop(60)


@pytest.mark.parametrize("what", ["points", "picture"])
def test_follower_killed_between_acceptance_and_note(tmp_path: Path, mlflow_server: Server, what: str):
    def matches(path: str, body: bytes) -> bool:
        return "+compressed" in path if what == "picture" else b"train/loss" in body and "log-batch" in path

    with proxied(mlflow_server.port) as proxy:
        folder = tmp_path / f"cut-{what}"
        run_id = create_run(folder, description(folder.name), tracking_uri=proxy.uri, timeout_s=60)
        assert run_id is not None
        spool = Spool(folder)
        write_steps(spool, range(300))
        write_picture(folder, spool, 299)
        spool.close()

        killed = threading.Event()

        def kill() -> None:
            assert follower.pid is not None
            os.kill(follower.pid, signal.SIGKILL)
            proxy.mode = "pass"
            killed.set()

        proxy.mode, proxy.matches, proxy.after_drop = "drop", matches, kill
        follower = start_follower(folder)
        assert killed.wait(60)
        # MLflow has it, and the folder does not know; another follower goes on.
        assert steps_of(mlflow_server.uri, run_id) == list(range(300))
        assert follower.stop(60)
    assert steps_of(mlflow_server.uri, run_id) == list(range(300))
    assert pictures_of(mlflow_server.uri, run_id) == [299]
    assert send(folder, timeout_s=60, tracking_uri=mlflow_server.uri).points == 0


def test_machine_lost_with_its_spool(tmp_path: Path, mlflow_server: Server):
    """The run goes on elsewhere, from an older copy of the spool: replayed points have other times."""
    folder = tmp_path / "moved"
    run_id = create_run(folder, description("moved"), tracking_uri=mlflow_server.uri, timeout_s=60)
    assert run_id is not None
    spool = Spool(folder)
    write_steps(spool, range(20))
    copy = (folder / "metrics.jsonl").read_bytes()
    write_steps(spool, range(20, 40))
    spool.close()
    assert send(folder, timeout_s=60).points == 80

    (folder / "sent.json").unlink()
    (folder / "metrics.jsonl").write_bytes(copy)
    time.sleep(0.01)
    spool = Spool(folder)
    write_steps(spool, range(15, 60))
    spool.close()
    assert send(folder, timeout_s=60).points == 40
    assert steps_of(mlflow_server.uri, run_id) == list(range(60))


def test_two_senders_at_once(tmp_path: Path, mlflow_server: Server):
    folder = tmp_path / "twice"
    create_run(folder, description("twice"), tracking_uri=mlflow_server.uri, timeout_s=60)
    spool = Spool(folder)
    for step in range(6):
        write_steps(spool, range(step, step + 1))
        write_picture(folder, spool, step)
    spool.close()
    results: list[subprocess.CompletedProcess[str]] = []
    threads = [threading.Thread(target=lambda: results.append(sync("twice", "--storage", str(tmp_path)))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.returncode for result in results] == [0, 0], results
    run_id = RunRecord.read(folder).mlflow_run_id
    assert run_id is not None
    assert steps_of(mlflow_server.uri, run_id) == list(range(6))
    assert pictures_of(mlflow_server.uri, run_id) == list(range(6))


TRAINER = """
import os, signal, sys, time
from pathlib import Path
from pipelines.commands import open_record
from pipelines.errors import UserError
from pipelines.spool import Spool
from pipelines.tracking import start_follower
folder = Path(sys.argv[1])
spool = Spool(folder)
spool.status("RUNNING")
follower = start_follower(folder)
for step in range(100):
    spool.metrics(step, {"train/loss": 1.0})
print(follower.pid, flush=True)
time.sleep(float(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_trainer_is_not_running_for_ever(tmp_path: Path, mlflow_server: Server):
    folder = tmp_path / "killed"
    run_id = create_run(folder, description("killed"), tracking_uri=mlflow_server.uri, timeout_s=60)
    assert run_id is not None
    trainer = subprocess.run(
        [sys.executable, "-c", TRAINER, str(folder), "1"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert trainer.returncode == -signal.SIGKILL, trainer.stderr
    eventually(lambda: client(mlflow_server.uri).get_run(run_id).info.status == "KILLED")
    assert steps_of(mlflow_server.uri, run_id) == list(range(100))
    eventually(lambda: not Path(f"/proc/{trainer.stdout.strip()}").exists())


def test_values_that_are_no_numbers(tmp_path: Path):
    uri = resolve_tracking_uri(str(tmp_path))
    folder = tmp_path / "diverged"
    run_id = create_run(folder, description("diverged"), tracking_uri=uri)
    assert run_id is not None
    spool = Spool(folder)
    for step, value in enumerate([1.0, float("inf"), float("nan"), float("-inf"), 2.0]):
        spool.metrics(step, {"train/loss": value})
    spool.close()
    assert send(folder, timeout_s=60).points == 2
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["metrics"]["train/loss"] for line in lines] == [1.0, "inf", "nan", "-inf", 2.0]
    run = client(uri).get_run(run_id)
    assert run.data.metrics == {"train/loss": 2.0}
    assert steps_of(uri, run_id) == [0, 4]
    assert json.loads(run.data.tags["mae.nonfinite"]) == {"train/loss": 3}


def test_spool_after_a_killed_writer(tmp_path: Path):
    spool = Spool(tmp_path)
    write_steps(spool, range(10))
    spool.image(5, "reconstruction", "pictures/5.png")
    spool.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 10, "time": 1.0, "metr')

    spool = Spool(tmp_path)
    assert path.read_bytes() == whole
    # Resumed from step 6: what is there already is not written again, and a new metric is.
    write_steps(spool, range(6, 12))
    spool.image(5, "reconstruction", "pictures/5.png")
    spool.metrics(9, {"train/loss": 0.0, "probe/knn_top1": 0.5})
    spool.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line.get("metrics", {})] == list(range(12))
    assert [line["step"] for line in lines if "image" in line] == [5]
    assert lines[-1]["metrics"] == {"probe/knn_top1": 0.5}


def test_sync_says_what_is_wrong(tmp_path: Path):
    uri = resolve_tracking_uri(str(tmp_path))
    create_run(tmp_path / "cells-b16", description("cells-b16"), tracking_uri=uri)
    wrong = sync("cell-b16", "--storage", str(tmp_path))
    assert wrong.returncode == 2
    assert "did you mean cells-b16?" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
    folder_uri = sync("cells-b16", "--storage", str(tmp_path), "--tracking-uri", str(tmp_path / "mlruns"))
    assert folder_uri.returncode == 2
    assert "sqlite:///" in folder_uri.stderr


def test_no_password_is_written_or_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "secret"
    uri = f"http://ann:hunter2@127.0.0.1:{free_port()}"
    plan = description("secret", **{"data.train": "https://ann:hunter2@host/shards"})
    assert create_run(folder, plan, tracking_uri=uri, timeout_s=5) is None
    assert not start_follower(folder, tracking_uri=uri).stop(5)
    text = "".join(path.read_text() for path in folder.iterdir() if path.is_file())
    assert "127.0.0.1" in text
    assert "hunter2" not in text + capsys.readouterr().err


def test_tracking_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri("runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_tracking_uri("s3://bucket/runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert resolve_tracking_uri("runs") == f"sqlite:///{tmp_path}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(UserError, match="sqlite:///"):
        resolve_tracking_uri("runs")


def test_the_loop_does_not_import_mlflow():
    code = "import sys, pipelines.tracking, pipelines.spool; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_values_that_cannot_be_encoded_are_escaped():
    """A database takes no lone surrogates, which stand for bytes of a path that are not UTF-8."""
    odd = os.fsdecode(b"caf\xe9")
    description = RunDescription(experiment="e", name="n", params={"data.train": odd}, tags={"storage": odd})
    assert description.params == {"data.train": "caf\\xe9"}
    assert description.tags == {"storage": "caf\\xe9"}
