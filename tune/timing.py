"""The paper's table 2: what a training step costs with mask tokens in the encoder, without, and with a small decoder.

The kinds take turns on the same pixels and masks, so that what else the machine does meets them alike; a speed-up is
taken within each turn, and beside it stands what the FLOPs say (``theory_speedup``).
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mae_core.flops import theory_speedup
from mae_core.model import MaskedAutoencoder
from mae_core.optim import make_optimizer, set_lr
from pipelines.errors import UserError
from pipelines.training.step import autocast

KINDS: dict[str, dict[str, Any]] = {
    "mask tokens in the encoder, 8 blocks": {"encoder_mask_tokens": True, "decoder_depth": 8},
    "8 blocks": {"decoder_depth": 8},
    "1 block": {"decoder_depth": 1},
}
"""The options of a model, by what the decoder is; the first kind is what the others are compared with."""
PAPER = {"vit_large_patch16_224": (1.0, 2.8, 3.7), "vit_huge_patch14_224": (1.0, 3.5, 4.1)}
"""The paper's speed-ups of the kinds, on 128 TPU-v3 cores, by architecture."""
FLOOR, CEILING = 0.85, 1.05  # of measured over theory
_UNDISTURBED = 0.9


@dataclass(frozen=True)
class Timing:
    """The steps of an architecture.

    Args:
        arch: The plain ViT.
        seconds: Of each turn's step, by kind.
        theory: Speed-up over the first kind by FLOPs, by kind.
        disturbed: Turns that were left out because others had the cores.
    """

    arch: str
    seconds: Mapping[str, tuple[float, ...]]
    theory: Mapping[str, float]
    disturbed: int

    def speedups(self, kind: str) -> list[float]:
        """Those over the first kind, turn by turn."""
        slow = self.seconds[next(iter(self.seconds))]
        return [one / other for one, other in zip(slow, self.seconds[kind], strict=True)]

    def of_theory(self, kind: str) -> float:
        """The median speed-up over that of the FLOPs."""
        return statistics.median(self.speedups(kind)) / self.theory[kind]


def measure(
    arch: str,
    *,
    images: int,
    turns: int,
    device: torch.device,
    precision: str,
    clock: Callable[[], tuple[float, float]] = lambda: (time.perf_counter(), time.process_time()),
    **shape: Any,
) -> Timing:
    """Does training steps of each kind in turns, after one of each that is not counted.

    On a CPU a turn in which a kind had less CPU time for its wall time than in its best turn is left out and done
    again, but no more than twice as many turns are done.

    Args:
        arch: A plain ViT of timm.
        images: Images a step, 224 pixels wide and high unless ``shape`` has another ``image_size``.
        turns: Turns to count.
        device: Where the steps compute.
        precision: As ``train.precision``.
        clock: Wall and CPU seconds.
        shape: More arguments of the model.

    Raises:
        UserError: No such architecture, or no turn that nobody disturbed.
    """
    try:
        with device:
            models = {kind: MaskedAutoencoder(arch, **shape, **options) for kind, options in KINDS.items()}
    except ValueError as error:
        raise UserError(f"archs: {error}") from None
    first, *_ = models.values()
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(images, first.channels, *first.image_size, generator=generator).to(device)
    noise_BN = torch.rand(images, first.num_patches, generator=generator).to(device)

    def step(model: MaskedAutoencoder, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
        wall, cpu = clock()
        set_lr(optimizer, 1e-5)
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision, device):
            loss = model(images_BCHW, noise_BN)["loss"]
        loss.backward()
        optimizer.step()
        loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end, cpu_end = clock()
        return end - wall, cpu_end - cpu

    arms = {kind: (model, make_optimizer(model)) for kind, model in models.items()}
    for arm in arms.values():
        step(*arm)
    done: list[dict[str, tuple[float, float]]] = []
    while len(done) < 2 * turns:
        done.append({kind: step(*arm) for kind, arm in arms.items()})
        if len(_undisturbed(done, device)) >= turns:
            break
    kept = _undisturbed(done, device)
    if not kept:
        raise UserError(f"{arch}: others had the cores in all of {len(done)} turns: measure on a machine that is idle")
    theory = {kind: theory_speedup(first, model) for kind, model in models.items()}
    seconds = {kind: tuple(turn[kind][0] for turn in kept) for kind in KINDS}
    return Timing(arch, seconds, theory, len(done) - len(kept))


def _undisturbed(
    done: list[dict[str, tuple[float, float]]], device: torch.device
) -> list[dict[str, tuple[float, float]]]:
    if device.type != "cpu":
        return done
    best = {kind: max(turn[kind][1] / turn[kind][0] for turn in done) for kind in done[0]}
    return [turn for turn in done if all(cpu / wall >= _UNDISTURBED * best[kind] for kind, (wall, cpu) in turn.items())]


def lines(timings: list[Timing]) -> list[list[str]]:
    """The table: a line for each kind of each architecture, under its head."""
    rows = [["", "decoder", "s a step", "range", "speed-up", "range", "theory", "of theory", "paper"]]
    for timing in timings:
        paper = dict(zip(KINDS, PAPER.get(timing.arch, ()), strict=False))
        for kind, seconds in timing.seconds.items():
            speedups = timing.speedups(kind)
            rows.append(
                [
                    timing.arch,
                    kind,
                    f"{statistics.median(seconds):.3f}",
                    f"{min(seconds):.3f} to {max(seconds):.3f}",
                    f"{statistics.median(speedups):.2f}",
                    f"{min(speedups):.2f} to {max(speedups):.2f}",
                    f"{timing.theory[kind]:.2f}",
                    f"{timing.of_theory(kind):.2f}",
                    f"{paper[kind]:.1f}" if kind in paper else "-",
                ]
            )
    return rows


def verdicts(timings: list[Timing]) -> list[str]:
    """What is to be said of the speed-ups, a line for each."""
    told = []
    for timing in timings:
        for kind in list(KINDS)[1:]:
            share = timing.of_theory(kind)
            said = f"holds: at least {FLOOR} of the theory" if share >= FLOOR else f"below {FLOOR} of the theory"
            if share > CEILING:
                said += (
                    f"; above {CEILING}: the long sequence also costs what FLOPs do not count (softmax, norms, memory"
                    " that no cache holds), else the measurement is wrong"
                )
            told.append(f"{timing.arch}, {kind}: {share:.2f} of the theory: {said}")
        turns = len(timing.seconds[next(iter(KINDS))])
        left_out = f"; {timing.disturbed} left out, in which others had the cores" if timing.disturbed else ""
        told.append(f"{timing.arch}: medians of {turns} turns{left_out}")
    return told
