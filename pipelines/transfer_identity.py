"""What a transfer is called, and what makes it the one that it is."""

import json
import re
from pathlib import PurePosixPath
from typing import Any

from pipelines.config import Config, flat
from pipelines.objects import split_query
from pipelines.transfer_config import CACHED, Transfer, TransferTrain, metric, recipe

# Where a transfer runs and lies, how often it tells, what ``units`` has resolved, and the seeds, each of which has a
# result of its own.
_NOT_RESULT: frozenset[str] = frozenset((
    "run", "weights", "storage", "sweep", "against_scratch", "seeds", "log_every", "checkpoint_minutes", "experiment",
    "random_baseline", "data.train", "data.test", "data.val", "data.name", "data.num_classes", "data.class_names",
    "data.deadline_s", "data.max_unreadable", "data.cpus_per_task",
))  # fmt: skip
_TRAIN = frozenset(f"train.{key}" for key in TransferTrain.model_fields)
# Of protocol segment, whose masks must move with their images, under AdamW, on a frozen encoder.
_NOT_SEGMENT: frozenset[str] = frozenset((
    "pool", "data.auto_augment", "train.optimizer", "train.layer_decay", "train.drop_path", "train.smoothing",
    "train.mixup", "train.cutmix", "train.erasing",
))  # fmt: skip


def _ignored(unit: Transfer) -> set[str]:
    """The keys that a transfer's protocol makes no use of."""
    protocol = unit.protocol
    found: set[str] = set(_NOT_RESULT)
    if unit.data.val:
        found.add("data.val_share")
    if protocol != "partial":
        found.add("blocks")
    if protocol != "knn":
        found.add("knn_k")
    if protocol in CACHED:
        found |= {*_TRAIN - {"train.precision"}, "data.crop_scale", "data.flip", "data.auto_augment"}
    else:
        found.add("visible")
    if protocol == "segment":
        found |= _NOT_SEGMENT
    elif unit.train.optimizer == "lars":
        found |= {"train.weight_decay", "train.betas", "train.layer_decay"}
    if protocol == "linear" or (protocol == "partial" and unit.blocks[0] == 0):
        found |= {"train.layer_decay", "train.drop_path"}
    if unit.train.base_lrs:
        found.add("train.base_lr")
    return found


def identity(unit: Transfer, step: int, digests: dict[str, Any]) -> dict[str, Any]:
    """What defines the result of a transfer with a seed: the same identity and seed, the same score.

    Args:
        unit: One of ``units``.
        step: Of the pretraining run; what begins from random weights does not depend on it.
        digests: Of the data, and of what else is no key of the configuration.
    """
    ignored = _ignored(unit)
    values = {key: value for key, value in flat(unit).items() if key not in ignored and not key.startswith("scale.")}
    values |= digests
    if unit.protocol != "scratch":
        values["step"] = step
    return json.loads(json.dumps(values))


def as_pretrained(transfer: Transfer, config: Config) -> Transfer:
    """The same transfer, that leaves to the encoder's configuration what it only repeats."""
    values, default = transfer.model_dump(), Transfer().data
    for key in ("image_size", "mean", "std"):
        if getattr(transfer.data, key) == getattr(config.data, key):
            values["data"][key] = getattr(default, key)
    return Transfer.model_validate(values)


def dataset_name(config: Transfer) -> str:
    """The data set's name in the record."""
    if config.data.name:
        return config.data.name
    parts = [part for part in re.split(r"[/:]+", config.data.train) if part and ".tar" not in part]
    while len(parts) > 1 and parts[-1].lower() in ("train", "training", "shards"):
        parts.pop()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", parts[-1]) if parts else "data"


def source_name(config: Transfer) -> str:
    """The name of what is scored: the run's, or that of the file of weights without its folder and ending."""
    return config.run or PurePosixPath(split_query(config.weights)[0]).stem


def score_name(unit: Transfer) -> str:
    """What a score is called: the protocol, and what changes its meaning where it is not the protocol's own.

    Args:
        unit: One of ``units``, its image size only given where it is not pretraining's (``as_pretrained``).
    """
    parts = [unit.protocol.replace("-", "_")]
    if unit.protocol == "partial":
        parts.append(f"{unit.blocks[0]:g}")
    if unit.visible[0] < 1:
        parts.append(f"visible_{unit.visible[0]:g}")
    if unit.data.label_fraction[0] < 1:
        parts.append(f"labels_{unit.data.label_fraction[0]:g}")
    if unit.pool != "mean" and unit.protocol != "segment":
        parts.append(unit.pool)
    if min(unit.data.image_size) > 0:
        parts.append(f"{unit.data.image_size[0]}x{unit.data.image_size[1]}")
    if unit.protocol == "knn" and unit.knn_k != Transfer().knn_k:
        parts.append(f"k{unit.knn_k}")
    own = recipe(unit.protocol)["train"].get("epochs", TransferTrain().epochs)
    if unit.protocol not in CACHED and unit.train.epochs != own:
        parts.append(f"{unit.train.epochs:g}_epochs")
    return "_".join(parts)


def score_key(unit: Transfer) -> str:
    """The metric of a score on its pretraining run."""
    return f"transfer/{dataset_name(unit)}/{score_name(unit)}_{metric(unit)}"
