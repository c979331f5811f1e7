"""All that is to be measured on a GPU, in one command without network: ``python -m benchmarks.gpu [--json OUT]``.

Matrix rates; training steps of four sizes with levers on and off, and a loop in the official code's style; the step as
a run does it, from pixels in memory and from JPEG shards; a checkpoint. Every part is a process of its own with a share
of the time, and is ended where that is over: what it has measured by then counts. The results are written after each
part.

Needs PyTorch, timm and NumPy; a part that needs more (pyarrow, simplejpeg, braceexpand, safetensors) is left out where
that is missing, and says so. ``--dry-run`` goes through all of it on a CPU with tiny shapes.
"""

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_ingest, gpu_step

Row = dict[str, Any]
# Each with its share of the time. The most telling come first; what one does not use is left to the others.
PARTS: dict[str, tuple[float, Callable[..., None]]] = {
    "rates": (2, gpu_step.rates),
    "vit_base_patch16_224": (10, gpu_step.steps),
    "vit_large_patch16_224": (14, gpu_step.steps),
    "loop": (4, gpu_ingest.loop),
    "ingest": (8, gpu_ingest.ingest),
    "checkpoint": (6, gpu_ingest.checkpoint),
    "vit_small_patch16_224": (8, gpu_step.steps),
    "vit_huge_patch14_224": (14, gpu_step.steps),
}


def run_part(name: str, rows: list[Row], seconds: float, dry_run: bool) -> list[Row]:
    """Runs a part in a process of its own, which is ended with all that it started when its time is over.

    Args:
        name: One of ``PARTS``.
        rows: What earlier parts have found.
        seconds: Its time.
        dry_run: Whether to go through it with tiny shapes on a CPU.

    Returns:
        What it has found, and a row that says how it ended.
    """
    # PyTorch is imported by now, and no GPU has been touched: a forked process may use it.
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, rows, time.monotonic() + seconds, dry_run, send))
    began = time.monotonic()
    process.start()
    send.close()
    found: list[Row] = []
    ended = f"ended after its {seconds:.0f} s"
    try:
        while receive.poll(max(0.0, began + seconds - time.monotonic())):
            row = receive.recv()
            if "ended" in row:
                ended = row["ended"]
                break
            found.append({"part": name} | row)
    except EOFError:
        ended = "its process died"
    finally:
        if process.pid is not None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()
        process.join()
    return [*found, {"part": name, "ended": ended, "seconds": time.monotonic() - began}]


def _child(name: str, rows: list[Row], end: float, dry_run: bool, send: Any) -> None:
    os.setsid()  # so that the processes that it starts end with it
    try:
        work = gpu_step.Work(name, rows, torch.device("cpu" if dry_run else "cuda"), dry_run, end, send.send)
        PARTS[name][1](work)
        ended = "done"
    except ModuleNotFoundError as error:
        ended = f"left out: no module {error.name}"
    except Exception as error:
        ended = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    send.send({"ended": ended})


def gpu_is_here() -> bool:
    """Whether there is a GPU: asked in a process of its own, since who has asked can fork none that uses it."""
    process = multiprocessing.get_context("fork").Process(target=_exit_without_gpu)
    process.start()
    process.join()
    return process.exitcode == 0


def _exit_without_gpu() -> None:
    sys.exit(0 if torch.cuda.is_available() else 1)


def machine(dry_run: bool) -> Row:
    """What this was measured on."""
    told = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    return told | {"device": platform.processor() or platform.machine() if dry_run else "GPU"}


def table(result: Row) -> str:
    """The results in Markdown."""
    rows: list[Row] = result["rows"]
    told = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = ["# benchmarks.gpu", "", told, ""]
    if rates := [row for row in rows if row["part"] == "rates" and "flops_per_s" in row]:
        lines += ["| matrix products of | TFLOP/s |", "|---|---|"]
        lines += [f"| {row['name']} | {row['flops_per_s'] / 1e12:,.3f} |" for row in rates] + [""]
    if steps := [row for row in rows if "arm" in row]:
        lines += [
            "| model | step | batch | ms | images/s | MFU | over official style | peak MiB |",
            "|---|" + "---|" * 7,
        ]
        official = {row["part"]: row.get("images_per_s") for row in steps if row["arm"] == "official style"}
        for row in steps:
            if "images_per_s" not in row:
                lines.append(f"| {row['part']} | {row['arm']} | {row['error']} |" + " |" * 5)
                continue
            plain = official.get(row["part"])
            over = f"{row['images_per_s'] / plain:.2f}" if plain else ""
            mfu = f"{100 * row['mfu']:.1f} %" if row.get("mfu") else ""
            numbers = f"{row['batch']} | {row['ms']:,.1f} | {row['images_per_s']:,.0f} | {mfu} | {over}"
            lines.append(f"| {row['part']} | {row['arm']} | {numbers} | {row['peak_mib']:,.0f} |")
        lines.append("")
    others = [row for row in rows if "what" in row]
    if others:
        lines += ["| part | what | value |", "|---|---|---|"]
        lines += [f"| {row['part']} | {row['what']} | {row['value']:,.4g} {row['unit']} |" for row in others] + [""]
    lines += [f"- {row['part']}: {row['ended']} ({row['seconds']:.0f} s)" for row in rows if "ended" in row]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="it ends by then (default: 7.5)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these; MFU needs rates")
    parser.add_argument("--json", default="", help="file for the numbers; a table in Markdown is written beside it")
    parser.add_argument("--dry-run", action="store_true", help="go through everything on a CPU, with tiny shapes")
    args = parser.parse_args(argv)
    if not args.dry_run and not gpu_is_here():
        print("error: PyTorch finds no GPU here; --dry-run goes through everything on a CPU", file=sys.stderr)
        return 2
    if args.json and not Path(args.json).parent.is_dir():
        print(f"error: --json {args.json}: no folder {Path(args.json).parent}", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * args.minutes
    result: Row = {"machine": machine(args.dry_run), "rows": []}
    for place, name in enumerate(args.parts):
        share = PARTS[name][0] / sum(PARTS[other][0] for other in args.parts[place:])
        result["rows"] += run_part(name, result["rows"], share * (end - time.monotonic()), args.dry_run)
        for row in result["rows"]:
            if "device" in row:
                result["machine"]["device"] = row["device"]
        last = result["rows"][-1]
        print(f"{name}: {last['ended']} ({last['seconds']:.0f} s)", file=sys.stderr, flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
            Path(args.json).with_suffix(".md").write_text(table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
