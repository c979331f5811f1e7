"""The encoder that a transfer scores: of a run, or of a file."""

import sys
from pathlib import Path
from typing import Any

import pydantic
import torch

from mae_core import weights
from mae_core.model import MaskedAutoencoder
from pipelines.cli import reason
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.runs import find_run, load_encoder, run_config
from pipelines.storage import Store
from pipelines.training.build import build_model
from pipelines.transfer_config import Transfer
from pipelines.weights_file import digest, local_file, shown


def source(transfer: Transfer) -> tuple[Store | None, Config, dict[str, torch.Tensor], int, str]:
    """The encoder that is scored: its run's folder (None: of a file), configuration, weights, step, a file's digest.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    if transfer.run:
        store = find_run(transfer.storage, transfer.run)
        config = run_config(store)
        model, step = load_encoder(store, config, lambda line: print(f"warning: {line}", file=sys.stderr))
        return store, config, weights.official_state(model), step, ""
    with local_file(transfer.weights, "--weights") as path:
        return _of_file(transfer, path)


def _of_file(transfer: Transfer, path: Path) -> tuple[None, Config, dict[str, torch.Tensor], int, str]:
    """As ``source``, of a file on this machine."""
    try:
        model, has_decoder = weights.load_weights(path, num_heads=transfer.num_heads or None)
        config = _config_of(model, has_decoder)
        # Of an encoder alone the decoder is a new one, which nobody asks.
        whole = build_model(config)
        state = weights.official_state(model)
        if not has_decoder:
            state = weights.official_state(whole) | weights.encoder_state(model)
        weights.load_state(whole, state)
    except pydantic.ValidationError as error:
        raise UserError(f"--weights: {shown(transfer.weights)}: {reason(error)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--weights: {str(error).replace(str(path), shown(transfer.weights))}") from None
    if transfer.data.mean or transfer.data.std:
        whose = "as given"
    elif model.mean and model.std:
        whose = "as the file says"
    else:
        whose = f"{'ImageNet' if model.channels == 3 else 'grey'}'s, as the file does not say"
    mean, std = transfer.data.mean or config.data.mean, transfer.data.std or config.data.std
    print(f"{model.num_heads} heads; images are normalised by mean {mean} and std {std}: {whose}")
    return None, config, state, 0, digest(path)


def _config_of(model: MaskedAutoencoder, has_decoder: bool) -> Config:
    """The configuration of a model that came as a file; its normalisation is ImageNet's where the file says none."""
    values: dict[str, Any] = Config().model_dump()
    values["data"] |= {"image_size": model.image_size, "channels": model.channels}
    if model.mean and model.std:
        values["data"] |= {"mean": model.mean, "std": model.std}
    elif model.channels == 1:
        values["data"] |= {"mean": (0.5,), "std": (0.5,)}
    values["model"] |= {
        "patch_size": model.patch_size,
        "width": model.width,
        "depth": len(model.encoder.blocks),
        "heads": model.num_heads,
        **(model.options if has_decoder else {"class_tokens": model.class_tokens, "decoder_depth": 1}),
    }
    return Config.model_validate(values)


def normalised(transfer: Transfer, config: Config) -> Config:
    """The encoder's configuration, with the normalisation asked for.

    Raises:
        UserError: What is asked for does not fit the encoder's channels.
    """
    values, asked = config.model_dump(), transfer.data
    values["data"] |= {key: given for key in ("mean", "std") if (given := getattr(asked, key))}
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(reason(error)) from None
