"""The rate that a step's FLOPs are held against: the work that is done, over the time of a clock."""

import itertools
import platform

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mae_core import device_rate
from mae_core.device_rate import bfloat16_gain, matrix_rate

CPU = torch.device("cpu")


def readings(*products):
    """A clock that is read before and after each product, and in between: products of so many seconds."""
    now = 0.0
    for seconds in products:
        yield now  # before it
        now += seconds
        yield now  # after it
        yield now  # whether there is time for another one


def rate_of(products, seconds, dtype=torch.float32):
    """The rate, and the FLOPs of a product as PyTorch counts them."""
    clock = readings(*products)
    matrix_rate.cache_clear()
    try:
        with FlopCounterMode(display=False) as counted:
            rate = matrix_rate(CPU, dtype, seconds, clock.__next__)
    finally:
        matrix_rate.cache_clear()
    assert next(clock, None) is None, "there was time for more products"
    return rate, counted.get_total_flops() / len(products)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_is_the_work_of_the_best_product_over_its_time(dtype):
    # The first one, which finds its kernel, does not count; nor does what a busy machine slows down.
    rate, flops = rate_of([0.25, 2.0, 0.5, 4.0], 6.5, dtype)
    assert flops >= 2 * 512**3, "too small to show the device's rate"
    assert rate == pytest.approx(flops / 0.5)


def test_one_product_is_counted_however_long_it_takes():
    rate, flops = rate_of([100.0, 8.0], 0.3)
    assert rate == pytest.approx(flops / 8.0)


def test_it_is_measured_once():
    matrix_rate.cache_clear()
    ticks = itertools.count()
    clock = lambda: float(next(ticks))  # noqa: E731
    first = matrix_rate(CPU, torch.float32, 1.0, clock)
    read = next(ticks)
    assert matrix_rate(torch.device("cpu"), torch.float32, 1.0, clock) == first
    assert next(ticks) == read + 1, "the clock was read again"
    matrix_rate.cache_clear()


def test_the_gain_of_bfloat16_is_measured_where_the_processor_has_instructions_for_it(monkeypatch):
    rates = {torch.bfloat16: 6e11, torch.float32: 2e11}
    monkeypatch.setattr(device_rate, "matrix_rate", lambda _, dtype: rates[dtype])
    for flags, gain in (({"avx512f", "amx_bf16"}, 3.0), ({"avx512_bf16"}, 3.0), ({"avx512f"}, 0.0), (set(), 0.0)):
        monkeypatch.setattr(device_rate, "_cpu_flags", lambda flags=flags: flags)
        assert bfloat16_gain(CPU) == gain
    monkeypatch.undo()
    assert device_rate._cpu_flags() or platform.machine() != "x86_64", "nothing is known of this processor"


@pytest.mark.timing
def test_no_product_is_much_faster_than_the_rate():
    import time

    matrix_rate.cache_clear()
    rate, size = matrix_rate(CPU, torch.float32), 512
    left, right = torch.randn(2, size, size)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    # In turns on a busy machine one may have the cores and the other not.
    assert rate > 0.3 * 2 * size**3 / min(seconds)
