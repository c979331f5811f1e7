"""What of a fine-tuning's recipe reaches the images and their targets, without Ray."""

import contextlib
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from pipelines.data.plan import FILLER
from pipelines.data.readers import MicroBatch
from pipelines.training.classification import Classification
from pipelines.transfer_config import Transfer, TransferTrain

CLASSES, SIZE = 8, 16
RECIPE: dict[str, Any] = {"smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "erasing": 0.25}


def task_of(**train: Any) -> Classification:
    worker: Any = SimpleNamespace(
        transfer=Transfer(protocol="finetune", train=TransferTrain(**train)),
        device=torch.device("cpu"),
        num_classes=CLASSES,
        autocast=contextlib.nullcontext,
        images=lambda batch: torch.from_numpy(batch.images_BHWC.copy()).permute(0, 3, 1, 2).float(),
    )
    return Classification(worker)


def seeded(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def batch_of(real: int, filler: int = 0) -> MicroBatch:
    """Each image is of one value and one class, counted from 1 on; filler is black, without a label."""
    value_B = np.concatenate([1 + np.arange(real) % (CLASSES - 1), np.zeros(filler, int)])
    images_BHWC = np.broadcast_to(value_B[:, None, None, None], (real + filler, SIZE, SIZE, 3)).astype(np.uint8)
    sample_B = np.where(value_B > 0, np.arange(real + filler), FILLER)
    label_B = np.where(value_B > 0, value_B, -1)
    return MicroBatch(0, 0, images_BHWC, sample_B, sample_B * 0, label_B, (value_B > 0).astype(np.float32), [])


class Seen(torch.nn.Module):
    """A model that keeps what it is shown; its logits are always the same ones."""

    def forward(self, images_BCHW: torch.Tensor, counts_B: torch.Tensor | None = None) -> torch.Tensor:
        self.images_BCHW, self.counts_B = images_BCHW, counts_B
        return torch.linspace(0, 3, CLASSES).repeat(len(images_BCHW), 1)


def augmented(task: Classification, batch: MicroBatch, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    seeded(seed)
    images_BCHW = task._worker.images(batch)
    label_B, weight_B = task._labels(batch)
    return task.augmented(images_BCHW, label_B, np.flatnonzero(weight_B))


@pytest.mark.parametrize(("real", "filler"), [(1, 0), (1, 3), (2, 1), (5, 0), (5, 3), (6, 1), (6, 3)])
def test_an_image_is_mixed_with_another_image_and_never_with_filler(real, filler):
    task, plain = task_of(**{**RECIPE, "erasing": 0.0}), task_of(smoothing=0.1)
    off = 0.1 / CLASSES
    mixed = set()
    for seed in range(8):
        batch = batch_of(real, filler)
        images_BCHW, target_BC = augmented(task, batch, seed)
        alone_BCHW, alone_BC = augmented(task, batch_of(real), seed)
        assert torch.equal(images_BCHW[:real], alone_BCHW)
        assert torch.equal(target_BC[:real], alone_BC), "filler changes what is drawn"
        # Filler is of class 0, as labels are cut there, and black.
        torch.testing.assert_close(target_BC[:real, 0], torch.full((real,), off))
        torch.testing.assert_close(target_BC.sum(dim=1), torch.tensor([1.0] * real + [0.0] * filler))
        for row in range(real):
            share_C = (target_BC[row] - off) / 0.9
            values = torch.arange(CLASSES).float()
            # As much of another class stands in the target as there is of its value in the image.
            assert images_BCHW[row].mean().item() == pytest.approx((share_C * values).sum().item(), abs=1e-4)
            assert images_BCHW[row].min() > 0
            mixed |= {row} if share_C.max() < 0.999 else set()
    # And the loss is that of these rows alone.
    seeded(3)
    loss = task.loss(Seen(), batch_of(real, filler))
    _, target_BC = augmented(task, batch_of(real), 3)
    logits_RC = torch.linspace(0, 3, CLASSES).repeat(real, 1)
    torch.testing.assert_close(loss, cross_entropy(logits_RC, target_BC, reduction="sum"))
    assert mixed == (set(range(real)) if real > 1 else set())
    assert augmented(plain, batch_of(real, filler), 0)[1].tolist() == [*range(1, real + 1), *[0] * filler]


def test_a_batch_without_an_image_costs_nothing():
    for train in (RECIPE, {"smoothing": 0.1}, {"erasing": 1.0}):
        seeded(0)
        assert task_of(**train).loss(Seen(), batch_of(0, 4)).item() == 0


def test_cutmix_pastes_a_box_and_mixup_blends():
    both, cutmix, mixup = (
        task_of(**train) for train in ({"mixup": 0.8, "cutmix": 1.0}, {"cutmix": 1.0}, {"mixup": 0.8})
    )
    blended = pasted = 0
    for seed in range(40):
        images_BCHW, _ = augmented(both, batch_of(2), seed)
        values = images_BCHW[0].unique()
        # A paste keeps the two values as they are; a blend has none of them.
        assert len(values) <= 2
        pasted += len(values) == 2
        blended += len(values) == 1 and values[0] not in (1, 2)
    assert 10 <= pasted <= 30
    assert 10 <= blended <= 30
    for seed in range(10):
        only, _ = augmented(cutmix, batch_of(2), seed)
        assert set(only.unique().tolist()) <= {1, 2}
        only, _ = augmented(mixup, batch_of(2), seed)
        assert len(only[0].unique()) == 1


@pytest.mark.parametrize("train", [{"smoothing": 0.1}, {"smoothing": 0.1, "cutmix": 1.0}])
def test_labels_are_smoothed(train):
    batch = batch_of(4, 1)
    seeded(3)
    loss = task_of(**train).loss(Seen(), batch)
    seeded(3)
    hard = task_of(**train | {"smoothing": 0.0}).loss(Seen(), batch)
    # Smoothing gives a tenth of each target to all classes alike.
    log_C = torch.linspace(0, 3, CLASSES).log_softmax(dim=0)
    torch.testing.assert_close(loss, 0.9 * hard + 0.1 * 4 * -log_C.mean())


def test_a_quarter_of_the_images_is_erased_in_part():
    task, whole = task_of(erasing=0.25), task_of()
    seen, erased, pixels = Seen(), 0, 0.0
    for seed in range(50):
        batch = batch_of(8, 2)
        seeded(seed)
        task.loss(seen, batch)
        changed_BHW = (seen.images_BCHW != task._worker.images(batch)).any(dim=1)
        assert not changed_BHW[8:].any()
        erased += int(changed_BHW.flatten(1).any(dim=1).sum())
        pixels += float(changed_BHW.float().mean())
        whole.loss(seen, batch)
        assert torch.equal(seen.images_BCHW, whole._worker.images(batch))
    # 400 images, each with a probability of one quarter.
    assert 65 <= erased <= 135
    assert pixels > 0


def test_rows_that_count_are_told_to_the_model():
    seen = Seen()
    task_of(**RECIPE).loss(seen, batch_of(3, 2))
    assert seen.counts_B is not None
    assert seen.counts_B.tolist() == [True] * 3 + [False] * 2
