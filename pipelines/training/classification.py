"""What the protocols that train a classifier learn: its model, loss and score."""

import numpy as np
import torch
from timm.data import Mixup  # pyright: ignore[reportPrivateImportUsage]
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import nn
from torch.nn.functional import cross_entropy

from mae_core.classifier import Classifier, freeze, make_lars, parameter_groups, training_flops
from pipelines.data.readers import MicroBatch
from pipelines.errors import UserError
from pipelines.training.scores import confusion, top1
from pipelines.training.transfer_worker import Worker


def make_classifier(worker: Worker, seed: int, *, random: bool = False) -> Classifier:
    """The classifier that a seed begins with, on the pretrained encoder or on a random one."""
    transfer = worker.transfer
    head_only = transfer.protocol == "linear" or (transfer.protocol == "partial" and transfer.blocks[0] == 0)
    model = Classifier(
        worker.encoder(seed, random=random),
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

    def model(self, seed: int, *, random: bool = False) -> Classifier:
        """What a seed begins with."""
        return make_classifier(self._worker, seed, random=random)

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
        images_BCHW, target = self.augmented(images_BCHW, label_B, np.flatnonzero(weight_B))
        counts_B = torch.from_numpy(weight_B).to(self._worker.device)
        with self._worker.autocast():
            logits_BC = model(images_BCHW, counts_B > 0)
        # Mixed targets are smoothed already.
        smoothing = 0.0 if self._mixup else self._smoothing
        loss_B = cross_entropy(logits_BC.float(), target, reduction="none", label_smoothing=smoothing)
        return (loss_B * counts_B).sum()

    def augmented(
        self, images_BCHW: torch.Tensor, label_B: torch.Tensor, real_R: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Erases and mixes images; draws from global generators.

        Rows that only fill a batch up take no part in it: what is drawn, and what an image is mixed with, is as if
        they were not there. With an odd number of images the first is mixed with a second copy of the next, and an
        image that is alone is not mixed.

        Args:
            images_BCHW: Normalised; may be changed.
            label_B: int64, from 0 on.
            real_R: The rows that count.

        Returns:
            The images, and ``label_B``, or where images are mixed float32 targets [B, C], 0 for the other rows.
        """
        if not self._erase and not self._mixup:
            return images_BCHW, label_B
        rows_R = torch.from_numpy(real_R).to(images_BCHW.device)
        images_RCHW, labels_R = images_BCHW[rows_R], label_B[rows_R]
        if self._erase:
            images_RCHW = self._erase(images_RCHW)
        if not self._mixup:
            return images_BCHW.index_copy(0, rows_R, images_RCHW), label_B
        num, num_classes = len(real_R), self._worker.num_classes
        if num < 2:
            target_RC = mixup_target(labels_R, num_classes, 1.0, self._smoothing)
        else:
            # timm mixes the first row with the last, the second with the last but one, and so on.
            more = slice(1, 1 + num % 2)
            images_RCHW, target_RC = self._mixup(
                torch.cat([images_RCHW, images_RCHW[more]]), torch.cat([labels_R, labels_R[more]])
            )
        target_BC = target_RC.new_zeros(len(label_B), num_classes).index_copy(0, rows_R, target_RC[:num])
        return images_BCHW.index_copy(0, rows_R, images_RCHW[:num]), target_BC

    def confusion(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The confusion matrix [C, C] of a micro-batch: rows true, columns predicted."""
        label_B, weight_B = self._labels(batch)
        with self._worker.autocast():
            logits_BC = model(self._worker.images(batch))
        predicted_B = logits_BC.argmax(dim=1)
        real = torch.from_numpy(weight_B > 0)
        return confusion(predicted_B.cpu()[real], label_B.cpu()[real], self._worker.num_classes)

    def score(self, confusion_CC: torch.Tensor) -> float:
        """Accuracy in percent."""
        return top1(confusion_CC)

    def sheet(self, model: nn.Module, batch: MicroBatch) -> None:
        """Nothing: a class is no picture."""

    def flops(self, model: Classifier) -> int:
        """Of one training step an image."""
        return training_flops(model)

    def _labels(self, batch: MicroBatch) -> tuple[torch.Tensor, np.ndarray]:
        """Labels and weights [B] of a micro-batch, the labels on the device; what has no label weighs 0.

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
        weight_B = np.where(label_B >= 0, batch.weight_B, 0).astype(np.float32)
        return torch.from_numpy(label_B.clip(0)).to(self._worker.device), weight_B
