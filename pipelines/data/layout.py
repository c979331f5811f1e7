"""How a group's micro-batches become the blocks and the tasks that Ray Data moves.

Ray Data pays some milliseconds a block and a task, whatever they hold. So several micro-batches of small images
travel in one block, and a task makes several blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.data.plan import GRAIN, Cut

BLOCK_BYTES = 40 << 20  # a block is filled up to this with micro-batches
TASK_BYTES = 128 << 20  # encoded or decoded, whichever is more: what one task handles, about
MOST_TASK_GRAINS = 16


@dataclass(frozen=True)
class Layout:
    """The blocks of a stretch of steps for one group of workers.

    The blocks of a stretch are numbered so that block ``q`` goes to member ``q % group_size``. A block holds the
    micro-batches of some turns of its member, and of each of these all views.

    Args:
        cut: How batches are cut.
        turns_per_block: Turns whose micro-batches share a block.
        blocks_per_task: Blocks that one task makes.
    """

    cut: Cut
    turns_per_block: int = 1
    blocks_per_task: int = 1

    def num_blocks(self, steps: tuple[int, int]) -> int:
        """Blocks of a group in a stretch of steps (the first, and the one after the last)."""
        first, stop = self._turns(steps)
        return -(-(stop - first) // self.turns_per_block) * self.cut.group_size

    def micro_batches(self, steps: tuple[int, int], group: int, block: int) -> list[list[int]]:
        """The micro-batches of a block: for each turn the indices of its views, which hold the same samples."""
        cut = self.cut
        first, stop = self._turns(steps)
        number, member = divmod(block, cut.group_size)
        turns = range(first + number * self.turns_per_block, min(first + (number + 1) * self.turns_per_block, stop))
        views: list[list[int]] = []
        for window, turn in (divmod(turn, cut.accumulation) for turn in turns):
            inside = range(max(window * cut.repeats, steps[0]), min((window + 1) * cut.repeats, steps[1]))
            views.append([cut.index(step, turn, group * cut.group_size + member) for step in inside])
        return views

    def tasks(self, steps: tuple[int, int]) -> list[range]:
        """The blocks of a stretch cut into the reading tasks' shares, in order."""
        total = self.num_blocks(steps)
        return [range(q, min(q + self.blocks_per_task, total)) for q in range(0, total, self.blocks_per_task)]

    def segments(self, steps: tuple[int, int], num_tasks: int) -> Iterator[tuple[int, int]]:
        """Cuts a stretch of steps into the shares of single Ray Data executions of at most so many tasks or so."""
        cut = self.cut
        turns = num_tasks * self.blocks_per_task * self.turns_per_block // cut.group_size
        each = max(1, turns // cut.accumulation) * cut.repeats
        first, stop = steps
        while first < stop:
            # Where the views of a batch end, so that none is decoded twice.
            last = min((first + each) // cut.repeats * cut.repeats, stop)
            yield first, last
            first = last

    def _turns(self, steps: tuple[int, int]) -> tuple[int, int]:
        """First turn of a stretch and the one after its last, over batches that hold different samples."""
        cut = self.cut
        return steps[0] // cut.repeats * cut.accumulation, -(-steps[1] // cut.repeats) * cut.accumulation


def make_layout(cut: Cut, *, encoded_bytes: float, pixel_bytes: int) -> Layout:
    """The layout for samples of some size.

    Args:
        cut: How batches are cut.
        encoded_bytes: Mean size of an encoded sample.
        pixel_bytes: Size of a sample as pixels, all views counted.
    """
    size = max(encoded_bytes, pixel_bytes, 1)
    task_samples = GRAIN * min(max(round(TASK_BYTES / (GRAIN * size)), 1), MOST_TASK_GRAINS)
    # A round of blocks, one a member, is read together: larger than a task it would be read in strips.
    turns = max(1, min(BLOCK_BYTES // (cut.rows * pixel_bytes), task_samples // (cut.rows * cut.group_size)))
    blocks = max(1, task_samples // (cut.rows * turns))
    if blocks > cut.group_size:
        blocks -= blocks % cut.group_size
    return Layout(cut, turns, blocks)
