"""A real Ray cluster on this machine, with the servers that a run speaks to; nothing of it stays behind.

    python -m cluster.local up [--nodes 3] [--cpus 2]    a head, nodes, an MLflow server, an S3 server
    eval "$(python -m cluster.local env)"                what this shell must know to use them
    python -m cluster.local status                       nodes, servers, addresses
    python -m cluster.local kill NODE                    a node is lost without a word
    python -m cluster.local drain NODE [--deadline-s 30] a node is lost with notice
    python -m cluster.local add                          one node more
    python -m cluster.local down                         all of it ends

Every node is a raylet of its own (`ray start`) with an address of its own, so that to Ray they are different machines.
They share this machine's cores: --cpus is what a node offers Ray, not what it has. The head offers none; there the
drivers of jobs run. Dashboard, MLflow and S3 listen on loopback; Ray's other ports listen everywhere, and those that
take orders ask for a token.
"""

import difflib
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import Field

from pipelines.cli import parse
from pipelines.commands import command_line
from pipelines.config import Section
from pipelines.errors import UserError, run_command

if TYPE_CHECKING:
    from cluster.state import State

PROG = command_line("cluster.local")


class OnCluster(Section):
    """What every command takes."""

    folder: Path = Path(".cluster")
    """Where the cluster's state, logs and MLflow record lie."""


class Up(OnCluster):
    """Start a cluster; of one that has lost its head or a server, start what is missing."""

    nodes: int = Field(3, ge=1)
    """Nodes beside the head."""
    cpus: int = Field(2, ge=1)
    """CPUs that each node offers Ray; the head offers none."""
    store_mib: int = Field(100, ge=80)
    """Object store of a node and of the head, in MiB of this machine's shared memory."""


class Env(OnCluster):
    """Print what a shell must know to use the cluster, to be evaluated."""


class Status(OnCluster):
    """Show nodes, servers and addresses; exit code 1 where the head or a server does not answer."""


class Kill(OnCluster):
    """SIGKILL a node with all that runs on it."""

    name: Annotated[str, tyro.conf.Positional]
    """The node; also 'head', 'mlflow' or 's3'."""


class Drain(OnCluster):
    """Tell Ray that a node goes away, and take it away when it is empty or the deadline has come."""

    name: Annotated[str, tyro.conf.Positional]
    """The node."""
    deadline_s: int = Field(30, ge=1)
    """Seconds of notice."""
    reason: str = "preempted"
    """Why, for Ray's logs."""


class Add(OnCluster):
    """Start one node more."""

    cpus: int = Field(0, ge=0)
    """CPUs that it offers Ray; 0: as many as those that began."""


class Down(OnCluster):
    """End all of it; MLflow's record and the logs stay in the folder."""


VERBS: dict[str, type[OnCluster]] = {
    "up": Up, "env": Env, "status": Status, "kill": Kill, "drain": Drain, "add": Add, "down": Down
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    verb, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("--help", "-h"):
        print(f"{__doc__}\n{PROG} COMMAND --help says more of each.")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise UserError(
            f"unknown command '{verb}': {f'did you mean {near[0]}?' if near else 'one of ' + ', '.join(VERBS)}"
        )
    asked = parse(VERBS[verb], prog=f"{PROG} {verb}", argv=arguments)
    for module in ("moto", "psutil"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{PROG} needs {module}: pip install -c constraints.txt -e '.[cluster]'")
    return run(asked)


def run(asked: OnCluster) -> int:
    """Does what was asked; returns the exit code."""
    # Not before what they need is known to be there.
    from cluster import operations
    from cluster.state import find, read

    folder = asked.folder.expanduser().absolute()
    if isinstance(asked, Up):
        state = operations.up(folder, asked.nodes, asked.cpus, asked.store_mib)
        print(f"the cluster is up: {len(state.nodes) - 1} nodes beside the head")
        print("\n".join(addresses(state)))
        print(f'to use it:    eval "$({PROG} env{_folder(asked)})"')
        print(f"to end it:    {PROG} down{_folder(asked)}")
        return 0
    if isinstance(asked, Down):
        state = find(folder)
        if state is None:
            print(f"no cluster in {folder}: nothing to do")
            return 0
        operations.down(state)
        print(f"the cluster has ended; MLflow's record and the logs are in {folder}")
        return 0
    state = read(folder)
    if isinstance(asked, Status):
        return status(state)
    if isinstance(asked, Kill):
        operations.kill(state, asked.name)
        print(f"{asked.name} is killed")
    elif isinstance(asked, Drain):
        empty = operations.drain(state, asked.name, asked.deadline_s, asked.reason)
        print(f"{asked.name} {'was empty and has ended' if empty else 'is taken away at its deadline'}")
    elif isinstance(asked, Add):
        print(f"{operations.add(state, asked.cpus).name} has joined")
    else:
        print("unset RAY_AUTH_TOKEN RAY_ADDRESS")
        for key, value in state.exports().items():
            print(f"export {key}={shlex.quote(value)}")
    return 0


def _folder(asked: OnCluster) -> str:
    return "" if asked.folder == OnCluster().folder else f" --folder {shlex.quote(str(asked.folder))}"


def addresses(state: "State") -> list[str]:
    """Where everything is."""
    from cluster.state import BUCKET

    return [
        f"Ray           {state.head}",
        f"dashboard     {state.dashboard}  (jobs too; it asks for the token in {state.token})",
        f"MLflow        {state.mlflow}",
        f"S3            {state.s3}  (s3://{BUCKET}; its objects are in memory and end with it)",
    ]


def status(state: "State") -> int:
    """Prints nodes and servers; returns 1 where the head or a server does not answer."""
    from cluster import members

    known = members.ray_nodes(state)
    up = {"head": known is not None} | {name: members.server_answers(state, name) for name in members.SERVERS}
    print("\n".join(addresses(state)) + "\n")
    print(f"{'member':10}{'address':12}{'state':22}{'CPUs':>5}{'store MiB':>11}")
    for node in state.nodes:
        told = (known or {}).get(node.name)
        store = f"{_resource(told, 'object_store_memory') / 2**20:.0f}"
        where = _state(told, members.runs(state, node.name))
        print(f"{node.name:10}{node.address:12}{where:22}{_resource(told, 'CPU'):>5g}{store:>11}")
    for name in members.SERVERS:
        print(f"{name:10}{'127.0.0.1':12}{'answers' if up[name] else 'does not answer':22}")
    return 0 if all(up.values()) else 1


def _resource(told: dict[str, Any] | None, name: str) -> float:
    return (told or {}).get("resources_total", {}).get(name, 0)


def _state(told: dict[str, Any] | None, runs: bool) -> str:
    """A node's state: what Ray says, and whether it runs, where the two differ."""
    said = told["state"].lower() if told else "not known to Ray"
    if runs == (said == "alive"):
        return said
    return f"{said}, but {'it runs' if runs else 'gone'}"


if __name__ == "__main__":
    run_command(main)
