"""Protocols of transfer on features that are computed once: nearest neighbours, and a linear classifier."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mae_core.classifier import Classifier
from mae_core.masking import random_masking
from mae_core.probes import knn_predict, linear_probe
from mae_core.randomness import mask_keys, mask_noise
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.training.classification import make_classifier
from pipelines.training.loop import DivergedError
from pipelines.training.probing import Features, Prober
from pipelines.training.scores import (
    check_scored,
    confusion,
    read_random,
    read_scored,
    top1,
    write_random,
    write_scored,
)
from pipelines.training.transfer_worker import Worker
from pipelines.transfer_config import with_random


def score_cached(worker: Worker) -> None:
    """Scores with the seeds that have no score yet, on features that all workers compute once; rank 0 scores.

    Raises:
        DivergedError: Features are not finite.
    """
    store, transfer, job = worker.job.store, worker.transfer, worker.job
    seeds, random = worker.agree(_missing(worker) if worker.rank == 0 else None)
    if not seeds and not random:
        return
    values = worker.config.model_dump()
    values["probe"]["pool"] = transfer.pool
    values["probe"]["crop_share"] = worker.crop_share
    values["data"]["image_size"] = worker.image_size
    values["batch"]["micro_size"] = transfer.train.micro_size
    values["data"]["deadline_s"] = transfer.data.deadline_s
    values["scale"]["segment_tasks"] = transfer.scale.segment_tasks
    limit = transfer.data.max_unreadable
    prober = Prober(Config.model_validate(values), worker.crew, worker.device, worker.autocast, limit)
    began = time.perf_counter()
    share = transfer.visible[0]
    # All images are read once, for all that look at them.
    drawn = seeds if share < 1 else seeds[:1]
    looks: list[Any] = [Look(make_classifier(worker, 0).eval(), share, seed) for seed in drawn]
    if random:
        first = transfer.seeds[0]
        looks.append(Look(make_classifier(worker, first, random=True).eval(), share, first))
    known = prober.extract(looks, job.train)
    chosen = prober.extract(looks, job.val) if job.val else known
    asked = prober.extract(looks, job.test)
    worker.left_out(prober.skipped)
    unreadable = worker.take_unreadable()
    if known is None or chosen is None or asked is None:
        return
    for each in (*known, *chosen, *asked):
        if not bool(torch.isfinite(each.features_ND).all()):
            raise DivergedError("features of the encoder are not finite: its weights are damaged, or have diverged")
    num = sum(len(each[0].labels_N) for each in ((known, chosen, asked) if job.val else (known, asked)))
    worker.say(f"features of {num:,} images in {_s(began)}")
    found = list(zip(known, chosen, asked, strict=True))
    if random:
        scored = _score(worker, *found.pop(), transfer.seeds[0], "random encoder")
        write_random(store, {key: scored[key] for key in ("seed", "test")})
    for i, seed in enumerate(seeds):
        scored = _score(worker, *found[min(i, len(found) - 1)], seed, f"seed {seed}")
        write_scored(store, {**scored, "unreadable": unreadable})


def _missing(worker: Worker) -> tuple[list[int], bool]:
    """The seeds that have no score yet, and whether a random encoder has none and shall have one."""
    store, transfer = worker.job.store, worker.transfer
    seeds = [seed for seed in transfer.seeds if read_scored(store, seed) is None]
    return seeds, with_random(transfer) and read_random(store) is None


def _score(worker: Worker, known: Features, chosen: Features, asked: Features, seed: int, name: str) -> dict[str, Any]:
    """Scores features.

    Args:
        worker: The rank.
        known: Of the images to learn from, and of those that are held out.
        chosen: Of the images to choose on; the same where they are held out.
        asked: Of the test images.
        seed: Of what is drawn.
        name: In progress lines.
    """
    began = time.perf_counter()
    learn_N = np.flatnonzero(np.isin(known.sample_N, worker.members(seed)))
    val_N = (
        np.flatnonzero(np.isin(known.sample_N, worker.val_ids)) if chosen is known else np.arange(len(chosen.labels_N))
    )
    if not len(learn_N) or not len(val_N):
        raise UserError(
            f"data.train: {len(known.labels_N)} labelled images leave {len(learn_N)} to learn from and "
            f"{len(val_N)} for validation: give more images, or other shares"
        )
    features, labels = known.features_ND, known.labels_N
    val_MD, val_M = chosen.features_ND[val_N], chosen.labels_N[val_N]
    if worker.transfer.protocol == "knn":

        def predict(features_MD: torch.Tensor) -> torch.Tensor:
            return knn_predict(
                features[learn_N],
                labels[learn_N],
                features_MD,
                num_classes=worker.num_classes,
                k=worker.transfer.knn_k,
            )

        how: dict[str, Any] = {"k": worker.transfer.knn_k}
    else:
        probe = linear_probe(
            features[learn_N], labels[learn_N], val_MD, val_M, num_classes=worker.num_classes, seed=seed
        )
        predict, how = probe.predict, {"learning_rate": probe.learning_rate}
    val_CC = confusion(predict(val_MD), val_M, worker.num_classes)
    test_CC = confusion(predict(asked.features_ND), asked.labels_N, worker.num_classes)
    check_scored(test_CC)
    worker.say(f"{name}  {worker.transfer.protocol}  validation {top1(val_CC):.2f} %  ({_s(began)})")
    return {
        "seed": seed,
        "val": val_CC.tolist(),
        "test": test_CC.tolist(),
        "seconds": time.perf_counter() - began,
        "chosen": how,
    }


@dataclass(frozen=True)
class Look:
    """An encoder that sees a share of the patches, as the prober takes it.

    Args:
        classifier: Holds the encoder, at the image size asked for.
        share: Of the patches, drawn for each sample anew.
        seed: Of the drawing.
    """

    classifier: Classifier
    share: float
    seed: int

    @property
    def width(self) -> int:
        """D."""
        return self.classifier.width

    def look(self, images_BCHW: torch.Tensor, sample_B: np.ndarray) -> torch.Tensor:
        """Features [B, D]; which patches are seen is a function of (seed, sample)."""
        if self.share == 1:
            return self.classifier.features(images_BCHW)
        num = self.classifier.num_patches
        keys_B = mask_keys(self.seed, np.zeros_like(sample_B), sample_B, 0).to(images_BCHW.device)
        keep_BK, _ = random_masking(mask_noise(keys_B, num), max(1, round(self.share * num)))
        return self.classifier.features(images_BCHW, keep_BK)


def _s(since: float) -> str:
    return f"{time.perf_counter() - since:.0f} s"
