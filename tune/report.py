"""What a search says at its end: its table, how sure its order is, and what an untrained encoder is worth."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.amounts import prefix
from tune.journal import shown
from tune.parent import aligned
from tune.space import encoder_part
from tune.trial import Ranked, Trial, mean_interval


@dataclass(frozen=True)
class Untrained:
    """An encoder before its first step, over the seeds.

    Args:
        values: Those of the varied keys that shape it; trials that differ in others share it.
        score: Mean in percent.
        half: Half of the mean's 95 % interval; None of a single seed.
        num_seeds: How many scores the mean is of.
    """

    values: dict[str, Any]
    score: float
    half: float | None
    num_seeds: int

    def is_of(self, values: Mapping[str, Any]) -> bool:
        """Whether a configuration starts from it."""
        return encoder_part(values) == self.values


def untrained(trials: Iterable[Trial], metric: str) -> list[Untrained]:
    """The untrained encoders that the trials of a search have scored, one for each shape.

    Args:
        trials: All of them.
        metric: The score's name in the record.
    """
    found: dict[tuple[tuple[str, Any], ...], list[float]] = {}
    for trial in trials:
        if metric in trial.random:
            found.setdefault(tuple(sorted(encoder_part(trial.values).items())), []).append(trial.random[metric])
    return [Untrained(dict(values), *mean_interval(scores), len(scores)) for values, scores in found.items()]


def standard_error(score: float, num: int) -> float:
    """That of a share of ``num`` images, in percent: sqrt(p (1 - p) / n).

    A score of 0 or 100 % would have none; it is taken as half an image off.

    Args:
        score: Percent.
        num: Images of the validation split.
    """
    share = min(max(score / 100, 0.5 / num), 1 - 0.5 / num)
    return 100 * math.sqrt(share * (1 - share) / num)


def table(ranked: Sequence[Ranked], untrained: Sequence[Untrained], objective: str) -> str:
    """The configurations, best first, and below them the untrained encoders, as a table for the terminal."""
    keys = sorted(ranked[0].values) if ranked else []
    unit, letter = prefix(max((one.flops for one in ranked), default=0.0))
    keys_shown = (key.split(".", 1)[1] for key in keys)
    head = ["", *keys_shown, f"{objective} top-1", "seeds", f"{letter}FLOP", "seconds", "state"]
    rows = [head]
    for place, one in enumerate(ranked, 1):
        rows.append(
            [
                str(place),
                *(shown(one.values[key]) for key in keys),
                _percent(one.score, one.half),
                str(one.num_seeds or one.num_failed),
                f"{one.flops / unit:.3g}",
                f"{one.seconds:.0f}",
                one.state,
            ]
        )
    for one in untrained:
        shape = (shown(one.values[key]) if key in one.values else "any" for key in keys)
        rows.append(["-", *shape, _percent(one.score, one.half), str(one.num_seeds), "0", "-", "random encoder"])
    return aligned(rows)


def _percent(score: float | None, half: float | None) -> str:
    if score is None:
        return "-"
    return f"{score:.2f} %" + (f" +- {half:.2f}" if half is not None else "")


def said(ranked: Sequence[Ranked], untrained: Sequence[Untrained], num: int) -> list[str]:
    """How far the best configuration is to be believed, a sentence each; nothing where there is no score.

    Args:
        ranked: The configurations, best first.
        untrained: The untrained encoders.
        num: Images of the validation split; the fewest over the seeds.
    """
    if not ranked or ranked[0].score is None:
        return []
    best, top = ranked[0], ranked[0].score
    scores = [one.score for one in ranked if one.score is not None]
    noise = 2 * standard_error(top, num)
    # Scores are sums of floats: an image is an image.
    ties, near = (sum(top - score <= width + 1e-6 for score in scores) for width in (100 / num, noise))
    early = "; those that were stopped by their last score" if any(one.state == "stopped" for one in ranked) else ""
    told = [
        f"{ties} of {len(scores)} within one image of the best, {near} within two standard errors ({noise:.2f} points)"
        f", n = {num}{early}"
    ]
    for one in untrained:
        if one.is_of(best.values):
            gain = top - one.score
            doubt = "" if gain > noise else ": no more than noise, so this search has found no better features"
            told.append(f"the best is {gain:+.2f} points over its random encoder{doubt}")
    return told
