"""Table 2: steps in turns, beside what their FLOPs say."""

from collections.abc import Iterator

import pytest
import torch

from mae_core.flops import theory_speedup
from mae_core.model import MaskedAutoencoder
from pipelines.errors import UserError
from tune.timing import KINDS, lines, measure, verdicts

TINY = {"image_size": 16, "patch_size": 4, "width": 24, "depth": 1, "num_heads": 2}
TINY |= {"decoder_width": 16, "decoder_heads": 2}
MASKS, EIGHT, ONE = KINDS


def clock(steps: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Readings before and after steps of so many wall and CPU seconds."""
    for wall, cpu in steps:
        yield 0.0, 0.0
        yield wall, cpu


def timing(turns: int, readings: list[tuple[float, float]]):
    told = clock([(1.0, 1.0)] * len(KINDS) + readings)
    return measure("vit_tiny_patch16_224", images=2, turns=turns, device=torch.device("cpu"), precision="float32",
                   clock=lambda: next(told), **TINY)  # fmt: skip


def test_speedups_are_taken_within_turns():
    found = timing(3, [(6.0, 6.0), (3.0, 3.0), (2.0, 2.0)] * 2 + [(12.0, 12.0), (3.0, 3.0), (6.0, 6.0)])
    assert found.seconds == {MASKS: (6.0, 6.0, 12.0), EIGHT: (3.0,) * 3, ONE: (2.0, 2.0, 6.0)}
    assert found.speedups(EIGHT) == [2.0, 2.0, 4.0]
    assert found.disturbed == 0
    with torch.device("meta"):
        models = {kind: MaskedAutoencoder("vit_tiny_patch16_224", **TINY, **options) for kind, options in KINDS.items()}
    assert models[MASKS].encoder_mask_token is not None
    assert [len(model.decoder_blocks) for model in models.values()] == [8, 8, 1]
    assert found.theory == {kind: theory_speedup(models[MASKS], model) for kind, model in models.items()}
    assert found.of_theory(ONE) == pytest.approx(3.0 / found.theory[ONE])
    assert [row[1] for row in lines([found])[1:]] == list(KINDS)
    eight, one, turns = verdicts([found])
    assert "above 1.05" in eight
    assert "below 0.85" not in one or found.of_theory(ONE) < 0.85
    assert "3 turns" in turns


def test_turns_in_which_others_had_the_cores_are_done_again():
    quiet, disturbed = [(6.0, 6.0), (3.0, 3.0), (2.0, 2.0)], [(6.0, 6.0), (9.0, 3.0), (2.0, 2.0)]
    found = timing(2, quiet + disturbed + quiet)
    assert found.seconds[EIGHT] == (3.0, 3.0)
    assert found.disturbed == 1
    assert "1 left out" in verdicts([found])[-1]


def test_an_unknown_architecture_is_named():
    with pytest.raises(UserError, match=r"archs: .*resnet18"):
        measure("resnet18", images=1, turns=1, device=torch.device("cpu"), precision="float32")
