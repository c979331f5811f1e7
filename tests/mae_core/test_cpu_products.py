"""The library that multiplies a shape is the faster one, the same in every process, and never a wrong product."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from mae_core import cpu_products
from mae_core.cpu_products import Choice, Shape
from mae_core.layers import linear

PASSES = ("forward", "values", "weight")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A process that has chosen nothing yet, with a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_products, "_chosen", {})
    monkeypatch.setattr(cpu_products, "_spent_s", 0.0)


def shape_of(kind, outputs=11, inputs=7):
    return Shape(kind, outputs, inputs)


def train_once(outputs=11, inputs=7):
    """One forward and backward pass of a linear layer; gives the output and the three gradients."""
    generator = torch.Generator().manual_seed(0)
    values, weight, bias = (
        torch.randn(size, generator=generator).requires_grad_() for size in ((5, inputs), (outputs, inputs), (outputs,))
    )
    out = linear(values, weight, bias)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return out.detach(), values.grad, weight.grad, bias.grad


def repeated(library, times):
    """A library that needs many times as long."""

    def slow(*operands):
        for _ in range(times - 1):
            library(*operands)
        return library(*operands)

    return slow


@pytest.mark.parametrize("kind", PASSES)
def test_each_pass_takes_its_own_choice(kind, monkeypatch):
    expected = train_once()
    cpu_products._chosen.clear()
    for each in PASSES:
        cpu_products._chosen[shape_of(each)] = Choice(onednn=each == kind, gain=1.0)
    shapes = []
    onednn = cpu_products._onednn

    def seen(values, weight, bias):
        shapes.append((tuple(values.shape), tuple(weight.shape)))
        return onednn(values, weight, bias)

    monkeypatch.setattr(cpu_products, "_onednn", seen)
    torch.testing.assert_close(train_once(), expected)
    rows = {"forward": ((5, 7), (11, 7)), "values": ((5, 11), (7, 11)), "weight": ((11, 5), (7, 5))}
    assert shapes == [rows[kind]]


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("slow", ["_onednn", "_pytorch"])
def test_the_faster_one_is_chosen(kind, slow, monkeypatch):
    monkeypatch.setattr(cpu_products, slow, repeated(getattr(cpu_products, slow), 4))
    train_once(96, 64)
    assert cpu_products.choices()[shape_of(kind, 96, 64)].onednn == (slow == "_pytorch")


def test_what_is_as_fast_stays_pytorchs(monkeypatch):
    """A gain within the noise is none."""
    now = iter(range(10**6))
    monkeypatch.setattr(cpu_products.time, "thread_time", lambda: 1e-6 * next(now))
    train_once()
    found = cpu_products.choices()
    assert len(found) == 3
    assert not any(choice.onednn for choice in found.values()), found


def test_without_time_it_is_pytorchs_and_the_record_says_so(monkeypatch):
    monkeypatch.setattr(cpu_products, "BUDGET_S", 0.0)
    train_once()
    assert set(cpu_products.choices().values()) == {Choice(onednn=False, gain=0.0)}
    own = "PyTorch's own: forward 11x7 (not measured), values 11x7 (not measured), weight 11x7 (not measured)"
    assert cpu_products.summary() == own


def test_all_measurements_together_keep_to_the_budget(monkeypatch):
    """Of many shapes, the ones for which it does not suffice are PyTorch's."""
    monkeypatch.setattr(cpu_products, "BUDGET_S", 0.2)
    for outputs in range(512, 1024, 32):
        linear(torch.randn(3, 512), torch.randn(outputs, 512))
    found = cpu_products.choices().values()
    assert any(choice.gain for choice in found)
    assert not all(choice.gain for choice in found)
    # Beside it what was made for measurements that then were too long.
    assert cpu_products._spent_s < 2 * 0.2 + 0.5


ANOTHER = """
import torch
from mae_core import cpu_products
from mae_core.layers import linear
linear(torch.ones(3, 7), torch.ones(11, 7, requires_grad=True)).sum().backward()
print(cpu_products.summary())
"""


def test_another_process_of_this_machine_chooses_the_same():
    """A loss would differ in its last bits otherwise."""
    train_once()
    path = cpu_products.cache_file()
    known = json.loads(path.read_text())
    assert len(known) == 3
    # What no measurement gives, so that it can only have been read.
    path.write_text(json.dumps({name: [True, 123.0] for name in known}))
    command = [sys.executable, "-c", ANOTHER]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told == "oneDNN: forward 11x7 (123.00), weight 11x7 (123.00)\n"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"forward 11 7": 3}', "\x00\xff"])
def test_a_damaged_file_is_written_again(text):
    path = cpu_products.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    train_once()
    known = json.loads(path.read_text())
    assert [name.split()[0] for name in known] == ["forward", "values", "weight"]


def test_without_a_cache_folder_a_process_chooses_for_itself(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    expected = nn.functional.linear(torch.ones(3, 7), torch.ones(11, 7))
    torch.testing.assert_close(linear(torch.ones(3, 7), torch.ones(11, 7)), expected)
    assert shape_of("forward") in cpu_products.choices()


def test_the_threads_of_others_stay_as_they_are():
    before = torch.get_num_threads()
    train_once()
    assert torch.get_num_threads() == before


def test_random_numbers_of_others_stay_as_they_are():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    train_once()
    assert torch.equal(torch.rand(3), expected)
