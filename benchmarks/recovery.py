"""Measures what losses cost a run: ``python -m benchmarks.recovery [--json OUT]``.

A run of two workers on a cluster of several nodes on this machine, whose workers, nodes and drivers are killed at
random, beside the same run left alone. Seeded: the same kills after the same numbers of steps.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.audit import CONTINUED, delivery, points
from cluster import members, operations
from cluster.processes import wait_until
from cluster.state import State, read
from pipelines.cli import parse
from pipelines.data.plan import Plan
from pipelines.data.shards import load_manifest
from pipelines.errors import UserError, run_command

ROOT = Path(__file__).parents[1]
WORKERS = 2
GLOBAL_SIZE = 48
SAVE_EVERY = 20  # steps
KEEP_GOING = range(SAVE_EVERY, 3 * SAVE_EVERY)  # new steps between a recovery and the next kill
PATIENCE_S = 300.0  # nothing that is waited for may take longer
TOLERANCE = 1e-5

NOTICE_S = 30  # from a node's notice to its end

Kind = Literal["worker", "node", "driver", "stopped", "drained"]
KINDS: tuple[Kind, ...] = ("worker", "node", "driver")


class Recovery(BaseModel):
    """Kills workers, nodes and drivers of a run at random, and counts what that costs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kills: int = Field(default=9, ge=1)
    """How often something is killed."""
    kinds: tuple[Kind, ...] = KINDS
    """What is killed: a worker's process; a node with all that is on it (another one joins); the driver (started
    again). Also 'stopped': a worker's process that hangs; 'drained': a node, with notice."""
    seed: int = 0
    """Decides what is killed when."""
    output: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the numbers; empty: none."""


class Run:
    """A pretraining run on a cluster: its driver, which may be started more than once, and its folder.

    Args:
        state: The cluster where it runs.
        arguments: Of the command.
        folder: The run's folder.
        log: File for what the driver prints.
    """

    def __init__(self, state: State, arguments: Sequence[str], folder: Path, log: Path):
        self._state = state
        self._arguments = [*arguments, "--run.storage", str(folder.parent), "--run.name", folder.name]
        self.folder = folder
        self._log = log
        self.start()

    def start(self) -> None:
        """Starts the driver."""
        with self._log.open("ab") as file:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "pipelines.pretrain", *self._arguments, "--scale.address", self._state.head],
                cwd=ROOT, env=self._state.environment(), stdout=file, stderr=file,
            )  # fmt: skip

    def told(self) -> str:
        """What the drivers have printed."""
        return self._log.read_text(errors="replace")

    def step(self) -> int:
        """The last step in the record."""
        return max(points(self.folder), default=0)

    def starts(self) -> int:
        """How often it was continued."""
        return self.told().count(CONTINUED)

    def wait_for(self, step: int) -> None:
        """Waits until a step has been done.

        Raises:
            RuntimeError: The driver has ended before.
        """
        self._wait(lambda: self.step() >= step)

    def wait_for_start(self, number: int) -> None:
        """Waits until the run has been continued so many times."""
        self._wait(lambda: self.starts() >= number)

    def wait_for_end(self) -> None:
        """Waits until the driver has ended.

        Raises:
            RuntimeError: It failed.
        """
        while self.driver.poll() is None:
            before = self.step()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.driver.wait(PATIENCE_S)
            if self.driver.poll() is None and self.step() == before:
                raise TimeoutError(f"no step in {PATIENCE_S:g} s:\n{self.told()[-3000:]}")
        if self.driver.returncode:
            raise RuntimeError(f"the run failed:\n{self.told()[-3000:]}")

    def _wait(self, condition: Callable[[], bool]) -> None:
        def ended() -> bool:
            return self.driver.poll() is not None

        wait_until(lambda: condition() or ended(), PATIENCE_S, lambda: self.told()[-3000:])
        if ended() and not condition():
            raise RuntimeError(f"the run ended by itself:\n{self.told()[-3000:]}")

    def close(self) -> None:
        """Ends the driver, where it still runs."""
        if self.driver.poll() is None:
            self.driver.kill()
        self.driver.wait()


def recipe(shards: Path, steps: int) -> list[str]:
    """Flags of a run so small that its steps cost nothing beside the recoveries."""
    values = {
        "data.train": shards, "data.cpus-per-task": 0.2, "data.crop-scale": "0.5 1", "data.image-size": "32 32",
        "model.arch": "vit_tiny_patch16_224", "model.patch-size": 8, "model.width": 48, "model.depth": 2,
        "model.heads": 2, "model.decoder-width": 32, "model.decoder-depth": 1, "model.decoder-heads": 2,
        "batch.global-size": GLOBAL_SIZE, "batch.micro-size": 12, "optim.warmup-epochs": 1,
        "train.steps": steps, "scale.workers": WORKERS, "scale.cpus-per-worker": 0.6, "scale.max-failures": -1,
        "checkpoint.every-steps": SAVE_EVERY, "log.every": 1, "log.pictures": 0,
    }  # fmt: skip
    return [part for key, value in values.items() for part in (f"--{key}", *str(value).split())] + ["--log.ids"]


def strike(kind: Kind, run: Run, state: State, dice: random.Random) -> None:
    """Kills something, and sees to it that what replaces it comes: a node joins, the driver is started again."""
    if kind == "driver":
        run.driver.kill()
        run.driver.wait()
        run.start()
        return
    nodes = (node.name for node in read(state.folder).nodes)
    victim, workers = dice.choice([(name, found) for name in nodes if (found := members.training(state, name))])
    if kind == "worker":
        dice.choice(workers).kill()
    elif kind == "stopped":
        dice.choice(workers).suspend()
    else:
        if kind == "node":
            operations.kill(read(state.folder), victim)
        else:
            operations.drain(read(state.folder), victim, NOTICE_S, "benchmark")
        operations.add(state)


def disturb(run: Run, state: State, kinds: Sequence[Kind], dice: random.Random) -> list[tuple[Kind, float]]:
    """Kills one thing after the other.

    Returns:
        What was killed, and the seconds from there to the end of the first step that had not been done before; of a
        node with notice, which may work on for a while, those between its last step and that one.
    """
    recovered: list[tuple[Kind, float]] = []
    for kind in kinds:
        run.wait_for(run.step() + dice.choice(KEEP_GOING))
        starts, struck = run.starts(), time.time()
        strike(kind, run, state, dice)
        run.wait_for_start(starts + 1)
        # Counted when the old workers have gone: the last ones may have done another step after the blow.
        before = run.step()
        run.wait_for(before + 1)
        done = points(run.folder)
        new = min(step for step in done if step > before)
        recovered.append((kind, done[new].time - (done[before].time if kind == "drained" else struck)))
        print(f"  {kind:7} killed at step {before:4}: next new step after {recovered[-1][1]:5.1f} s", flush=True)
    return recovered


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(Recovery, prog="python -m benchmarks.recovery", argv=argv)
    if not args.kinds:
        raise UserError(f"--kinds needs at least one of {', '.join(KINDS)}")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--json {args.output}: there is no folder {Path(args.output).absolute().parent}")
    dice = random.Random(args.seed)
    # Every kind as often as the others, in random order.
    kinds: list[Kind] = [args.kinds[number % len(args.kinds)] for number in range(args.kills)]
    dice.shuffle(kinds)
    steps = (KEEP_GOING.stop + SAVE_EVERY) * (args.kills + 1)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="recovery-")))
        state = stack.enter_context(operations.cluster(folder / "cluster", WORKERS, cpus=1))
        packed = subprocess.run(
            [sys.executable, "-m", "pipelines.make_shards", "--source", "digits", "--split", "train",
             "--out", str(folder / "shards")],
            cwd=ROOT, env=state.environment(), capture_output=True, text=True,
        )  # fmt: skip
        if packed.returncode:
            raise RuntimeError(f"the digits could not be packed:\n{packed.stderr}")
        flags = recipe(folder / "shards", steps)
        print(f"{steps} steps of {GLOBAL_SIZE} on {WORKERS} workers, a checkpoint every {SAVE_EVERY}", flush=True)
        alone = Run(state, flags, folder / "alone", folder / "alone.log")
        try:
            alone.wait_for_end()
        finally:
            alone.close()
        killed = Run(state, flags, folder / "killed", folder / "killed.log")
        try:
            recovered = disturb(killed, state, kinds, dice)
            killed.wait_for_end()
        finally:
            killed.close()
        result = evaluate(folder, steps, recovered)
    show(result)
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2))
    return 0


def evaluate(folder: Path, steps: int, recovered: list[tuple[Kind, float]]) -> dict[str, object]:
    """Holds the run that was killed against the one that was left alone, and both against the plan."""
    seen = delivery(
        folder / "killed", Plan(load_manifest(str(folder / "shards")).num_samples, seed=0), GLOBAL_SIZE, range(steps)
    )
    alone, killed = points(folder / "alone"), points(folder / "killed")
    apart = [abs(killed[step].loss / alone[step].loss - 1) for step in alone if step in killed]
    complete = sorted(killed) == sorted(alone) == list(range(1, steps + 1))
    took = {
        name: found[max(found)].time - found[min(found)].time for name, found in (("alone", alone), ("killed", killed))
    }
    return {
        "lost": seen.lost,
        "repeated": seen.repeated,
        "order_equal": seen.order_equal,
        "loss_equal": complete and max(apart) <= TOLERANCE,
        "loss_bit_equal": complete and max(apart) == 0,
        "recover_s": statistics.median(seconds for _, seconds in recovered),
        "useful_time": took["alone"] / took["killed"],
        "details": {
            "recover_s": {kind: [s for k, s in recovered if k == kind] for kind in sorted({k for k, _ in recovered})},
            "worst_loss_difference": max(apart),
            "steps": steps,
            "steps_done_again": seen.done_again,
            "seconds": took,
            "kills_per_minute": 60 * len(recovered) / took["killed"],
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("ray", "torch")},
        },
    }


def show(result: dict[str, object]) -> None:
    """Prints the table."""
    details = result["details"]
    assert isinstance(details, dict)
    for kind, seconds in details["recover_s"].items():
        print(
            f"  {kind:7} {len(seconds)} times: {statistics.median(seconds):5.1f} s to the next new step "
            f"({min(seconds):.1f} to {max(seconds):.1f})"
        )
    print(
        f"  lost {result['lost']}, repeated {result['repeated']}, order equal: {result['order_equal']}, "
        f"losses equal: {result['loss_equal']} (bit by bit: {result['loss_bit_equal']}), "
        f"{details['steps_done_again']} steps done again"
    )
    print(
        f"  useful time {100 * float(str(result['useful_time'])):.0f} % at {details['kills_per_minute']:.1f} kills a "
        f"minute; median {result['recover_s']:.1f} s to recover"
    )


if __name__ == "__main__":
    run_command(main)
