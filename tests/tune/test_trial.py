"""What trials came to: ranks over seeds, intervals, and what is not beaten at its cost."""

import pytest

from tune.trial import State, Trial, mean_interval, pareto, ranking


def trial(
    ratio: float, score: float | None, *, seed: int = 0, state: State = "finished", flops: float = 1e12, seconds=10.0
):
    scores = () if score is None else ((100, score / 2), (200, score))
    return Trial(f"{ratio}-{seed}", {"model.mask_ratio": ratio}, seed, scores, state, seconds, flops)


def ratios(ranked) -> list[float]:
    return [one.values["model.mask_ratio"] for one in ranked]


def test_configurations_rank_by_the_mean_of_their_seeds():
    lucky = [trial(0.5, 72.0), trial(0.5, 60.0, seed=1)]
    steady = [trial(0.7, 69.0, seconds=10), trial(0.7, 71.0, seed=1, seconds=20), trial(0.7, 70.0, seed=2, seconds=30)]
    first, second = ranking([*lucky, *steady])
    assert (first.values, first.num_seeds, first.score) == ({"model.mask_ratio": 0.7}, 3, pytest.approx(70.0))
    # Student's t of 2 degrees of freedom: 4.303; the standard error of 69, 70, 71: 1 / sqrt(3).
    assert first.half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert (first.seconds, first.flops) == (20.0, 1e12)
    assert second.score == pytest.approx(66.0)


def test_one_seed_has_no_interval():
    assert mean_interval([50.0]) == (50.0, None)
    assert mean_interval([1.0, 3.0])[1] == pytest.approx(12.706, rel=1e-3)


def test_the_finished_come_first_and_the_cheaper_of_equals():
    ranked = ranking([
        trial(0.1, None, state="failed"),
        trial(0.2, 90.0, state="stopped"),
        trial(0.3, 50.0, flops=2e12),
        trial(0.4, 50.0),
        trial(0.5, 0.0),
        trial(0.6, 95.0, state="running"),
        trial(0.7, None, state="stopped"),
    ])  # fmt: skip
    assert ratios(ranked) == [0.4, 0.3, 0.5, 0.6, 0.2, 0.7, 0.1]


def test_a_stopped_seed_leaves_no_finished_configuration_and_a_failed_one_no_score():
    stopped = [trial(0.5, 80.0), trial(0.5, 40.0, seed=1, state="stopped")]
    failed = [trial(0.7, 70.0), trial(0.7, 10.0, seed=1, state="failed", flops=9e12)]
    first, second = ranking([*stopped, *failed])
    assert (first.score, first.state, first.num_seeds, first.num_failed) == (70.0, "finished", 1, 1)
    assert first.flops == 1e12
    assert (second.score, second.state, second.num_seeds) == (60.0, "stopped", 2)


def test_the_front_is_what_nothing_cheaper_reaches():
    trials = [
        trial(0.1, 60.0, flops=1e12, seconds=50),
        trial(0.2, 60.0, flops=2e12, seconds=40),  # the same for more FLOPs, but in less time
        trial(0.3, 70.0, flops=3e12, seconds=60),
        trial(0.4, 65.0, flops=3e12, seconds=60),
        trial(0.5, 69.0, flops=4e12, seconds=70),
        trial(0.6, 99.0, flops=5e11, seconds=1, state="stopped"),
        trial(0.7, None, flops=1e11, seconds=1, state="finished"),
    ]
    assert ratios(pareto(trials, "flops")) == [0.1, 0.3]
    assert ratios(pareto(trials, "seconds")) == [0.2, 0.3]
    assert ratios(pareto(ranking(trials), "flops")) == [0.1, 0.3]
    assert pareto(trials[5:], "flops") == []
