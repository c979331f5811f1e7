"""Runs that are there already: their folder, their configuration, and the encoder that they have come to."""

import contextlib
import difflib
import json
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pydantic

from pipelines.config import Config, identity_hash
from pipelines.errors import UserError
from pipelines.kinds import SHOWN, kind_of
from pipelines.spool import SPOOL_FILE
from pipelines.storage import Store, absolute

if TYPE_CHECKING:
    from mae_core.model import MaskedAutoencoder

CONFIG = "config.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_TOLD = 5


def find_run(storage: str, name: str) -> Store:
    """The folder of a run.

    Args:
        storage: Folder or address that holds the runs.
        name: The run's name.

    Raises:
        UserError: There is no such run; the text says what else has the name, or lists similar ones.
    """
    runs = Store(absolute(storage))
    if _NAME.fullmatch(name) and runs.child(name).exists(CONFIG):
        return runs.child(name)
    if _NAME.fullmatch(name) and (kind := kind_of(runs.child(name))):
        trials = runs.child(name).child("trials").shown()
        way = f": its trials are runs of --storage {trials}" if kind in ("search", "ablation") else ""
        raise UserError(f"'{name}' in {runs.shown()} is {SHOWN[kind]}, not {SHOWN['run']}{way}")
    names = [other for other in runs.names() if _NAME.fullmatch(other)]
    near = [other for other in difflib.get_close_matches(name, names, n=20, cutoff=0.5) if _is_run(runs, other)]
    if near:
        found = f"did you mean {', '.join(near[:_MOST_TOLD])}?"
    else:
        some = [other for other in names if _is_run(runs, other)]
        found = f"it holds {', '.join(some[:_MOST_TOLD]) or 'no run at all'}{', ...' if len(some) > _MOST_TOLD else ''}"
    raise UserError(f"no run '{name}' in {runs.shown()}: {found}")


def run_config(store: Store) -> Config:
    """The resolved configuration of a run.

    Args:
        store: The run's folder.

    Raises:
        UserError: There is none, or it is not one that this version reads.
    """
    try:
        return Config.model_validate_json(store.read(CONFIG))
    except FileNotFoundError:
        raise UserError(f"{store.shown()} is no run: there is no {CONFIG}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        told = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(f"{store.shown(CONFIG)} is no configuration of this version: {told}") from None


def final_step(store: Store) -> int | None:
    """The last step of a run that has finished; None where it has not.

    Args:
        store: The run's folder.
    """
    if not store.exists("result.json"):
        return None
    result, identity = (json.loads(store.read(name)) for name in ("result.json", "identity.json"))
    # The result of an earlier configuration, which this run went on from, is not this one's.
    return result["step"] if result["identity"] == identity_hash(identity) else None


def finished_when(store: Store) -> str:
    """When a run or a transfer has finished, as its record says: `` on 2026-11-30 at 12:00``; empty where it does not.

    Args:
        store: Its folder.
    """
    ended = 0.0
    if store.exists(SPOOL_FILE):
        for text in store.read(SPOOL_FILE).splitlines():
            if b'"status"' in text:
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
                    ended = line["time"] if line.get("status") == "FINISHED" else ended
    return time.strftime(" on %Y-%m-%d at %H:%M", time.localtime(ended)) if ended else ""


def load_encoder(store: Store, config: Config, warn: Callable[[str], None]) -> "tuple[MaskedAutoencoder, int]":
    """The model of a run's newest whole checkpoint, encoder and decoder, on the current default device.

    Args:
        store: The run's folder.
        config: Its configuration, from ``run_config``.
        warn: Takes a line for each broken checkpoint that is passed over.

    Returns:
        The model in evaluation mode, and the optimiser steps that it has done.

    Raises:
        UserError: The run has no whole checkpoint, or one that does not fit its configuration.
    """
    # Not at the top: who only looks for a run would wait seconds for PyTorch and timm.
    from pipelines.training import checkpoint
    from pipelines.training.build import build_model

    checkpoints = store.child("checkpoints")
    step = checkpoint.newest_whole(checkpoints, warn)
    if step is None:
        broken = len(checkpoint.steps(checkpoints))
        found = f"none of its {broken} is whole" if broken else "none has been written yet"
        raise UserError(
            f"the run in {store.shown()} has no whole checkpoint ({found}): let it train on, then try again"
        )
    model = build_model(config)
    try:
        checkpoint.restore(checkpoints, step, model)
    except ValueError as error:
        name = checkpoints.shown(checkpoint.folder_name(step))
        raise UserError(f"{name} does not fit the run's {CONFIG}: {error}") from None
    return model.eval(), step


def _is_run(runs: Store, name: str) -> bool:
    return runs.child(name).exists(CONFIG)
