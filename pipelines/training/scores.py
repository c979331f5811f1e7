"""What a transfer's confusion matrices come to: accuracy or mean IoU, its mean over seeds, its interval."""

import json
from typing import Any

import numpy as np
import torch

from mae_core.segmentation import class_iou, mean_iou
from pipelines.errors import UserError
from pipelines.storage import Store
from pipelines.transfer_config import Transfer, metric

_SCORED = "scored.json"
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


def summarise(transfer: Transfer, scored: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of a transfer: means over the seeds with their 95 % intervals, and what each seed gave."""
    name = metric(transfer)
    score = {"top1": top1, "miou": miou}[name]
    val = [score(torch.tensor(one["val"])) for one in scored]
    test = [score(torch.tensor(one["test"])) for one in scored]
    confusion_CC = torch.tensor([one["test"] for one in scored]).sum(dim=0)
    return {
        "protocol": transfer.protocol,
        "scores": {
            f"val/{name}": float(np.mean(val)),
            f"test/{name}": float(np.mean(test)),
            f"test/{name}_interval": interval(test),
            "time/train_s": float(np.mean([one["seconds"] for one in scored])),
            "train/flops": float(scored[0].get("flops", 0)),
        },
        "seeds": [
            {"seed": one["seed"], "val": v, "test": t, "chosen": one["chosen"]}
            for one, v, t in zip(scored, val, test, strict=True)
        ],
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
