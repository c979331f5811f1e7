"""What the protocol ``segment`` learns: a linear head on frozen patch tokens."""

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from mae_core.classifier import parameter_groups
from mae_core.mask_images import IGNORE
from mae_core.segmentation import Segmenter, confusion, segmentation_flops
from mae_core.sheets import segmentation_sheet
from pipelines.data.readers import MicroBatch
from pipelines.errors import UserError
from pipelines.training.scores import miou
from pipelines.training.transfer_worker import Worker

_SHOWN = 8  # test images in the sheet


class Segmentation:
    """Learns the classes of pixels, by the recipe in the transfer's configuration.

    Args:
        worker: The rank that learns.
    """

    def __init__(self, worker: Worker):
        self._worker = worker

    def model(self, seed: int, *, random: bool = False) -> Segmenter:
        """What a seed begins with."""
        worker = self._worker
        encoder = worker.encoder(seed, random=random)
        model = Segmenter(encoder, worker.num_classes, image_size=worker.image_size, seed=seed)
        return model.to(worker.device)

    def optimizer(self, model: Segmenter) -> torch.optim.Optimizer:
        """AdamW on the head, its rates 0."""
        train, lr = self._worker.transfer.train, torch.zeros((), device=self._worker.device)
        groups = parameter_groups(model, lr, train.weight_decay)
        return torch.optim.AdamW(groups, lr=lr, betas=train.betas, fused=True)

    def loss(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The cross entropies of a micro-batch's images, summed.

        An image's is the mean over all its pixels, with 0 for those that do not count: the divisor is the same
        whoever computes it. What weighs 0 has no pixel that counts.
        """
        target_BHW = self._masks(batch)
        with self._worker.autocast():
            counts_B = torch.from_numpy(batch.weight_B > 0).to(self._worker.device)
            logits_BCHW = model(self._worker.images(batch), counts_B)
        loss_BHW = cross_entropy(logits_BCHW.float(), target_BHW, ignore_index=IGNORE, reduction="none")
        return loss_BHW.mean(dim=(1, 2)).sum()

    def confusion(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The confusion matrix [C, C] of a micro-batch's pixels: rows true, columns predicted."""
        target_BHW = self._masks(batch)
        with self._worker.autocast():
            predicted_BHW = model(self._worker.images(batch)).argmax(dim=1)
        return confusion(predicted_BHW, target_BHW, self._worker.num_classes).cpu()

    def score(self, confusion_CC: torch.Tensor) -> float:
        """Mean intersection over union in percent."""
        return miou(confusion_CC)

    def sheet(self, model: nn.Module, batch: MicroBatch) -> Image.Image | None:
        """Images, label maps and what the model makes of them; None where no image has a mask."""
        mask_BHW = batch.mask_BHW
        assert mask_BHW is not None, "the stream was not asked for masks"
        shown = np.flatnonzero((batch.weight_B > 0) & (mask_BHW != IGNORE).any(axis=(1, 2)))[:_SHOWN]
        if not len(shown):
            return None
        with self._worker.autocast():
            predicted_BHW = model(self._worker.images(batch)).argmax(dim=1)
        return segmentation_sheet(
            batch.images_BHWC[shown], mask_BHW[shown], predicted_BHW.cpu().numpy()[shown], self._worker.job.classes
        )

    def flops(self, model: Segmenter) -> int:
        """Of one training step an image."""
        return segmentation_flops(model)

    def _masks(self, batch: MicroBatch) -> torch.Tensor:
        """The masks of a micro-batch, int64 [B, H, W].

        Raises:
            UserError: A value is none of the classes.
        """
        mask_BHW, num_classes = batch.mask_BHW, self._worker.num_classes
        assert mask_BHW is not None, "the stream was not asked for masks"
        wrong_BHW = (mask_BHW >= num_classes) & (mask_BHW != IGNORE)
        if wrong_BHW.any():
            row = int(np.argmax(wrong_BHW.any(axis=(1, 2))))
            value = mask_BHW[row][wrong_BHW[row]].max()
            raise UserError(
                f"the mask of sample {batch.sample_B[row]} has the value {value}, and there are {num_classes} classes: "
                f"give --data.num-classes, or mend the masks ({IGNORE}: does not count)"
            )
        return torch.from_numpy(mask_BHW.astype(np.int64)).to(self._worker.device)
