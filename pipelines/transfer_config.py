"""The configuration of a transfer: what is scored, by which protocol, on which labelled images.

Each protocol has a recipe of its own (the paper, appendix A.1, tables 9 to 11, and the official code where it
differs); flags go over it.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
import tyro
from pydantic import Field

from pipelines.config import SEED_LIMIT, ImageSize, Scale, Section, also

Protocol = Literal["knn", "linear-fast", "linear", "partial", "finetune", "scratch", "segment"]
CACHED: tuple[Protocol, ...] = ("knn", "linear-fast")
"""Protocols on features that are computed once."""


def _number(text: Any) -> Any:
    return math.inf if text == "all" else text


Blocks = Annotated[
    float,
    pydantic.BeforeValidator(_number),
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT|all",
        instance_from_str=lambda words: float(_number(words[0])),
        is_instance=lambda value: isinstance(value, float),
        str_from_instance=lambda value: ["all" if value == math.inf else f"{value:g}"],
    ),
]
"""A number of blocks; ``all``, in files and flags, is infinity."""


class TransferData(Section):
    """Labelled images."""

    train: str = ""
    """Labelled shards to learn from."""
    test: str = ""
    """Labelled shards to score on, when all that is chosen has been chosen."""
    val: str = ""
    """Labelled shards to choose on; empty: a share of data.train, val_share, is held out."""
    name: str = Field(default="", pattern=r"^[A-Za-z0-9._-]*$")
    """The data set's name in the record; empty: of the folder that holds data.train."""
    num_classes: int = Field(default=0, ge=0, le=255)
    """Of protocol segment: classes in the masks, whose values count from 0 on; 0: what the shards' manifest says."""
    class_names: tuple[str, ...] = ()
    """Of protocol segment: a name for each of the masks' classes, from 0 on; empty: their numbers."""
    image_size: ImageSize = (0, 0)
    """Height and width in pixels, one number: a square; 0: as in pretraining. The position table is resampled to
    another."""
    mean: tuple[float, ...] = ()
    """Mean of each channel, of values in 0..1; empty: as in pretraining, which a file of weights may say, else
    ImageNet's (grey: 0.5)."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel; empty: as mean."""
    val_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of data.train that is held out for choosing; none where data.val is given."""
    label_fraction: tuple[float, ...] = (1.0,)
    """Share of the other images of data.train that is learned from; several: one transfer for each, and a plot."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a training crop covers."""
    flip: bool = True
    """Mirror half of the training crops; never where pretraining did not."""
    auto_augment: str = ""
    """RandAugment in timm's words, as rand-m9-mstd0.5-inc1; empty: none."""
    crop_share: float = Field(default=0.0, ge=0, le=1)
    """Side of the central crop over the image's shorter side, for validation and test; 0: as in the run's probes."""
    deadline_s: float = Field(default=300.0, gt=0)
    """How long a store may fail to give a range of a shard before the transfer stops."""
    max_unreadable: float = Field(default=0.01, ge=0, le=1)
    """Share of the images that may be unreadable; a transfer ends where it is more."""
    cpus_per_task: float = Field(default=0.66, gt=0)
    """CPUs that one reading and decoding task claims from Ray."""


class TransferTrain(Section):
    """How the classifier learns."""

    epochs: float = Field(default=100.0, gt=0)
    """Passes over the training images."""
    global_size: Annotated[int, also("--batch.global-size")] = Field(default=1024, gt=0)
    """Images an optimiser step, over all workers."""
    micro_size: Annotated[int, also("--batch.micro-size")] = Field(default=64, gt=0)
    """Largest number of images that a worker takes at once, which mixup and cutmix mix with each other."""
    optimizer: Literal["adamw", "lars"] = "adamw"
    """lars: as in the paper's linear probe."""
    base_lr: Annotated[float, also("--optim.base-lr")] = Field(default=1e-3, gt=0)
    """Learning rate for 256 images a step; it scales with the global batch."""
    base_lrs: tuple[float, ...] = ()
    """Several in place of base_lr: each is trained with the first seed, and all seeds, of later commands too, take the
    best on the validation split."""
    warmup_epochs: Annotated[float, also("--optim.warmup-epochs")] = Field(default=5.0, ge=0)
    """Epochs over which the learning rate rises from 0."""
    weight_decay: Annotated[float, also("--optim.weight-decay")] = Field(default=0.05, ge=0)
    """Decay of the weights, not of biases and one-dimensional parameters."""
    betas: Annotated[tuple[float, float], also("--optim.betas")] = (0.9, 0.999)
    """AdamW's betas."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the learning rate from each layer to the one below."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Drop path rate of the last block."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing."""
    mixup: float = Field(default=0.0, ge=0)
    """Mixup's alpha; 0: none."""
    cutmix: float = Field(default=0.0, ge=0)
    """CutMix's alpha; 0: none."""
    erasing: float = Field(default=0.0, ge=0, le=1)
    """Probability of random erasing."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the moving average of the weights, which is what is scored; 0: none. It rises with the steps t, as
    (1 + t) / (10 + t), so that a short training is not spoilt by its beginning."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on a GPU, float32 on a CPU."""


class Transfer(Section):
    """Scores a pretrained encoder on labelled images; the score stands on the pretraining run.

    Protocols: knn (nearest neighbours), linear-fast (a linear classifier on cached features, at ten learning rates),
    linear (the paper's linear probe), partial (the last --blocks train), finetune (everything), scratch (everything,
    from random weights), segment (a linear classifier of patches, where samples carry masks).
    """

    run: Annotated[str, also("--run.name")] = ""
    """The pretraining run whose encoder is scored."""
    weights: str = ""
    """Or a file: an official MAE checkpoint (.pth) or a model.safetensors, with a decoder or without; here or at an
    s3://, gs:// or https:// address."""
    num_heads: int = Field(default=0, ge=0)
    """Of weights: heads of the encoder; 0: as the file says, else as ViTs of its width have."""
    storage: Annotated[str, also("--run.storage")] = "runs"
    """Folder or s3:// address that holds the runs."""
    protocol: Protocol = "linear-fast"
    """What is trained, and how."""
    blocks: tuple[Blocks, ...] = (4.0,)
    """Of protocol partial: the last blocks that train; 0: the head alone, 0.5: the MLP of the last block, all: the
    embedding too, which is the protocol finetune. Several: one transfer for each, and a plot."""
    sweep: bool = False
    """Of protocol partial: 0, 0.5, 1, 2, 4, ... blocks and all: the paper's figure 9."""
    visible: tuple[float, ...] = (1.0,)
    """Of protocols knn and linear-fast: share of the patches that the encoder sees. Several: a plot."""
    against_scratch: bool = False
    """Of protocol finetune: also from random weights, without layer decay and else alike."""
    seeds: tuple[int, ...] = (0,)
    """One training for each; the score is their mean. Those that have been scored already are not trained again."""
    pool: Annotated[Literal["mean", "cls"], also("--probe.pool")] = "mean"
    """Features: the mean of the patch tokens, or the class token."""
    knn_k: Annotated[int, also("--probe.knn-k")] = Field(default=20, gt=0)
    """Neighbours that vote."""
    random_baseline: bool = True
    """Also score a random encoder: of knn, linear-fast, linear and segment, where the encoder does not train. The first
    two read the images once for both; the others train one more head, with the first seed alone."""
    log_every: Annotated[int, also("--log.every")] = Field(default=20, gt=0)
    """Steps between two progress lines."""
    checkpoint_minutes: Annotated[float, also("--checkpoint.every-minutes")] = Field(default=5.0, gt=0)
    """Minutes between checkpoints."""
    experiment: Annotated[str, also("--run.experiment")] = "mae-on-ray"
    """MLflow experiment, where there is no pretraining run."""
    data: TransferData = TransferData()
    train: TransferTrain = TransferTrain()
    scale: Scale = Scale()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Transfer":
        if (
            not self.seeds
            or len(set(self.seeds)) != len(self.seeds)
            or not all(0 <= s < SEED_LIMIT for s in self.seeds)
        ):
            raise ValueError(f"seeds must be different numbers from 0 on, found {self.seeds}")
        for name, shares in (("visible", self.visible), ("data.label_fraction", self.data.label_fraction)):
            if not shares or not all(0 < share <= 1 for share in shares):
                raise ValueError(f"{name} takes shares above 0 and up to 1, found {shares}")
        if not self.blocks or min(self.blocks) < 0:
            raise ValueError(f"blocks takes numbers from 0 on, found {self.blocks}")
        if self.visible != (1.0,) and self.protocol not in CACHED:
            raise ValueError(f"visible is for the protocols {' and '.join(CACHED)}, not for {self.protocol}")
        if self.sweep and self.protocol != "partial":
            raise ValueError(f"sweep is for the protocol partial, not for {self.protocol}")
        if self.against_scratch and self.protocol != "finetune":
            raise ValueError(f"against_scratch is for the protocol finetune, not for {self.protocol}")
        if self.num_heads and not self.weights:
            raise ValueError("num_heads goes with weights: a run has its own")
        for name in ("num_classes", "class_names"):
            if getattr(self.data, name) and self.protocol != "segment":
                raise ValueError(f"data.{name} is for the protocol segment, not for {self.protocol}")
        train = self.train
        mixes = train.mixup or train.cutmix or train.erasing or train.smoothing or self.data.auto_augment
        if self.protocol == "segment" and (mixes or train.optimizer == "lars"):
            raise ValueError("segment takes no mixup, cutmix, erasing, smoothing, auto_augment and no lars")
        if not 0 < self.data.crop_scale[0] <= self.data.crop_scale[1] <= 1:
            raise ValueError(f"data.crop_scale must rise within (0, 1], found {self.data.crop_scale}")
        if not all(0 <= beta < 1 for beta in self.train.betas):
            raise ValueError(f"train.betas must lie in [0, 1), found {self.train.betas}")
        rates = self.train.base_lrs
        if len(set(rates)) != len(rates) or not all(0 < rate < math.inf for rate in rates):
            raise ValueError(f"train.base_lrs must be different numbers above 0, found {rates}")
        for name, given in (("base_lrs", rates), ("ema", self.train.ema)):
            if given and self.protocol in CACHED:
                raise ValueError(f"train.{name} is for the protocols that train, not for {self.protocol}")
        if (self.train.mixup or self.train.cutmix) and self.train.micro_size < 2:
            raise ValueError(f"train.micro_size must be 2 or more for mixup and cutmix, found {self.train.micro_size}")
        return self


_LINEAR: dict[str, Any] = {
    "epochs": 90.0,
    "global_size": 16384,
    "optimizer": "lars",
    "base_lr": 0.1,
    "warmup_epochs": 10.0,
    "weight_decay": 0.0,
}
_FINETUNE: dict[str, Any] = {
    "epochs": 100.0,
    "global_size": 1024,
    "base_lr": 5e-4,
    "layer_decay": 0.65,
    "drop_path": 0.1,
    "smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "erasing": 0.25,
}
_SCRATCH: dict[str, Any] = {
    **_FINETUNE,
    "epochs": 300.0,
    "global_size": 4096,
    "base_lr": 1e-4,
    "warmup_epochs": 20.0,
    "weight_decay": 0.3,
    "betas": (0.9, 0.95),
    "layer_decay": 1.0,
    # Table 11 has none; 0.25 stands in the official code for fine-tuning alone.
    "erasing": 0.0,
    "ema": 0.9999,
}
# No recipe of the paper's: what linear segmentation on frozen features mostly takes, a rate of 1e-3 for 16 images.
_SEGMENT: dict[str, Any] = {
    "epochs": 30.0,
    "global_size": 16,
    "micro_size": 16,
    "base_lr": 0.016,
    "warmup_epochs": 1.0,
    "weight_decay": 1e-4,
}
_AUGMENT = "rand-m9-mstd0.5-inc1"


def recipe(protocol: str) -> dict[str, Any]:
    """The values of a protocol that differ from the schema's own: the paper's recipe."""
    train = {
        "linear": _LINEAR,
        "partial": _FINETUNE,
        "finetune": _FINETUNE,
        "scratch": _SCRATCH,
        "segment": _SEGMENT,
    }.get(protocol, {})
    data: dict[str, Any] = {"auto_augment": _AUGMENT} if protocol in ("partial", "finetune", "scratch") else {}
    if protocol == "segment":
        # Small things stay large enough to be learned, and what is scored reaches to the borders.
        data = {"crop_scale": (0.25, 1.0), "crop_share": 1.0}
    return {"protocol": protocol, "train": train, "data": data}


def metric(transfer: Transfer) -> str:
    """What a protocol is scored by, as its scores are named."""
    return "miou" if transfer.protocol == "segment" else "top1"


@dataclass(frozen=True)
class Schedule:
    """How long a training is.

    Args:
        global_size: Images a step.
        steps: Optimiser steps.
        warmup_steps: Those over which the learning rate rises from 0.
        asked_warmup: As many as ``train.warmup_epochs`` asks for; more than half of the steps are not given.
    """

    global_size: int
    steps: int
    warmup_steps: int
    asked_warmup: int


def schedule(train: TransferTrain, num: int) -> Schedule:
    """The schedule of a training on so many images."""
    size = min(train.global_size, num)
    steps = max(1, round(train.epochs * num / size))
    asked = round(train.warmup_epochs * num / size)
    return Schedule(size, steps, min(asked, steps // 2), asked)


def with_random(unit: Transfer) -> bool:
    """Whether a random encoder is scored too: where asked for, and where the encoder does not train."""
    return unit.random_baseline and unit.protocol in (*CACHED, "linear", "segment")


def by_chance(unit: Transfer) -> bool:
    """Whether a seed changes anything: neighbours of all patches among all labels are always the same."""
    return unit.protocol != "knn" or unit.visible[0] < 1 or unit.data.label_fraction[0] < 1


def units(transfer: Transfer, depth: int) -> list[Transfer]:
    """The single transfers that one command asks for: each with one number of blocks, one share, one fraction.

    Args:
        transfer: What is asked for.
        depth: Blocks of the encoder.
    """
    blocks = transfer.blocks if transfer.protocol == "partial" else Transfer().blocks
    if transfer.sweep:
        powers = (float(2**n) for n in range(depth.bit_length()) if 2**n < depth)
        blocks = (0.0, 0.5, *powers, float(depth), math.inf)
    found: list[dict[str, Any]] = []
    for fraction in transfer.data.label_fraction:
        for share in transfer.visible:
            for number in blocks:
                values = transfer.model_dump() | {"blocks": (number,), "visible": (share,), "sweep": False}
                values |= {"data": values["data"] | {"label_fraction": (fraction,)}, "against_scratch": False}
                # Everything: also the embedding, which is no block.
                if transfer.protocol == "partial" and number == math.inf:
                    values |= {"protocol": "finetune", "blocks": Transfer().blocks}
                found.append(values)
        alone = found[-1]
        found += [
            alone | {"protocol": "scratch", "train": alone["train"] | {"layer_decay": 1.0}}
        ] * transfer.against_scratch
    several = [Transfer.model_validate(values) for values in found]
    return [unit if by_chance(unit) else unit.model_copy(update={"seeds": (0,)}) for unit in several]
