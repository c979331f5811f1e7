"""From a configuration to a model."""

from pathlib import Path

import torch

from mae_core import weights
from mae_core.model import MaskedAutoencoder
from pipelines.config import Config
from pipelines.errors import UserError


def build_model(config: Config) -> MaskedAutoencoder:
    """The model that a configuration describes, on the current default device.

    Raises:
        UserError: Its parts do not go together.
    """
    model = config.model
    try:
        return MaskedAutoencoder(
            model.arch,
            image_size=config.data.image_size,
            patch_size=model.patch_size or None,
            channels=config.data.channels,
            width=model.width or None,
            depth=model.depth or None,
            num_heads=model.heads or None,
            decoder_width=model.decoder_width,
            decoder_depth=model.decoder_depth,
            decoder_heads=model.decoder_heads,
            mask_ratio=model.mask_ratio,
            normalize_pixels=model.target == "normalized",
            seed=config.run.seed,
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def check_model(config: Config) -> None:
    """Builds the model's shapes without its memory.

    Raises:
        UserError: Its parts do not go together.
    """
    with torch.device("meta"):
        build_model(config)


def check_initial_weights(config: Config) -> None:
    """Holds ``run.init_from`` against the model's shapes, without the model's memory.

    Raises:
        UserError: It is not there, not readable, or of another shape.
    """
    path = config.run.init_from
    if not Path(path).is_file():
        raise UserError(f"run.init_from: no file '{path}'")
    try:
        found = weights.read_state(path)
    except (OSError, ValueError) as error:
        raise UserError(f"run.init_from: {error}") from None
    with torch.device("meta"):
        expected = weights.official_state(build_model(config))
    for name in sorted(expected.keys() | found.keys()):
        theirs, ours = (list(state[name].shape) if name in state else "missing" for state in (found, expected))
        if theirs != ours:
            raise UserError(
                f"run.init_from: {path} does not fit the model: {name} is {theirs} in the file, {ours} in the model"
            )


def initial_weights(model: MaskedAutoencoder, path: str) -> None:
    """Fills a model with the weights of a checkpoint of the same shape.

    Raises:
        UserError: It is not there, not readable, or of another shape.
    """
    if not Path(path).is_file():
        raise UserError(f"run.init_from: no file '{path}'")
    try:
        weights.load_state(model, weights.read_state(path))
    except ValueError as error:
        raise UserError(f"run.init_from: {path}: {error}") from None
