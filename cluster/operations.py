"""What can be done to a cluster on this machine: all that ``cluster.local`` does, for programs."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cluster import members, processes
from cluster.members import HEAD, SERVERS
from cluster.state import Node, State, alone, find, forget, new, read
from pipelines.errors import UserError


def up(folder: Path, nodes: int, cpus: int, store_mib: int) -> State:
    """Starts a cluster; of one that has lost its head or a server, what is missing.

    Args:
        folder: Absolute path of the folder that is its own.
        nodes: Nodes beside the head.
        cpus: CPUs that each of them offers Ray.
        store_mib: Object store of a node, in MiB.

    Raises:
        UserError: It runs already, or something does not start; then nothing that was started is left.
    """
    with alone(folder, "up", wait=False):
        state = find(folder)
        first = state is None
        if state is None:
            state = new(folder, cpus, store_mib)
        try:
            lost = [name for name in (*SERVERS, HEAD) if not members.runs(state, name)]
            if not lost:
                raise UserError(f"a cluster runs in {folder}: see status, or end it with down")
            state = state.model_copy(update={"cpus": cpus, "store_mib": store_mib})
            state.write()
            return _start(state, lost, nodes)
        except BaseException:
            if first:
                down(state)
            raise


def _start(state: State, lost: list[str], nodes: int) -> State:
    """Starts members; where one does not start, none of them is left."""
    with _none_left_behind(state) as started:
        for name in (*lost, *(node.name for node in state.nodes if HEAD in lost)):
            processes.kill(state.mark(name))  # what is left of them: nodes outlive their head for some seconds
        started += [name for name in lost if name in SERVERS]
        servers = [members.start_server(state, name) for name in started]
        if HEAD in lost:
            _start_nodes(state.folder, [(HEAD, 0)], started)
            _start_nodes(state.folder, [("", state.cpus)] * nodes, started)
            state = read(state.folder)
            members.wait_for_jobs(state)
        for server in servers:
            members.wait_for_server(state, server)
    return state


@contextlib.contextmanager
def _none_left_behind(state: State) -> Iterator[list[str]]:
    """Yields a list for the names of members that are being started; where the block fails they are ended."""
    started: list[str] = []
    try:
        yield started
    except BaseException:
        for name in started:
            processes.kill(state.mark(name))
        raise


def _start_nodes(folder: Path, wanted: list[tuple[str, int]], started: list[str]) -> None:
    """Starts nodes (a name, or none, and the CPUs that it offers), and waits until all have joined."""
    # One after the other: `ray start` gives its raylet 30 s, and side by side on few cores they take longer.
    for name, cpus in wanted:
        node = _reserve(folder, name, cpus)
        started.append(node.name)
        members.wait_for_node(members.start_node(read(folder), node))


def _reserve(folder: Path, name: str, cpus: int) -> Node:
    """Writes a node down before it starts: with a name, an address and a port that no other has had."""
    with alone(folder, "state", wait=True):
        state = read(folder)
        # The nodes of a head that is gone are gone with it.
        nodes = () if name == HEAD else state.nodes
        (port,) = processes.free_ports(1)
        number = len(nodes)
        node = Node(name=name or f"node-{number}", address=f"127.0.1.{number + 1}", cpus=cpus, agent_port=port)
        state.model_copy(update={"nodes": (*nodes, node)}).write()
    return node


def add(state: State, cpus: int = 0) -> Node:
    """Starts one node more, and waits until it has joined.

    Args:
        state: The cluster.
        cpus: CPUs that it offers Ray; 0: as many as those that began.

    Raises:
        UserError: There is no head to join, or it does not start.
    """
    if not members.runs(state, HEAD):
        raise UserError(f"the cluster in {state.folder} has lost its head: up starts what is missing")
    with _none_left_behind(state) as started:
        _start_nodes(state.folder, [("", cpus or state.cpus)], started)
    return read(state.folder).node(started[0])


def kill(state: State, name: str) -> None:
    """SIGKILL for a node, the head or a server, with all that runs on it.

    Raises:
        UserError: There is no such member, or it does not run.
    """
    if name not in SERVERS:
        state.node(name)
    if not members.runs(state, name):
        raise UserError(f"{name} does not run (see python -m cluster.local status)")
    processes.kill(state.mark(name))


def drain(state: State, name: str, deadline_s: int, reason: str) -> bool:
    """Tells Ray that a node goes away, and takes it away when it is empty or the deadline has come.

    Returns:
        Whether it was empty before the deadline.

    Raises:
        UserError: There is no such node, or Ray refuses.
    """
    node = state.node(name)
    if name == HEAD:
        raise UserError("the head cannot be drained: it is the cluster; kill takes it away")
    members.drain(state, node, deadline_s, reason)
    try:
        # A raylet that has nothing left to do ends; at the deadline Ray does nothing: the machine's owner does.
        processes.wait_until(lambda: not members.runs(state, name), deadline_s)
    except TimeoutError:
        return False
    finally:
        processes.kill(state.mark(name))
    return True


def down(state: State) -> None:
    """Ends all of a cluster, whatever is left of it."""
    processes.kill(state.mark(), state.ray_dir)
    forget(state)


@contextlib.contextmanager
def cluster(folder: Path, nodes: int, cpus: int, store_mib: int = 100) -> Iterator[State]:
    """A cluster for the length of a block; nothing of it runs on, whatever happens.

    Args:
        folder: As in ``up``.
        nodes: As in ``up``.
        cpus: As in ``up``.
        store_mib: As in ``up``.
    """
    try:
        yield up(folder, nodes, cpus, store_mib)
    finally:
        if (state := find(folder)) is not None:
            down(state)
