"""The tensors of a checkpoint in memory of their own, and the bytes of a safetensors file that holds them.

The safetensors library, which reads them, would copy all bytes once more, or write to a local file alone: here they are
hashed on their way to a disk or an object store.
"""

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator, Mapping

import numpy as np
import torch

Tensors = Mapping[str, torch.Tensor]
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_CHUNK = 4 << 20
_ALIGN = 64


def file_bytes(tensors: Tensors, metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file in pieces of some MiB: a header, then the tensors' own memory, not copied.

    The format: https://github.com/huggingface/safetensors#format

    Args:
        tensors: By name; those on another device are copied here one by one.
        metadata: What the file says beside them.
    """
    # As the library orders them: the widest types first, so that each tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        data = _flat(tensor.detach().cpu().contiguous()).data
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]


def file_fault(data: bytes) -> str | None:
    """Why some bytes are no safetensors file, by its header alone; None where they are one."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, LookupError, RecursionError):
        return "is no safetensors file"
    return None if len(data) == 8 + length + max(ends, default=0) else "is no safetensors file: its length is wrong"


def _flat(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's memory as bytes, also of types that NumPy does not know."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()


class Snapshot:
    """Takes copies of a model's and its optimiser's state while training goes on, into the same memory each time.

    ``begin`` returns at once. The copying is done by ``finish`` in another thread, beside the next step's forward and
    backward pass: only the optimiser changes what is copied, so its next step waits until the copy has been made. On a
    GPU it is the device that waits, and the copy travels on a stream of its own into pinned memory.
    """

    def __init__(self) -> None:
        self._copies: dict[str, dict[str, torch.Tensor]] = {}
        self._source: Mapping[str, Tensors] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._device: torch.device | None = None
        self._issued = threading.Event()
        self._issued.set()
        self._before: torch.cuda.Event | None = None
        self._after: torch.cuda.Event | None = None

    def begin(self, files: Mapping[str, Tensors], optimizer: torch.optim.Optimizer) -> None:
        """From now on the optimiser waits before it changes anything.

        Args:
            files: The tensors of each file, in the memory in which training goes on.
            optimizer: What changes them.
        """
        self._source = files
        devices = (tensor.device for tensors in files.values() for tensor in tensors.values())
        self._device = next((device for device in devices if device.type == "cuda"), None)
        if self._device is not None:
            self._before = torch.cuda.Event()
            self._before.record(torch.cuda.current_stream(self._device))
        self._issued.clear()
        if self._optimizer is not optimizer:
            self._optimizer = optimizer
            optimizer.register_step_pre_hook(lambda *_: self.hold())

    def finish(self) -> dict[str, dict[str, torch.Tensor]]:
        """Copies what ``begin`` was given, and lets the optimiser go on.

        Returns:
            The copies, on the CPU; they are written over after the next ``begin``.
        """
        source, self._source = self._source, {}
        try:
            if _layout(self._copies) != _layout(source):
                self._copies = {}  # the memory goes back before there is new
                self._copies = {file: _room(tensors, self._device is not None) for file, tensors in source.items()}
            with contextlib.ExitStack() as on_device:
                if self._before is not None:
                    stream = torch.cuda.Stream(self._device)
                    on_device.enter_context(torch.cuda.stream(stream))
                    stream.wait_event(self._before)
                for file, tensors in source.items():
                    for name, tensor in tensors.items():
                        _copy(self._copies[file][name], tensor)
                if self._device is not None:
                    self._after = torch.cuda.Event()
                    self._after.record(torch.cuda.current_stream(self._device))
        finally:
            self._issued.set()
        if self._after is not None:
            self._after.synchronize()
        return self._copies

    def hold(self) -> None:
        """Waits until what was copied may be changed; on a GPU what is computed from now on waits."""
        self._issued.wait()
        if self._after is not None:
            torch.cuda.current_stream(self._device).wait_event(self._after)


def _layout(files: Mapping[str, Tensors]) -> dict[tuple[str, str], tuple[torch.dtype, torch.Size]]:
    return {(file, name): (t.dtype, t.shape) for file, tensors in files.items() for name, t in tensors.items()}


def _room(tensors: Tensors, pinned: bool) -> dict[str, torch.Tensor]:
    """Memory for copies of tensors, in one piece."""
    starts = itertools.accumulate((-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in tensors.values()), initial=0)
    places = dict(zip(tensors, starts, strict=False))
    size = sum(-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in tensors.values())
    memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    return {
        name: memory[places[name] : places[name] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for name, tensor in tensors.items()
    }


def _copy(to: torch.Tensor, tensor: torch.Tensor) -> None:
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        # One thread, without the interpreter's lock: PyTorch's own would take the cores from training.
        np.copyto(_flat(to), _flat(tensor))
    else:
        to.copy_(tensor.detach(), non_blocking=True)
