"""What a finished run says of itself where it has not come to much, and what usually helps."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipelines.config import Config, total_steps, warmup_steps
from pipelines.spool import SPOOL_FILE, read_spool

_PROBES = {"knn_top1": "kNN", "linear_top1": "linear probe"}
_UNMOVED = 0.95  # of the first loss; and of what a prediction of every patch's mean has, where patches are normalised
_FEW_PATCHES = 100
_MANY_STEPS = 10_000


def read_record(folder: Path) -> tuple[list[float], dict[str, float]]:
    """A run's losses in the order of its steps, and its scores before the first step, from its record."""
    losses: dict[int, float] = {}
    scores: dict[str, float] = {}
    for line, _ in read_spool(folder / SPOOL_FILE):
        values = line.get("metrics", {}) if line else {}
        if isinstance(loss := values.get("train/loss"), float):
            losses[line["step"]] = loss  # type: ignore[index]
        if line and line.get("step") == 0:
            scores |= {name: value for name, value in values.items() if isinstance(value, float)}
    return [losses[step] for step in sorted(losses)], scores


def notes(
    config: Config, num_samples: int, scores: Mapping[str, float], losses: list[float], random: Mapping[str, float]
) -> list[str]:
    """What a finished run should say: that its probes do not beat a random encoder, that its loss has hardly moved.

    Args:
        config: The run's configuration.
        num_samples: Training images.
        scores: Its last ones.
        losses: Of its points, in order.
        random: Scores of its encoder before the first step.
    """
    found = [*_not_better(config, scores, random), *_not_moved(config, losses)]
    return [f"{what}. What usually helps: {', '.join(_help(config, num_samples))}" for what in found]


def _not_better(config: Config, scores: Mapping[str, float], random: Mapping[str, float]) -> Iterator[str]:
    """Those of the test images where there are some, else of the validation split; percentages as they are shown."""
    pairs = {name: (scores.get(f"test/{name}"), scores.get(f"test/random_{name}")) for name in _PROBES}
    if not any(name.startswith("test/") for name in scores) and config.probe.early_share == 1:
        pairs = {name: (scores.get(f"probe/{name}"), random.get(f"probe/{name}")) for name in _PROBES}
    worse = [
        f"{_PROBES[name]} {mine:.1f} % against {theirs:.1f} %"
        for name, (mine, theirs) in pairs.items()
        if mine is not None and theirs is not None and mine <= theirs
    ]
    if worse and not config.run.init_from:
        yield f"the probes do not beat the random encoder ({', '.join(worse)})"


def _not_moved(config: Config, losses: list[float]) -> Iterator[str]:
    """Compares the last tenth of the points with the first, which is before most of the warm-up."""
    if len(losses) < 2:
        return
    tail = losses[-max(1, len(losses) // 10) :]
    first, last = losses[0], math.fsum(tail) / len(tail)
    constant = config.model.target == "normalized" and last >= _UNMOVED
    if constant or (last >= _UNMOVED * first and not config.run.init_from):
        known = "; predicting the mean of each patch would give 1" if config.model.target == "normalized" else ""
        yield f"the loss has hardly moved (from {first:.3f} to {last:.3f}{known})"


def _help(config: Config, num_samples: int) -> Iterator[str]:
    steps, size = total_steps(config, num_samples), config.batch.global_size
    if steps < _MANY_STEPS:
        yield f"more steps (these were {steps:,}, {steps * size / num_samples:.3g} epochs; the paper has 800)"
    height, width = config.data.image_size
    patch = config.model.patch_size or 16
    if (height // patch) * (width // patch) < _FEW_PATCHES and patch > 2:
        yield f"smaller patches (--model.patch-size {patch // 2})"
    if 2 * warmup_steps(config, num_samples) > steps:
        yield f"a shorter warm-up (--optim.warmup-epochs {steps * size / num_samples / 20:.2g})"
    yield "another learning rate (--optim.base-lr)"
