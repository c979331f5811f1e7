"""The protocol segment without Ray: what is learned and scored, and wrong input."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mae_core.images import normalize
from mae_core.mask_images import IGNORE
from mae_core.model import MaskedAutoencoder
from pipelines.data.plan import Cut, Plan
from pipelines.data.readers import MicroBatch, Stream, View, read_images
from pipelines.data.shards import Manifest
from pipelines.errors import UserError
from pipelines.training.scores import summarise
from pipelines.training.segmentation import Segmentation
from pipelines.transfer import check_masks
from pipelines.transfer_config import Transfer, TransferData, TransferTrain, recipe
from pipelines.transfer_identity import score_key
from tests.masks import pack, write_scenes


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 12)
    return pack(folder, folder / "shards")[1]


def task_of(num_classes: int = 3) -> Segmentation:
    encoder = MaskedAutoencoder("vit_tiny_patch16_224", image_size=32, patch_size=4, width=24, depth=1, num_heads=2)
    worker: Any = SimpleNamespace(
        transfer=Transfer(protocol="segment", train=TransferTrain(**recipe("segment")["train"])),
        device=torch.device("cpu"),
        num_classes=num_classes,
        job=SimpleNamespace(classes=("ground", "$light$", "a\nb")),
        image_size=(32, 32),
        encoder=lambda *_, **__: encoder,
        autocast=contextlib.nullcontext,
        images=lambda batch: normalize(torch.from_numpy(batch.images_BHWC.copy()), (0.5,) * 3, (0.25,) * 3),
    )
    return Segmentation(worker)


def read(manifest: Manifest, rows: int = 12) -> MicroBatch:
    plan = Plan(manifest.num_samples, 0, end=manifest.num_samples, shuffle=False)
    return read_images(Stream(manifest, plan, Cut(rows, rows, 1), View((32, 32), 3, crop_share=1.0, masks=True)), 0)


def test_a_head_learns_what_the_masks_show(manifest):
    task, batch = task_of(), read(manifest)
    model = task.model(0)
    optimizer = task.optimizer(model)
    for group in optimizer.param_groups:
        group["lr"].fill_(0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = task.loss(model, batch) / len(batch.weight_B)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    with torch.inference_mode():
        confusion_CC = task.confusion(model.eval(), batch)
    assert confusion_CC.sum() == 12 * 32 * 32
    assert task.score(confusion_CC) > 70
    assert batch.mask_BHW is not None
    wrong = replace(batch, mask_BHW=np.roll(batch.mask_BHW, 1, axis=0))
    assert task.score(task.confusion(model, wrong)) < 55


def test_what_does_not_count_costs_nothing(manifest):
    task, batch = task_of(), read(manifest)
    model = task.model(0).eval()
    assert batch.mask_BHW is not None
    nothing = replace(batch, mask_BHW=np.full_like(batch.mask_BHW, IGNORE))
    assert task.loss(model, nothing).item() == 0
    assert task.confusion(model, nothing).sum() == 0
    with pytest.raises(UserError, match="no pixel was counted"):
        task.score(task.confusion(model, nothing))
    # Filler at the end of the data, whoever computes it: the same sum of losses.
    filled = task.loss(model, read(manifest, rows=16)).item()
    assert filled == pytest.approx(task.loss(model, batch).item(), rel=1e-5)


def test_a_sheet_shows_what_has_a_mask(manifest):
    task, batch = task_of(), read(manifest)
    model = task.model(0).eval()
    with torch.inference_mode():
        sheet, nothing = task.sheet(model, batch), task.sheet(model, replace(batch, weight_B=batch.weight_B * 0))
    assert nothing is None
    assert sheet is not None
    # Eight rows of tiles, enlarged from 32 pixels to some 128, and the legend below.
    assert sheet.height > 8 * 128
    assert sheet.width > 3 * 128


def test_values_outside_the_classes_are_told(manifest):
    task = task_of(num_classes=2)
    with pytest.raises(UserError, match=r"the mask of sample 0 has the value 2, and there are 2 classes"):
        task.loss(task.model(0), read(manifest))


def test_masks_and_their_classes_must_be_known(manifest, tmp_path):
    asked = Transfer(protocol="segment")
    assert check_masks(asked, {"train": manifest, "test": manifest}) == 3
    foreign = replace(manifest, mask_classes=0)
    with pytest.raises(UserError, match=r"data\.train: its manifest does not say .* give --data\.num-classes"):
        check_masks(asked, {"train": foreign, "test": manifest})
    told = Transfer(protocol="segment", data=TransferData(num_classes=5))
    assert check_masks(told, {"train": foreign, "test": manifest}) == 5
    with pytest.raises(UserError, match=r"data\.test: the masks have 4 classes, and 3 are learned"):
        check_masks(asked, {"train": manifest, "test": replace(manifest, mask_classes=4)})
    write_scenes(tmp_path, 4)
    _, without = pack(tmp_path, tmp_path / "shards", masks=False)
    with pytest.raises(UserError, match=r"data\.test: the shards in .* have no masks"):
        check_masks(asked, {"train": manifest, "test": without})


def test_masks_of_one_class_are_refused(manifest):
    # What 0 and 255 make: 255 does not count.
    one = replace(manifest, mask_classes=1)
    with pytest.raises(UserError, match=r"data\.train: the masks make one class, 0, .* write 1 where the thing is"):
        check_masks(Transfer(protocol="segment"), {"train": one, "test": one})
    with pytest.raises(UserError, match=r"data\.test: the masks make one class"):
        check_masks(Transfer(protocol="segment"), {"train": manifest, "test": one})
    for asked in ({"num_classes": 1}, {"class_names": ("thing",)}):
        unread = replace(manifest, mask_classes=0)
        transfer = Transfer.model_validate({"protocol": "segment", "data": asked})
        with pytest.raises(UserError, match="the masks make one class"):
            check_masks(transfer, {"train": unread, "test": unread})


def test_class_names_are_one_for_each_class(manifest):
    names = Transfer(protocol="segment", data=TransferData(class_names=("sky", "wall", "roof")))
    assert check_masks(names, {"train": manifest, "test": manifest}) == 3
    two = Transfer(protocol="segment", data=TransferData(num_classes=3, class_names=("sky", "wall")))
    with pytest.raises(UserError, match=r"data\.class_names: 2 names for 3 classes"):
        check_masks(two, {"train": manifest, "test": manifest})


@pytest.mark.parametrize(
    "values",
    [{"train": {"mixup": 1.0}}, {"train": {"optimizer": "lars"}}, {"data": {"auto_augment": "rand-m9-mstd0.5-inc1"}}],
)
def test_what_would_not_move_masks_is_refused(values):
    with pytest.raises(ValueError, match="segment takes no mixup"):
        Transfer.model_validate({"protocol": "segment", **values})
    with pytest.raises(ValueError, match="num_classes is for the protocol segment"):
        Transfer(protocol="linear", data=TransferData(num_classes=3))


def test_the_score_is_named_miou():
    transfer = Transfer.model_validate(recipe("segment") | {"data": {"name": "cells"}})
    one = {"seed": 0, "val": [[1, 0], [0, 1]], "test": [[3, 1], [0, 0]], "seconds": 1.0, "chosen": {}}
    result = summarise(transfer, [one | {"unreadable": []}])
    assert (result["scores"]["val/miou"], result["scores"]["test/miou"]) == (100, 37.5)
    assert result["per_class"] == [75, 0]
    assert score_key(transfer) == "transfer/cells/segment_miou"
