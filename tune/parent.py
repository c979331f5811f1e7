"""What stands above trials, of a search as of an ablation: one definition for a folder, and a record of its own."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pipelines.config import Config
from pipelines.data.plan import Plan
from pipelines.data.shards import Manifest
from pipelines.errors import UserError
from pipelines.kinds import refuse_other
from pipelines.spool import SPOOL_FILE, Spool
from pipelines.storage import Store
from pipelines.tracking import send, start_follower
from pipelines.training.runfolder import RunFolder
from tune.journal import Cell, Journal


def trial_config(config: Config, store: Store, every_epochs: float, *, at_start: bool = False) -> Config:
    """What a trial has where nothing else is said: a place of its own, no test data, no pictures.

    Args:
        config: The user's, resolved.
        store: The folder above the trials.
        every_epochs: Epochs between probes; 0: one, at the end.
        at_start: Whether untrained encoders are scored too, each shape once.
    """
    values = config.model_dump()
    values["run"] |= {"storage": store.path("trials")}
    values["probe"] |= {"test": "", "at_start": at_start, "every_epochs": every_epochs}
    values["log"] |= {"pictures": 0}
    return Config.model_validate(values)


def probed(config: Config, labelled: Manifest) -> dict[str, Any]:
    """What makes the scores of trials comparable, beside the runs themselves.

    Args:
        config: Of the trials.
        labelled: The data of their probes.
    """
    keys = ("knn_k", "pool", "val_share", "crop_share", "samples")
    return {f"probe.{key}": getattr(config.probe, key) for key in keys} | {"probe.digest": labelled.digest}


def refuse_other_trials(store: Store, cells: Iterable[Cell]) -> None:
    """Sees that what lies where trials will be is theirs; writes nothing.

    Args:
        store: The folder above the trials.
        cells: Those that are known.

    Raises:
        UserError: A place holds something else.
    """
    trials = store.child("trials")
    for name in {cell.name for cell in cells} & set(trials.names()):
        refuse_other(trials.child(name), "trial")


def validation_size(config: Config, labelled: Manifest, seed: int) -> int:
    """Images of the validation split on which the last probe of a trial scores, if all can be read and have a label.

    Args:
        config: Of the trials.
        labelled: The data of their probes.
        seed: Of the trial: each has a split of its own.
    """
    from mae_core.probes import split_indices  # and PyTorch with it

    _, validation = split_indices(labelled.num_samples, config.probe.val_share, seed=seed)
    num = min(config.probe.samples or labelled.num_samples, labelled.num_samples)
    looked_at, _ = Plan(labelled.num_samples, seed=0, end=num, shuffle=num < labelled.num_samples).samples(0, num)
    return int(np.isin(looked_at, validation).sum())


def end_running(journal: Journal, store: Store) -> None:
    """Writes into the records of trials that were being trained that they were killed; their processes have ended.

    Args:
        journal: What is known of the trials.
        store: The folder above them.
    """
    for trial in journal.trials.values():
        place = store.child("trials").child(trial.name)
        if trial.state == "running" and place.is_local and place.exists(SPOOL_FILE):
            Spool(place.local()).status("KILLED")


def refuse_change(store: Store, file: str, who: str, wanted: Mapping[str, Any]) -> None:
    """Holds a definition against that with which a folder was begun.

    Args:
        store: The folder.
        file: Its definition.
        who: As an error names it.
        wanted: The definition now, the most telling key first.

    Raises:
        UserError: It is another.
    """
    found = json.loads(store.read(file))
    changed = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    if changed:
        key = changed[0]
        raise UserError(
            f"{who} was begun with another {key}: {found.get(key)!r}, now {wanted.get(key)!r}; choose another --run"
        )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows under a head, in columns of a terminal, flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)) for row in rows)


@contextmanager
def own_record(folder: RunFolder, followed: bool) -> Iterator[Spool]:
    """The record above the trials, whose MLflow run is there; sent when the block ends, however it does.

    Args:
        folder: Its small files.
        followed: Whether a process of its own sends it, and that of the trials, meanwhile.
    """
    spool = Spool(folder.path)
    spool.status("RUNNING")
    follower = start_follower(folder.path) if followed else None
    try:
        yield spool
    finally:
        spool.close()
        if follower:
            follower.stop(timeout_s=30.0)
        else:
            send(folder.path, timeout_s=30.0)
        folder.push()
