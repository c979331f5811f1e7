"""A run in the weather: ``python -m benchmarks.soak [--minutes 30] [--json OUT]``.

A cluster of three nodes on this machine, shards and checkpoints on S3, the record on an MLflow server, two workers.
Workers and whole nodes are killed at random (seeded), nodes come back, a driver that dies is submitted again. At the
end it is held against what is promised; where that does not hold, the exit code is 1.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import tyro
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.audit import delivery
from cluster import members, operations, processes
from cluster.processes import wait_until
from cluster.state import BUCKET, State, read
from pipelines.cli import parse
from pipelines.data.plan import Plan
from pipelines.data.shards import load_manifest
from pipelines.errors import UserError, run_command
from pipelines.storage import Store
from pipelines.training import checkpoint

ROOT = Path(__file__).parents[1]
NODES, WORKERS = 3, 2
GLOBAL_SIZE, LOG_EVERY, SAVE_EVERY = 64, 5, 20  # images a step, steps, steps
SHARDS, RUNS = f"s3://{BUCKET}/digits", f"s3://{BUCKET}/runs"
PATIENCE_S = 300.0  # nothing that is waited for may take longer
KEEP_EVERY_S = 5.0
# Ray keeps some idle processes, now more and now fewer.
MORE_PROCESSES, MORE_MEMORY = 10, 1.25

Kind = Literal["worker", "node"]


class Soak(BaseModel):
    """Kills workers and nodes of a run at random for some time, and looks at what is left."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    minutes: float = Field(default=30.0, gt=0)
    """How long."""
    worker_every_s: float = Field(default=90.0, gt=0)
    """Mean time between two kills of a worker."""
    node_every_s: float = Field(default=300.0, gt=0)
    """Mean time between two kills of a node; another one joins each time."""
    alone_s: float = Field(default=60.0, gt=0)
    """How long the same run goes undisturbed before, for what a step takes and for its losses."""
    seed: int = 0
    """Decides what is killed when."""
    folder: str = ""
    """Where logs, ids and MLflow's record are kept; empty: nowhere."""
    output: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the numbers; empty: none."""


@dataclass(frozen=True)
class Blow:
    """Something is killed.

    Args:
        at_s: When, in seconds from the beginning.
        kind: What.
    """

    at_s: float
    kind: Kind


def weather(args: Soak) -> list[Blow]:
    """What is killed when: the times between two kills are exponential draws."""
    dice = random.Random(args.seed)
    blows = []
    every: dict[Kind, float] = {"worker": args.worker_every_s, "node": args.node_every_s}
    for kind, mean_s in every.items():
        at_s = dice.expovariate(1 / mean_s)
        while at_s < 60 * args.minutes:
            blows.append(Blow(at_s, kind))
            at_s += dice.expovariate(1 / mean_s)
    return sorted(blows, key=lambda blow: blow.at_s)


def flags(name: str, ids: Path) -> list[str]:
    """Of a run without an end."""
    values = {
        "config": "pipelines/recipes/digits.toml", "run.name": name, "run.storage": RUNS, "log.ids-folder": ids,
        "data.train": SHARDS, "data.cpus-per-task": 0.4, "probe.train": "", "probe.test": "", "train.steps": 10**6,
        "batch.global-size": GLOBAL_SIZE, "log.every": LOG_EVERY, "checkpoint.every-steps": SAVE_EVERY,
        "log.pictures": 0, "scale.workers": WORKERS, "scale.max-failures": -1,
        # More than half of a node: a worker has a node to itself.
        "scale.cpus-per-worker": 1.2,
    }  # fmt: skip
    return [part for key, value in values.items() for part in (f"--{key}", str(value))] + [
        "--log.ids",
        "--probe.no-at-start",
    ]


class Run:
    """A run as a job of the cluster, submitted again where its driver has died.

    Args:
        state: The cluster.
        name: The run's name.
        folder: Where it writes down the ids of its samples.
    """

    def __init__(self, state: State, name: str, folder: Path):
        self._state, self.name, self.folder = state, name, folder / name
        self.submitted = 0
        self._looked = 0.0
        self.submit()

    def submit(self) -> None:
        """Submits the job."""
        self.submitted += 1
        self._ray_job("submit", "--no-wait", "--submission-id", self._job, "--working-dir", ".", "--",
                      "python", "pipelines/pretrain.py", *flags(self.name, self.folder / "ids"))  # fmt: skip

    @property
    def _job(self) -> str:
        return f"{self.name}-{self.submitted}"

    def _ray_job(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", *arguments],
            cwd=ROOT, env=self._state.environment(), capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"ray job {arguments[0]}: {done.stdout}{done.stderr}")
        return done.stdout

    def told(self) -> str:
        """What its present driver has printed."""
        return self._ray_job("logs", self._job)

    def status(self) -> str:
        """What the job server says of its present driver."""
        found = members.answer(f"{self._state.dashboard}/api/jobs/{self._job}", self._state.token)
        return json.loads(found)["status"] if found else "UNKNOWN"

    def keep(self) -> None:
        """Submits it again if its driver has died; looks every few seconds."""
        if time.monotonic() - self._looked < KEEP_EVERY_S:
            return
        self._looked = time.monotonic()
        if self.status() == "FAILED":
            print(f"  the driver has died: {self.told()[-2000:]}", flush=True)
            self.submit()

    def step(self, since: float = 0.0) -> int:
        """The last step that was begun; -1: none.

        Args:
            since: Only in attempts that began after this time, in seconds since 1970.
        """
        lines = [last_line(path) for path in (self.folder / "ids").glob("*.jsonl")]
        return max((line["step"] for line in lines if line and line["began"] > since), default=-1)

    def wait_for(self, step: int) -> None:
        """Waits until a step has been begun.

        Raises:
            TimeoutError: For too long there was no new one.
        """
        while (now := self.step()) < step:
            wait_until(lambda now=now: self.step() > now, PATIENCE_S, self.told)

    def stop(self) -> None:
        """Stops the job; its last checkpoint is where it would go on."""
        self._ray_job("stop", self._job)
        wait_until(lambda: self.status() in ("STOPPED", "FAILED", "SUCCEEDED"), PATIENCE_S, self.told)
        wait_until(lambda: not members.training(self._state), PATIENCE_S)


def last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line of a file of ids; None where there is none."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.startswith(b"{") and line.endswith(b"\n")]
    return json.loads(whole[-1]) if whole else None


@dataclass(frozen=True)
class Census:
    """Processes of a cluster, and their memory in MiB (what is shared counts once)."""

    processes: int
    memory_mib: float


def census(state: State) -> Census:
    """Counts the processes of a cluster."""
    found = memory = 0
    for process in processes.marked(state.mark(), state.ray_dir):
        with contextlib.suppress(psutil.NoSuchProcess):
            memory += process.memory_full_info().pss
            found += 1
    return Census(found, memory / 2**20)


class Weather:
    """Strikes a run, and sees that it goes on.

    Args:
        state: The cluster.
        run: The run.
        dice: Decides which worker or node is struck.
    """

    def __init__(self, state: State, run: Run, dice: random.Random):
        self._state, self._run, self._dice = state, run, dice
        self._pool = ThreadPoolExecutor(NODES)
        self._joining: list[Future[None]] = []
        self._waiting: list[tuple[Kind, float, int]] = []
        self.recovered: list[tuple[Kind, float]] = []
        """What was killed, and the seconds from there to the first new step."""

    def until(self, end: float) -> None:
        """Watches the run until a time (of the monotonic clock)."""
        while time.monotonic() < end:
            self.look()
            time.sleep(0.25)

    def look(self) -> None:
        """Notes whether the run has done new steps since it was struck."""
        self._run.keep()
        for blow in list(self._waiting):
            kind, struck, before = blow
            if self._run.step(since=struck) > before:
                self._waiting.remove(blow)
                self.recovered.append((kind, time.time() - struck))
                print(
                    f"  {kind:6} killed at step {before:5}: a new step after {self.recovered[-1][1]:5.1f} s", flush=True
                )

    def strike(self, kind: Kind) -> None:
        """Kills a worker, or a node in whose place another one joins."""
        struck, before = time.time(), self._run.step()
        if kind == "worker":
            # One that is just being started counts too; where there is none the next one is hit.
            wait_until(lambda: bool(members.training(self._state)), PATIENCE_S, self._run.told)
            struck = time.time()
            self._dice.choice(sorted(members.training(self._state), key=lambda process: process.pid)).kill()
        else:
            wait_until(lambda: bool(self._alive()), PATIENCE_S, self._run.told)
            struck, trained = time.time(), self._training()
            operations.kill(read(self._state.folder), self._dice.choice(self._alive()))
            self._joining.append(self._pool.submit(self._add))
            if trained <= self._training():
                print(f"  node   killed at step {before:5}: none of the run's workers was on it", flush=True)
                return
        self._waiting.append((kind, struck, before))

    def _training(self) -> set[int]:
        return {process.pid for process in members.training(self._state)}

    def _alive(self) -> list[str]:
        """The nodes beside the head."""
        state = read(self._state.folder)
        return [node.name for node in state.nodes if node.name != members.HEAD and members.runs(state, node.name)]

    def _add(self) -> None:
        with contextlib.suppress(UserError):  # it was the next to be struck, or this machine was too busy
            operations.add(self._state)
            return
        operations.add(self._state)

    def clear(self) -> None:
        """Waits until the run has recovered from all."""

        def calm() -> bool:
            self.look()
            return not self._waiting and all(one.done() for one in self._joining)

        wait_until(calm, PATIENCE_S, self._run.told)
        for one in self._joining:
            one.result()
        self._pool.shutdown()


def losses(state: State, name: str) -> list[tuple[int, float, float]]:
    """Step, seconds since 1970 and loss of all points that MLflow has of a run, in their order.

    Raises:
        RuntimeError: It has not one run of this name.
    """
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=state.mlflow)
    experiment = client.get_experiment_by_name("mae-on-ray")
    runs = client.search_runs([experiment.experiment_id], f"run_name = '{name}'") if experiment else []
    if len(runs) != 1:
        raise RuntimeError(f"MLflow has {len(runs)} runs '{name}'")
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    return sorted((point.step, point.timestamp / 1000, point.value) for point in history)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(Soak, prog="python -m benchmarks.soak", argv=argv)
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--json {args.output}: there is no folder {Path(args.output).absolute().parent}")
    with contextlib.ExitStack() as stack:
        kept = args.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-"))
        folder = Path(kept).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with operations.cluster(folder / "cluster", NODES, cpus=2) as state:
            result = soak(state, folder, args)
        result["left_behind"] = len(processes.marked(state.mark(), state.ray_dir)) + state.ray_dir.exists()
    broken = [name for name, holds in promises(result).items() if not holds]
    print(json.dumps(result, indent=2))
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2))
    if broken:
        print(f"error: this does not hold: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


def soak(state: State, folder: Path, args: Soak) -> dict[str, Any]:
    """Runs undisturbed, then in the weather; returns what came of it."""
    os.environ.update(state.exports())
    pack = [sys.executable, "-m", "pipelines.make_shards", "--source", "digits", "--split", "train", "--out", SHARDS]
    subprocess.run(pack, cwd=ROOT, env=state.environment(), check=True, stdout=subprocess.DEVNULL)
    alone = Run(state, "alone", folder)
    alone.wait_for(2 * SAVE_EVERY)
    time.sleep(args.alone_s)
    alone.stop()
    reference = losses(state, "alone")
    step_s = (reference[-1][1] - reference[0][1]) / (reference[-1][0] - reference[0][0])
    print(f"undisturbed: {reference[-1][0]} steps, {1000 * step_s:.0f} ms each", flush=True)

    run = Run(state, "soak", folder)
    run.wait_for(2 * SAVE_EVERY)
    before, first, began = census(state), run.step(), time.monotonic()
    blows = weather(args)
    storm = Weather(state, run, random.Random(args.seed))
    for blow in blows:
        storm.until(began + blow.at_s)
        storm.strike(blow.kind)
    storm.until(began + 60 * args.minutes)
    steps, seconds = run.step() - first, time.monotonic() - began
    storm.clear()
    run.wait_for(run.step() + 2 * SAVE_EVERY)
    after = census(state)
    run.stop()

    done = checkpoint.steps(Store(RUNS).child("soak").child("checkpoints"))[0]
    plan = Plan(load_manifest(SHARDS).num_samples, seed=0)
    seen = delivery(run.folder, plan, GLOBAL_SIZE, range(done))
    points = losses(state, "soak")
    told = dict.fromkeys(step for step, _, _ in points)
    # A run that is stopped tells of its last step too.
    due = {*range(LOG_EVERY, points[-1][0] + 1, LOG_EVERY), points[-1][0]}
    mine = {step: loss for step, _, loss in points}
    apart = [abs(mine[step] / loss - 1) for step, _, loss in reference if step % LOG_EVERY == 0 and step in mine]
    seconds_to_recover = {kind: [s for k, s in storm.recovered if k == kind] for kind in ("worker", "node")}
    return {
        "minutes": seconds / 60,
        "kills": {kind: sum(blow.kind == kind for blow in blows) for kind in ("worker", "node")},
        "lost": seen.lost,
        "repeated": seen.repeated,
        "order_equal": seen.order_equal,
        "steps_checked": done,
        "losses_compared": len(apart),
        "worst_loss_difference": max(apart, default=1.0),
        "points": len(points),
        "points_repeated": len(points) - len(told),
        "points_missing": len(due - told.keys()) + len(set(range(LOG_EVERY, done + 1, LOG_EVERY)) - told.keys()),
        "useful_time": steps * step_s / seconds,
        "recover_s": {kind: statistics.median(found) for kind, found in seconds_to_recover.items() if found},
        "processes": [before.processes, after.processes],
        "memory_mib": [round(before.memory_mib), round(after.memory_mib)],
        "drivers": run.submitted,
        "details": {
            "recover_s": seconds_to_recover,
            "steps": steps,
            "step_s": step_s,
            "steps_done_again": seen.done_again,
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("ray", "torch", "mlflow")},
        },
    }  # fmt: skip


def promises(result: dict[str, Any]) -> dict[str, bool]:
    """What is promised, and whether it holds."""
    processes_before, processes_after = result["processes"]
    memory_before, memory_after = result["memory_mib"]
    return {
        "no sample is lost": result["lost"] == 0,
        "no sample is repeated": result["repeated"] == 0,
        "the order is the plan's": bool(result["order_equal"]),
        "losses are those of the undisturbed run": result["worst_loss_difference"] == 0,
        "every point is in MLflow": result["points_missing"] == 0,
        "each once": result["points_repeated"] == 0,
        "no more processes": processes_after <= processes_before + MORE_PROCESSES,
        "no more memory": memory_after <= memory_before * MORE_MEMORY,
        "nothing is left behind": result["left_behind"] == 0,
    }


if __name__ == "__main__":
    run_command(main)
