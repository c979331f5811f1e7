"""What a pretraining run will take: arithmetic from its configuration and from rates that somebody has measured."""

from dataclasses import dataclass
from typing import Literal

import torch

from mae_core.flops import StepFlops, step_flops
from pipelines.config import Config, total_steps
from pipelines.training import checkpoint
from pipelines.training.build import build_model


@dataclass(frozen=True)
class Work:
    """What a run does, whatever it runs on.

    Attributes:
        steps: Optimiser steps.
        images: Images trained on, each view counted.
        epochs: Passes over the data.
        flops: Of one image.
        total_flops: Of all images.
        encoder_parameters: In the encoder, fixed positions included.
        decoder_parameters: In the rest of the model, likewise.
        checkpoint_bytes: Of one checkpoint.
        kept_bytes: Of all that are kept.
    """

    steps: int
    images: int
    epochs: float
    flops: StepFlops
    total_flops: int
    encoder_parameters: int
    decoder_parameters: int
    checkpoint_bytes: int
    kept_bytes: int


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        step_images_per_s: A worker's training step, alone on its share of the machine; None: not known.
        decode_images_per_s: Reading, decoding and cropping on one core.
        shared_cores: Cores that a worker's step and its decoding share, where it computes on a CPU; 0: it does not.
        spare_cores: Cores beside each worker that computes on a GPU; None: not known.
    """

    step_images_per_s: float | None
    decode_images_per_s: float
    shared_cores: float
    spare_cores: float | None


@dataclass(frozen=True)
class Estimate:
    """What comes of it, if all workers are as fast as the one measured and none waits for another.

    Attributes:
        images_per_s: Of all workers together.
        flops_per_s: Of all workers together.
        feeding_cores: Cores that read for a worker at the full speed of its step.
        limit: Which of the two is slower; None: not known.
        decode_share: Share of the shared cores' time that decoding takes; 0 where they share none.
        hours: Of training, without probes, starts and checkpoints.
        cost: Of these hours on all workers.
    """

    images_per_s: float
    flops_per_s: float
    feeding_cores: float
    limit: Literal["compute", "decoding"] | None
    decode_share: float
    hours: float
    cost: float


def plan_work(config: Config, num_samples: int) -> Work:
    """What a configuration asks for on so many images.

    Raises:
        UserError: Its parts do not go together, or the epochs do not make a single step.
    """
    with torch.device("meta"):
        model = build_model(config)
    steps, size = total_steps(config, num_samples), config.batch.global_size
    # Given in epochs, the last batch is filled up with nothing.
    images = steps * size if config.train.steps else int(config.train.epochs * num_samples)
    flops, one = step_flops(model), checkpoint.num_bytes(model)
    encoder = sum(parameter.numel() for parameter in model.encoder.parameters())
    decoder = sum(parameter.numel() for parameter in model.parameters()) - encoder
    return Work(
        steps, images, images / num_samples, flops, images * flops.training, encoder, decoder, one,
        one * config.checkpoint.keep,
    )  # fmt: skip


def estimate(work: Work, rates: Rates, *, workers: int, price_per_hour: float = 0.0) -> Estimate | None:
    """Hours and cost of a run, and what limits it.

    On a GPU the slower of step and decoding sets the pace. On a CPU both take turns on the same cores: their times
    add up.

    Args:
        work: What is to be done.
        rates: Of one worker.
        workers: How many there are.
        price_per_hour: Of one worker.

    Returns:
        None where the speed of the step is not known.
    """
    step, decode = rates.step_images_per_s, rates.decode_images_per_s
    if step is None:
        return None
    rate, share, limit = step, 0.0, None
    if rates.shared_cores:
        fed = rates.shared_cores * decode
        rate, share = step * fed / (step + fed), step / (step + fed)
        limit = "decoding" if fed < step else "compute"
    elif rates.spare_cores is not None:
        fed = rates.spare_cores * decode
        rate, limit = min(step, fed), "decoding" if fed < step else "compute"
    hours = work.images / (workers * rate) / 3600
    return Estimate(
        images_per_s=workers * rate,
        flops_per_s=workers * rate * work.flops.training,
        feeding_cores=step / decode,
        limit=limit,
        decode_share=share,
        hours=hours,
        cost=hours * workers * price_per_hour,
    )
