"""Weights in and out of the official MAE layout; its encoder keys are timm's own.

The official layout is one flat state dict: timm's encoder keys beside ``decoder_embed``, ``mask_token``,
``decoder_pos_embed``, ``decoder_blocks.N``, ``decoder_norm`` and ``decoder_pred``. What the official code does not have
has keys of its own: ``encoder_mask_token`` in place of ``mask_token``, and ``target.*`` of a fitted target. Class
tokens after the first are timm's ``reg_token``.
"""

import argparse
import json
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mae_core.model import MaskedAutoencoder

_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_ENCODER = "encoder."
_SHAPES = "mae_core.shapes"


def official_state(model: MaskedAutoencoder) -> dict[str, torch.Tensor]:
    """The whole model's state dict in the official layout, sharing memory with the model."""
    return {name.removeprefix(_ENCODER): tensor for name, tensor in model.state_dict().items()}


def encoder_state(model: MaskedAutoencoder) -> dict[str, torch.Tensor]:
    """The encoder's state dict under timm's keys, sharing memory with the model.

    It loads with ``strict=True`` into ``timm.create_model`` of the same architecture and sizes
    (``num_classes=0``, ``img_size``, and ``patch_size``, ``in_chans``, ``embed_dim``, ``depth``, ``num_heads``,
    ``mlp_ratio`` where they were overridden, and ``reg_tokens``, one fewer than the class tokens).
    """
    return {
        name.removeprefix(_ENCODER): tensor for name, tensor in model.state_dict().items() if name.startswith(_ENCODER)
    }


def save(model: MaskedAutoencoder, path: str | Path) -> None:
    """Writes the whole model as safetensors in the official layout, whole or not at all.

    What no tensor's shape tells (heads, a non-square image size, the images' normalisation) stands in the metadata.

    Args:
        model: The model.
        path: A local file; replaced if it exists.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    tensors = {name: tensor.detach().contiguous() for name, tensor in official_state(model).items()}
    try:
        save_file(tensors, temporary, metadata=file_metadata(model))
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def file_metadata(model: MaskedAutoencoder) -> dict[str, str]:
    """What a safetensors file says of a model beside its tensors: what their shapes do not tell."""
    unseen = {
        "num_heads": model.num_heads,
        "decoder_num_heads": model.decoder_heads,
        "image_size": list(model.image_size),
        "mean": list(model.mean),
        "std": list(model.std),
    }
    return {"format": "pt", _SHAPES: json.dumps(unseen)}


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint (.pth or .safetensors) under its own keys; nothing in it is executed.

    Raises:
        ValueError: It cannot be read as one.
        OSError: It cannot be opened.
    """
    return read_file(path)[0]


def load_state(model: MaskedAutoencoder, state: dict[str, torch.Tensor]) -> None:
    """Fills a model with a full state dict in the official layout.

    Raises:
        ValueError: Keys or shapes do not fit.
    """
    names = {name.removeprefix(_ENCODER): name for name in model.state_dict()}
    try:
        model.load_state_dict({names.get(name, name): tensor for name, tensor in state.items()}, strict=True)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).splitlines()[1:2]).strip()) from error


def read_file(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A checkpoint's tensors and, where ``save`` wrote it, what their shapes do not tell.

    Raises:
        ValueError: It cannot be read as one.
        OSError: It cannot be opened.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get(_SHAPES, "{}"))
                return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
        # Resume files of the official code hold their arguments: a class of plain values, let in by name.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a damaged or hostile file raises has no common class
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors (damaged, another format, or objects that "
            "are not let in): expected a .pth with {'model': state_dict}, or a .safetensors file"
        ) from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(value) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: expected a .pth with {{'model': state_dict}}")
    return state, {}


def has_decoder(state: dict[str, torch.Tensor]) -> bool:
    """Whether a state dict in the official layout holds more than an encoder."""
    return any(name.startswith(("decoder_", "mask_token", "encoder_mask_token", "target.")) for name in state)


def encoder_sizes(
    state: dict[str, torch.Tensor], known: dict[str, Any], num_heads: int | None, path: Path
) -> dict[str, Any]:
    """The encoder's sizes as ``MaskedAutoencoder`` takes them, from its tensors' shapes, and its normalisation.

    Args:
        state: Holds the encoder under timm's keys.
        known: What the file says beside its tensors.
        num_heads: What is asked for; None: as the file says, else by the width.
        path: The file, for what is said of it.

    Raises:
        ValueError: Heads that do not fit, or positions whose grid nobody knows.
    """
    width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape
    if num_heads is None:
        num_heads = written if isinstance(written := known.get("num_heads"), int) else _HEADS.get(width, width // 64)
    num_heads = _agreed("num_heads", num_heads, known.get("num_heads"), path)
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"{path}: {num_heads} heads do not divide the encoder's width {width}: pass num_heads")
    class_tokens = 1 + (state["reg_token"].shape[1] if "reg_token" in state else 0)
    return {
        "image_size": _image_size(state["pos_embed"].shape[1] - class_tokens, patch[-1], known.get("image_size"), path),
        "patch_size": patch[-1],
        "channels": patch[1],
        "width": width,
        "depth": _depth(state, "blocks"),
        "num_heads": num_heads,
        "mlp_ratio": _mlp_ratio(state, width),
        "class_tokens": class_tokens,
        "mean": tuple(known.get("mean", ())),
        "std": tuple(known.get("std", ())),
    }


def _depth(state: dict[str, torch.Tensor], prefix: str) -> int:
    return len({match[1] for name in state if (match := re.match(rf"{prefix}\.(\d+)\.", name))})


def _mlp_ratio(state: dict[str, torch.Tensor], width: int) -> float:
    # timm rounds width * ratio down: the next float up keeps a rounded quotient from losing one.
    return math.nextafter(len(state["blocks.0.mlp.fc1.weight"]) / width, math.inf)


def _image_size(num_patches: int, patch_size: int, known: object, path: Path) -> tuple[int, int]:
    if isinstance(known, list):
        return known[0], known[1]
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"{path}: {num_patches} positions are no square grid, and the file does not say which")
    return side * patch_size, side * patch_size


def _agreed(name: str, given: int, known: object, path: Path) -> int:
    if isinstance(known, int) and given != known:
        raise ValueError(f"{path} was written with {name}={known}, asked for was {given}: pass {name}={known}")
    return given


def load_official(
    path: str | Path,
    *,
    num_heads: int | None = None,
    decoder_num_heads: int = 16,
    mask_ratio: float = 0.75,
    target: Literal["raw", "normalized"] = "raw",
) -> MaskedAutoencoder:
    """Builds a model from a full checkpoint (encoder and decoder) in the official layout.

    Sizes come from the tensors' shapes. Nothing in the file is executed.

    Args:
        path: A ``.pth`` file with ``{"model": state_dict}`` (a bare state dict will do), or ``.safetensors``.
        num_heads: Encoder heads; None takes them from the file where ``save`` wrote it, else from the width
            (that of ViT-Ti, S, B, L or H, else ``width // 64``).
        decoder_num_heads: Decoder heads; no shape tells them.
        mask_ratio: Of the model built.
        target: What the checkpoint was trained on, pixels or normalised pixels; no shape tells. That it was on
            principal components, the file does.

    Returns:
        The model on the current default device, in training mode.

    Raises:
        ValueError: No checkpoint, an encoder alone, keys or shapes of another model, or heads that do not fit.
        OSError: The file cannot be opened.
    """
    path = Path(path)
    state, known = read_file(path)
    if "cls_token" in state and not has_decoder(state):
        raise ValueError(f"{path} holds an encoder alone: load it with timm, or give a full checkpoint")
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}
    needed |= {"decoder_embed.weight": 2, "encoder_mask_token" if "encoder_mask_token" in state else "mask_token": 3}
    if missing := [name for name in needed if name not in state]:
        found = ", ".join(list(state)[:3])
        raise ValueError(f"{path} is no checkpoint in the official layout: {missing[0]} is missing ({found}, ...)")
    if wrong := [name for name, ndim in needed.items() if state[name].ndim != ndim]:
        raise ValueError(f"{path}: {wrong[0]} has the shape {list(state[wrong[0]].shape)} of another layout")
    model = MaskedAutoencoder(
        **encoder_sizes(state, known, num_heads, path),
        decoder="mlp" if any(".mlp_tokens." in name for name in state) else "transformer",
        decoder_width=len(state["decoder_embed.weight"]),
        decoder_depth=_depth(state, "decoder_blocks"),
        decoder_heads=_agreed("decoder_num_heads", decoder_num_heads, known.get("decoder_num_heads"), path),
        mask_ratio=mask_ratio,
        encoder_mask_tokens="encoder_mask_token" in state,
        target="pca" if "target.basis" in state else target,
        target_components=state["target.basis"].shape[-1] if "target.basis" in state else 1,
    )
    try:
        load_state(model, state)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the official layout: {error}") from error
    return model


def load_weights(
    path: str | Path,
    *,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    target: Literal["raw", "normalized"] = "raw",
) -> tuple[MaskedAutoencoder, bool]:
    """Builds a model from a full checkpoint in the official layout, or from an encoder alone under timm's keys.

    Args:
        path: A ``.pth`` file or ``.safetensors``, as ``load_official`` takes it.
        num_heads: Encoder heads; None: as the file says, else by the width.
        decoder_num_heads: Decoder heads; None: as the file says, else the paper's 16.
        target: What the checkpoint was trained on, as ``load_official`` takes it.

    Returns:
        The model on the current default device, and whether the file has a decoder. Where it has none, the
        model's own is a stub without blocks, drawn at random.

    Raises:
        ValueError: No checkpoint, keys or shapes of another model, or heads that do not fit.
        OSError: The file cannot be opened.
    """
    path = Path(path)
    state, known = read_file(path)
    if "cls_token" not in state or has_decoder(state):
        if decoder_num_heads is None:
            decoder_num_heads = written if isinstance(written := known.get("decoder_num_heads"), int) else 16
        model = load_official(path, num_heads=num_heads, decoder_num_heads=decoder_num_heads, target=target)
        return model, True
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}
    for name, ndim in needed.items():
        if name not in state or state[name].ndim != ndim:
            found = list(state[name].shape) if name in state else "missing"
            raise ValueError(f"{path} is no encoder under timm's keys: {name} is {found}, expected {ndim} dimensions")
    sizes = encoder_sizes(state, known, num_heads, path)
    model = MaskedAutoencoder(**sizes, decoder_width=4, decoder_depth=0, decoder_heads=1, target=target)
    stub = {name: tensor for name, tensor in official_state(model).items() if has_decoder({name: tensor})}
    try:
        load_state(model, state | stub)
    except ValueError as error:
        raise ValueError(f"{path} is no encoder under timm's keys: {error}") from error
    return model, False
