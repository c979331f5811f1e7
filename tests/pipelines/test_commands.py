"""Printed commands: each runs as it is pasted."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.commands import command_line, open_record

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def paste(command, path, folder=ROOT):
    """Runs a command in a shell that finds programs in ``path``."""
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["/bin/sh", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("where", ["active", "not active", "of another", "elsewhere"])
def test_a_printed_command_runs_as_it_is_pasted(where, monkeypatch, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("python", "python3"):
        (other / name).write_text("#!/bin/sh\nexit 9\n")
        (other / name).chmod(0o755)
    path = {"active": f"{BIN}:/usr/bin:/bin", "not active": "/nowhere"}.get(where, f"{other}:/usr/bin:/bin")
    folder = tmp_path if where == "elsewhere" else ROOT
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", path)
    command = command_line("pipelines.compare", "no such run", "it's", storage=str(tmp_path / "my runs"))
    done = paste(command, path, folder)
    # It has come through as it was meant: the run's name and the folder hold blanks.
    assert done.returncode == 2
    assert f"no run 'no such run' in {tmp_path}/my runs" in done.stderr


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="such names are quoted as bash takes them")
@pytest.mark.parametrize("name", [b"caf\xe9", b"it's \xff\\n", "plain é 🦆".encode()])
def test_a_name_of_any_bytes_comes_through(name):
    quoted = shlex_free(command_line("x", os.fsdecode(name)))
    done = subprocess.run(["/bin/bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True)
    assert done.stdout == name


def shlex_free(command: str) -> str:
    """The last word of a printed command, quoted as it is."""
    return command.split(" -m x ", 1)[1]


def test_the_interpreter_is_spelt_by_name_where_the_environment_is_active(monkeypatch):
    monkeypatch.setenv("PATH", f"{BIN}:/usr/bin:/bin")
    assert shlex.split(command_line("pipelines.sync"))[0] in ("python", "python3")
    # The log of a job is read at another machine.
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert command_line("pipelines.sync") == "python -m pipelines.sync"


def test_the_default_storage_is_not_spelt(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for storage in ("runs", str(tmp_path / "runs"), "runs/"):
        assert "--storage" not in command_line("pipelines.sync", "cells", storage=storage)
    assert command_line("pipelines.sync", "cells", storage="s3://a/runs").endswith("cells --storage s3://a/runs")


def test_the_record_is_opened_by_a_command_that_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")
    command = open_record(f"sqlite:///{tmp_path}/my runs/mlflow.db")
    assert shlex.split(command)[1:] == ["-m", "mlflow", "ui", "--backend-store-uri",
                                        f"sqlite:///{tmp_path}/my runs/mlflow.db"]  # fmt: skip
