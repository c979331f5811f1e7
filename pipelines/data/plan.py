"""Who sees what, when: the order of samples as a pure function of (data, seed, epoch), and how batches are cut.

Samples are numbered through all shards in the manifest's order. Each epoch turns that line by a random phase,
cuts it into ranges of neighbours (one read each) and permutes the ranges. The endless sequence of epochs is cut
into grains of eight ranges' length, shuffled inside. A *position* is a number in that sequence: global batch ``b``
is the positions ``b * G`` to ``(b + 1) * G``, whatever the number of workers, and any position costs the same to
find: no table is as long as the data.
"""

import functools
from dataclasses import dataclass

import numpy as np

from mae_core.randomness import Purpose, hash_u64, permute

RANGE = 64  # neighbouring samples that are read at once
GRAIN = 8 * RANGE  # samples that are shuffled among themselves
FILLER = -1  # the sample id of a row that only fills up a batch


@dataclass(frozen=True, eq=False)
class Members:
    """The samples of a plan that goes over a part of the data: a split, or a share of the labels.

    Args:
        sample_N: int64 sample ids, ascending. A table as long as the part: for labelled data, which are small.
    """

    sample_N: np.ndarray


@dataclass(frozen=True)
class Plan:
    """The order of samples.

    Args:
        num_samples: Samples in the data, or in the part of it, at least 1.
        seed: The run's seed.
        end: Samples of the run, each view counted; what is beyond fills up the last batch. None: without end.
        shuffle: False: position ``p`` is sample ``p``, as evaluation reads (a single epoch).
        members: The part of the data; None: all.
    """

    num_samples: int
    seed: int
    end: int | None = None
    shuffle: bool = True
    members: Members | None = None

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
            Two int64 arrays of ``stop - start``.
        """
        position = np.arange(start, stop, dtype=np.int64)
        if self.shuffle:
            grains = [_grain(self, g) for g in range(start // GRAIN, -(-stop // GRAIN))]
            cut = slice(start - start // GRAIN * GRAIN, stop - start // GRAIN * GRAIN)
            sample = np.concatenate([s for s, _ in grains])[cut] if grains else position
            epoch = np.concatenate([e for _, e in grains])[cut] if grains else position
        else:
            sample, epoch = position.copy(), np.zeros_like(position)
        if self.members is not None:
            # Beyond the end of what is read in order there is filler, whatever it is called.
            sample = self.members.sample_N[np.minimum(sample, self.num_samples - 1)]
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
    """How every global batch is cut into micro-batches of one size, and which worker takes which.

    A batch is ``accumulation * world_size`` micro-batches in the plan's order. Each group of workers takes a
    stretch of them, dealt round robin inside the group. With repeats, ``repeats`` batches in a row hold the same
    samples under other crops and masks.

    Args:
        global_size: Images an optimiser step, G.
        micro_size: Largest number of images in a micro-batch.
        world_size: Workers, W.
        repeats: Views of a sample in an epoch, R, each in another batch.
        groups: Groups of workers that are fed apart, one a node where there is more than one; divides W.
    """

    global_size: int
    micro_size: int
    world_size: int
    repeats: int = 1
    groups: int = 1

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

    @property
    def group_size(self) -> int:
        """Workers in a group."""
        return self.world_size // self.groups

    def index(self, step: int, turn: int, rank: int) -> int:
        """The number, counted through all steps, of the micro-batch that a worker takes in a turn of a step."""
        group, member = divmod(rank, self.group_size)
        return step * self.micros + (group * self.accumulation + turn) * self.group_size + member

    def rank(self, index: int) -> int:
        """The worker that takes a micro-batch."""
        group, place = divmod(index % self.micros, self.accumulation * self.group_size)
        return group * self.group_size + place % self.group_size

    def repeat(self, index: int) -> int:
        """Which view of its samples a micro-batch holds."""
        return index // self.micros % self.repeats

    def positions(self, index: int) -> tuple[int, int]:
        """Where a micro-batch begins and ends in the plan."""
        step, micro = divmod(index, self.micros)
        start = step // self.repeats * self.global_size
        return tuple(start + min((micro + edge) * self.rows, self.global_size) for edge in (0, 1))  # type: ignore[return-value]

    def micro_batch(self, plan: Plan, index: int) -> tuple[int, np.ndarray, np.ndarray]:
        """What micro-batch ``index`` holds, counted through all steps.

        Returns:
            The step, and int64 sample ids and epochs of ``rows`` rows.
        """
        step = index // self.micros
        start, stop = self.positions(index)
        sample, epoch = plan.samples(start, stop)
        if plan.end is not None:
            # The run's end counts views.
            views = step * self.global_size + np.arange(start, stop) % self.global_size
            sample[views >= plan.end] = FILLER
        missing = self.rows - len(sample)
        return step, np.pad(sample, (0, missing), constant_values=FILLER), np.pad(epoch, (0, missing))
