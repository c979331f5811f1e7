"""From a configuration to a model, its data and its step."""

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mae_core import weights
from mae_core.checkpointing import checkpoint_activations
from mae_core.images import normalize
from mae_core.masking import Masking
from mae_core.model import MaskedAutoencoder
from pipelines.config import Config
from pipelines.data.plan import GRAIN, Cut, Plan
from pipelines.data.readers import Stream, View, parse_block, read_blocks
from pipelines.data.shards import Manifest
from pipelines.errors import UserError
from pipelines.reading import ReadPolicy
from pipelines.training.step import Trainer, autocast
from pipelines.training.unreadable import check_readable
from pipelines.weights_file import digest, local_file, shown

FIT_IMAGES = GRAIN
_FIT_ROWS = 64


def build_model(config: Config) -> MaskedAutoencoder:
    """The model that a configuration describes, on the current default device, as it is trained.

    Raises:
        UserError: Its parts do not go together.
    """
    model = config.model
    try:
        built = MaskedAutoencoder(
            model.arch,
            image_size=config.data.image_size,
            patch_size=model.patch_size or None,
            channels=config.data.channels,
            width=model.width or None,
            depth=model.depth or None,
            num_heads=model.heads or None,
            mean=config.data.mean,
            std=config.data.std,
            seed=config.run.seed,
            # The other keys have the names of the arguments.
            **model.model_dump(exclude={"arch", "patch_size", "width", "depth", "heads"}),
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    if config.train.checkpoint_activations:
        checkpoint_activations(built)
    return built


def maybe_compiled(config: Config, model: MaskedAutoencoder, device: torch.device) -> nn.Module:
    """A model as a run's steps call it: by torch.compile, where the run asks for it.

    On a CPU the compiler is told to keep nothing for the backward pass that can be computed anew without a matrix
    product, such as the values behind LayerNorm and GELU: a third of what is kept, at the same speed (docs/log.md).
    And for how many threads: younger versions of PyTorch alone ask for it before they take code that they have made
    before. Both are for this process: PyTorch has no such settings of one model.

    Args:
        config: The run's configuration.
        model: Its model.
        device: Where the steps compute.
    """
    if not config.train.compile:
        return model
    if device.type == "cpu":
        # Here, as they take a second that a run without them need not wait.
        import torch._functorch.config as functorch
        import torch._inductor.config as inductor

        functorch.ban_recompute_used_far_apart = False
        functorch.ban_recompute_long_fusible_chains = False
        functorch.ban_recompute_materialized_backward = False
        inductor.cpp.threads = torch.get_num_threads()
    return torch.compile(model)  # type: ignore[return-value]


@contextlib.contextmanager
def compiler_told(config: Config) -> Iterator[None]:
    """Around steps: what a compiler cannot do is no fault of theirs that goes away.

    Raises:
        UserError: The compiler failed.
    """
    if not config.train.compile:
        yield
        return
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as error:
        raise UserError(
            f"train.compile: {str(error).strip().splitlines()[0]} (on a CPU torch.compile needs a C++ compiler, such "
            f"as g++; without train.compile none is needed)"
        ) from error


def make_stream(config: Config, manifest: Manifest, world_size: int, groups: int = 1) -> Stream:
    """The training images of a run, from its first step to its last.

    Args:
        config: The run's configuration.
        manifest: Of its training images.
        world_size: Workers.
        groups: Groups of workers that are fed apart.
    """
    data = config.data
    end = None if config.train.steps else int(config.train.epochs * manifest.num_samples)
    return Stream(
        manifest,
        Plan(manifest.num_samples, config.run.seed, end=end),
        Cut(config.batch.global_size, config.batch.micro_size, world_size, data.repeats, groups),
        View(data.image_size, data.channels, config.run.seed, data.crop_scale, data.flip, augment=data.augment),
        ReadPolicy(deadline_s=data.deadline_s),
    )


def make_trainer(
    config: Config, model: nn.Module, masking: Masking, optimizer: torch.optim.Optimizer, cut: Cut, device: torch.device
) -> Trainer:
    """What a training step of a run needs.

    Args:
        config: The run's configuration.
        model: The model, compiled or wrapped as it may be.
        masking: The model's own.
        optimizer: Over its parameters.
        cut: How batches are cut.
        device: Where the step computes.
    """
    return Trainer(
        model,
        optimizer,
        cut,
        masking,
        config.run.seed,
        torch.tensor(config.data.mean, device=device),
        torch.tensor(config.data.std, device=device),
        device,
        functools.partial(autocast, config.train.precision, device),
    )


def fit_target(model: MaskedAutoencoder, stream: Stream, config: Config) -> None:
    """Fits a model's target on the first images of a run, under their crops of the first epoch.

    Args:
        model: One whose target needs it.
        stream: The run's images.
        config: The run's configuration.

    Raises:
        UnreadableError: None of the images can be read.
    """
    plan, num = stream.plan, min(FIT_IMAGES, stream.plan.num_samples)
    rows = min(num, _FIT_ROWS)
    some = Stream(stream.manifest, dataclasses.replace(plan, end=num), Cut(rows, rows, 1), stream.view, stream.policy)

    skipped: Counter[str] = Counter()

    def patches() -> Iterator[torch.Tensor]:
        for table in read_blocks(some, [[[index]] for index in range(-(-num // rows))]):
            (batch,) = parse_block(table, some)
            skipped.update(sample["reason"] for sample in batch.skipped)
            if skipped.total() == num:
                check_readable(skipped, num, plan.num_samples, config.data.max_unreadable, some.manifest.location)
            images_BHWC = torch.from_numpy(batch.images_BHWC[batch.weight_B > 0])
            yield model.patches(normalize(images_BHWC, config.data.mean, config.data.std)).flatten(0, 1)

    model.target.fit(patches())


def check_model(config: Config) -> None:
    """Builds the model's shapes without its memory.

    Raises:
        UserError: Its parts do not go together.
    """
    with torch.device("meta"):
        build_model(config)


def check_initial_weights(config: Config) -> str:
    """Holds ``run.init_from`` against the model, without the model's memory.

    Returns:
        What is taken for granted, as the file does not say it, in a line.

    Raises:
        UserError: It is not there, not readable, not the file that ``run.init_digest`` says, of another shape, or of a
            model whose heads or image size are others.
    """
    run, name = config.run, shown(config.run.init_from)
    with local_file(run.init_from, "run.init_from") as path:
        if run.init_digest not in ("", digest(path)):
            raise UserError(
                f"run.init_from: {name} is not the file that it was: its SHA-256 is {digest(path)}, and "
                f"run.init_digest says {run.init_digest}; give that file, or leave run.init_digest out"
            )
        try:
            found, known = weights.read_file(path)
        except (OSError, ValueError) as error:
            raise UserError(f"run.init_from: {_named(error, path, run.init_from)}") from None
    with torch.device("meta"):
        model = build_model(config)
    expected = weights.official_state(model)
    for tensor in sorted(expected.keys() | found.keys()):
        theirs, ours = (list(state[tensor].shape) if tensor in state else "missing" for state in (found, expected))
        if theirs != ours:
            raise UserError(
                f"run.init_from: {name} does not fit the model: {tensor} is {theirs} in the file, {ours} in the model"
            )
    # What no shape tells: with other heads the same weights make other features.
    unseen: dict[str, tuple[Any, str]] = {
        "num_heads": (model.num_heads, "model.heads"),
        "image_size": (list(model.image_size), "data.image_size"),
    }
    if config.model.decoder == "transformer":
        unseen["decoder_num_heads"] = model.decoder_heads, "model.decoder_heads"
    for what, (ours, key) in unseen.items():
        if what in known and known[what] != ours:
            raise UserError(
                f"run.init_from: {name} was written with {what} {known[what]}, and {key} is {ours} here: the "
                f"same weights would compute something else; give --{key.replace('_', '-')} {_flag(known[what])}"
            )
    if "num_heads" not in known:
        return (
            f"{name} does not say how many heads it was trained with: taken are {model.num_heads} in the "
            f"encoder (--model.heads) and {model.decoder_heads} in the decoder (--model.decoder-heads)"
        )
    theirs, ours = [list(known.get(key, ())) for key in ("mean", "std")], [list(model.mean), list(model.std)]
    if theirs == ours or not all(theirs):
        return ""
    return (
        f"{name} was trained on images normalised by mean {theirs[0]} and std {theirs[1]}; here they are "
        f"normalised by {ours[0]} and {ours[1]} (--data.mean, --data.std)"
    )


def initial_weights(model: MaskedAutoencoder, location: str) -> None:
    """Fills a model with the weights of a checkpoint of the same shape.

    Raises:
        UserError: It is not there, not readable, or of another shape.
    """
    with local_file(location, "run.init_from") as path:
        try:
            weights.load_state(model, weights.read_state(path))
        except ValueError as error:
            raise UserError(f"run.init_from: {shown(location)}: {_named(error, path, location)}") from None


def _named(error: Exception, path: Path, location: str) -> str:
    """An error's words, under the name that the user knows the file by."""
    return str(error).replace(str(path), shown(location))


def _flag(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
