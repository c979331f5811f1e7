"""What the protocols that train a classifier learn: its model, loss and score."""

import numpy as np
import torch
from timm.data import Mixup  # pyright: ignore[reportPrivateImportUsage]
from timm.data.random_erasing import RandomErasing
from torch import nn
from torch.nn.functional import cross_entropy

from mae_core.classifier import Classifier, freeze, make_lars, parameter_groups, training_flops
from pipelines.data.readers import MicroBatch
from pipelines.errors import UserError
from pipelines.training.scores import confusion, top1
from pipelines.training.transfer_worker import Worker


def make_classifier(worker: Worker, seed: int) -> Classifier:
    """The classifier that a seed begins with."""
    transfer = worker.transfer
    head_only = transfer.protocol == "linear" or (transfer.protocol == "partial" and transfer.blocks[0] == 0)
    model = Classifier(
        worker.encoder(seed),
        worker.num_classes,
        pool=transfer.pool,
        head="batchnorm" if head_only else "linear",
        image_size=worker.image_size,
        drop_path=transfer.train.drop_path,
        seed=seed,
    )
    freeze(model, {"linear": 0, "partial": transfer.blocks[0]}.get(transfer.protocol))
    return model.to(worker.device)


class Classification:
    """Learns the classes of whole images, by the recipe in the transfer's configuration.

    Args:
        worker: The rank that learns.
    """

    def __init__(self, worker: Worker):
        train = worker.transfer.train
        self._worker = worker
        self._smoothing = train.smoothing
        self._mixup = None
        if train.mixup or train.cutmix:
            self._mixup = Mixup(
                mixup_alpha=train.mixup,
                cutmix_alpha=train.cutmix,
                label_smoothing=train.smoothing,
                num_classes=worker.num_classes,
            )
        self._erase = None
        if train.erasing:
            self._erase = RandomErasing(train.erasing, mode="pixel", device=str(worker.device))  # type: ignore[arg-type]

    @property
    def pairs(self) -> bool:
        """Whether images are mixed by pairs."""
        return self._mixup is not None

    def model(self, seed: int) -> Classifier:
        """What a seed begins with."""
        return make_classifier(self._worker, seed)

    def optimizer(self, model: Classifier) -> torch.optim.Optimizer:
        """The recipe's optimiser, its rates 0."""
        train = self._worker.transfer.train
        if train.optimizer == "lars":
            return make_lars(model, 0.0)
        lr = torch.zeros((), device=self._worker.device)
        groups = parameter_groups(model, lr, train.weight_decay, train.layer_decay)
        return torch.optim.AdamW(groups, lr=lr, betas=train.betas, fused=True)

    def loss(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The losses of a micro-batch's images, each times its weight, summed."""
        images_BCHW = self._worker.images(batch)
        label_B, weight_B = self._labels(batch)
        target: torch.Tensor = label_B
        if self._erase:
            images_BCHW = self._erase(images_BCHW)
        if self._mixup:
            images_BCHW, target = self._mixup(images_BCHW, label_B)
        with self._worker.autocast():
            logits_BC = model(images_BCHW, weight_B > 0)
        # Mixed targets are smoothed already.
        smoothing = 0.0 if self._mixup else self._smoothing
        loss_B = cross_entropy(logits_BC.float(), target, reduction="none", label_smoothing=smoothing)
        return (loss_B * weight_B).sum()

    def confusion(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The confusion matrix [C, C] of a micro-batch: rows true, columns predicted."""
        label_B, weight_B = self._labels(batch)
        with self._worker.autocast():
            predicted_B = model(self._worker.images(batch)).argmax(dim=1)
        real = weight_B.cpu() > 0
        return confusion(predicted_B.cpu()[real], label_B.cpu()[real], self._worker.num_classes)

    def score(self, confusion_CC: torch.Tensor) -> float:
        """Accuracy in percent."""
        return top1(confusion_CC)

    def flops(self, model: Classifier) -> int:
        """Of one training step an image."""
        return training_flops(model)

    def _labels(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels and weights of a micro-batch; what has no label weighs 0.

        Raises:
            UserError: A label is none of the classes.
        """
        label_B, num_classes = batch.label_B, self._worker.num_classes
        if label_B.max() >= num_classes:
            row = int(label_B.argmax())
            raise UserError(
                f"sample {batch.sample_B[row]} has label {label_B[row]}, and there are {num_classes} classes: "
                "pack the shards from class folders, or mend their .cls files"
            )
        weight_B = torch.from_numpy(np.where(label_B >= 0, batch.weight_B, 0).astype(np.float32))
        return torch.from_numpy(label_B.clip(0)).to(self._worker.device), weight_B.to(self._worker.device)
