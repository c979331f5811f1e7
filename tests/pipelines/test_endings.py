"""How commands end that somebody cuts short: by Ctrl-C in their first seconds, or by reading no further."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.processes import wait_until
from tests.pipelines.test_pretrain import arguments, recipe

__all__ = ["recipe"]  # a fixture

ROOT = Path(__file__).parents[2]


def loaded(process: subprocess.Popen, library: str) -> bool:
    """Whether a process has loaded a library."""
    return library in Path(f"/proc/{process.pid}/maps").read_text()


def started(process: subprocess.Popen, name: str) -> bool:
    """Whether a process has started another, of some name."""
    children = psutil.Process(process.pid).children(recursive=True)
    return any(name in word for child in children if child.is_running() for word in child.cmdline()[:1])


@pytest.mark.parametrize(
    ("came", "what"),
    [(loaded, "_pydantic_core"), (loaded, "libtorch_cpu"), (started, "gcs_server")],
    ids=["at its own imports", "at PyTorch's", "at Ray's start"],
)
def test_ctrl_c_in_the_first_seconds_is_one_line(came, what, recipe, shards, tmp_path):
    flags = arguments(recipe(4), shards, tmp_path, "run")
    command = [sys.executable, "-m", "pipelines.pretrain", *flags]
    with (tmp_path / "log.txt").open("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: came(process, what), 120, lambda: f"{what} did not come")
            below = psutil.Process(process.pid).children(recursive=True)
            # As a terminal does: to all of its processes.
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(60) == 130
            assert (tmp_path / "log.txt").read_text() == "interrupted\n"
            psutil.wait_procs(below, timeout=30)
            assert not [child for child in below if child.is_running()]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert not list(tmp_path.glob("run/lease.json"))


def unread(*words: str, **environment: str) -> tuple[int, str]:
    """Exit code and stderr of a command whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", ["pipelines.check_shards", "tune.ablate"])
def test_help_that_is_not_read_to_its_end_is_no_error(command):
    assert unread(command, "--help", PYTHONUNBUFFERED="1") == (0, "")
    assert unread(command, "--help", PYTHONUNBUFFERED="") == (0, "")


def test_output_that_is_not_read_to_its_end_is_no_error(shards):
    # What is printed at the very end, when all is done; and before, where it ends the command as it ends others.
    assert unread("pipelines.check_shards", shards["test"], PYTHONUNBUFFERED="") == (0, "")
    assert unread("pipelines.check_shards", shards["test"], PYTHONUNBUFFERED="1") == (128 + signal.SIGPIPE, "")
