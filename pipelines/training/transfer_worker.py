"""What the workers of a transfer have in common: their place, the images, the record."""

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train.collective import broadcast_from_rank_zero

from mae_core.images import normalize
from mae_core.model import MaskedAutoencoder
from mae_core.probes import split_indices
from mae_core.randomness import Purpose, hash_u64
from mae_core.weights import load_state
from pipelines.config import Config
from pipelines.data.feed import join_crew
from pipelines.data.plan import Cut, Members, Plan
from pipelines.data.readers import MicroBatch, Stream, View
from pipelines.data.shards import Manifest
from pipelines.lease import Lease, check_of
from pipelines.reading import ReadPolicy
from pipelines.spool import Spool
from pipelines.storage import Store
from pipelines.tracking import start_follower
from pipelines.training.build import build_model
from pipelines.training.guard import Guard
from pipelines.training.loop import MOST_IN_ONE_EXECUTION, workers_on_this_machine
from pipelines.training.runfolder import RunFolder
from pipelines.training.step import autocast
from pipelines.training.unreadable import check_readable, gathered
from pipelines.transfer_config import Transfer

SPLIT_SEED = 0  # the validation split is the same for all seeds and protocols


@dataclass(frozen=True)
class TransferJob:
    """What the driver hands to every worker.

    Args:
        transfer: What is asked for, every path absolute.
        config: Of the pretraining run: model, image size, mean and deviation.
        state: The pretrained weights in the official layout, in the object store.
        train: Labelled images to learn from.
        test: Labelled images to score on.
        val: Labelled images to choose on; None: a part of ``train``.
        classes: Names of their labels, or of their masks' values.
        store: The transfer's folder.
        console: Actor that takes lines for the driver's terminal.
        lease: That of the driver, without which no checkpoint is written.
    """

    transfer: Transfer
    config: Config
    state: Any
    train: Manifest
    test: Manifest
    val: Manifest | None
    classes: tuple[str, ...]
    store: Store
    console: Any
    lease: Lease | None = None


def split(transfer: Transfer, num: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids, ascending, of the samples of ``data.train`` to learn from and of those that are held out to choose on.

    Args:
        transfer: What is asked for.
        num: Samples in ``data.train``.
    """
    if transfer.data.val:
        return np.arange(num), np.arange(0)
    learn, val = split_indices(num, transfer.data.val_share, seed=SPLIT_SEED)
    return np.sort(learn), np.sort(val)


def share_of(transfer: Transfer, num: int) -> int:
    """How many of the images to learn from one seed learns from."""
    fraction = transfer.data.label_fraction[0]
    return num if fraction == 1 else max(1, round(fraction * num))


class Worker:
    """One rank: its share of the images, its replica of the classifier, and on rank 0 the record."""

    def __init__(self, job: TransferJob):
        context = ray.train.get_context()
        self.job, self.transfer, self.config = job, job.transfer, job.config
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        scale = job.transfer.scale
        if self.device.type == "cpu":
            # As pretraining's: Ray sets one thread a worker.
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(scale.threads or max(1, cores // workers_on_this_machine(self.world_size)))
        self.crew = join_crew(
            self.rank,
            self.world_size,
            num_cpus=job.transfer.data.cpus_per_task,
            limit=scale.reading_cpus,
            broadcast=self.agree,
            per_node=scale.executions == "node"
            or (scale.executions == "auto" and self.world_size > MOST_IN_ONE_EXECUTION),
        )
        self.guard = Guard(self.rank, job.console, self.device)
        self.num_classes = len(job.classes)
        self.folder = RunFolder(job.store, check_of(job.lease)) if self.rank == 0 else None
        self.spool = Spool(self.folder.path) if self.folder else None
        if self.spool:
            self.spool.status("RUNNING")
        self.follower = start_follower(self.folder.path) if self.folder else None
        self.learn_ids, self.val_ids = split(self.transfer, job.train.num_samples)
        self._unreadable: set[tuple[str, str]] = set()
        self._met: list[dict[str, str]] = []
        self._broken: dict[str, dict[tuple[str, str], str]] = {}

    def say(self, line: str) -> None:
        """Shows a line in the driver's terminal."""
        if self.rank == 0:
            self.job.console.say.remote(line)

    def close(self) -> None:
        """Ends what runs beside the work."""
        if self.follower:
            self.follower.stop(timeout_s=20.0)
        if self.folder:
            self.folder.push()

    def agree(self, value: Any) -> Any:
        """What rank 0 gave, on all ranks."""
        return broadcast_from_rank_zero(value)

    def left_out(self, skipped: list[dict[str, str]]) -> None:
        """Notes images that could not be read, each once."""
        self._unreadable.update((one["shard"], one["key"]) for one in skipped)
        self._met += skipped

    def check_readable(self, read: int, manifest: Manifest) -> None:
        """Ends what reads images most of which are none; all ranks ask, and do the same.

        Each image counts once: of few labels one comes again and again.

        Args:
            read: Images of this data read so far, by all ranks.
            manifest: The data that was read since this was asked last.

        Raises:
            UnreadableError: More images cannot be read than ``data.max_unreadable`` allows.
        """
        mine, self._met = self._met, []
        broken = self._broken.setdefault(manifest.location, {})
        broken |= {(one["shard"], one["key"]): one["reason"] for one in gathered(mine, self.device)}
        share, num = self.transfer.data.max_unreadable, manifest.num_samples
        check_readable(Counter(broken.values()), min(read, num), num, share, manifest.location)

    def take_unreadable(self) -> list[tuple[str, str]]:
        """Shard and key of what could not be read by any rank since this was asked last; all ranks must ask."""
        mine, self._unreadable = self._unreadable, set()
        found = [mine]
        if self.world_size > 1:
            found = [set() for _ in range(self.world_size)]
            dist.all_gather_object(found, mine)
        return sorted(set().union(*found))

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        return autocast(self.transfer.train.precision, self.device)

    def stops_at(self, done: int, text: str) -> None:
        """Says that the work ends after a step, as was asked for: in the record, to the driver, in the terminal."""
        if self.spool:
            self.spool.status("KILLED")
            self.job.console.stops_at.remote(done)
        self.say(text)

    @property
    def validation(self) -> tuple[Manifest, np.ndarray | None]:
        """The images that are chosen on: their data, and their ids there; None: all."""
        return (self.job.train, self.val_ids) if self.job.val is None else (self.job.val, None)

    def encoder(self, seed: int, *, random: bool = False) -> MaskedAutoencoder:
        """The pretrained model; from scratch, or where a random one is asked for, a new one."""
        values = self.config.model_dump()
        values["run"]["seed"] = seed
        model = build_model(Config.model_validate(values))
        if self.transfer.protocol != "scratch" and not random:
            load_state(model, ray.get(self.job.state))
        return model.to(self.device)

    @property
    def image_size(self) -> tuple[int, int]:
        """Of the images that are classified."""
        asked = self.transfer.data.image_size
        return asked if min(asked) > 0 else self.config.data.image_size

    @property
    def crop_share(self) -> float:
        """Side of the central crop over the image's shorter side."""
        return self.transfer.data.crop_share or self.config.probe.crop_share

    def members(self, seed: int) -> np.ndarray:
        """The sample ids that one seed learns from, in order."""
        ids, num = self.learn_ids, share_of(self.transfer, len(self.learn_ids))
        if num == len(ids):
            return ids
        return np.sort(ids[np.argsort(hash_u64(Purpose.SPLIT, seed, 1, ids), kind="stable")[:num]])

    def stream(self, manifest: Manifest, ids: np.ndarray | None, cut: Cut, end: int, training: int | None) -> Stream:
        """The images of a training (its seed given), or of an evaluation."""
        data, num = self.transfer.data, manifest.num_samples if ids is None else len(ids)
        members = None if ids is None else Members(ids)
        view = View(
            self.image_size,
            self.config.data.channels,
            training or 0,
            None if training is None else data.crop_scale,
            training is not None and data.flip and self.config.data.flip,
            self.crop_share,
            "" if training is None else data.auto_augment,
            self.transfer.protocol == "segment",
        )
        plan = Plan(num, training or 0, end=end, shuffle=training is not None, members=members)
        return Stream(manifest, plan, cut, view, ReadPolicy(deadline_s=data.deadline_s))

    def images(self, batch: MicroBatch) -> torch.Tensor:
        """The normalised images_BCHW of a micro-batch."""
        images_BHWC = torch.from_numpy(batch.images_BHWC.copy()).to(self.device)
        return normalize(images_BHWC, self.config.data.mean, self.config.data.std)
