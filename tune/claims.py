"""Whether the paper's claims hold here: by the 95 % interval of a difference over seeds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tune.tables import Claim
from tune.trial import mean_interval

Verdict = Literal["holds", "does not hold", "within noise", "one seed", "not judged"]


@dataclass(frozen=True)
class Judged:
    """A claim, judged.

    Args:
        claim: The claim.
        verdict: What is to be said of it.
        detail: The difference that decides, or what is missing.
    """

    claim: Claim
    verdict: Verdict
    detail: str


def judge(claim: Claim, scores: Mapping[str, Mapping[int, float]]) -> Judged:
    """Judges a claim by the differences of the seeds that its rows have in common.

    Paired by seed: the runs of a seed share initial weights, order of the images and validation split. A claim holds
    where the 95 % interval of each of its differences (Student's t) lies above 0, and does not where one lies below.
    It is not corrected for the number of claims.

    Args:
        claim: The claim.
        scores: Percent by seed, by the row's label; no row without a score.
    """
    missing = [label for pair in claim.pairs for label in pair if not scores.get(label)]
    if missing:
        return Judged(claim, "not judged", f"no score of {missing[0]}")
    found: list[tuple[float, float | None, str]] = []
    for better, worse in claim.pairs:
        seeds = sorted(scores[better].keys() & scores[worse].keys())
        if not seeds:
            return Judged(claim, "not judged", f"no seed of both {better} and {worse}")
        mean, half = mean_interval([scores[better][seed] - scores[worse][seed] for seed in seeds])
        told = f"{better} over {worse}: {mean:+.2f}" + (f" +- {half:.2f}" if half is not None else "")
        found.append((mean + claim.margin, half, told))
    mean, half, detail = min(found, key=lambda one: one[0] + (one[1] or 0.0))  # the one furthest below, if one is
    if any(half is None for _, half, _ in found):
        # Of several, the weakest says it.
        mean, _, detail = min(found, key=lambda one: one[0])
        way = "as claimed" if mean > 0 else "not as claimed"
        return Judged(claim, "one seed", f"{way}; {detail}; one seed: no interval")
    if mean + (half or 0.0) < 0:
        return Judged(claim, "does not hold", detail)
    mean, half, detail = min(found, key=lambda one: one[0] - (one[1] or 0.0))
    return Judged(claim, "holds" if mean - (half or 0.0) > 0 else "within noise", detail)
