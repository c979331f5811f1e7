"""What a transfer's confusion matrices come to: accuracy or mean IoU, its mean over seeds, its interval."""

import json
from typing import Any

import numpy as np
import torch

from mae_core.segmentation import class_iou, mean_iou
from pipelines.data.index import WRITE_HINT
from pipelines.data.shards import Manifest, load_index
from pipelines.errors import UserError
from pipelines.storage import Store
from pipelines.transfer_config import Transfer, metric

_SCORED, _RANDOM = "scored.json", "random.json"
SHEET = "segmentation.png"
_NO_LABEL = -1
TEST_READ = (
    "when a seed is scored, after its training; by knn and linear-fast once for all seeds that a command scores. All "
    "that is chosen is chosen on the validation split"
)


def seed_folder(store: Store, seed: int) -> Store:
    """Where a transfer keeps what one seed has come to."""
    return store.child(f"seed-{seed}")


def read_scored(store: Store, seed: int) -> dict[str, Any] | None:
    """What a seed of a transfer has come to; None where it has not been scored."""
    folder = seed_folder(store, seed)
    return json.loads(folder.read(_SCORED)) if folder.exists(_SCORED) else None


def write_scored(store: Store, scored: dict[str, Any]) -> None:
    """Keeps what a seed has come to."""
    seed_folder(store, scored["seed"]).write(_SCORED, json.dumps(scored))


def read_random(store: Store) -> dict[str, Any] | None:
    """What a random encoder has come to, scored beside a transfer; None where none was."""
    return json.loads(store.read(_RANDOM)) if store.exists(_RANDOM) else None


def write_random(store: Store, scored: dict[str, Any]) -> None:
    """Keeps what a random encoder has come to: its seed, and its confusion matrix ``test``, or None."""
    store.write(_RANDOM, json.dumps(scored))


def check_classes(name: str, manifest: Manifest) -> None:
    """Sees that a labelled data set can be scored on: samples of more than one class have a label.

    Reads the shards' indexes until two classes are found.

    Args:
        name: The key that named it.
        manifest: The data.

    Raises:
        UserError: They have not.
    """
    found: set[int] = set()
    for shard in range(len(manifest.shard_names)):
        found |= set(np.unique(load_index(manifest, shard).label_S).tolist()) - {_NO_LABEL}
        if len(found) > 1:
            return
    if not found:
        raise UserError(
            f"{name}: none of the {manifest.num_samples:,} samples in {manifest.location} has a label: pack them from "
            "class folders, or give the tars .cls members and "
            f"{WRITE_HINT}"
        )
    (label,) = found
    which = repr(manifest.classes[label]) if label < len(manifest.classes) else f"number {label}"
    raise UserError(
        f"{name}: all labelled samples in {manifest.location} are of one class, {which}, and whatever is scored on one "
        "class alone gets 100 %: give shards with all classes (make_shards takes a folder with one folder a class)"
    )


def check_scored(test_CC: torch.Tensor) -> None:
    """Sees that a score on test data says something: more than one class was there to be found.

    Raises:
        UserError: None was, or one alone.
    """
    there = int((test_CC.sum(dim=1) > 0).sum())
    if there < 2:
        found = "only one class" if there else "nothing with a label that could be read"
        raise UserError(
            f"data.test: {found} was there to be scored, which says nothing of the features: give test data with two "
            "classes or more (of masks: the values count from 0 on, and 255 does not count)"
        )


def chance(name: str, confusion_CC: torch.Tensor) -> tuple[float, float]:
    """What needs no features: the score of always naming one class, the best one for it.

    Args:
        name: ``top1`` or ``miou``.
        confusion_CC: The confusion matrix, rows true.

    Returns:
        That score in percent, and the one up to which another is not above it: for accuracy two standard deviations of
        a share of so many images more.
    """
    true_C = confusion_CC.sum(dim=1).double()
    share = (true_C.max() / true_C.sum().clamp(min=1)).item()
    if name == "miou":
        best = 100 * share / max(1, int((true_C > 0).sum()))
        return best, best
    return 100 * share, 100 * (share + 2 * (share * (1 - share) / max(1.0, true_C.sum().item())) ** 0.5)


def summarise(transfer: Transfer, scored: list[dict[str, Any]], random: dict[str, Any] | None = None) -> dict[str, Any]:
    """The result of a transfer: means over the seeds with their 95 % intervals, and what each seed gave.

    Args:
        transfer: What was asked for.
        scored: What each seed came to.
        random: What a random encoder came to; None: none was scored.
    """
    name = metric(transfer)
    score = {"top1": top1, "miou": miou}[name]
    val = [score(torch.tensor(one["val"])) for one in scored]
    test = [score(torch.tensor(one["test"])) for one in scored]
    confusion_CC = torch.tensor([one["test"] for one in scored]).sum(dim=0)
    # Of one seed: other seeds look at the same images.
    by_chance, at_most = chance(name, torch.tensor(scored[0]["test"]))
    of_random: dict[str, float | None] = {}
    if random:
        of_random[f"test/random_{name}"] = score(torch.tensor(random["test"])) if random["test"] else None
    return {
        "protocol": transfer.protocol,
        "scores": {
            f"val/{name}": float(np.mean(val)),
            f"test/{name}": float(np.mean(test)),
            f"test/{name}_interval": interval(test),
            **of_random,
            "time/train_s": float(np.mean([one["seconds"] for one in scored])),
            "train/flops": float(scored[0].get("flops", 0)),
        },
        "seeds": [
            {"seed": one["seed"], "val": v, "test": t, "chosen": one["chosen"]}
            for one, v, t in zip(scored, val, test, strict=True)
        ],
        "chance": by_chance,
        "at_chance": float(np.mean(test)) <= at_most + 1e-6,
        "skipped_steps": sum(one.get("skipped_steps", 0) for one in scored),
        "tried": scored[0].get("tried", []),
        "test_read": TEST_READ,
        "confusion": confusion_CC.tolist(),
        "per_class": _per_class(confusion_CC) if name == "top1" else _iou_per_class(confusion_CC),
        "unreadable": len({tuple(one) for each in scored for one in each["unreadable"]}),
    }


def _per_class(confusion_CC: torch.Tensor) -> list[float]:
    return (100 * confusion_CC.diag() / confusion_CC.sum(dim=1).clamp(min=1)).tolist()


def _iou_per_class(confusion_CC: torch.Tensor) -> list[float | None]:
    """None for what is neither in the masks nor predicted."""
    return [None if np.isnan(value) else value for value in class_iou(confusion_CC).tolist()]


def interval(values: list[float]) -> float | None:
    """Half the width of the 95 % interval of a mean (Student's t); None for a single value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def confusion(predicted_N: torch.Tensor, label_N: torch.Tensor, num_classes: int) -> torch.Tensor:
    """The confusion matrix [C, C]: rows true, columns predicted.

    Raises:
        UserError: A label is none of the classes.
    """
    if len(label_N) and int(label_N.max()) >= num_classes:
        raise UserError(f"label {int(label_N.max())} is none of the {num_classes} classes: mend the .cls files")
    counts = torch.bincount(label_N * num_classes + predicted_N, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def top1(confusion_CC: torch.Tensor) -> float:
    """Accuracy in percent."""
    return 100 * float(confusion_CC.diag().sum()) / max(1, int(confusion_CC.sum()))


def miou(confusion_CC: torch.Tensor) -> float:
    """Mean intersection over union in percent.

    Raises:
        UserError: No pixel counts.
    """
    try:
        return mean_iou(confusion_CC)
    except ValueError as error:
        raise UserError(str(error)) from None
