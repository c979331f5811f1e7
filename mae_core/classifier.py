"""A classifier on a pretrained encoder: fine-tuning, partial fine-tuning and the linear probe.

Shapes: B batch, C channels H W image (``images_BCHW``) or C classes (``logits_BC``), N patches, K kept, S class tokens,
D encoder width.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from timm.layers.drop import DropPath, calculate_drop_path_rates
from timm.models.vision_transformer import VisionTransformer
from timm.optim import (
    Lars,  # pyright: ignore[reportPrivateImportUsage]
    param_groups_layer_decay,  # pyright: ignore[reportPrivateImportUsage]
)
from torch import nn

from mae_core.masking import take
from mae_core.model import MaskedAutoencoder, pooled

# Parameters of no module of their own; the official code leaves them without weight decay in fine-tuning.
_TOKENS = ("encoder.cls_token", "encoder.reg_token", "encoder.pos_embed")


class Classifier(nn.Module):
    """A copy of an autoencoder's encoder with a linear classifier on it; everything trains until ``freeze``.

    The features are those of ``MaskedAutoencoder.features``: pooled after the final norm. The official code does
    so where it takes the class token, but where it takes the mean of the patches for fine-tuning, it pools first
    and puts a new, untrained norm behind. Here the pretrained norm stays where it was trained, so that a
    classifier, the probes and a frozen encoder all speak of the same features, whatever the pooling.

    From scratch is a classifier on a new ``MaskedAutoencoder``. Keys in the state dict are timm's behind
    ``encoder.``, and ``head.``. Attributes for callers: ``image_size``, ``patch_size``, ``channels``,
    ``grid_size``, ``num_patches`` (N), ``width`` (D), ``class_tokens`` (S), ``num_classes``, ``pool``,
    ``trained_blocks`` (as given to ``freeze``, infinity for everything).
    """

    def __init__(
        self,
        autoencoder: MaskedAutoencoder,
        num_classes: int,
        *,
        pool: Literal["mean", "cls"] = "mean",
        head: Literal["linear", "batchnorm"] = "linear",
        image_size: int | tuple[int, int] | None = None,
        drop_path: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Copies the encoder, on its own device, and adds a head.

        Args:
            autoencoder: Left as it is; the classifier shares no memory with it.
            num_classes: C.
            pool: Mean of the patches, or the class token (of several their mean).
            head: ``linear`` for fine-tuning, its weights drawn at 2e-5 so that the first steps leave the encoder
                alone; ``batchnorm`` for linear probing, with a BatchNorm without affine parameters before it
                (the paper's appendix A.1) and weights drawn at 0.01. Both deviations are the official code's.
            image_size: Pixels a side, or (H, W); None means the autoencoder's. The position table is resampled
                to another grid (timm's bicubic one).
            drop_path: Drop path rate of the last block; it grows linearly from 0 in the first. The noise comes
                from the device's global generator.
            seed: Of the head's weights.

        Raises:
            ValueError: The image size is not divisible by the patch size, the rate is not in [0, 1), or there
                are no classes.
        """
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"a classifier of {num_classes} classes: expected at least 1")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop path rate {drop_path} is not in [0, 1): the paper's is 0.1 (ViT-H: 0.2)")
        size = autoencoder.image_size if image_size is None else image_size
        H, W = (size, size) if isinstance(size, int) else size
        patch = autoencoder.patch_size
        if min(H, W) < 1 or H % patch or W % patch:
            raise ValueError(f"image size {H}x{W} is not divisible by the patch size {patch}: change the image size")
        self.image_size = (H, W)
        self.patch_size = patch
        self.channels = autoencoder.channels
        self.grid_size = (H // patch, W // patch)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.width = autoencoder.width
        self.class_tokens = autoencoder.class_tokens
        self.num_classes = num_classes
        self.pool: Literal["mean", "cls"] = pool
        self.trained_blocks = math.inf

        self.encoder: VisionTransformer = copy.deepcopy(autoencoder.encoder)
        self.encoder.set_input_size(self.image_size)
        rates: Any = calculate_drop_path_rates(drop_path, len(self.encoder.blocks))
        block: Any
        for block, rate in zip(self.encoder.blocks, rates, strict=True):
            block.drop_path1, block.drop_path2 = (DropPath(rate) if rate else nn.Identity() for _ in range(2))
        # The position table too, that pretraining keeps fixed: the official code trains it in fine-tuning.
        self.encoder.requires_grad_(True)
        projection = self.encoder.patch_embed.proj.weight
        linear = make_linear(self.width, num_classes, std=0.01 if head == "batchnorm" else 2e-5, seed=seed)
        if head == "batchnorm":
            self.head = ProbeHead(BatchNorm(self.width), linear)
        else:
            self.head = linear
        self.head.to(projection.device, projection.dtype)
        self.train()

    def encode(self, images_BCHW: torch.Tensor, keep_BK: torch.Tensor | None = None) -> torch.Tensor:
        """Encodes images; what is frozen runs without a graph.

        Args:
            images_BCHW: Floating point, normalised as in pretraining.
            keep_BK: int64 indices of the visible patches, in any order; None means all of them.

        Returns:
            [B, S + K, D] after the final norm: the class tokens, then the patches in the order of ``keep_BK``.

        Raises:
            ValueError: The images are not of this classifier's shape.
        """
        expected = [self.channels, *self.image_size]
        if list(images_BCHW.shape[1:]) != expected:
            raise ValueError(
                f"images of shape {list(images_BCHW.shape)} do not fit this classifier, that takes {expected} after "
                "the batch: resize them, or build it with their image size"
            )
        encoder, S = self.encoder, self.class_tokens
        assert encoder.pos_embed is not None, "a plain ViT has a position table"
        blocks, num_frozen = list(encoder.blocks), self._num_frozen_blocks()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trained_blocks == math.inf):
            class_1SD = torch.cat([t for t in (encoder.cls_token, encoder.reg_token) if t is not None], dim=1)
            class_BSD = class_1SD.expand(len(images_BCHW), -1, -1)
            tokens = torch.cat([class_BSD, encoder.patch_embed(images_BCHW)], dim=1) + encoder.pos_embed
            if keep_BK is not None:
                tokens = torch.cat([tokens[:, :S], take(tokens[:, S:], keep_BK)], dim=1)
            for block in blocks[:num_frozen]:
                tokens = block(tokens)
        # Half a block and a frozen norm need no guard: neither their input nor their weights ask for a gradient.
        for block in blocks[num_frozen:]:
            tokens = block(tokens)
        return encoder.norm(tokens)

    def features(self, images_BCHW: torch.Tensor, keep_BK: torch.Tensor | None = None) -> torch.Tensor:
        """What the head sees: ``encode`` pooled to [B, D], over the visible patches alone where it is the mean."""
        return pooled(self.encode(images_BCHW, keep_BK), self.class_tokens, self.pool)

    def forward(self, images_BCHW: torch.Tensor, counts_B: torch.Tensor | None = None) -> torch.Tensor:
        """Classifies whole images, given as to ``encode``; returns ``logits_BC``.

        Args:
            images_BCHW: The images.
            counts_B: Which of them are images at all, for the statistics of a head's BatchNorm; None: all.
        """
        features_BD = self.features(images_BCHW)
        return self.head(features_BD, counts_B) if isinstance(self.head, ProbeHead) else self.head(features_BD)

    def train(self, mode: bool = True) -> "Classifier":
        """As ``nn.Module.train``, but what is frozen stays in evaluation mode: no drop path there."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """The layers from below, as timm asks for them; the norm and the head are the last one together."""
        return {
            "stem": r"^encoder\.(?:cls_token|reg_token|pos_embed|patch_embed)",
            "blocks": r"^encoder\.blocks\.(\d+)",
        }

    def _num_frozen_blocks(self) -> int:
        """Blocks that are frozen as a whole."""
        depth = len(self.encoder.blocks)
        return depth - math.ceil(min(self.trained_blocks, depth))

    def _frozen_modules(self) -> Iterator[nn.Module]:
        if self.trained_blocks == 0:
            yield self.encoder
        elif self.trained_blocks < math.inf:
            yield self.encoder.patch_embed
            yield from list(self.encoder.blocks)[: self._num_frozen_blocks()]
        if self.trained_blocks == 0.5:
            last: Any = self.encoder.blocks[-1]
            yield from (last.norm1, last.attn, last.drop_path1)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm of features [B, D] without affine parameters, in training over the batches of all workers together.

    torch's ``SyncBatchNorm`` does so on GPUs alone. Its rows are those of a frozen encoder: no gradient goes through.
    Rows that only fill up a batch are normalised, and left out of the statistics. Without such and without a process
    group it is ``nn.BatchNorm1d``, with its state dict.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False, eps=1e-6)

    def forward(self, input: torch.Tensor, counts_B: torch.Tensor | None = None) -> torch.Tensor:
        """Normalises features, in their own dtype.

        Args:
            input: [B, D].
            counts_B: bool, which rows the statistics are of; None: all.
        """
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not self.training or (counts_B is None and not together):
            return super().forward(input)
        assert not input.requires_grad, "no gradient goes through the statistics of other workers"
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        features_BD = input.float()
        counts_B1 = features_BD.new_ones(len(input), 1) if counts_B is None else counts_B[:, None].float()
        # The last column becomes the number of rows.
        sums = torch.cat([features_BD * counts_B1, counts_B1], dim=1).sum(dim=0)
        if together:
            dist.all_reduce(sums)
        rows = sums[-1].clamp(min=1)
        mean_D = sums[:-1] / rows
        # Around the common mean: a difference of second moments would cancel.
        squares_D = ((features_BD - mean_D).square() * counts_B1).sum(dim=0)
        if together:
            dist.all_reduce(squares_D)
        # Without a row there is nothing to remember, and of a single one no variance.
        self.running_mean.lerp_(mean_D, self.momentum * (sums[-1] > 0))
        self.running_var.lerp_(squares_D / (rows - 1).clamp(min=1), self.momentum * (sums[-1] > 1))
        self.num_batches_tracked += 1
        return ((features_BD - mean_D) * (squares_D / rows + self.eps).rsqrt()).to(input.dtype)


class ProbeHead(nn.Sequential):
    """A BatchNorm and a linear classifier."""

    def forward(self, input: torch.Tensor, counts_B: torch.Tensor | None = None) -> torch.Tensor:
        """Classifies features [B, D]; ``counts_B`` as ``BatchNorm`` takes it."""
        norm, linear = self
        return linear(norm(input, counts_B))


def make_linear(width: int, num_classes: int, *, std: float, seed: int) -> nn.Linear:
    """A linear classifier on the current default device: truncated normal weights, biases 0.

    Args:
        width: Of the features.
        num_classes: C.
        std: Of the weights; they are cut at -2 and 2, as in the official code.
        seed: Of a generator of its own; global generators are not touched.
    """
    weight_CD = torch.empty(num_classes, width, device="cpu")
    nn.init.trunc_normal_(weight_CD, std=std, generator=torch.Generator("cpu").manual_seed(seed))
    linear = nn.Linear(width, num_classes, device="meta").to_empty(device=torch.get_default_device())
    with torch.no_grad():
        linear.weight.copy_(weight_CD)
        linear.bias.zero_()
    return linear


def freeze(classifier: Classifier, blocks: float | None) -> None:
    """Chooses what trains: partial fine-tuning (section 4.3 and figure 9 of the paper).

    The head always trains, and the final norm wherever a block does, or half of one. The embedding (patch
    projection, class token, position table) trains with everything only, not with the last block of all.

    Args:
        classifier: Changed in place: its parameters' ``requires_grad``, and the mode of its modules.
        blocks: 0 for the head alone, 0.5 for the MLP of the last block (with its norm), K for the last K
            blocks, None or infinity for everything.

    Raises:
        ValueError: Anything else.
    """
    depth = len(classifier.encoder.blocks)
    trained = math.inf if blocks is None else blocks
    if trained not in (0, 0.5, *range(1, depth + 1), math.inf):
        raise ValueError(
            f"{blocks} trained blocks: expected 0 (the head alone), 0.5 (the MLP of the last block), 1 to {depth} "
            "(the last blocks) or None (everything)"
        )
    classifier.trained_blocks = float(trained)
    classifier.requires_grad_(True)
    for name, parameter in classifier.named_parameters():
        if name in _TOKENS:
            parameter.requires_grad_(trained == math.inf)
    for module in classifier._frozen_modules():
        module.requires_grad_(False)
    classifier.train(classifier.training)


def parameter_groups(
    classifier: Classifier, lr: float | torch.Tensor, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters, with layer-wise lr decay (Clark et al., 2020; the paper's appendix A.1).

    The head and the final norm learn at the full rate, the last block at ``layer_decay`` times it, the one before
    at ``layer_decay ** 2``, and so on down to the embedding. 1-D parameters, the class token and the position
    table do not decay. Both as in the official code's fine-tuning.

    Args:
        classifier: The classifier.
        lr: Full learning rate. Given as a tensor, each group gets one of its own.
        weight_decay: Of what decays.
        layer_decay: Factor a layer; 1 for none.

    Returns:
        Groups as ``torch.optim`` takes them, their ``params`` as (name, parameter) pairs. A schedule sets a group's
        ``lr`` to its own times the group's ``lr_scale``.
    """
    names = {parameter: name for name, parameter in classifier.named_parameters()}
    groups = param_groups_layer_decay(
        classifier, weight_decay=weight_decay, no_weight_decay_list=_TOKENS, layer_decay=layer_decay
    )
    return [
        {**group, "params": [(names[parameter], parameter) for parameter in group["params"]],
         "lr": lr * group["lr_scale"]}
        for group in groups
    ]  # fmt: skip


def make_lars(classifier: Classifier, lr: float) -> Lars:
    """LARS for the linear probe (appendix A.1 of the paper): momentum 0.9, no weight decay, trust coefficient 0.001.

    The trust ratio scales weights alone; biases and other 1-D parameters are left to plain SGD with momentum.

    Args:
        classifier: Its trainable parameters.
        lr: Learning rate, as from ``peak_lr``.
    """
    named = [(name, parameter) for name, parameter in classifier.named_parameters() if parameter.requires_grad]
    groups = [
        # Without always_adapt timm's LARS is plain SGD at a weight decay of 0.
        {"params": [pair for pair in named if pair[1].ndim > 1], "always_adapt": True},
        {"params": [pair for pair in named if pair[1].ndim <= 1], "always_adapt": False},
    ]
    return Lars(groups, lr=lr, momentum=0.9, trust_coeff=0.001)  # pyright: ignore[reportArgumentType]


def training_flops(classifier: Classifier) -> int:
    """FLOPs of one training step an image: matrix products alone, two FLOPs a multiply-add.

    Forward of everything, and twice that of what trains for its backward: the gradients of its weights and of its
    input. The lowest layer that trains has no use for the latter where it is the patch projection or the head; in a
    block it has, as the norm before trains too. Recomputation (in a fused attention) does not count.
    """
    mlp: Any = classifier.encoder.blocks[0].mlp
    depth, D, T = len(classifier.encoder.blocks), classifier.width, classifier.class_tokens + classifier.num_patches
    embed = 2 * classifier.num_patches * D * classifier.channels * classifier.patch_size**2
    mlp_half = 4 * T * D * mlp.fc1.out_features
    block = 8 * T * D**2 + 4 * T**2 * D + mlp_half
    head = 2 * D * classifier.num_classes
    forward, trained = embed + depth * block + head, classifier.trained_blocks
    if trained == 0:
        return forward + head
    if trained == 0.5:
        return forward + 2 * (mlp_half + head)
    if trained < math.inf:
        return forward + 2 * (int(trained) * block + head)
    return 3 * forward - embed
