"""Who sees what, when: the order of samples as a pure function of (data, seed, epoch), and how batches are cut.

Samples are numbered through all shards in the manifest's order. Each epoch turns that line by a random phase,
cuts it into ranges of neighbours (one read each) and permutes the ranges. The endless sequence of epochs is cut
into grains of eight ranges' length, shuffled inside. A *position* is a number in that sequence: global batch ``b``
is the positions ``b * G`` to ``(b + 1) * G``, whatever the number of workers, and any position costs the same to
find: no table is as long as the data.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mae_core.randomness import Purpose, hash_u64, permute

RANGE = 64  # neighbouring samples that are read at once
GRAIN = 8 * RANGE  # samples that are shuffled among themselves
TASK_SAMPLES = 2 * GRAIN  # what one reading task handles, about

FILLER = -1  # the sample id of a row that only fills up a batch


@dataclass(frozen=True)
class Plan:
    """The order of samples.

    Args:
        num_samples: Samples in the data, at least 1.
        seed: The run's seed.
        end: Positions of the run; from there on all is filler. None: without end.
        shuffle: False: position ``p`` is sample ``p``, as evaluation reads (a single epoch).
    """

    num_samples: int
    seed: int
    end: int | None = None
    shuffle: bool = True

    def ranged(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and epochs at positions, before the shuffle inside grains."""
        epoch, within = np.divmod(position, self.num_samples)
        sample = np.empty_like(within)
        whole = self.num_samples // RANGE
        for e in np.unique(epoch):
            here = epoch == e
            slot, offset = np.divmod(within[here], RANGE)
            full = slot < whole
            # The range that is left over comes last in its epoch; the phase makes it another one each time.
            slot[full] = permute(slot[full], whole, self.seed, int(e)) if whole else slot[full]
            phase = int(hash_u64(Purpose.PHASE, self.seed, int(e))) % self.num_samples
            sample[here] = (slot * RANGE + offset + phase) % self.num_samples
        return sample, epoch

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids and epochs at positions ``start`` to ``stop``.

        Returns:
            Two int64 arrays of ``stop - start``; the id is ``FILLER`` where the run has ended.
        """
        position = np.arange(start, stop, dtype=np.int64)
        if self.shuffle:
            grains = [_grain(self, g) for g in range(start // GRAIN, -(-stop // GRAIN))]
            cut = slice(start - start // GRAIN * GRAIN, stop - start // GRAIN * GRAIN)
            sample = np.concatenate([s for s, _ in grains])[cut] if grains else position
            epoch = np.concatenate([e for _, e in grains])[cut] if grains else position
        else:
            sample, epoch = position.copy(), np.zeros_like(position)
        if self.end is not None:
            sample[position >= self.end] = FILLER
        return sample, epoch


@functools.lru_cache(maxsize=16)
def _grain(plan: Plan, grain: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and epochs of one grain; remembered, because several micro-batches are cut from it."""
    sample, epoch = plan.ranged(np.arange(grain * GRAIN, (grain + 1) * GRAIN, dtype=np.int64))
    # By epoch first: where an epoch ends inside a grain, it still ends before the next one begins.
    order = np.lexsort((hash_u64(Purpose.ORDER, plan.seed, epoch, sample), epoch))
    return sample[order], epoch[order]


@dataclass(frozen=True)
class Cut:
    """How every global batch is cut into micro-batches of one size, dealt round robin to the workers.

    Args:
        global_size: Images an optimiser step, G.
        micro_size: Largest number of images in a micro-batch.
        world_size: Workers, W.
    """

    global_size: int
    micro_size: int
    world_size: int

    @property
    def accumulation(self) -> int:
        """Micro-batches a worker takes for one step."""
        return -(-self.global_size // (self.micro_size * self.world_size))

    @property
    def micros(self) -> int:
        """Micro-batches in one step, over all workers."""
        return self.accumulation * self.world_size

    @property
    def rows(self) -> int:
        """Rows of a micro-batch; the last ones of a step may be filler."""
        return -(-self.global_size // self.micros)

    def micro_batch(self, plan: Plan, index: int) -> tuple[int, np.ndarray, np.ndarray]:
        """What micro-batch ``index`` holds, counted through all steps.

        Returns:
            The step, and int64 sample ids and epochs of ``rows`` rows.
        """
        step, micro = divmod(index, self.micros)
        start = step * self.global_size + min(micro * self.rows, self.global_size)
        stop = step * self.global_size + min((micro + 1) * self.rows, self.global_size)
        sample, epoch = plan.samples(start, stop)
        missing = self.rows - len(sample)
        return step, np.pad(sample, (0, missing), constant_values=FILLER), np.pad(epoch, (0, missing))

    def tasks(self, start_step: int, stop_step: int) -> Iterator[range]:
        """Cuts steps into the reading tasks' shares: ranges of micro-batch indices, in order."""
        each = max(1, TASK_SAMPLES // self.rows)
        stop = stop_step * self.micros
        for first in range(start_step * self.micros, stop, each):
            yield range(first, min(first + each, stop))

    def segments(
        self, start_step: int, stop_step: int, num_tasks: int, break_every: int = 0
    ) -> Iterator[tuple[int, int]]:
        """Cuts a run's steps into the shares of single Ray Data executions.

        Args:
            start_step: The first step.
            stop_step: The one after the last.
            num_tasks: Reading tasks in one execution.
            break_every: No share goes over a multiple of it; 0: no such limit.

        Yields:
            First step, and the one after the last.
        """
        each = max(1, num_tasks * max(1, TASK_SAMPLES // self.rows) // self.micros)
        first = start_step
        while first < stop_step:
            last = min(first + each, stop_step)
            if break_every:
                last = min(last, (first // break_every + 1) * break_every)
            yield first, last
            first = last
