"""Large numbers as a person reads them."""

import pytest

from pipelines.amounts import flops


@pytest.mark.parametrize(
    ("number", "text"),
    [(3.165e17, "316.5 PFLOP"), (2.4e12, "2.4 TFLOP"), (1.84e10, "18.4 GFLOP"), (5e20, "500 EFLOP"), (0, "0 FLOP")],
)
def test_flop_have_a_prefix_that_can_be_read(number, text):
    assert flops(number) == text
