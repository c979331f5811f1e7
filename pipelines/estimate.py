"""Estimates a pretraining run: FLOPs, images a second, hours, memory, checkpoints and cost, before anything starts.

    python -m pipelines.estimate --config pipelines/recipes/cifar10_cpu.toml --price-per-hour 2.5

It takes the configuration and all flags of ``pipelines.pretrain`` and does, without Ray, some training steps on random
pixels and some reading and decoding of the run's first images here; the rest is arithmetic.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import Field

from pipelines.amounts import flops
from pipelines.cli import parse_with_file
from pipelines.commands import command_line
from pipelines.config import Config, warmup_note, worker_cpus
from pipelines.data.shards import load_manifest
from pipelines.early import check_shape
from pipelines.errors import UserError, run_command

if TYPE_CHECKING:
    from pipelines.estimation import Estimate, Rates, Work
    from pipelines.training.dry_run import StepRate

# PyTorch and timm are imported in functions: who mistypes a flag need not wait seconds for them.
PROG = command_line("pipelines.estimate")
_UNKNOWN_ROWS = 64  # of a micro-batch that is left open where there is nothing to look for it on
_BUSY = 0.8  # share of its cores' time that a step must get to count as undisturbed


class Args(Config):
    """Estimates what a pretraining run will take, from a dry run of some seconds on this machine."""

    price_per_hour: float = Field(default=0.0, ge=0)
    """Price of one worker for an hour, in whatever currency; 0: no cost is told."""
    seconds: float = Field(default=10.0, gt=0)
    """How long the training step is measured, and then decoding."""
    images_per_s: float = Field(default=0.0, ge=0)
    """Images a second of one worker's training step, where it is known from elsewhere; 0: measured here."""
    output: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the numbers; empty: none."""


def _claimed(config: Config, cores: int) -> float:
    """CPUs that each worker of the run would claim here."""
    return worker_cpus(config.scale, config.data.cpus_per_task, [cores])


def workers_here(config: Config, cores: int) -> int:
    """Workers of the run that this machine would hold; one, where it is too small for any."""
    import torch

    scale = config.scale
    # Ray counts in ten-thousandths.
    fit = torch.cuda.device_count() if scale.gpu else int(cores / _claimed(config, cores) + 1e-4)
    return min(scale.workers, max(1, fit))


def measure(args: Args, work: "Work") -> "tuple[StepRate | None, Rates]":
    """The dry run: the training step, unless it is known or there is no GPU for it, and decoding.

    Raises:
        UserError: The images cannot be read, or a micro-batch does not fit into the GPU's memory.
    """
    import torch

    from pipelines.estimation import Rates
    from pipelines.training import micro_size
    from pipelines.training.build import make_stream
    from pipelines.training.dry_run import cpu_threads, measure_decoding, measure_step

    scale, cores = args.scale, len(os.sched_getaffinity(0))
    here = workers_here(args, cores)
    config, device = args, torch.device("cuda" if scale.gpu else "cpu")
    measured = not args.images_per_s and (torch.cuda.is_available() or not scale.gpu)
    threads = max(1, cores // here)
    if not args.batch.micro_size:
        rows = _UNKNOWN_ROWS
        if measured:
            with cpu_threads(threads):
                limit = -(-args.batch.global_size // scale.workers)
                rows = micro_size.find(args, device, limit=limit, memory_share=1 / here)
        config = micro_size.with_micro_size(args, rows)
    stream = make_stream(config, load_manifest(args.data.train), scale.workers)
    step = measure_step(config, stream.cut, device, threads=threads, seconds=args.seconds) if measured else None
    decode = measure_decoding(stream, work.steps, seconds=args.seconds, max_unreadable=args.data.max_unreadable)
    spare = cores / here - _claimed(args, cores)
    # Of a machine without GPUs nothing follows for one with them; and one too small for a worker is not the run's.
    known = scale.gpu and torch.cuda.is_available() and spare * here >= args.data.cpus_per_task
    return step, Rates(
        step.images_per_s if step else args.images_per_s or None,
        decode,
        0.0 if scale.gpu else cores / here,
        spare if known else None,
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def work_lines(args: Args, work: "Work", num_samples: int) -> Iterator[tuple[str, str]]:
    """What the run does: lines of the table, each with what it is about."""
    an_image, share = work.flops, work.flops.decoder / work.flops.forward
    encoder, decoder = work.encoder_parameters / 1e6, work.decoder_parameters / 1e6
    yield "parameters", f"encoder {encoder:.1f} M, decoder {decoder:.1f} M"
    yield "checkpoint", f"{_size(work.checkpoint_bytes)}; {_size(work.kept_bytes)} for the {args.checkpoint.keep} kept"
    size = args.batch.global_size
    yield "images", f"{work.images:,} in {work.steps:,} steps of {size:,}: {work.epochs:.4g} epochs"
    if note := warmup_note(args, num_samples):
        yield "warm-up", note
    forward = f"{flops(an_image.forward)} forward, {share:.0%} of it in the decoder"
    yield "arithmetic", f"an image {forward}; {flops(an_image.training)} with the backward pass"
    yield "", f"all images {flops(work.total_flops)}"


def speed_lines(
    args: Args, step: "StepRate | None", rates: "Rates", found: "Estimate | None", num_samples: int
) -> Iterator[tuple[str, str]]:
    """How fast it goes and what it takes: lines of the table, each with what it is about."""
    from pipelines.training.duration import DAYS_H, bfloat16_hint, in_words, smaller

    scale, decode = args.scale, rates.decode_images_per_s
    speed = f"{rates.step_images_per_s or 0:,.1f} images/s a worker"
    if step and scale.gpu:
        speed += f", measured on this GPU; at most {_size(step.memory_bytes)} of its memory"
    elif step:
        threads = f"{step.threads} CPU thread{'s' if step.threads > 1 else ''}"
        speed += f", measured on {threads}; the process grew by {_size(step.memory_bytes)}"
    else:
        speed += ", as given"
    if found is None:
        speed = "not measured: scale.gpu is set and there is no GPU here; ask where there is, or give --images-per-s"
    yield "training step", speed
    if step and step.cpu_share < _BUSY and not scale.gpu:
        yield "", f"too slow: other programs had the cores, the step got {step.cpu_share:.0%} of their time"
    if step and not scale.gpu and (hint := bfloat16_hint(args.train.precision, step.bfloat16_gain)):
        yield "", hint
    yield "decoding", f"{decode:,.0f} images/s a core, measured on this machine"
    if found is None:
        yield "feeding", f"a worker of 1,000 images/s takes {1000 / decode:.2g} such cores"
        return
    spare = f"; here {rates.spare_cores:.3g} are left for each" if rates.spare_cores is not None else ""
    yield "feeding", f"a worker takes {found.feeding_cores:.2g} such cores{spare}"
    if rates.shared_cores:
        yield "limit", f"{found.limit}; decoding takes {found.decode_share:.1%} of the cores' time"
    else:
        yield "limit", found.limit or "not known here: compute, where every worker is fed"
    alike = "s as fast as this one, if none waits for another" if scale.workers > 1 else ""
    total = f"{found.images_per_s:,.1f} images/s, {flops(found.flops_per_s)}/s"
    yield "speed", f"{total}, on {scale.workers} worker{alike}"
    yield "time", f"{in_words(found.hours)}, without probes, starts and checkpoints"
    if not scale.gpu and found.hours >= DAYS_H:
        yield "", smaller(args, found.hours, num_samples)
    if args.price_per_hour:
        yield "cost", f"{found.cost:,.2f}, each worker at {args.price_per_hour:g} an hour"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse_with_file(Args, prog=PROG, argv=argv, default=Args())
    if not args.data.train:
        raise UserError(f"data.train is not given: name shards with --data.train DIR (see {PROG} --help)")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--json {args.output}: there is no such folder")
    check_shape(args)
    num_samples = load_manifest(args.data.train).num_samples

    from pipelines.estimation import estimate, plan_work

    work = plan_work(args, num_samples)
    step, rates = measure(args, work)
    found = estimate(work, rates, workers=args.scale.workers, price_per_hour=args.price_per_hour)
    print(f"run '{args.run.name}', estimated:")
    for title, text in (*work_lines(args, work, num_samples), *speed_lines(args, step, rates, found, num_samples)):
        print(f"  {title:15}{text}")
    if args.output:
        parts = {"work": work, "step": step, "rates": rates, "estimate": found}
        values = {name: asdict(part) if part else None for name, part in parts.items()}
        Path(args.output).write_text(json.dumps(values, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
