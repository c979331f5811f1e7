"""The rate that a step's FLOPs are held against."""

import time

import torch

from mae_core.device_rate import matrix_rate

CPU = torch.device("cpu")


def test_no_product_is_faster_than_the_rate():
    rate = matrix_rate(CPU, torch.float32)
    size = 512
    left, right = torch.randn(2, size, size)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    assert rate > 0.5 * 2 * size**3 / min(seconds)


def test_it_is_measured_once():
    first = matrix_rate(CPU, torch.float32)
    start = time.perf_counter()
    assert matrix_rate(torch.device("cpu"), torch.float32) == first
    assert time.perf_counter() - start < 0.1
