"""MLflow that fails in every way: all points arrive in the end, each once, and the loop never waits."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from cluster.processes import wait_until
from pipelines.sender import Sender
from pipelines.spool import Spool
from pipelines.tracking import RunRecord, create_run, quiet_environment, start_follower, write_record
from tests.jobs import left_behind
from tests.records import (
    ROOT,
    Server,
    client,
    description,
    eventually,
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
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in quiet_environment().items():
        monkeypatch.setenv(name, value)


def runs_of(uri: str, uid: str) -> list[str]:
    """The ids of the runs that a run folder has in MLflow."""
    known = client(uri)
    experiments = [found.experiment_id for found in known.search_experiments()]
    return [run.info.run_id for run in known.search_runs(experiments, f"tags.`mae.run_uid` = '{uid}'")]


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("500", "500"),
        ("403", "403"),
        ("hang", "gave no answer in time"),
        ("late", "gave no answer in time"),
        ("drop", "not reachable"),
        ("refuse", "not reachable"),
    ],
)
def test_a_fault_at_every_kind_of_request(
    tmp_path: Path, mlflow_server: Server, monkeypatch: pytest.MonkeyPatch, mode: str, told: str
):
    folder = tmp_path / mode
    with proxied(mlflow_server.port) as proxy:
        write_record(folder, description(mode), tracking_uri=proxy.uri)
        spool = Spool(folder)
        sender = Sender(folder, proxy.uri, may_create=False)

        def meets(path: str) -> None:
            """The next request to a path meets the fault; what is sent then makes up for it."""
            failed, dropped = proxy.failed, proxy.dropped
            proxy.mode, proxy.matches = mode, lambda asked, _: asked.partition("?")[0].endswith(path)
            if mode == "refuse":
                proxy.refuse()
            with monkeypatch.context() as patch:
                patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2" if mode in ("hang", "late") else "30")
                sent = sender.send()
            assert told in sent.problem
            assert sent.left
            if mode == "refuse":
                proxy.listen()
            else:
                assert proxy.failed == failed + 1
            proxy.mode = "pass"
            sent = sender.send()
            assert (sent.problem, sent.left) == ("", 0)
            if mode == "late":
                proxy.release()
                eventually(lambda: proxy.dropped > dropped)

        spool.status("RUNNING")
        meets("runs/create")
        write_steps(spool, range(1500))
        write_picture(folder, spool, 1499)
        meets("runs/log-batch")
        spool.tags({"note": "second try"})
        write_steps(spool, range(1000, 1600))
        meets("runs/log-batch")
        spool.status("FINISHED")
        spool.close()
        meets("runs/update")
        # As the driver does at the end.
        assert Sender(folder, proxy.uri, may_create=False).send().problem == ""
    record = RunRecord.read(folder)
    run_id = record.mlflow_run_id
    assert run_id is not None
    for key in ("train/loss", "perf/images_per_s"):
        assert steps_of(mlflow_server.uri, run_id, key) == list(range(1600))
    assert pictures_of(mlflow_server.uri, run_id) == [1499]
    run = client(mlflow_server.uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["note"] == "second try"
    # A request that was thought lost can have made another one.
    assert runs_of(mlflow_server.uri, record.uid) == [run_id]


@pytest.mark.chaos
def test_another_database_behind_the_address(tmp_path: Path):
    """An empty one, as on a new host, and one from yesterday: what they lack is sent again, by the same follower."""
    (tmp_path / "server").mkdir()
    server, folder = Server(tmp_path / "server"), tmp_path / "moved"
    database = tmp_path / "server" / "server.db"
    try:
        server.start()
        write_record(folder, description("moved"), tracking_uri=server.uri)
        spool = Spool(folder)
        spool.status("RUNNING")
        write_steps(spool, range(100))
        write_picture(folder, spool, 99)
        assert Sender(folder, server.uri, may_create=False).send().left == 0
        server.stop()
        yesterday = database.read_bytes()

        server.start()
        sender = Sender(folder, server.uri, may_create=False)
        write_steps(spool, range(100, 200))
        assert sender.send().points == 200
        server.stop()
        write_steps(spool, range(200, 210))
        assert "not reachable" in sender.send().problem
        database.write_bytes(yesterday)
        server.start()
        assert sender.send().points == 220
        first = RunRecord.read(folder).mlflow_run_id
        assert first is not None
        assert steps_of(server.uri, first) == list(range(210))

        server.stop()
        database.unlink()
        server.start()
        spool.status("FINISHED")
        spool.close()
        assert "not found" in sender.send().problem
        sent = sender.send()
        assert (sent.points, sent.files, sent.left) == (420, 1, 0)
        run_id = RunRecord.read(folder).mlflow_run_id
        assert run_id is not None
        assert run_id != first
        assert steps_of(server.uri, run_id) == list(range(210))
        assert pictures_of(server.uri, run_id) == [99]
        assert client(server.uri).get_run(run_id).info.status == "FINISHED"
    finally:
        server.stop()


def test_a_killed_follower_is_replaced(tmp_path: Path):
    """In the middle of a run, and a moment before its end."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    folder = tmp_path / "killed"
    run_id = create_run(folder, description("killed"), tracking_uri=uri)
    assert run_id is not None
    spool = Spool(folder)
    follower = start_follower(folder)
    first = follower.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    write_steps(spool, range(50))
    eventually(lambda: steps_of(uri, run_id) == list(range(50)))
    second = follower.pid
    assert second is not None
    assert second != first
    write_steps(spool, range(50, 100))
    os.kill(second, signal.SIGKILL)
    assert follower.stop(60)
    assert steps_of(uri, run_id) == list(range(100))
    spool.close()


LONELY = """
import os, signal, sys, time
from pathlib import Path
from pipelines.spool import Spool
from pipelines.tracking import start_follower
folder = Path(sys.argv[1])
spool = Spool(folder)
spool.status("RUNNING")
follower = start_follower(folder)
for step in range(100):
    spool.metrics(step, {"train/loss": 1.0})
print(follower.pid, flush=True)
while "no answer" not in (folder / "sync.log").read_text():
    time.sleep(0.1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_the_server_hangs(tmp_path: Path, mlflow_server: Server, monkeypatch: pytest.MonkeyPatch):
    """The follower gives up in the end, and what it noted is sent later."""
    folder = tmp_path / "lonely"
    with proxied(mlflow_server.port) as proxy:
        write_record(folder, description("lonely"), tracking_uri=proxy.uri)
        proxy.mode = "hang"
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
        trainer = subprocess.run(
            [sys.executable, "-c", LONELY, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert trainer.returncode == -signal.SIGKILL, trainer.stderr
        eventually(lambda: not Path(f"/proc/{trainer.stdout.strip()}").exists())
        proxy.mode = "pass"
        monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
        done = sync("lonely", "--storage", str(tmp_path))
        assert done.returncode == 0, done.stderr
    run_id = RunRecord.read(folder).mlflow_run_id
    assert run_id is not None
    assert steps_of(mlflow_server.uri, run_id) == list(range(100))
    assert client(mlflow_server.uri).get_run(run_id).info.status == "KILLED"


STEPS, EVERY = 3000, 4
TINY = [
    "--model.arch", "vit_tiny_patch16_224", "--model.patch-size", "4", "--model.width", "24", "--model.depth", "2",
    "--model.heads", "2", "--model.decoder-width", "16", "--model.decoder-depth", "1", "--model.decoder-heads", "2",
    "--data.image-size", "16", "16", "--batch.global-size", "320", "--batch.micro-size", "32",
    "--train.steps", str(STEPS), "--checkpoint.every-steps", "100", "--log.every", str(EVERY), "--log.pictures", "0",
    "--scale.workers", "1", "--scale.cpus-per-worker", "0.5",
]  # fmt: skip


def spooled(folder: Path) -> list[int]:
    """The steps whose loss the spool has, in its order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]
    return [line["step"] for line in lines if "train/loss" in line.get("metrics", {})]


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_through_all_of_it(shards: dict[str, str], tmp_path: Path):
    """Pretraining on Ray, with a worker killed while the server hangs: the run goes on from an older step."""
    (tmp_path / "server").mkdir()
    server, folder, log = Server(tmp_path / "server"), tmp_path / "weather", tmp_path / "log.txt"
    command = [sys.executable, "-m", "pipelines.pretrain", *TINY, "--data.train", shards["train"]]
    command += ["--run.storage", str(tmp_path), "--run.name", "weather"]
    told = lambda: log.read_text()[-3000:]  # noqa: E731

    with (
        contextlib.ExitStack() as stack,
        proxied(server.port) as proxy,
        tempfile.TemporaryDirectory(prefix="ray-") as ray_folder,
    ):
        stack.callback(server.stop)
        proxy.refuse()
        environment = os.environ | {"RAY_TMPDIR": ray_folder, "MLFLOW_TRACKING_URI": proxy.uri}
        environment["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "5"
        with log.open("wb") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

        def arrives() -> None:
            """What is spooled now is in MLflow soon."""
            run_id, newest = RunRecord.read(folder).mlflow_run_id, spooled(folder)[-1]
            assert run_id is not None

            def there() -> bool:
                time.sleep(1)  # a history costs the server seconds, which the record needs
                return steps_of(server.uri, run_id)[-1:] >= [newest]

            wait_until(there, 180, told)

        try:
            wait_until(lambda: (folder / "metrics.jsonl").exists() and len(spooled(folder)) > 20, 120, told)
            assert "no MLflow run yet" in log.read_text()
            server.start()
            proxy.listen()
            wait_until(lambda: RunRecord.read(folder).mlflow_run_id is not None, 120, told)
            arrives()
            for mode in ("500", "403", "drop", "hang"):
                failed, proxy.mode = proxy.failed, mode
                wait_until(lambda failed=failed: proxy.failed > failed, 60, told)
                before = spooled(folder)[-1]
                wait_until(lambda before=before: spooled(folder)[-1] > before + 20, 60, told)
                if mode == "hang":
                    for child in psutil.Process(process.pid).children(recursive=True):
                        if "RayTrainWorker" in " ".join(child.cmdline()):
                            child.kill()
                    wait_until(lambda: "continuing from the checkpoint of step" in log.read_text(), 120, told)
                    before = spooled(folder)[-1]
                    wait_until(lambda before=before: spooled(folder)[-1] > before + 20, 60, told)
                proxy.mode = "pass"
                proxy.release()
                arrives()
            server.stop()
            before = spooled(folder)[-1]
            wait_until(lambda: spooled(folder)[-1] > before + 20, 60, told)
            server.start()
            assert process.poll() is None, "it ended before all had been tried"
            assert process.wait(400) == 0, told()
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            wait_until(lambda: not left_behind(ray_folder), 60, lambda: f"still there: {left_behind(ray_folder)}")

        assert spooled(folder) == list(range(EVERY, STEPS + 1, EVERY))
        run_id = RunRecord.read(folder).mlflow_run_id
        assert run_id is not None
        assert steps_of(server.uri, run_id) == list(range(EVERY, STEPS + 1, EVERY))
        assert client(server.uri).get_run(run_id).info.status == "FINISHED"
    tracking = json.loads((folder / "result.json").read_text())["tracking_s"]
    print(tracking)
    assert tracking["p99"] < 1e-3
