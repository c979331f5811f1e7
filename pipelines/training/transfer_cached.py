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
from pipelines.training.probing import Features, Prober
from pipelines.training.scores import confusion, read_scored, top1, write_scored
from pipelines.training.transfer_worker import Worker


def score_cached(worker: Worker) -> None:
    """Scores with the seeds that have no score yet, on features that all workers compute once; rank 0 scores."""
    store, transfer = worker.job.store, worker.transfer
    here = worker.rank == 0
    seeds = worker.agree([seed for seed in transfer.seeds if read_scored(store, seed) is None] if here else None)
    if not seeds:
        return
    values = worker.config.model_dump()
    values["probe"]["pool"] = transfer.pool
    values["probe"]["crop_share"] = worker.crop_share
    values["data"]["image_size"] = worker.image_size
    values["batch"]["micro_size"] = transfer.train.micro_size
    limit = transfer.data.max_unreadable
    prober = Prober(Config.model_validate(values), worker.crew, worker.device, worker.autocast, limit)
    began = time.perf_counter()
    share = transfer.visible[0]
    # All images are read once, for all that look at them.
    looks: list[Any] = [
        Look(make_classifier(worker, 0).eval(), share, seed) for seed in (seeds if share < 1 else seeds[:1])
    ]
    known = prober.extract(looks, worker.job.train)
    asked = prober.extract(looks, worker.job.test)
    worker.left_out(prober.skipped)
    unreadable = worker.take_unreadable()
    if known is None or asked is None:
        return
    worker.say(f"features of {len(known[0].labels_N) + len(asked[0].labels_N):,} images in {_s(began)}")
    last = len(looks) - 1
    for i, seed in enumerate(seeds):
        scored = _score(worker, known[min(i, last)], asked[min(i, last)], seed)
        write_scored(store, {**scored, "unreadable": unreadable})


def _score(worker: Worker, known: Features, asked: Features, seed: int) -> dict[str, Any]:
    began = time.perf_counter()
    is_val_N = np.isin(known.sample_N, worker.val_ids)
    learn_N = np.flatnonzero(np.isin(known.sample_N, worker.members(seed)))
    val_N = np.flatnonzero(is_val_N)
    if not len(learn_N) or not len(val_N):
        raise UserError(
            f"data.train: {len(known.labels_N)} labelled images leave {len(learn_N)} to learn from and "
            f"{len(val_N)} for validation: give more images, or other shares"
        )
    features, labels = known.features_ND, known.labels_N
    if worker.transfer.protocol == "knn":

        def predict(features_MD: torch.Tensor) -> torch.Tensor:
            return knn_predict(
                features[learn_N],
                labels[learn_N],
                features_MD,
                num_classes=worker.num_classes,
                k=worker.transfer.knn_k,
            )

        chosen: dict[str, Any] = {"k": worker.transfer.knn_k}
    else:
        probe = linear_probe(
            features[learn_N],
            labels[learn_N],
            features[val_N],
            labels[val_N],
            num_classes=worker.num_classes,
            seed=seed,
        )
        predict, chosen = probe.predict, {"learning_rate": probe.learning_rate}
    val_CC = confusion(predict(features[val_N]), labels[val_N], worker.num_classes)
    test_CC = confusion(predict(asked.features_ND), asked.labels_N, worker.num_classes)
    worker.say(f"seed {seed}  {worker.transfer.protocol}  validation {top1(val_CC):.2f} %  ({_s(began)})")
    return {
        "seed": seed,
        "val": val_CC.tolist(),
        "test": test_CC.tolist(),
        "seconds": time.perf_counter() - began,
        "chosen": chosen,
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
