"""The configuration of a pretraining run: frozen schemas, one dotted name for each key.

The name is the same in a TOML file, as a flag, in a Tune space and as an MLflow parameter. A derived number is a
function here or where it is used, never a field.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
import tyro
from pydantic import Field

from pipelines.errors import UserError

SEED_LIMIT = 2**31


def also(*flags: str) -> Any:
    """Other spellings of a key's flag, for ``Annotated``: one thing is spelt alike in all commands."""
    return tyro.conf.arg(aliases=flags)


def _square(size: Any) -> Any:
    if isinstance(size, int):
        return size, size
    return (*size, *size) if isinstance(size, list | tuple) and len(size) == 1 else size


def _read_size(words: list[str]) -> tuple[int, int]:
    if len(words) not in (1, 2) or not all(word.isdecimal() for word in words):
        raise ValueError(f"takes one number (a square) or two (height and width), found {' '.join(words) or 'none'}")
    return int(words[0]), int(words[-1])


ImageSize = Annotated[
    tuple[int, int],
    pydantic.BeforeValidator(_square),
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="INT [INT]",
        instance_from_str=_read_size,
        is_instance=lambda value: isinstance(value, tuple) and len(value) == 2,
        str_from_instance=lambda value: [str(side) for side in value],
    ),
]
"""Height and width in pixels; a single number, in files and flags, is a square."""


class Section(pydantic.BaseModel):
    """A group of keys; a key that it does not know is an error."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Run(Section):
    """Which run this is, and where it lies."""

    name: Annotated[str, also("--run")] = Field(default="mae", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's identity: submitting the same name again continues it."""
    storage: Annotated[str, also("--storage")] = "runs"
    """Folder or s3:// address that holds the runs, each in a folder of its name."""
    experiment: Annotated[str, also("--experiment")] = "mae-on-ray"
    """MLflow experiment."""
    seed: int = Field(default=0, ge=0, lt=SEED_LIMIT)
    """Defines every random choice, together with epoch and sample."""
    init_from: str = ""
    """Weights to begin with: an official MAE checkpoint (.pth) or a model.safetensors, here or at an s3://, gs:// or
    https:// address; empty: from scratch."""
    init_digest: str = ""
    """SHA-256 of init_from's content, which the run fills in: where it is given, another file is refused."""
    allow_change: bool = False
    """Continue a run although its configuration has changed."""


class Data(Section):
    """The images and how they are cropped."""

    train: str = ""
    """Shards to pretrain on: DIR, 'DIR/train-{000000..000012}.tar' or 'DIR/train-*.tar', local or s3://."""
    image_size: ImageSize = (224, 224)
    """Height and width of a training image in pixels; one number: a square."""
    channels: Literal[1, 3] = 3
    """1: grey, 3: RGB."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, of values in 0..1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel."""
    augment: Literal["none", "fixed_crop", "random_crop", "random_crop_jitter"] = "random_crop"
    """none: the whole image, not mirrored; fixed_crop: shifted by up to an eighth of its side; random_crop: of a random
    size within crop_scale; random_crop_jitter: and its colours changed."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a random crop covers."""
    flip: bool = True
    """Mirror half of the crops."""
    repeats: int = Field(default=1, ge=1)
    """Views of an image from one decoding, each in another batch: saves decoding, makes neighbouring batches alike."""
    deadline_s: float = Field(default=300.0, gt=0)
    """How long a store may fail to give a range of a shard before the run stops."""
    max_unreadable: float = Field(default=0.01, ge=0, le=1)
    """Share of the images that may be unreadable; a run ends where it is more, or where 100 in a row are."""
    cpus_per_task: float = Field(default=0.66, gt=0)
    """CPUs that one reading and decoding task claims from Ray."""


class Model(Section):
    """The masked autoencoder."""

    arch: str = "vit_base_patch16_224"
    """A plain ViT of timm, by name."""
    patch_size: int = Field(default=0, ge=0)
    """Side of a patch in pixels; 0: as the architecture has it."""
    width: int = Field(default=0, ge=0)
    """Encoder width; 0: as the architecture has it."""
    depth: int = Field(default=0, ge=0)
    """Encoder blocks; 0: as the architecture has it."""
    heads: int = Field(default=0, ge=0)
    """Encoder heads; 0: as the architecture has it."""
    class_tokens: int = Field(default=1, ge=1)
    """Class tokens; as a feature the mean of them is taken."""
    mask: Literal["random", "block", "grid"] = "random"
    """Masked patches: anywhere; in rectangles, as BEiT's; all but one of each 2x2 (at a mask ratio of 0.75)."""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of the patches that is hidden from the encoder."""
    mask_cell: int = Field(default=1, ge=1)
    """Side, in patches, of the cells that are hidden or shown as a whole."""
    encoder_mask_tokens: bool = False
    """Show the encoder mask tokens in place of the hidden patches: slow, and worse features (the paper's table 1c)."""
    target: Literal["raw", "normalized", "pca"] = "normalized"
    """What is reconstructed: pixels, pixels normalised within each patch, or a patch's principal components."""
    target_components: int = Field(default=96, ge=1)
    """Principal components of a patch, with target pca."""
    loss_on: Literal["masked", "all"] = "masked"
    """Which patches are reconstructed."""
    decoder: Literal["transformer", "mlp"] = "transformer"
    """Decoder blocks: a Vision Transformer's, or an MLP-Mixer's."""
    decoder_width: int = Field(default=512, gt=0)
    """Decoder width."""
    decoder_depth: int = Field(default=8, gt=0)
    """Decoder blocks."""
    decoder_heads: int = Field(default=16, gt=0)
    """Decoder heads."""


class Batch(Section):
    """How a batch is cut."""

    global_size: int = Field(default=4096, gt=0)
    """Images an optimiser step, over all workers: part of what defines the result."""
    micro_size: int = Field(default=64, ge=0)
    """Largest number of images that a worker takes at once; the rest is accumulated. 0: looked for once, the largest
    that fits into the GPU, or the fastest on a CPU."""


class Optim(Section):
    """AdamW and its schedule (paper, appendix A.1)."""

    base_lr: float = Field(default=1.5e-4, gt=0)
    """Learning rate for 256 images a step; it scales with the global batch."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decay of the weights, not of biases and one-dimensional parameters."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    warmup_epochs: float = Field(default=40.0, ge=0)
    """Epochs over which the learning rate rises from 0, step by step."""


class Train(Section):
    """How long, and in what arithmetic."""

    epochs: float = Field(default=800.0, ge=0)
    """Passes over the training data; ignored where steps are given."""
    steps: int = Field(default=0, ge=0)
    """Optimiser steps; 0: as many as the epochs make."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on a GPU, float32 on a CPU."""
    compile: bool = False
    """Compile the model with torch.compile: faster steps, after a minute or so at the start; takes a C++ compiler on a
    CPU."""
    checkpoint_activations: bool = False
    """Compute the blocks' activations anew in the backward pass instead of keeping them: less memory, slower."""


class Scale(Section):
    """On what it runs; none of it changes the result beyond rounding."""

    workers: int = Field(default=1, ge=1)
    """Ray Train workers."""
    min_workers: int = Field(default=0, ge=0)
    """Fewest workers to go on with while nodes are missing, up to scale.workers; 0: always all of them."""
    cpus_per_worker: float = Field(default=0.0, ge=0)
    """CPUs that a worker claims from Ray; 0: 1, or what fits beside data.cpus_per_task for reading and decoding."""
    threads: int = Field(default=0, ge=0)
    """PyTorch threads of a worker on CPUs; 0: the cores of its machine, shared among the run's workers there."""
    reading_cpus: float = Field(default=0.0, ge=0)
    """CPUs that reading and decoding may take, over all workers; 0: all that are free."""
    gpu: bool = False
    """One GPU for each worker."""
    gpu_share: float = Field(default=1.0, gt=0, le=1)
    """Share of a GPU that a run of one worker claims, so that several runs share one."""
    max_failures: int = Field(default=8, ge=-1)
    """Restarts of the worker group after a failure; -1: without limit."""
    address: str = ""
    """Ray cluster to join ('auto': one on this machine); empty: RAY_ADDRESS, else a local Ray."""
    segment_tasks: int = Field(default=0, ge=0)
    """Reading tasks in one Ray Data execution, about; the next one starts before the last has ended. 0: some minutes'
    worth, by the CPUs of the cluster."""
    executions: Literal["auto", "one", "node"] = "auto"
    """Who is fed by one Ray Data execution: all workers, or those of a node; auto: a node's from 17 workers on."""

    @property
    def gpus_per_worker(self) -> float:
        """GPUs that a worker claims."""
        return self.gpu_share if self.gpu else 0.0

    @pydantic.model_validator(mode="after")
    def _one_gpu_a_rank(self) -> "Scale":
        if self.gpu_share < 1 and self.workers > 1:
            raise ValueError(
                f"scale.gpu_share {self.gpu_share:g} needs scale.workers 1, found {self.workers}: the workers of a run "
                "cannot share a GPU"
            )
        return self


class Checkpoint(Section):
    """When the state is saved."""

    every_steps: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: by minutes alone."""
    every_minutes: float = Field(default=10.0, gt=0)
    """Minutes between checkpoints."""
    keep: int = Field(default=3, ge=2)
    """Checkpoints that are kept; at least two, so that a broken one has an older to fall back to."""
    patience_minutes: float = Field(default=30.0, ge=0)
    """Minutes for which training goes on while a checkpoint or the record cannot be written (a full disk, a store that
    is away) and is tried again; then the run ends."""


class Probe(Section):
    """What the features are worth, while pretraining runs and at its end."""

    train: str = ""
    """Labelled shards for the probes; empty: none."""
    test: str = ""
    """Labelled shards that are read once, at the end; empty: none."""
    every_epochs: float = Field(default=0.0, ge=0)
    """Epochs between probes on a validation split of probe.train; 0: at the start and the end only."""
    at_start: bool = True
    """Also score the encoder before its first step."""
    knn_k: int = Field(default=20, gt=0)
    """Neighbours that vote."""
    pool: Literal["mean", "cls"] = "mean"
    """Features: the mean of the patch tokens, or the class token."""
    val_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of probe.train that is held out for choosing."""
    crop_share: float = Field(default=0.875, gt=0, le=1)
    """Side of the central crop over the image's shorter side."""
    samples: int = Field(default=0, ge=0)
    """Images of probe.train that the probes on the way use; 0: all. Those on the test data always use all."""
    early_share: float = Field(default=1.0, gt=0, le=1)
    """Share of these images that all probes but the first and the last look at, where a cheap glance is enough."""
    hold_mib: int = Field(default=256, ge=0)
    """MiB of pixels that a worker keeps from probe to probe, if its share of the images is no more; else they are read
    each time."""
    random_baseline: bool = True
    """Also score a randomly initialised encoder of the same shape at the end."""


class Log(Section):
    """What is told."""

    every: int = Field(default=10, gt=0)
    """Steps between two progress lines and two points of the record (means over the steps between)."""
    pictures: int = Field(default=8, ge=0)
    """Images in the reconstruction picture; 0: no picture."""
    ids: bool = False
    """Write the sample ids of every step to ids/ in the run's folder: a proof of the order, for audits."""
    profile: Annotated[bool, also("--profile")] = False
    """Write a torch.profiler trace of ten steps, and a table of the slowest operators, as artifacts of the run."""
    ids_folder: str = ""
    """Folder for log.ids that all workers share, where run.storage is remote; empty: ids/ in the run's folder."""


class Config(Section):
    """Pretrains a Vision Transformer as a masked autoencoder on WebDataset shards."""

    run: Run = Run()
    data: Data = Data()
    model: Model = Model()
    batch: Batch = Batch()
    optim: Optim = Optim()
    train: Train = Train()
    scale: Scale = Scale()
    checkpoint: Checkpoint = Checkpoint()
    probe: Probe = Probe()
    log: Log = Log()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Config":
        data = self.data
        if len(data.mean) != data.channels or len(data.std) != data.channels:
            raise ValueError(
                f"data.mean and data.std need one value for each of the {data.channels} data.channels, "
                f"found {len(data.mean)} and {len(data.std)}"
            )
        if min(data.std) <= 0:
            raise ValueError(f"data.std must be above 0, found {data.std}")
        if not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
            raise ValueError(f"data.crop_scale must rise within (0, 1], found {data.crop_scale}")
        if min(data.image_size) <= 0:
            raise ValueError(f"data.image_size must be above 0, found {data.image_size}")
        if not all(0 <= beta < 1 for beta in self.optim.betas):
            raise ValueError(f"optim.betas must lie in [0, 1), found {self.optim.betas}")
        if self.train.steps == 0 and self.train.epochs == 0:
            raise ValueError("give train.epochs or train.steps: both are 0")
        if self.scale.min_workers > self.scale.workers:
            raise ValueError(
                f"scale.min_workers must be at most scale.workers, {self.scale.workers}, found {self.scale.min_workers}"
            )
        if 0 < self.scale.reading_cpus < self.data.cpus_per_task:
            raise ValueError(
                f"scale.reading_cpus {self.scale.reading_cpus:g} is not enough for one task of data.cpus_per_task "
                f"{self.data.cpus_per_task:g}"
            )
        if self.probe.test and not self.probe.train:
            raise ValueError("probe.test is given without probe.train: the probes need labels to learn from")
        return self


def worker_cpus(scale: Scale, reading: float, nodes: Sequence[float]) -> float:
    """CPUs that each worker claims: those asked for, else 1, or less where that many workers leave none for reading.

    Args:
        scale: What a run asks for.
        reading: CPUs that one reading task claims.
        nodes: CPUs of each node.

    Returns:
        1 where nothing fits.
    """
    workers = scale.workers
    if scale.cpus_per_worker or workers > sum(nodes):  # more workers than CPUs are not pressed together
        return scale.cpus_per_worker or 1.0

    def fits(share: float) -> bool:
        # Ray counts in ten-thousandths.
        if scale.min_workers:
            # As many start as there is room for: they must leave some on every node.
            places = [min(int(cpus / share + 1e-4), workers) for cpus in nodes]
            left = [cpus - fit * share for cpus, fit in zip(nodes, places, strict=True) if fit]
            return sum(places) >= scale.min_workers and min(left, default=0.0) >= reading - 1e-4
        # Wherever Ray puts them then, some node has what a reading task claims.
        return sum(int((cpus - reading) / share + 1e-4) for cpus in nodes if cpus > reading) >= workers

    parts = {int(100 * (cpus - reading) / num) / 100 for cpus in set(nodes) for num in range(1, workers + 1)}
    return next((share for share in sorted({1.0, *parts}, reverse=True) if 0 < share <= 1 and fits(share)), 1.0)


def flat(section: pydantic.BaseModel, prefix: str = "") -> dict[str, Any]:
    """All keys of a configuration under their dotted names."""
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, pydantic.BaseModel):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


# What decides the numbers that a run produces: all but where it runs, how often it tells and where things lie.
_RESULT = ("run.seed", "run.init_from", "data.", "model.", "batch.global_size", "optim.", "train.")
_NOT_RESULT = (
    "data.train", "data.deadline_s", "data.max_unreadable", "data.cpus_per_task", "train.compile",
    "train.checkpoint_activations",
)  # fmt: skip
# The keys that the first runs had. None is ever added: a younger key is left out of an identity where it has its
# default, so that a run from before it stays the run that it was.
_FIRST = frozenset((
    "run.seed", "run.init_from",
    "data.image_size", "data.channels", "data.mean", "data.std", "data.crop_scale", "data.flip", "data.repeats",
    "model.arch", "model.patch_size", "model.width", "model.depth", "model.heads", "model.mask_ratio", "model.target",
    "model.decoder_width", "model.decoder_depth", "model.decoder_heads",
    "batch.global_size", "optim.base_lr", "optim.weight_decay", "optim.betas", "optim.warmup_epochs",
    "train.epochs", "train.steps", "train.precision",
))  # fmt: skip


def younger_defaults() -> dict[str, Any]:
    """The keys that define a result and that the first runs did not have, with the values that these had."""
    return {key: value for key, value in _result(Config()).items() if key not in _FIRST}


def defines_result(key: str) -> bool:
    """Whether a key of the configuration changes the numbers that a run produces."""
    return key.startswith(_RESULT) and key not in _NOT_RESULT


def _result(config: Config) -> dict[str, Any]:
    values = {key: value for key, value in flat(config).items() if defines_result(key)}
    return json.loads(json.dumps(values))


def identity(config: Config, data_digest: str) -> dict[str, Any]:
    """What defines the result of a run: the same identity, the same losses, on any machines.

    Args:
        config: The resolved configuration.
        data_digest: The training manifest's digest, which stands for where the shards lie.
    """
    defaults = younger_defaults()
    values = {key: value for key, value in _result(config).items() if key in _FIRST or value != defaults[key]}
    if config.run.init_digest:
        # What the file holds, not where it lies.
        values["run.init_from"] = config.run.init_digest
    return values | {"data.digest": data_digest}


def identity_hash(values: dict[str, Any]) -> str:
    """A short name for an identity: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def total_steps(config: Config, num_samples: int) -> int:
    """Optimiser steps of the run; the last batch may be partly filled.

    Raises:
        UserError: The epochs do not make a single step.
    """
    steps = config.train.steps or -int(-config.train.epochs * num_samples // config.batch.global_size)
    if steps < 1:
        raise UserError(f"train.epochs {config.train.epochs} of {num_samples} images are not one step")
    return steps


def warmup_steps(config: Config, num_samples: int) -> int:
    """Steps over which the learning rate rises, at most all of them."""
    wanted = int(config.optim.warmup_epochs * (num_samples / config.batch.global_size))
    return min(wanted, total_steps(config, num_samples))


def warmup_note(config: Config, num_samples: int) -> str:
    """That a run is no longer than its warm-up, and the flag that mends it; empty where it is longer."""
    steps = total_steps(config, num_samples)
    if not config.optim.warmup_epochs or warmup_steps(config, num_samples) < steps:
        return ""
    epochs = steps * config.batch.global_size / num_samples
    # The paper's own share: 40 of 800.
    return (
        f"optim.warmup_epochs {config.optim.warmup_epochs:g} is no shorter than the run, of {epochs:.3g} epochs: its "
        f"learning rate rises to the end and never falls; set --optim.warmup-epochs {epochs / 20:.2g}"
    )
