"""A cluster on this machine: it comes up, says how it is, loses a node, and leaves nothing behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import members, operations, processes
from cluster.local import main
from cluster.state import State, find, new, read
from pipelines.errors import UserError

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def ended(folder: Path) -> Iterator[None]:
    """Whatever a test does, its cluster ends."""
    try:
        yield
    finally:
        if (state := find(folder)) is not None:
            operations.down(state)


def nothing_is_left(state: State) -> bool:
    # The threads of a killed process end after its main one, and keep its ports until then.
    processes.wait_until(lambda: not any(answers(port) for port in state_ports(state)), 10)
    return (
        not processes.marked(state.mark(), state.ray_dir) and not state.ray_dir.exists() and find(state.folder) is None
    )


def state_ports(state: State) -> list[int]:
    return [state.gcs_port, state.dashboard_port, state.mlflow_port, state.s3_port]


def answers(port: int) -> bool:
    # Not by binding it: by now it may be the near end of somebody else's connection.
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "cluster.local", *arguments, "--folder", str(folder)]


def test_up_status_kill_down(tmp_path, capfd, monkeypatch):
    folder = ["--folder", str(tmp_path)]
    with ended(tmp_path):
        assert main(["up", "--nodes", "1", "--cpus", "1", *folder]) == 0
        state = read(tmp_path)
        told = capfd.readouterr().out
        assert "1 nodes beside the head" in told
        assert f'-m cluster.local env --folder {tmp_path})"' in told
        token = state.token.read_text()
        assert token not in told
        assert (state.token.stat().st_mode & 0o077, tmp_path.stat().st_mode & 0o077) == (0, 0)

        assert main(["status", *folder]) == 0
        rows = [line.split() for line in capfd.readouterr().out.splitlines()]
        assert ["head", "127.0.1.1", "alive", "0", "100"] in rows
        assert ["node-1", "127.0.1.2", "alive", "1", "100"] in rows
        assert ["s3", "127.0.0.1", "answers"] in rows
        # without the token nobody is told of the nodes
        assert members.answer(f"{state.dashboard}/api/v0/nodes") is None

        assert main(["env", *folder]) == 0
        told = capfd.readouterr().out
        script = f"{told}\nexec {sys.executable} -c 'import os; print(dict(os.environ))'"
        seen = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
        assert token not in told
        assert all(f"'{key}': '{value}'" in seen for key, value in state.exports().items())
        assert "RAY_AUTH_TOKEN'" not in seen

        with pytest.raises(UserError, match="a cluster runs in"):
            main(["up", *folder])
        with pytest.raises(UserError, match=r"no node 'node-2'.*found head, node-1"):
            main(["kill", "node-2", *folder])
        with pytest.raises(UserError, match="head cannot be drained"):
            main(["drain", "head", *folder])

        killed = processes.marked(state.mark("node-1"))
        assert main(["kill", "node-1", *folder]) == 0
        assert not [process for process in killed if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        capfd.readouterr()
        processes.wait_until(lambda: main(["status", *folder]) == 0 and "dead" in capfd.readouterr().out, 20)
        with pytest.raises(UserError, match="node-1 does not run"):
            main(["kill", "node-1", *folder])
        with pytest.raises(UserError, match="node-1 cannot be drained"):
            main(["drain", "node-1", *folder])

        # a part that is lost without a word, and a worker without its raylet, are no hindrance
        os.kill(next(p.pid for p in processes.marked(state.mark("head")) if p.name() == "raylet"), signal.SIGKILL)
        assert main(["down", *folder]) == 0
        assert nothing_is_left(state)
        assert (tmp_path / "mlflow.db").exists()
        assert main(["down", *folder]) == 0
        assert "nothing to do" in capfd.readouterr().out


def test_down_ends_what_a_killed_up_left(tmp_path):
    with ended(tmp_path):
        up = subprocess.Popen(command(tmp_path, "up", "--nodes", "1", "--cpus", "1"), cwd=ROOT)
        try:
            processes.wait_until(lambda: (state := find(tmp_path)) is not None and members.runs(state, "head"), 60)
        finally:
            up.kill()
            up.wait()
        state = read(tmp_path)
        assert processes.marked(state.mark("s3"))
        operations.down(state)
        assert nothing_is_left(state)


def test_an_up_that_fails_leaves_nothing(tmp_path, monkeypatch):
    made = []

    def fail(state, node):
        made.append(state)
        assert processes.marked(state.mark("s3"))
        raise UserError("no head today")

    monkeypatch.setattr(members, "start_node", fail)
    with ended(tmp_path), pytest.raises(UserError, match="no head today"):
        operations.up(tmp_path, nodes=1, cpus=1, store_mib=100)
    assert nothing_is_left(made[0])


def test_a_member_that_ends_at_once_says_why(tmp_path):
    state = new(tmp_path, cpus=1, store_mib=100)
    with ended(tmp_path):
        member = members.Member(state, "s3", [sys.executable, "-c", "raise SystemExit('no such port')"])
        with pytest.raises(UserError, match=r"s3 did not start: no such port \(all of it: .*s3\.log\)"):
            member.wait("Ray runtime started")


def test_nodes_get_cores_of_their_own(tmp_path):
    state = new(tmp_path, cpus=1, store_mib=100)
    assert len(set(processes.free_ports(50))) == 50
    with ended(tmp_path):
        sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
        for number, name in enumerate(("one", "two")):
            members.Member(state.model_copy(update={"nodes": state.nodes * number}), name, sleeping, cpus=1)
            (process,) = processes.marked(state.mark(name))
            assert len(process.cpu_affinity()) == min(1, len(os.sched_getaffinity(0)))
        # a process that belongs to another cluster, or to nobody, is let alone
        with subprocess.Popen(sleeping, env={**os.environ, processes.MARK: "other/one/"}) as other:
            operations.down(state)
            assert other.poll() is None
            other.kill()
    assert nothing_is_left(state)


def test_the_job_says_python_and_means_this_one(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere")
    state = new(tmp_path, cpus=1, store_mib=100)
    with ended(tmp_path):
        environment = state.environment()
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    assert not {"RAY_ADDRESS", "RAY_AUTH_TOKEN"} & environment.keys()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["dwon"], "unknown command 'dwon': did you mean down?"),
        (["up", "--nodes", "0"], "nodes"),
        (["up", "--store-mib", "10"], "store"),
        (["kill"], "NAME|name|STR"),
        (["status"], "no cluster in .*: start one with"),
        (["kill", "node-1"], "no cluster in"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "moto" else object())
    with pytest.raises(UserError, match=r"needs moto: pip install .*\[cluster\]"):
        main(["status"])


def test_help_names_every_command(capsys):
    from cluster.local import VERBS

    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"cluster.local {verb}" in told for verb in VERBS)
