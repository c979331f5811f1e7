"""The patch head against PyTorch's own layers on maps, and the scores against scikit-learn's."""

from typing import Any

import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mae_core.classifier import parameter_groups
from mae_core.model import MaskedAutoencoder
from mae_core.segmentation import PatchHead, Segmenter, class_iou, confusion, mean_iou, segmentation_flops


def test_the_head_is_a_convolution_on_the_map_of_patches():
    before = torch.get_rng_state()
    head, again, other = (PatchHead(8, 3, (4, 6), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(head.linear.weight, again.linear.weight)
    assert not torch.equal(head.linear.weight, other.linear.weight)
    assert [name for name, _ in head.named_parameters()] == ["linear.weight", "linear.bias"]
    convolution = nn.Conv2d(8, 3, 1)
    reference = nn.Sequential(
        nn.BatchNorm2d(8, affine=False, eps=1e-6), convolution, nn.Upsample((10, 18), mode="bilinear")
    )
    with torch.no_grad():
        head.linear.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
        convolution.weight.copy_(head.linear.weight[:, :, None, None])
        convolution.bias.copy_(head.linear.bias)  # pyright: ignore
    for seed, mode in ((0, True), (1, False)):  # the running statistics of the first are used by the second
        patches_BND = 3 + torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(seed))
        map_BDhw = patches_BND.transpose(1, 2).unflatten(2, (4, 6))
        logits_BCHW = head.train(mode)(patches_BND, (10, 18))
        torch.testing.assert_close(logits_BCHW, reference.train(mode)(map_BDhw), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="25 tokens for a grid of 4x6"):
        head(torch.zeros(2, 25, 8), (10, 18))


def segmenter() -> tuple[MaskedAutoencoder, Segmenter]:
    model = MaskedAutoencoder("vit_tiny_patch16_224", image_size=16, patch_size=4, width=24, depth=2, num_heads=2)
    return model, Segmenter(model, 50, image_size=(16, 24), seed=1)


def test_the_encoder_is_frozen_and_gives_its_patches():
    source, model = segmenter()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {"head.linear.weight", "head.linear.bias"}
    assert {name for group in parameter_groups(model, 1.0, 0.1) for name, _ in group["params"]} == names
    assert not model.encoder.training
    images_BCHW = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    whole = Segmenter(source, 50, seed=1).eval()
    tokens_BND = source.encoder.forward_features(images_BCHW[..., :16])[:, 1:]
    torch.testing.assert_close(whole(images_BCHW[..., :16]), whole.head(tokens_BND, (16, 16)))
    assert model(images_BCHW).shape == (2, 50, 16, 24)


def test_flops_are_those_that_torch_counts():
    _, model = segmenter()
    block: Any
    for block in model.encoder.blocks:
        block.attn.fused_attn = False  # the counter does not know the CPU's fused kernel
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, 16, 24)).sum().backward()
    assert segmentation_flops(model) == pytest.approx(counter.get_total_flops() / 2, rel=0.001)


def random_masks(num_classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(num_classes, (3, 7, 9), generator=generator)
    pred = torch.where(torch.rand(3, 7, 9, generator=generator) < 0.6, target, target.roll(1, dims=2))
    target[torch.rand(3, 7, 9, generator=generator) < 0.2] = 255
    return pred, target


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_scores_are_those_of_scikit_learn(dtype):
    pairs = [random_masks(6, seed) for seed in range(3)]
    summed = sum(confusion(pred.to(dtype), target.to(dtype), 6) for pred, target in pairs)
    pred, target = (torch.stack(tensors).flatten() for tensors in zip(*pairs, strict=True))
    pred, target = pred[target != 255], target[target != 255]
    assert torch.equal(torch.as_tensor(summed), torch.from_numpy(confusion_matrix(target, pred)))
    expected = 100 * float(jaccard_score(target, pred, average="macro"))
    assert mean_iou(torch.as_tensor(summed)) == pytest.approx(expected)


def test_a_class_counts_where_it_is_in_the_masks_or_predicted():
    target = torch.tensor([0, 0, 0, 1])
    assert mean_iou(confusion(target, target, 4)) == 100
    pred = torch.tensor([0, 0, 3, 1])  # class 2 is nowhere
    assert mean_iou(confusion(pred, target, 4)) == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)
    assert class_iou(confusion(pred, target, 4)).tolist() == pytest.approx([200 / 3, 100, torch.nan, 0], nan_ok=True)
    assert mean_iou(confusion(pred, target, 4, ignore=0)) == 100
    with pytest.raises(ValueError, match="no pixel"):
        mean_iou(confusion(pred, torch.full((4,), 255), 4))


def test_wrong_masks_are_refused():
    with pytest.raises(ValueError, match=r"shape \[2\] for a target of shape \[3\]"):
        confusion(torch.zeros(2), torch.zeros(3), 4)
    with pytest.raises(ValueError, match="true classes reach from 0 to 4: expected 0 to 3"):
        confusion(torch.tensor([0, 1]), torch.tensor([0, 4]), 4)
    with pytest.raises(ValueError, match="predicted classes reach from -1 to 1"):
        confusion(torch.tensor([-1, 1]), torch.tensor([0, 0]), 4)
