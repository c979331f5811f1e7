"""The paper's claims on made-up scores."""

import pytest

from tune.claims import judge
from tune.tables import Claim

CLAIM = Claim("a beats b", (("a", "b"),))


def seeds(*scores: float) -> dict[int, float]:
    return dict(enumerate(scores))


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (seeds(71, 72, 73), seeds(61, 62, 64), "holds"),
        (seeds(61, 62, 64), seeds(71, 72, 73), "does not hold"),
        (seeds(71, 72, 73), seeds(70, 73, 72), "within noise"),
        # The seeds are paired: scores that go up and down together differ by little noise.
        (seeds(51, 72, 93), seeds(50, 71, 91.8), "holds"),
        (seeds(71), seeds(61), "one seed"),
        (seeds(71, 72), {}, "not judged"),
        ({0: 71.0}, {1: 61.0}, "not judged"),
        # The seed that both have.
        ({0: 71.0, 1: 72.0}, {1: 61.0}, "one seed"),
    ],
)
def test_verdicts(a, b, verdict):
    assert judge(CLAIM, {"a": a, "b": b}).verdict == verdict


def test_the_difference_and_its_interval_are_told():
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), Student's t with 2 degrees of freedom 4.303.
    found = judge(CLAIM, {"a": seeds(11, 22, 33), "b": seeds(10, 20, 30)})
    assert found.detail == "a over b: +2.00 +- 2.48"
    assert found.verdict == "within noise"
    assert "not as claimed; a over b: -3.00; one seed" in judge(CLAIM, {"a": seeds(1), "b": seeds(4)}).detail


def test_all_pairs_must_hold_and_the_one_that_decides_is_told():
    claim = Claim("a is best", (("a", "b"), ("a", "c")))
    scores = {"a": seeds(70, 71, 72), "b": seeds(60, 61, 62.1)}
    assert judge(claim, {**scores, "c": seeds(65, 66, 67.1)}).verdict == "holds"
    assert judge(claim, {**scores, "c": seeds(65, 66, 67.1)}).detail.startswith("a over c")
    assert judge(claim, {**scores, "c": seeds(71, 70, 72.5)}).verdict == "within noise"
    found = judge(claim, {**scores, "c": seeds(80, 81, 82.1)})
    assert (found.verdict, found.detail[:8]) == ("does not hold", "a over c")
    assert judge(claim, {"a": seeds(70), "b": seeds(60), "c": seeds(80)}).detail.startswith("not as claimed; a over c")


def test_a_margin_lets_the_better_one_be_behind():
    claim = Claim("b gains less than a point", (("a", "b"),), 1.0)
    assert judge(claim, {"a": seeds(70, 71, 72), "b": seeds(70.4, 71.5, 72.4)}).verdict == "holds"
    assert judge(claim, {"a": seeds(70, 71, 72), "b": seeds(72.4, 73.5, 74.4)}).verdict == "does not hold"


def test_of_some_rows_a_claim_says_what_they_can_say():
    claim = Claim("a is best", (("a", "b"), ("a", "c")))
    found = claim.among(["a", "c", "d"])
    assert found.pairs == (("a", "c"),)
    assert found.text == "a is best, of these rows"
    assert claim.among(["c", "b", "a"]) is claim
    # Nothing of it: judged as it stands, it says what is missing.
    assert judge(claim.among(["b", "c"]), {"b": seeds(1), "c": seeds(2)}).detail == "no score of a"
