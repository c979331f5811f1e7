"""What the features are worth, measured by all workers of a run together: each encodes a share, rank 0 scores."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from mae_core.images import normalize
from mae_core.model import MaskedAutoencoder
from mae_core.probes import effective_rank, knn_predict, linear_probe, split_indices, top1
from pipelines.config import Config
from pipelines.data.feed import Crew, Feed
from pipelines.data.plan import FILLER, Cut, Plan
from pipelines.data.readers import Stream, View
from pipelines.data.shards import Manifest
from pipelines.errors import UserError
from pipelines.reading import ReadPolicy
from pipelines.training.unreadable import check_readable, gathered

UNLABELLED_IMAGES = 2048  # enough for the effective rank of features up to that width


@dataclass(frozen=True)
class Features:
    """Features of a data set in the order of its sample ids.

    Left out are images that could not be read, and in labelled data those without a label.

    Args:
        features_ND: float32 on the CPU.
        labels_N: int64, -1 where there is none.
        sample_N: int64 sample ids.
    """

    features_ND: torch.Tensor
    labels_N: torch.Tensor
    sample_N: np.ndarray


class Look(Protocol):
    """Something that makes features of images whose sample ids it is told."""

    @property
    def width(self) -> int:
        """D."""
        ...

    def look(self, images_BCHW: torch.Tensor, sample_B: np.ndarray) -> torch.Tensor:
        """Features [B, D]."""
        ...


@dataclass(frozen=True)
class _Images:
    """A batch of a worker's share.

    Args:
        images_BHWC: uint8 pixels.
        label_B: int64.
        sample_B: int64 ids, ``FILLER`` where there is no image.
    """

    images_BHWC: torch.Tensor
    label_B: torch.Tensor
    sample_B: np.ndarray


@dataclass(frozen=True)
class _Held:
    """A worker's share of the images that probes look at again and again.

    Args:
        limit: As ``extract`` has it.
        batches: All of the share.
        skipped: Images that could not be read.
    """

    limit: int
    batches: "list[_Images]"
    skipped: list[dict[str, str]]


# What was held last in this process, by all that it depends on: the trials of a search, one after the other in the
# same process, look at the same images.
_KEPT: dict[tuple[Any, ...], _Held] = {}


@dataclass
class Prober:
    """Extracts features with all workers and scores them on rank 0.

    Args:
        config: The run's configuration.
        crew: The workers.
        device: Where this worker computes.
        autocast: Gives the context in which the encoder runs.
        max_unreadable: Share of the images that may be unreadable.
        listed: The file that lists those that are; empty: none.
    """

    config: Config
    crew: Crew
    device: torch.device
    autocast: Callable[[], torch.autocast]
    max_unreadable: float = 1.0
    listed: str = ""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """Images that could not be read, collected until somebody takes them."""
    _held: dict[str, _Held] = field(default_factory=dict, init=False)

    def hold(self, manifest: Manifest, limit: int = 0) -> bool:
        """Keeps this worker's share of the images that probes look at again and again, where they are small.

        Args:
            manifest: The data.
            limit: As ``extract`` has it.

        Returns:
            Whether they are kept, the same on all workers: then ``extract`` reads nothing.

        Raises:
            UnreadableError: As ``extract``.
        """
        height, width = self.config.data.image_size
        num = min(limit or manifest.num_samples, manifest.num_samples)
        if num * height * width * self.config.data.channels > (self.config.probe.hold_mib << 20) * self.crew.world_size:
            return False
        data, probe, crew = self.config.data, self.config.probe, self.crew
        view = (data.image_size, data.channels, probe.crop_share, self.config.batch.micro_size)
        key = (manifest.digest, limit, *view, crew.rank, crew.world_size, crew.groups)
        if key not in _KEPT:
            before, self.skipped = self.skipped, []
            batches = list(self._read(manifest, limit))
            _KEPT.clear()
            _KEPT[key] = _Held(limit, batches, self.skipped)
            self.skipped = before
        self._held = {manifest.digest: _KEPT[key]}
        self.skipped += _KEPT[key].skipped
        return True

    def _images(self, manifest: Manifest, limit: int) -> Iterator["_Images"]:
        """This worker's share of a data set's images, or of those that the limit leaves: held or read."""
        held, rows = self._held.get(manifest.digest), self.config.batch.micro_size
        # In their shuffled order a smaller limit leaves the first ones of a larger.
        if held is None or not (held.limit == limit or 0 < limit < held.limit):
            yield from self._read(manifest, limit)
            return
        num, crew = min(limit or manifest.num_samples, manifest.num_samples), self.crew
        for step, batch in enumerate(held.batches[: -(-num // (rows * crew.world_size))]):
            position_B = (step * crew.world_size + crew.rank) * rows + np.arange(rows)
            yield replace(batch, sample_B=np.where(position_B < num, batch.sample_B, FILLER))

    def _read(self, manifest: Manifest, limit: int) -> Iterator["_Images"]:
        """As ``_images``, read; all workers have as many batches, and raise together."""
        crew, rows = self.crew, self.config.batch.micro_size
        num = min(limit or manifest.num_samples, manifest.num_samples)
        stream = Stream(
            manifest,
            Plan(manifest.num_samples, seed=0, end=num, shuffle=bool(limit)),
            Cut(rows * crew.world_size, rows, crew.world_size, groups=crew.groups),
            View(self.config.data.image_size, self.config.data.channels, crop_share=self.config.probe.crop_share),
            ReadPolicy(deadline_s=self.config.data.deadline_s),
        )
        steps = -(-num // stream.cut.global_size)
        fresh: list[dict[str, str]] = []
        for batch in Feed(stream, (0, steps), crew=crew, num_tasks=self.config.scale.segment_tasks):
            fresh += batch.skipped
            # Copies: what arrives lies in the object store, and keeps its block there.
            yield _Images(
                torch.from_numpy(batch.images_BHWC.copy()),
                torch.from_numpy(batch.label_B.copy()),
                # An image that could not be read is left out like filler.
                np.where(batch.weight_B > 0, batch.sample_B, FILLER),
            )
        self.skipped += fresh
        counts = Counter(sample["reason"] for sample in gathered(fresh, self.device))
        check_readable(counts, num, manifest.num_samples, self.max_unreadable, manifest.location, listed=self.listed)

    @torch.inference_mode()
    def extract(
        self,
        models: "Sequence[MaskedAutoencoder | Look]",
        manifest: Manifest,
        limit: int = 0,
        when_read: Callable[[], None] | None = None,
    ) -> list[Features] | None:
        """Encodes whole images of a data set, read once for all models; rank 0 gets the features, the others None.

        Args:
            models: The models, not wrapped, or what looks at images in another way.
            manifest: The data.
            limit: Take that many images, spread over the data set; 0: all.
            when_read: Called on every worker when nothing is being read any more.

        Raises:
            UnreadableError: More of the images cannot be read than may be.
        """
        config, crew, rows = self.config, self.crew, self.config.batch.micro_size
        num = min(limit or manifest.num_samples, manifest.num_samples)
        steps = -(-num // (rows * crew.world_size))
        # Made at once: small pieces that are kept among large ones that are freed would tear the heap apart.
        features = [torch.empty(steps * rows, model.width, device=self.device) for model in models]
        labels = torch.full((steps * rows,), -1)
        samples = torch.full((steps * rows,), FILLER)
        for step, batch in enumerate(self._images(manifest, limit)):
            here = slice(step * rows, (step + 1) * rows)
            images_BCHW = normalize(batch.images_BHWC.to(self.device), config.data.mean, config.data.std)
            with self.autocast():
                for model, part in zip(models, features, strict=True):
                    part[here] = (
                        model.features(images_BCHW, config.probe.pool)
                        if isinstance(model, MaskedAutoencoder)
                        else model.look(images_BCHW, batch.sample_B)
                    )
            labels[here] = batch.label_B
            samples[here] = torch.from_numpy(batch.sample_B)
        gathered = [self._gather(part.to(self.device)).cpu() for part in (*features, labels, samples)]
        if when_read:
            when_read()
        if crew.rank != 0:
            return None
        *features_, labels_N, sample_N = gathered
        order = torch.argsort(sample_N, stable=True)
        order = order[sample_N[order] != FILLER]
        if manifest.labelled:
            # In shards that others made some samples may lack a label.
            order = order[labels_N[order] >= 0]
        return [Features(part[order], labels_N[order], sample_N[order].numpy()) for part in features_]

    def _gather(self, share: torch.Tensor) -> torch.Tensor:
        """The shares of all ranks, one after the other, on rank 0; all have the same shape."""
        if self.crew.world_size == 1:
            return share
        shares = [torch.empty_like(share) for _ in range(self.crew.world_size)] if self.crew.rank == 0 else None
        dist.gather(share, shares, dst=0)
        return torch.cat(shares) if shares is not None else share

    def validate(
        self,
        model: MaskedAutoencoder,
        train: Manifest | None,
        images: Manifest,
        when_read: Callable[[], None] | None = None,
        *,
        last: bool = False,
    ) -> dict[str, float]:
        """Scores on a validation split of the probe's training data, or without labels the effective rank.

        Args:
            model: The model, not wrapped.
            train: Labelled images, or None.
            images: The images that it is pretrained on.
            last: Whether all of ``looked_at`` is looked at, or only ``probe.early_share`` of the labelled images.
            when_read: Called on every worker when nothing is being read any more, before the scoring.

        Returns:
            The scores on rank 0, nothing on the others.
        """
        manifest, limit = self.looked_at(train, images)
        if train is not None and not last and self.config.probe.early_share < 1:
            limit = max(2, round(limit * self.config.probe.early_share))
        found = self.extract([model], manifest, limit, when_read)
        if found is None:
            return {}
        if train is None:
            return {"probe/effective_rank": effective_rank(found[0].features_ND)}
        return self._validation(found[0], train)

    def looked_at(self, train: Manifest | None, images: Manifest) -> tuple[Manifest, int]:
        """The data that ``validate`` reads at the last, and its limit."""
        if train is None:
            return images, UNLABELLED_IMAGES
        probe = self.config.probe
        # A share of all is taken from their shuffled order.
        num = min(probe.samples or train.num_samples, train.num_samples)
        return train, probe.samples if probe.early_share == 1 else num

    def _validation(self, found: Features, train: Manifest) -> dict[str, float]:
        scores = _score(found, None, train, self.config)
        return _named("probe/", scores) | {"probe/effective_rank": effective_rank(found.features_ND)}

    def test(self, models: dict[str, MaskedAutoencoder], train: Manifest, test: Manifest) -> dict[str, float]:
        """Scores on the test data; the learning rate is chosen on a validation split of the training labels.

        Args:
            models: The models by the prefix of their scores; the first is also validated.
            train: Labelled images to learn from.
            test: Labelled images, read here and nowhere else.

        Returns:
            The scores on rank 0, nothing on the others.
        """
        found = self.extract(list(models.values()), train)
        asked = self.extract(list(models.values()), test)
        if found is None or asked is None:
            return {}
        scores = self._validation(found[0], train)
        for prefix, known, query in zip(models, found, asked, strict=True):
            scores |= _named(prefix, _score(known, query, train, self.config))
        return scores


def _named(prefix: str, scores: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in scores.items()}


def _score(found: Features, asked: Features | None, train: Manifest, config: Config) -> dict[str, float]:
    """Top-1 of kNN and linear probe: on the validation split, or on ``asked`` where it is given."""
    num_classes = len(train.classes)
    # By sample id: an image that cannot be read moves no other across the split.
    _, val_ids = split_indices(train.num_samples, config.probe.val_share, seed=config.run.seed)
    is_val_N = np.isin(found.sample_N, val_ids)
    known, held_out = np.flatnonzero(~is_val_N), np.flatnonzero(is_val_N)
    if not len(known) or not len(held_out):
        raise UserError(
            f"probe.train: {len(found.labels_N)} labelled images leave {len(known)} to learn from and {len(held_out)} "
            f"for validation with probe.val_share {config.probe.val_share}: give more images, or another share"
        )
    linear = linear_probe(
        found.features_ND[known],
        found.labels_N[known],
        found.features_ND[held_out],
        found.labels_N[held_out],
        num_classes=num_classes,
        seed=config.run.seed,
    )
    # The neighbours have nothing to choose, so on test data they are all of the training labels.
    base = known if asked is None else np.arange(len(found.labels_N))
    query_MD = found.features_ND[held_out] if asked is None else asked.features_ND
    labels_M = found.labels_N[held_out] if asked is None else asked.labels_N
    neighbours = knn_predict(
        found.features_ND[base],
        found.labels_N[base],
        query_MD,
        num_classes=num_classes,
        k=config.probe.knn_k,
    )
    return {
        "knn_top1": top1(neighbours, labels_M),
        "linear_top1": top1(linear.predict(query_MD), labels_M),
    }
