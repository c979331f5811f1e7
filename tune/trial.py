"""What the trials of a search came to: configurations over seeds, their ranks, and what they cost."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

State = Literal["finished", "running", "stopped", "failed"]
# Of the most worth to the least: an unfinished score is a lower one of the same configuration.
_ORDER: tuple[State, ...] = ("finished", "running", "stopped", "failed")


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Args:
        name: Of the run.
        values: What was varied, by dotted key.
        seed: Of the run.
        scores: Optimiser step and score in percent, in their order.
        state: stopped: by the search, for being poor; failed: by an error.
        seconds: Of training and probing.
        flops: Of its training so far.
        reason: Why it failed.
        probes: All scores of the last report, by their names in the record.
        random: Those of its encoder before the first step; empty where another trial of its shape has them.
    """

    name: str
    values: dict[str, Any]
    seed: int
    scores: tuple[tuple[int, float], ...]
    state: State
    seconds: float
    flops: float
    reason: str = ""
    probes: Mapping[str, float] = field(default_factory=dict)
    random: Mapping[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """The last one, in percent; None where there is none, or where the trial failed."""
        return self.scores[-1][1] if self.scores and self.state != "failed" else None


@dataclass(frozen=True)
class Ranked:
    """A configuration, over its seeds.

    Args:
        values: What was varied, by dotted key.
        state: finished where all its seeds have, but for those that failed.
        score: Mean of the last scores in percent; None where there is none.
        half: Half of the mean's 95 % interval; None of a single seed.
        num_seeds: How many scores the mean is of.
        num_failed: How many seeds failed; they give no score.
        seconds: Mean of training and probing, without failed seeds where others are.
        flops: Mean of training, likewise.
    """

    values: dict[str, Any]
    state: State
    score: float | None
    half: float | None
    num_seeds: int
    num_failed: int
    seconds: float
    flops: float


T = TypeVar("T", Trial, Ranked)


def mean_interval(scores: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half of its 95 % interval (Student's t), which a single score has not."""
    from pipelines.training.scores import interval  # imports PyTorch, for which not every command waits

    return sum(scores) / len(scores), interval(list(scores))


def configurations(trials: Iterable[Trial]) -> list[list[Trial]]:
    """The trials of each configuration: those of the same values, whatever their seed."""
    found: dict[tuple[tuple[str, Any], ...], list[Trial]] = {}
    for trial in trials:
        found.setdefault(tuple(sorted(trial.values.items())), []).append(trial)
    return list(found.values())


def ranking(trials: Iterable[Trial]) -> list[Ranked]:
    """The configurations by the mean of their seeds' last scores, best first.

    Those that are finished come before others, whose scores are of another step. Of equal scores the cheaper training
    comes first.
    """
    ranked = [summary(seeds) for seeds in configurations(trials)]
    return sorted(ranked, key=_place)


def best_score(ranked: Sequence[Ranked]) -> float | None:
    """The best score of a search, in percent: that of what its table has first; None while nothing has one."""
    return ranked[0].score if ranked else None


def _place(one: Ranked) -> tuple[int, float, float]:
    return _ORDER.index(one.state), math.inf if one.score is None else -one.score, one.flops


def summary(seeds: Sequence[Trial]) -> Ranked:
    """One configuration's trials as one."""
    sound = [trial for trial in seeds if trial.state != "failed"]
    counted = sound or seeds
    scores = [trial.score for trial in seeds if trial.score is not None]
    score, half = mean_interval(scores) if scores else (None, None)
    # One seed that was stopped makes a mean of finished and unfinished scores: such a mean is no finished one.
    state = _ORDER[max(_ORDER.index(trial.state) for trial in counted)]
    return Ranked(
        seeds[0].values,
        state,
        score,
        half,
        len(scores),
        len(seeds) - len(sound),
        sum(trial.seconds for trial in counted) / len(counted),
        sum(trial.flops for trial in counted) / len(counted),
    )


def pareto(scored: Iterable[T], cost: Literal["flops", "seconds"]) -> list[T]:
    """The finished ones that no cheaper one reaches, cheapest first.

    Only finished ones: what was stopped is cheap because it was stopped.

    Args:
        scored: Trials, or configurations. Of single seeds the luckiest would win.
        cost: What counts as one.
    """
    priced = [(getattr(one, cost), one.score, one) for one in scored if one.state == "finished"]
    scores = [(paid, score, one) for paid, score, one in priced if score is not None]
    front: list[T] = []
    best = -math.inf
    for _, score, one in sorted(scores, key=lambda row: (row[0], -row[1])):
        if score > best:
            front.append(one)
            best = score
    return front
