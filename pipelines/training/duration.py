"""How long a run will take here, in words, and what would take less."""

from collections.abc import Iterator

import torch

from mae_core.flops import step_flops
from mae_core.model import MaskedAutoencoder
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.training.build import build_model

DAYS_H = 24.0  # from here on a run on CPUs is worth another thought
_BETTER_H = 8.0  # what is proposed in its place: over night
_WORTH_IT = 3.0  # times as fast: less, and the rest of a step leaves little of it
# Small enough for CPUs, large enough to learn something of photographs.
_SMALL = {
    "arch": "vit_tiny_patch16_224", "width": 0, "depth": 0, "heads": 0,
    "decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4,
}  # fmt: skip
_PATCH = 16  # of that architecture


def in_words(hours: float) -> str:
    """``20 s``, ``12.5 min``, ``3.2 h`` or ``60 h (2.5 days)``."""
    if hours < 1 / 60:
        return f"{max(1.0, 3600 * hours):.0f} s"
    if hours >= 2 * DAYS_H:
        return f"{hours:,.0f} h ({hours / 24:,.1f} days)"
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def bfloat16_hint(precision: str, gain: float) -> str:
    """Says that bfloat16 would be worth it; empty where it would not, or is what the run takes.

    Args:
        precision: As ``train.precision``.
        gain: How many times as fast as float32 matrices this device multiplies bfloat16 ones.
    """
    if precision == "bfloat16" or gain < _WORTH_IT:
        return ""
    return (
        f"bfloat16 matrices are multiplied {gain:.1f} times as fast as float32 ones on this processor: "
        f"--train.precision bfloat16 takes them"
    )


def smaller(config: Config, hours: float, num_samples: int) -> str:
    """The flags with which a run that takes days on CPUs would take some hours, by its arithmetic.

    Args:
        config: The run's configuration.
        hours: What it takes.
        num_samples: Training images.
    """
    kept = small = config
    found: list[str] = []
    with torch.device("meta"):
        model = build_model(config)
    patch = config.model.patch_size or (0 if model.patch_size == _PATCH else model.patch_size)
    wanted = {**_SMALL, "patch_size": patch}
    differing = {key: value for key, value in wanted.items() if getattr(config.model, key) != value}
    flags = [f"--model.{key.replace('_', '-')} {value}" for key, value in differing.items()]
    try:
        small = Config.model_validate(config.model_dump() | {"model": config.model.model_dump() | wanted})
        with torch.device("meta"):
            ratio = step_flops(build_model(small)).training / step_flops(model).training
    except UserError:  # of another shape than such a model can have
        ratio = 1.0
    if ratio < 0.5:
        kept, hours, found = small, hours * ratio, flags
    if hours > DAYS_H:
        share, hours = _BETTER_H / hours, _BETTER_H
        found.append(
            f"--train.steps {max(1, int(kept.train.steps * share))}"
            if kept.train.steps
            else f"--train.epochs {max(kept.train.epochs * share, kept.batch.global_size / num_samples):.2g}"
        )
    return f"that is days on CPUs: about {in_words(hours)} with {' '.join(found)}"


class Duration:
    """Says how long the rest of a run takes: at least, by arithmetic, at its start, and once more from its first steps.

    Args:
        config: The run's configuration.
        model: Its model, not wrapped.
        steps: The run's steps.
        num_samples: Training images.
        full_rate: FLOP/s that matrices are multiplied with on all devices.
        on_cpus: Whether these are CPUs.
    """

    ENOUGH_S = 20.0  # of steps beside the first, which waits for its data and its kernels

    def __init__(
        self, config: Config, model: MaskedAutoencoder, steps: int, num_samples: int, full_rate: float, on_cpus: bool
    ):
        self._config, self._model, self._steps, self._num_samples = config, model, steps, num_samples
        self._full_rate, self._on_cpus = full_rate, on_cpus
        self._began, self._first, self._start, self._ended = 0.0, 0.0, 0, False
        self._proposed = False

    def begin(self, start: int, now: float) -> Iterator[str]:
        """What arithmetic says before the first step.

        Args:
            start: Steps done already.
            now: The time in seconds.
        """
        self._began, self._start = now, start
        flops = (self._steps - start) * self._config.batch.global_size * step_flops(self._model).training
        hours = flops / self._full_rate / 3600
        yield (
            f"this will take {in_words(hours)} at least: {flops / 1e12:,.3g} TFLOP, at the "
            f"{self._full_rate / 1e12:,.3g} TFLOP/s of matrix products here; the first steps will show more"
        )
        yield from self._propose(hours)

    def leave_out(self, seconds: float) -> None:
        """Takes out what was no step."""
        self._began += seconds
        self._first += seconds

    def step(self, done: int, now: float) -> Iterator[str]:
        """What the first steps say, once.

        Args:
            done: Steps done.
            now: The time in seconds.
        """
        if self._ended or done >= self._steps:
            return
        count = done - self._start
        if count == 1:
            self._first = now
        since, counted = (self._began, 1) if count == 1 else (self._first, count - 1)
        long = self.ENOUGH_S * (3 if count == 1 else 1)
        if now - since < long and counted < max(2, self._config.log.every):
            return
        self._ended = True
        step_s = (now - since) / counted
        hours = (self._steps - done) * step_s / 3600
        speed = f"{self._config.batch.global_size / step_s:,.3g} images/s"
        yield f"about {in_words(hours)} left, by the first steps: {speed}, without probes and checkpoints"
        yield from self._propose(hours)

    def _propose(self, hours: float) -> Iterator[str]:
        if self._on_cpus and hours >= DAYS_H and not self._proposed:
            self._proposed = True
            yield smaller(self._config, hours, self._num_samples)
