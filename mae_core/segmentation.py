"""Semantic segmentation on patch features: a linear head, and the mean intersection over union.

Shapes: B batch, N patches (h x w of them), D width, C classes, H W mask.
"""

import torch
from torch import nn

from mae_core.classifier import BatchNorm, Classifier, freeze, make_linear, training_flops
from mae_core.mask_images import IGNORE
from mae_core.model import MaskedAutoencoder


class PatchHead(nn.Module):
    """Classifies each patch linearly, after a BatchNorm without affine parameters, and upsamples the logits.

    In the manner of the linear evaluation of DINOv2 (Oquab et al., 2023, section 7.4), on the last layer alone.
    """

    def __init__(self, width: int, num_classes: int, grid_size: tuple[int, int], *, seed: int = 0) -> None:
        """Builds the head on the current default device.

        Args:
            width: D.
            num_classes: C.
            grid_size: Patches down and across (h, w).
            seed: Of the weights; global generators are not touched.
        """
        super().__init__()
        self.grid_size = grid_size
        self.norm = BatchNorm(width)
        self.linear = make_linear(width, num_classes, std=0.01, seed=seed)

    def forward(
        self, patches_BND: torch.Tensor, size: tuple[int, int], counts_B: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Classifies the pixels of masks.

        Args:
            patches_BND: All patch tokens row by row, without the class token.
            size: (H, W) of the masks.
            counts_B: Which images' patches the statistics of the BatchNorm are of; None: all.

        Returns:
            ``logits_BCHW``, upsampled bilinearly.

        Raises:
            ValueError: There are not as many tokens as patches in the grid.
        """
        B, N, _ = patches_BND.shape
        h, w = self.grid_size
        if h * w != N:
            raise ValueError(f"{N} tokens for a grid of {h}x{w} patches: give all patches, without the class token")
        counts = None if counts_B is None else counts_B.repeat_interleave(N)
        logits = self.linear(self.norm(patches_BND.flatten(0, 1), counts))  # [B * N, C]
        logits_BChw = logits.view(B, h, w, -1).permute(0, 3, 1, 2)
        return nn.functional.interpolate(logits_BChw, size=size, mode="bilinear", align_corners=False)


class Segmenter(Classifier):
    """A frozen copy of an autoencoder's encoder with a ``PatchHead`` on it, that alone trains."""

    def __init__(
        self,
        autoencoder: MaskedAutoencoder,
        num_classes: int,
        *,
        image_size: int | tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        """Copies the encoder, on its own device, and adds the head.

        Args:
            autoencoder: Left as it is.
            num_classes: C.
            image_size: Pixels a side, or (H, W), of images and masks; None means the autoencoder's.
            seed: Of the head's weights.

        Raises:
            ValueError: The image size is not divisible by the patch size, or there are no classes.
        """
        super().__init__(autoencoder, num_classes, image_size=image_size)
        projection = self.encoder.patch_embed.proj.weight
        self.head = PatchHead(self.width, num_classes, self.grid_size, seed=seed)
        self.head.to(projection.device, projection.dtype)
        freeze(self, 0)

    def forward(self, images_BCHW: torch.Tensor, counts_B: torch.Tensor | None = None) -> torch.Tensor:
        """Classifies every pixel of images, both given as to ``Classifier``; returns ``logits_BCHW`` of C classes."""
        return self.head(self.encode(images_BCHW)[:, self.class_tokens :], self.image_size, counts_B)


def segmentation_flops(segmenter: Segmenter) -> int:
    """FLOPs of one training step an image, as ``training_flops`` counts them."""
    head = 2 * segmenter.width * segmenter.num_classes
    # Forward and the gradient of its weights, for each patch instead of once.
    return training_flops(segmenter) + 2 * (segmenter.num_patches - 1) * head


def confusion(pred: torch.Tensor, target: torch.Tensor, num_classes: int, ignore: int = IGNORE) -> torch.Tensor:
    """Counts pixels by true (row) and predicted (column) class; counts of batches and of workers add up.

    Args:
        pred: Integer classes, of any shape.
        target: True classes, of the same shape.
        num_classes: C.
        ignore: Value of pixels in ``target`` that do not count.

    Returns:
        int64 ``confusion_CC``, on the device of ``pred``.

    Raises:
        ValueError: The shapes differ, or a class is out of range.
    """
    if pred.shape != target.shape:
        raise ValueError(f"predictions of shape {list(pred.shape)} for a target of shape {list(target.shape)}")
    target = target.to(pred.device, torch.int64)
    counts = target != ignore
    pred, target = pred[counts].long(), target[counts]
    for what, classes in (("predicted", pred), ("true", target)):
        if bool(((classes < 0) | (classes >= num_classes)).any()):
            raise ValueError(
                f"{what} classes reach from {classes.min()} to {classes.max()}: expected 0 to {num_classes - 1}, "
                f"and {ignore} for what does not count"
            )
    return torch.bincount(target * num_classes + pred, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion_CC: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each class, in percent: float64 [C], NaN where it is neither true nor predicted.

    Args:
        confusion_CC: From ``confusion``, summed over the whole data first.
    """
    hits_C = confusion_CC.diagonal().double()
    union_C = (confusion_CC.sum(dim=0) + confusion_CC.sum(dim=1)).double() - hits_C
    return 100 * hits_C / union_C


def mean_iou(confusion_CC: torch.Tensor) -> float:
    """Mean over the classes of intersection over union, in percent.

    A class that is neither in the masks nor predicted anywhere is left out of the mean.

    Args:
        confusion_CC: From ``confusion``, summed over the whole data first.

    Raises:
        ValueError: No pixel was counted.
    """
    if not confusion_CC.any():
        raise ValueError("no pixel was counted: the masks are empty, or all of them are to be ignored")
    return class_iou(confusion_CC).nanmean().item()
