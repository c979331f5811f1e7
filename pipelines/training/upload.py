"""Micro-batches on their way to the device: the next one is copied while this one computes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mae_core.randomness import mask_keys
from pipelines.data.readers import MicroBatch


@dataclass(frozen=True)
class OnDevice:
    """A micro-batch where it is computed; valid until the next one is asked for.

    Args:
        images_BHWC: uint8.
        keys_B: int64, of the masks.
        weight_B: float32.
    """

    images_BHWC: torch.Tensor
    keys_B: torch.Tensor
    weight_B: torch.Tensor


def _arrays(seed: int, batch: MicroBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    keys_B = mask_keys(seed, batch.epoch_B, batch.sample_B, batch.repeat).numpy()
    return batch.images_BHWC, keys_B, batch.weight_B


class Upload:
    """Copies micro-batches to a device.

    The host runs ahead of a GPU: when it comes for the next micro-batch, the GPU is still computing with the present
    one. So a copy has only to keep off the stream of the computation, which it would wait for, and to come from pinned
    memory, so that the host does not wait for it. There are two places for a micro-batch on either side, filled in
    turn: the copy into one waits, on the GPU, until what was there has been used, and the host, before it writes over
    pinned memory, until that has been copied. So the host is two micro-batches ahead at most, and nothing is
    allocated from step to step.

    All micro-batches have the same number of rows, as a run's have.

    On a CPU a copy out of the object store is all there is: it takes some hundredths of a per cent of a step.

    Args:
        device: Where the steps compute.
        seed: The run's seed.
    """

    def __init__(self, device: torch.device, seed: int):
        self._device, self._seed = device, seed
        self._slots: Iterator[_Slot] | None = None
        self._used: _Slot | None = None

    def __call__(self, batch: MicroBatch) -> OnDevice:
        """The micro-batch on the device; what was given before it may be written over."""
        arrays = _arrays(self._seed, batch)
        if self._device.type == "cpu":
            return OnDevice(*(torch.from_numpy(array.copy()) for array in arrays))
        if self._slots is None:
            stream = torch.cuda.Stream(self._device)
            self._slots = _in_turn([_Slot(arrays, stream, self._device) for _ in range(2)])
        if self._used is not None:
            self._used.free()
        self._used = next(self._slots)
        return self._used.fill(arrays)


def _in_turn(slots: "list[_Slot]") -> "Iterator[_Slot]":
    while True:
        yield from slots


class _Slot:
    """A place for a micro-batch in pinned memory and on a GPU."""

    def __init__(self, arrays: tuple[np.ndarray, ...], stream: torch.cuda.Stream, device: torch.device):
        self._pinned = [torch.from_numpy(array.copy()).pin_memory() for array in arrays]
        self._there = [torch.empty_like(tensor, device=device) for tensor in self._pinned]
        self._device, self._stream = device, stream
        self._copied, self._freed = torch.cuda.Event(), torch.cuda.Event()
        self.free()  # the memory may have been another tensor's

    def fill(self, arrays: tuple[np.ndarray, ...]) -> OnDevice:
        """Copies, and lets the present stream wait for it."""
        self._copied.synchronize()
        self._stream.wait_event(self._freed)
        with torch.cuda.stream(self._stream):
            for array, pinned, there in zip(arrays, self._pinned, self._there, strict=True):
                np.copyto(pinned.numpy(), array)
                there.copy_(pinned, non_blocking=True)
            self._copied.record(self._stream)
        torch.cuda.current_stream(self._device).wait_event(self._copied)
        return OnDevice(*self._there)

    def free(self) -> None:
        """All that uses this micro-batch has been given to the present stream."""
        self._freed.record(torch.cuda.current_stream(self._device))
