"""What is kept of whole runs, for real: full disks, kills in the middle of an upload, two commands, hostile files."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.processes import wait_until
from pipelines.errors import UserError
from pipelines.pretrain import main
from pipelines.storage import Store
from pipelines.training import checkpoint
from pipelines.transfer import main as transfer
from tests.bombs import bomb, exploded, torch_bomb
from tests.pipelines.test_pretrain import ROOT, arguments, command, losses, recipe, steps_done
from tests.pipelines.test_writer import fill, small_disk
from tests.stores import Fault, FaultyProxy, moto_server, put, s3_environment

__all__ = ["recipe"]
QUIET = ("--log.pictures", "0", "--log.no-ids", "--probe.no-at-start")


@pytest.mark.parametrize("kind", ["pickle", "zipped", "legacy", "named safetensors"])
def test_hostile_weights_are_refused_in_one_line(recipe, shards, tmp_path, kind):
    path = tmp_path / ("model.safetensors" if kind == "named safetensors" else "mae.pth")
    path.write_bytes(
        bomb(tmp_path) if kind in ("pickle", "named safetensors") else torch_bomb(tmp_path, zipped=kind == "zipped")
    )
    data = ["--data.train", shards["train"], "--data.test", shards["test"]]
    for run in (
        lambda: main(arguments(recipe(4), shards, tmp_path / "runs", "hostile", "--run.init-from", str(path))),
        lambda: transfer(["--weights", str(path), "--storage", str(tmp_path / "runs"), *data]),
    ):
        with pytest.raises(UserError, match="cannot be read as a checkpoint of tensors") as caught:
            run()
        assert "\n" not in str(caught.value)
    assert not exploded(tmp_path)


def pretraining(folder: Path, *more: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs a command that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "pipelines.pretrain", *more],
        cwd=ROOT, env={**os.environ, "RAY_TMPDIR": str(folder), **environment},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_run_goes_on_beside_a_full_disk(recipe, shards, tmp_path):
    steps, log = 400, tmp_path / "log.txt"
    told = lambda: log.read_text()[-3000:]  # noqa: E731
    with small_disk(tmp_path / "disk", 24 << 10) as disk:
        folder, checkpoints = disk / "run", Store(str(disk)).child("run").child("checkpoints")
        run = arguments(recipe(steps), shards, disk, "run", *QUIET)
        with command(run, log) as process:
            wait_until(lambda: steps_done(folder) >= 50, 120, told)
            other = fill(disk)
            wait_until(lambda: "training goes on" in log.read_text(), 60, told)
            assert "No space left on device" in log.read_text()
            other.unlink()
            assert process.wait(200) == 0, told()
        assert sorted(losses(folder)) == [s for s in range(1, steps + 1) if s % 3 == 0 or s % 20 == 0]

        # And one that nobody cleans.
        log.write_text("")
        with command([*run, "--run.name", "short", "--checkpoint.patience-minutes", "0.05"], log) as process:
            wait_until(lambda: steps_done(disk / "short") >= 50, 120, told)
            other = fill(disk)
            assert process.wait(120) == 2, told()
        errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "No space left on device" in errors[0]
        passed: list[str] = []
        newest = checkpoint.newest_whole(Store(str(disk)).child("short").child("checkpoints"), passed.append)
        assert newest is not None
        assert newest >= 20
        other.unlink()
        assert checkpoint.newest_whole(checkpoints, passed.append) == steps


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_run_killed_between_two_files_of_an_upload(recipe, shards, tmp_path, monkeypatch):
    steps, log = 200, tmp_path / "log.txt"
    told = lambda: log.read_text()[-3000:]  # noqa: E731
    optimizer = re.compile(r"step-(\d+)/optimizer")

    def later(method, path):
        """The step of a checkpoint beyond the first whose second file is sent; 0: something else."""
        found = optimizer.search(path) if method == "PUT" else None
        return int(found[1]) if found and int(found[1]) > 20 else 0

    with moto_server() as moto, FaultyProxy(moto) as proxy:
        put(moto, "runs")
        for name, value in s3_environment(proxy.address).items():
            monkeypatch.setenv(name, value)
        run = arguments(recipe(steps), shards, "s3://runs", "run", *QUIET)
        store = Store("s3://runs/run/checkpoints")
        proxy.rules = lambda method, path, *_: Fault(stall_s=600) if later(method, path) else None
        record = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
        with command(run, log, **record) as process:
            wait_until(lambda: any(later(r.method, r.path) for r in list(proxy.requests)), 200, told)
            process.send_signal(signal.SIGKILL)
        cut = max(later(r.method, r.path) for r in list(proxy.requests))
        proxy.rules = lambda *_: None
        assert checkpoint.steps(store)[:2] == [cut, 20]
        log.write_text("")
        with command(run, log, **record) as process:
            assert process.wait(200) == 0, told()
        passed_over = f"checkpoint step-{cut:08d} has no manifest.json: it was never finished; taking the next older"
        assert passed_over in log.read_text()
        assert "continuing from the checkpoint of step 20" in log.read_text()
        assert checkpoint.newest_whole(store, print) == steps


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_two_commands_of_one_name(recipe, shards, tmp_path, short_folder):
    """Each has a cluster of its own; they share the storage."""
    steps, log, second_log = 100_000, tmp_path / "log.txt", tmp_path / "second.txt"
    told = lambda: log.read_text()[-2000:] + (second_log.read_text()[-2000:] if second_log.exists() else "")  # noqa: E731
    folder = tmp_path / "run"
    run = arguments(recipe(steps), shards, tmp_path, "run", *QUIET)
    with command(run, log) as first:
        wait_until(lambda: steps_done(folder) >= 30, 200, told)
        refused = pretraining(Path(short_folder), *run)
        assert refused.returncode == 2, refused.stderr
        assert refused.stderr.startswith(f"error: run 'run' is being worked on by process {first.pid} on ")
        assert refused.stderr.count("\n") == 1
        before = steps_done(folder)
        wait_until(lambda: steps_done(folder) > before, 60, told)

        # Its driver stands still, while its workers go on.
        first.send_signal(signal.SIGSTOP)
        with command(run, second_log) as second:
            wait_until(lambda: "run 'run' is taken over" in second_log.read_text(), 200, told)
            wait_until(lambda: "continuing from the checkpoint" in second_log.read_text(), 200, told)
            # The workers that were left find the lease lost when they are about to save, and the driver at once.
            first.send_signal(signal.SIGCONT)
            assert first.wait(60) == 2, told()
            assert "was taken over by process" in log.read_text()
            lease = json.loads((folder / "lease.json").read_text())
            assert lease["pid"] == second.pid
            start = steps_done(folder)
            wait_until(lambda: steps_done(folder) > start + 40, 200, told)
            assert second.poll() is None
            second.send_signal(signal.SIGKILL)
        # Of a killed driver it is known at once that it is dead.
        second_log.write_text("")
        with command(run, second_log) as third:
            wait_until(lambda: "continuing from the checkpoint" in second_log.read_text(), 200, told)
            assert "is held by" not in second_log.read_text()
            with contextlib.suppress(ProcessLookupError):
                third.kill()
