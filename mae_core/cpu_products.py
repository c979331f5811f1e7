"""Chooses the library that multiplies float32 matrices on a CPU: the one that PyTorch takes by itself (MKL), or oneDNN.

Which one is faster depends on the processor, on the shape and on the pass of training: on an AMD EPYC with AVX-512
oneDNN takes as little as 0.6 of MKL's time, on an Intel Xeon as much as 2.4 times. So each shape is measured when it
first occurs, in less than ``BUDGET_S`` seconds a process for all of them.

The two add in different orders, so another choice would change the last bits of a loss. What was chosen is therefore
kept in the user's cache folder, one file for each kind of processor and version of PyTorch: runs on one machine agree.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

Pass = Literal["forward", "values", "weight"]
"""Of training: the layer itself, the gradient of its values, the gradient of its weight."""
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

BUDGET_S = 1.8  # of CPU time, for all measurements of a process
_ROWS, _FEWER_ROWS = 256, 128  # of the measured matrices: near each library's full rate, in little time
_MANY = 1 << 21  # weights of a layer from which fewer rows are enough
_GAIN = 1.05  # oneDNN has to be this much faster; less is noise
_ROUNDS = 3
_SHORT_S = 0.5e-3  # a product is repeated until its turn takes so long
_HAS_ONEDNN = torch.backends.mkldnn.is_available()


class Shape(NamedTuple):
    """What a product is chosen by.

    Attributes:
        kind: The pass.
        outputs: O, outputs of the layer.
        inputs: I, inputs of the layer.
    """

    kind: Pass
    outputs: int
    inputs: int


class Choice(NamedTuple):
    """What a shape's measurement came to.

    Attributes:
        onednn: Whether oneDNN multiplies it.
        gain: How many times as fast oneDNN was; 0 where the time did not allow a measurement.
    """

    onednn: bool
    gain: float


def product(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: Pass) -> torch.Tensor:
    """Returns ``values @ weight.T + bias``, multiplied by the faster library.

    Args:
        values: float32 [..., I]; of the pass "values" the outputs' gradient [R, O], of "weight" its transpose [O, R].
        weight: float32 [O, I]; of the pass "values" its transpose [I, O], of "weight" the transposed values [I, R].
        bias: float32 [O], or None.
        kind: The pass.
    """
    if kind == "forward":
        outputs, inputs = weight.shape
    elif kind == "values":
        inputs, outputs = weight.shape
    else:
        outputs, inputs = values.shape[0], weight.shape[0]
    shape = Shape(kind, outputs, inputs)
    choice = _chosen.get(shape) or _choose(shape)
    return (_onednn if choice.onednn else _pytorch)(values, weight, bias)


def choices() -> dict[Shape, Choice]:
    """Returns what this process has chosen so far."""
    return dict(_chosen)


def summary() -> str:
    """Says in a line which products oneDNN does and which PyTorch's own library; empty where there were none."""
    parts = []
    for library, onednn in (("oneDNN", True), ("PyTorch's own", False)):
        found = [
            f"{shape.kind} {shape.outputs}x{shape.inputs} ({f'{choice.gain:.2f}' if choice.gain else 'not measured'})"
            for shape, choice in sorted(_chosen.items())
            if choice.onednn == onednn
        ]
        if found:
            parts.append(f"{library}: {', '.join(found)}")
    return "; ".join(parts)


_chosen: dict[Shape, Choice] = {}
_spent_s = 0.0


def _pytorch(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return nn.functional.linear(values, weight, bias)


def _onednn(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")


def _choose(shape: Shape) -> Choice:
    """Looks a shape up in the file of this kind of machine, or measures it and writes it there."""
    if not _HAS_ONEDNN:
        return Choice(onednn=False, gain=0.0)
    name = " ".join(map(str, shape))
    with _kept() as known:
        if name not in known:
            known[name] = _measure(shape)
        _chosen[shape] = choice = known[name]
    return choice


def _measure(shape: Shape) -> Choice:
    """Times both libraries in turns; without a result, and so for PyTorch's own, where the budget does not suffice.

    On one thread: where other programs have the cores, threads that wait for one another say nothing of a library.
    """
    global _spent_s
    threads, began = torch.get_num_threads(), time.thread_time()
    torch.set_num_threads(1)
    try:
        return _compare(shape, BUDGET_S - _spent_s)
    finally:
        torch.set_num_threads(threads)
        _spent_s += time.thread_time() - began


def _compare(shape: Shape, budget_s: float) -> Choice:
    kind, outputs, inputs = shape
    rows = _FEWER_ROWS if outputs * inputs >= _MANY else _ROWS
    some = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0))  # others draw from the global generator

    def random(*size: int) -> torch.Tensor:
        num = math.prod(size)
        return some.repeat(-(-num // len(some)))[:num].view(size)

    # Each operand as it lies in memory in that pass: see mae_core.layers.
    if kind == "forward":
        operands = random(rows, inputs), random(outputs, inputs), random(outputs)
    elif kind == "values":
        operands = random(rows, outputs), random(outputs, inputs).t(), None
    else:
        operands = random(rows, outputs).t(), random(rows, inputs).t(), None

    def timed(multiply: Product, turns: int) -> float:
        # CPU time of this thread: what else the machine and this process do counts less in it than in wall time.
        start = time.thread_time()
        for _ in range(turns):
            multiply(*operands)
        return (time.thread_time() - start) / turns

    libraries = _pytorch, _onednn
    best = [timed(multiply, 1) for multiply in libraries]  # the first call finds its kernel
    turns = 1 + int(_SHORT_S / max(*best, _SHORT_S / 100))
    if _ROUNDS * turns * sum(best) > budget_s:
        return Choice(onednn=False, gain=0.0)
    rounds = [[timed(multiply, turns) for multiply in libraries] for _ in range(_ROUNDS)]
    own_s, onednn_s = (max(min(seconds), 1e-9) for seconds in zip(*rounds, strict=True))
    gain = own_s / onednn_s
    return Choice(onednn=gain >= _GAIN, gain=round(gain, 3))


@contextlib.contextmanager
def _kept() -> Iterator[dict[str, Choice]]:
    """Gives what is known of this kind of machine, and keeps what is added; one process at a time.

    Where the cache folder cannot be written, nothing is known and nothing is kept: each process measures for itself.
    """
    with contextlib.ExitStack() as stack:
        try:
            path = cache_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+"))
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            file.seek(0)
            known = _parsed(file.read())
        except (OSError, RuntimeError):  # RuntimeError: no home
            yield {}
            return
        before = dict(known)
        yield known
        if known != before:
            with contextlib.suppress(OSError):
                file.truncate(0)
                file.write(json.dumps({name: list(choice) for name, choice in known.items()}, indent=1) + "\n")
                file.flush()


def _parsed(text: str) -> dict[str, Choice]:
    """Reads the file's text; empty where it is damaged: it is measured again."""
    try:
        return {name: Choice(bool(onednn), float(gain)) for name, (onednn, gain) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def cache_file() -> Path:
    """Returns the file of this kind of processor, with this version of PyTorch.

    Raises:
        RuntimeError: There is no home folder.
    """
    folder = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(folder) if folder.startswith("/") else Path.home() / ".cache"
    what = f"{_processor()}\n{torch.__version__}\n{torch.backends.cpu.get_cpu_capability()}"
    return root / "mae-on-ray" / f"products-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def _processor() -> str:
    """What Linux says of the first processor, without what changes from one moment to the next."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return ""
    changing = ("cpu MHz", "bogomips", "processor", "apicid", "initial apicid", "core id", "physical id", "microcode")
    return "\n".join(line for line in first.splitlines() if not line.startswith(changing))
