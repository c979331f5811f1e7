"""Checkpoints: safetensors and JSON in a folder a step, with a manifest of checksums that is written last.

``step-NNNNNNNN/`` holds ``model.safetensors`` (in the official MAE layout, as ``mae_core.weights`` reads it),
``optimizer.safetensors``, ``state.json`` and ``manifest.json`` (the size and SHA-256 of the others). Without a manifest
that all files agree with, it is not a checkpoint. Nothing in it is unpickled.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import nn

from mae_core import weights
from mae_core.model import MaskedAutoencoder
from pipelines.storage import Content, Store
from pipelines.training import snapshot

_STEP = re.compile(r"step-(\d{8})")


def folder_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def steps(checkpoints: Store) -> list[int]:
    """The steps that have a checkpoint folder, whole or not, newest first."""
    matches = (_STEP.fullmatch(name) for name in checkpoints.names())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def fault(checkpoint: Store) -> str | None:
    """Why a folder is no whole checkpoint; None where it is one. Reads every byte."""
    try:
        listed = json.loads(checkpoint.read("manifest.json"))["files"]
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except FileNotFoundError:
        return "has no manifest.json: it was never finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json cannot be read"
    if not {"model.safetensors", "state.json"} <= files.keys():
        return "manifest.json does not list a model and its state"
    for name, (size, digest) in files.items():
        try:
            data = checkpoint.read(name)
        except FileNotFoundError:
            return f"{name} is missing"
        if len(data) != size:
            return f"{name} has {len(data)} bytes instead of {size}"
        if hashlib.sha256(data).hexdigest() != digest:
            return f"{name} does not match its checksum"
        # Checksums say who wrote it last, not that it is harmless: a pickle has some, too.
        if name.endswith(".safetensors") and (reason := snapshot.file_fault(data)):
            return f"{name} {reason}"
    return None


def newest_whole(checkpoints: Store, warn: Callable[[str], None]) -> int | None:
    """The step of the newest whole checkpoint; broken ones are told of and passed over."""
    for step in steps(checkpoints):
        reason = fault(checkpoints.child(folder_name(step)))
        if reason is None:
            return step
        warn(f"checkpoint {folder_name(step)} {reason}; taking the next older one")
    return None


def _names(model: nn.Module) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def tensors_of(model: MaskedAutoencoder, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """A model's and its optimiser's state by the files of a checkpoint, sharing memory with them."""
    return {
        "model.safetensors": weights.official_state(model),
        "optimizer.safetensors": optimizer_state(model, optimizer),
    }


def num_bytes(model: MaskedAutoencoder) -> int:
    """Bytes of the tensors in a checkpoint of a model, also of one on ``meta``; a file's header comes on top."""
    state = sum(tensor.nbytes for tensor in weights.official_state(model).values())
    # AdamW's two moments, and its float32 count of steps.
    return state + sum(2 * parameter.nbytes + 4 for parameter in model.parameters() if parameter.requires_grad)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's state under ``<kind>/<parameter's name>``, sharing memory with it."""
    names = _names(model)
    return {
        f"{key}/{names[parameter]}": torch.as_tensor(value).detach()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def write(
    checkpoints: Store,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    metadata: Mapping[str, str],
    state: Mapping[str, Any],
    guard: Callable[[], None] = lambda: None,
) -> None:
    """Writes a checkpoint, the manifest last; each file is hashed as it goes, and copied nowhere.

    Args:
        checkpoints: The run's ``checkpoints`` folder.
        step: Steps done.
        tensors: From ``tensors_of``, or copies.
        metadata: What the safetensors files say beside the tensors.
        state: Goes into ``state.json``.
        guard: Called before anything is written and again before the manifest is; raises where this must not go on.

    Raises:
        OSError, ReadError: It could not be written.
    """
    guard()
    store = checkpoints.child(folder_name(step))
    store.delete()
    files: dict[str, Any] = {}
    for name, values in tensors.items():
        files[name] = _put(store, name, functools.partial(snapshot.file_bytes, values, metadata))
    text = json.dumps(state, indent=2).encode()
    files["state.json"] = _put(store, "state.json", lambda: [text])
    guard()
    store.write("manifest.json", json.dumps({"step": step, "files": files}, indent=2))


def _put(store: Store, name: str, content: Content) -> dict[str, Any]:
    """Writes one file; returns what the manifest says of it."""
    entry: dict[str, Any] = {}

    def hashed() -> Iterator[bytes | memoryview]:
        size, digest = 0, hashlib.sha256()
        for chunk in content():
            size += len(chunk)
            digest.update(chunk)
            yield chunk
        entry.update(bytes=size, sha256=digest.hexdigest())

    store.write_content(name, hashed)
    return entry


def prune(checkpoints: Store, keep: int, newest: int) -> None:
    """Deletes what is older than the newest ``keep`` checkpoints up to step ``newest``.

    One that was never finished does not count; a broken one of a later step, which was passed over, does neither and is
    left to be looked at.
    """
    past = [step for step in steps(checkpoints) if step <= newest]
    finished = [step for step in past if checkpoints.child(folder_name(step)).exists("manifest.json")]
    for step in past:
        if len(finished) > keep and step < finished[keep - 1]:
            checkpoints.child(folder_name(step)).delete()


def read_state(checkpoints: Store, step: int) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint."""
    return json.loads(checkpoints.child(folder_name(step)).read("state.json"))


def restore(
    checkpoints: Store, step: int, model: MaskedAutoencoder, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Loads a checkpoint into a model and its optimiser, wherever they are.

    Raises:
        ValueError: Names or shapes do not fit.
    """
    store = checkpoints.child(folder_name(step))
    weights.load_state(model, safetensors.torch.load(store.read("model.safetensors")))
    if optimizer is not None:
        load_optimizer(store, model, optimizer)


def load_optimizer(store: Store, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimiser's state of one checkpoint's folder.

    Raises:
        ValueError: Names or shapes do not fit.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in safetensors.torch.load(store.read("optimizer.safetensors")).items():
        kind, name = key.split("/", 1)
        found.setdefault(name, {})[kind] = value
    names = _names(model)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # The moments lie with the weights; the count of steps on the CPU, unless AdamW is fused on a GPU.
            fused_on_gpu = parameter.device.type == "cuda" and group.get("fused")
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if key != "step" or fused_on_gpu else value
                for key, value in found.get(names[parameter], {}).items()
            }
