"""What is known of a cluster on this machine: the state file in its folder, and what its users must know."""

import contextlib
import fcntl
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pydantic

from cluster.processes import free_ports
from pipelines.config import Section
from pipelines.errors import UserError
from pipelines.tracking import quiet_environment

BUCKET = "mae"
_STATE, _TOKEN = "state.json", "token"


class Node(Section):
    """A machine, as Ray sees it: a raylet with an address of its own on the loopback device."""

    name: str
    """What people call it."""
    address: str
    """Its IP address; none is given twice."""
    cpus: int
    """CPUs that it offers."""
    agent_port: int
    """Where its agent listens."""


class State(Section):
    """A cluster on this machine."""

    folder: Path
    """Absolute; it holds the state, the token, the logs, and MLflow's database and artifacts."""
    id: str
    """Marks its processes."""
    ray_dir: Path
    """What Ray writes: a short path, since it holds sockets."""
    gcs_port: int
    dashboard_port: int
    mlflow_port: int
    s3_port: int
    cpus: int
    """CPUs of a node."""
    store_mib: int
    """Object store of a node."""
    nodes: tuple[Node, ...] = ()
    """All nodes there have been, the head first."""

    @property
    def token(self) -> Path:
        """The file that holds the token."""
        return self.folder / _TOKEN

    @property
    def head(self) -> str:
        """The address of Ray's GCS, which nodes and drivers join."""
        # Not 127.0.0.1: Ray puts the machine's address on the network in its place.
        return f"127.0.1.1:{self.gcs_port}"

    @property
    def dashboard(self) -> str:
        """The dashboard, which is also the job server."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def mlflow(self) -> str:
        """The MLflow server."""
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def s3(self) -> str:
        """The S3 server."""
        return f"http://127.0.0.1:{self.s3_port}"

    def mark(self, member: str = "") -> str:
        """What the processes of a member, or of all, are found by."""
        return f"{self.id}/{member}/" if member else f"{self.id}/"

    def node(self, name: str) -> Node:
        """A node by its name.

        Raises:
            UserError: There is none.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise UserError(f"no node '{name}' in {self.folder}: found {', '.join(node.name for node in self.nodes)}")

    def exports(self) -> dict[str, str]:
        """The environment variables of the cluster's users and of its own processes."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "MLFLOW_TRACKING_URI": self.mlflow,
            "AWS_ENDPOINT_URL": self.s3,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def environment(self) -> dict[str, str]:
        """The whole environment of the cluster's processes, and of commands on it."""
        foreign = ("RAY_JOB_ID", "RAY_JOB_CONFIG", "RAY_AUTH", "RAY_ADDRESS", "RAY_API", "MLFLOW_TRACKING", "AWS_")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        # A job says `python`, and means this one.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        return inherited | quiet_environment() | self.exports() | {"PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}

    def write(self) -> None:
        """Writes the state file, whole or not at all."""
        temporary = self.folder / f".{_STATE}.{os.getpid()}"
        temporary.write_text(self.model_dump_json(indent=2) + "\n")
        temporary.replace(self.folder / _STATE)


def new(folder: Path, cpus: int, store_mib: int) -> State:
    """Gives a cluster its folder, its token and its ports, before anything of it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    gcs, dashboard, mlflow, s3 = free_ports(4)
    state = State(
        folder=folder, id=secrets.token_hex(8), ray_dir=Path(tempfile.mkdtemp(prefix="ray-")), cpus=cpus,
        gcs_port=gcs, dashboard_port=dashboard, mlflow_port=mlflow, s3_port=s3, store_mib=store_mib,
    )  # fmt: skip
    state.token.touch(mode=0o600)
    state.token.write_text(secrets.token_hex(32))
    state.write()
    return state


def find(folder: Path) -> State | None:
    """The cluster of a folder, if it has one.

    Raises:
        UserError: The state file is none.
    """
    try:
        return State.model_validate_json((folder / _STATE).read_text())
    except FileNotFoundError:
        return None
    except pydantic.ValidationError:
        raise UserError(f"{folder / _STATE} is no state of a cluster: delete it if nothing of it runs") from None


def read(folder: Path) -> State:
    """The cluster of a folder.

    Raises:
        UserError: It has none.
    """
    state = find(folder)
    if state is None:
        raise UserError(f"no cluster in {folder}: start one with python -m cluster.local up, or name its --folder")
    return state


def forget(state: State) -> None:
    """Deletes all but the logs and MLflow's record."""
    shutil.rmtree(state.ray_dir, ignore_errors=True)
    for path in (state.token, state.folder / _STATE, *state.folder.glob("*.lock")):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder: Path, name: str, *, wait: bool) -> Iterator[None]:
    """Only one process at a time is in here.

    Raises:
        UserError: Another one is, and there is no waiting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another command is starting the cluster in {folder}") from None
        yield
