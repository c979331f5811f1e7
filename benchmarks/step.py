"""Measures a training step (forward, backward, optimiser): ``python -m benchmarks.step [--json OUT]``.

Ours is the step of a run, ``train_step`` itself: besides what the others do it turns bytes into pixels, draws the
masks, and looks whether the loss and the gradients are finite. Each arm (``benchmarks.step_arms``) is a process of its
own, so that its memory is its own; they take turns, so that what else the machine does meets them alike, and a ratio is
taken within each turn. Before that all have to find the same loss, and after it their losses have to have gone the
same way.
"""

import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from pydantic import BaseModel, ConfigDict, Field
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.meter import summary
from pipelines.cli import parse
from pipelines.errors import UserError, run_command

Arm = Literal[
    "float32",
    "float32_compiled",
    "float32_checkpointed",
    "bfloat16",
    "bfloat16_compiled",
    "transformers_float32",
    "transformers_bfloat16",
    "official_style_float32",
]
_ALL: tuple[Arm, ...] = Arm.__args__
# What is said of a model: over whom, who; how many times as fast.
RATIOS = {
    "over_transformers": ("transformers_float32", "float32"),
    "over_official_style": ("official_style_float32", "float32"),
    "compiled_over_transformers": ("transformers_float32", "float32_compiled"),
    "bf16_over_transformers_float32": ("transformers_float32", "bfloat16"),
    "bf16_over_transformers_bf16": ("transformers_bfloat16", "bfloat16"),
    "bf16_compiled_over_transformers_bf16": ("transformers_bfloat16", "bfloat16_compiled"),
    "bf16_over_float32": ("float32", "bfloat16"),
    "checkpointed_over_float32": ("float32", "float32_checkpointed"),
}
MEMORY = {
    "memory_over_transformers": ("transformers_float32", "float32"),
    "compiled_memory_over_transformers": ("transformers_float32", "float32_compiled"),
    "checkpointed_memory_over_float32": ("float32", "float32_checkpointed"),
    "bf16_memory_over_transformers_bf16": ("transformers_bfloat16", "bfloat16"),
    "bf16_compiled_memory_over_transformers_bf16": ("transformers_bfloat16", "bfloat16_compiled"),
}
# Relative, of losses: float32 differs by the order of sums, bfloat16 by its own rounding too; and after some steps by
# what has become of that.
EQUAL = {"float32": 1e-5, "bfloat16": 2e-3}
TRACKS = {"float32": 1e-3, "bfloat16": 1e-2}
_UNDISTURBED = 0.9


class Step(BaseModel):
    """Measures training steps: ours against transformers' and a plain loop, in turns."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    models: tuple[str, ...] = ("vit_small_patch16_224", "vit_base_patch16_224")
    """Plain ViTs of timm."""
    threads: tuple[Annotated[int, Field(gt=0)], ...] = (1, 2)
    """CPU threads."""
    only: tuple[Arm, ...] = tuple(arm for arm in _ALL if arm != "float32_checkpointed")
    """Arms to measure; by default all but float32_checkpointed. They are all in memory at once: of ViT-B on a CPU each
    takes 2.4 to 3.5 GiB."""
    rounds: int = Field(default=5, ge=1)
    """How often each arm has its turn."""
    steps: int = Field(default=1, ge=1)
    """Steps a turn."""
    batch: int = Field(default=16, gt=0)
    """Images a step."""
    image_size: int = Field(default=224, gt=0)
    """Pixels a side."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    output: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the numbers; empty: none."""


@dataclass
class _Measured:
    """What an arm has told so far.

    Attributes:
        loss: Of the first step.
        gflops: Of a step's products, counted.
        compile_s: Seconds of the first compiled step, 0 where there is none.
        turns: Of each turn seconds a step, the CPU time that it had over its wall time, and the last loss.
        memory_mib: By how much the process grew at its peak; on a GPU what PyTorch allocated.
    """

    loss: float
    gflops: float
    compile_s: float
    turns: list[tuple[float, float, float]] = field(default_factory=list)
    memory_mib: float = 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(Step, prog="python -m benchmarks.step", argv=argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    if args.output and not Path(args.output).parent.is_dir():
        raise UserError(f"--json {args.output}: no folder {Path(args.output).parent}")
    results: dict[str, Any] = {}
    for model in args.models:
        for threads in args.threads:
            measured = _measure(args, model, threads, device)
            results.setdefault(model, {})[str(threads)] = result = _result(measured, device)
            print("\n".join(_told(args, model, threads, device, measured, result)), flush=True)
            if args.output:  # what there is; the rest takes minutes
                found = {**_machine(device), **args.model_dump(), "models": results}
                Path(args.output).write_text(json.dumps(found, indent=2))
    return 0


def _measure(args: Step, model: str, threads: int, device: str) -> dict[str, _Measured]:
    # One worker for its few kernels is enough, and processes that wait beside the measured ones are none of an arm's.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    # One process imports, and the arms are its copies.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.step_arms"])
    arms: dict[str, tuple[Any, Any]] = {}
    try:
        for name in args.only:
            here, there = context.Pipe()
            process = context.Process(target=_arm, args=(there, name, args, model, threads, device), daemon=True)
            process.start()
            there.close()
            arms[name] = here, process
        measured = {name: _Measured(*_ask(pipe, "begin")) for name, (pipe, _) in arms.items()}
        _check({name: one.loss for name, one in measured.items()}, EQUAL, "do not begin with the same loss")
        for _ in range(args.rounds):
            for name, (pipe, _) in arms.items():
                measured[name].turns.append(_ask(pipe, "turn"))
        _check({name: one.turns[-1][2] for name, one in measured.items()}, TRACKS, "did not go the same way")
        for name, (pipe, _) in arms.items():
            measured[name].memory_mib = _ask(pipe, "memory")
        return measured
    finally:
        for pipe, process in arms.values():
            pipe.close()  # which ends it
            process.join(30)
            process.kill()


def _ask(pipe: Connection, what: str) -> Any:
    try:
        pipe.send(what)
        answer = pipe.recv()
    except (EOFError, ConnectionError):
        raise UserError(
            "an arm's process ended: its error stands above, or there is none, and memory ran out (all arms are there "
            "at once: --only takes some of them, --batch fewer images)"
        ) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _arm(pipe: Connection, name: str, args: Step, model: str, threads: int, device_type: str) -> None:
    """An arm's process: answers until nobody asks any more."""
    from benchmarks.step_arms import ARMS, make_config, make_step

    torch.set_num_threads(threads)
    kind, device = ARMS[name], torch.device(device_type)
    before = _memory_mib("VmRSS")

    def timed(step: Callable[[], float], steps: int) -> tuple[float, float, float]:
        loss, start, cpu = 0.0, time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
        return wall / steps, (time.process_time() - cpu) / wall, loss

    step: Callable[[], float] | None = None
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            return
        if what == "begin":
            try:
                step, plain = make_step(make_config(model, args.image_size, args.batch, kind), kind, device)
            except UserError as error:
                pipe.send(error)
                return
            with FlopCounterMode(display=False) as counter:
                loss = plain()
            # Its first step as it is measured, for all arms, which are to have done the same steps.
            first_s = timed(step, 1)[0]
            pipe.send((loss, counter.get_total_flops() / 1e9, first_s if kind.compiled else 0.0))
        elif what == "turn":
            assert step is not None
            pipe.send(timed(step, args.steps))
        elif device.type == "cuda":
            pipe.send(torch.cuda.max_memory_allocated() / 2**20)
        else:
            pipe.send(_memory_mib("VmHWM") - before)


def _memory_mib(key: str) -> float:
    """A line of what Linux knows of this process: its memory now (VmRSS), or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def _check(losses: Mapping[str, float], limits: Mapping[str, float], what: str) -> None:
    first = next(iter(losses))
    for name, loss in losses.items():
        limit = limits["bfloat16" if "bfloat16" in name + first else "float32"]
        if not abs(loss / losses[first] - 1) <= limit:
            raise RuntimeError(f"the arms {what}: {losses}")


def _undisturbed(measured: Mapping[str, _Measured], device: str) -> list[int]:
    """Rounds in which no arm had less CPU time for its wall time than in its best: others had the cores in the rest."""
    rounds = list(range(len(next(iter(measured.values())).turns)))
    if device != "cpu":
        return rounds
    best = {name: max(share for _, share, _ in one.turns) for name, one in measured.items()}
    return [r for r in rounds if all(one.turns[r][1] >= _UNDISTURBED * best[name] for name, one in measured.items())]


def _result(measured: dict[str, _Measured], device: str) -> dict[str, Any]:
    rounds = range(len(next(iter(measured.values())).turns))
    undisturbed = _undisturbed(measured, device)
    kept = undisturbed or rounds
    seconds = {name: [one.turns[r][0] for r in kept] for name, one in measured.items()}
    ratios = {
        key: [slow / fast for slow, fast in zip(seconds[over], seconds[who], strict=True)]
        for key, (over, who) in RATIOS.items()
        if over in seconds and who in seconds
    }
    memory = {
        key: measured[who].memory_mib / measured[over].memory_mib
        for key, (over, who) in MEMORY.items()
        if over in seconds and who in seconds
    }
    return {
        **{key: statistics.median(values) for key, values in ratios.items()},
        **memory,
        "loss_equal": True,  # or it would have ended before
        "details": {
            "ratios": {key: summary(values) for key, values in ratios.items()},
            "rounds": len(kept),
            "rounds_disturbed": len(rounds) - len(undisturbed),
            "arms": {
                name: {
                    "seconds": summary(seconds[name]),
                    "cpu_seconds": summary([one.turns[r][0] * one.turns[r][1] for r in kept]),
                    "gflops": one.gflops,
                    "first_loss": one.loss,
                    "last_loss": one.turns[-1][2],
                    "compile_s": one.compile_s,
                    "memory_mib": one.memory_mib,
                }
                for name, one in measured.items()
            },
        },
    }


def _told(
    args: Step, model: str, threads: int, device: str, measured: dict[str, _Measured], result: dict[str, Any]
) -> list[str]:
    details = result["details"]
    others = ""
    if disturbed := details["rounds_disturbed"]:
        others = f"; others had the cores in {disturbed}" + (" that are left out" if disturbed < args.rounds else "")
    lines = [
        f"{model}, {args.image_size} px, batch {args.batch}, {_device_name(device)}, {threads} threads, "
        f"{details['rounds']} rounds of {args.steps} steps{others}",
        f"  {'arm':24} {'ms a step':>10} {'range':>15} {'GFLOP':>8} {'GFLOP/s':>8} {'peak MiB':>9} {'loss':>8} "
        f"{'last':>8} {'compile s':>9}",
    ]
    for name, one in measured.items():
        seconds = details["arms"][name]["seconds"]
        lines.append(
            f"  {name:24} {1000 * seconds['median']:10.0f} {1000 * seconds['low']:7.0f}-{1000 * seconds['high']:<7.0f} "
            f"{one.gflops:8.1f} {one.gflops / seconds['median']:8.0f} {one.memory_mib:9.0f} {one.loss:8.5f} "
            f"{one.turns[-1][2]:8.5f} {one.compile_s:9.1f}"
        )
    lines += [
        f"  {key:40} {values['median']:6.3f} ({values['low']:.3f} to {values['high']:.3f})"
        for key, values in details["ratios"].items()
    ]
    return lines + [f"  {key:40} {result[key]:6.3f}" for key in MEMORY if key in result]


def _machine(device: str) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", "transformers")}
    return {**versions, "processor": _processor(), "cores": os.cpu_count(), "device": _device_name(device)}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


if __name__ == "__main__":
    run_command(main)
