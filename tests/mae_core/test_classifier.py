"""The classifier against timm's own model, and each kind of training against what may move and what may not."""

import math
from typing import Any

import pytest
import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mae_core.classifier import Classifier, freeze, make_lars, parameter_groups, training_flops
from mae_core.model import MaskedAutoencoder

DEPTH = 3
SIZES: dict[str, Any] = {"patch_size": 4, "width": 24, "depth": DEPTH, "num_heads": 3}
DECODER: dict[str, Any] = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def autoencoder(**changes) -> MaskedAutoencoder:
    """Random values everywhere, so that biases, norms and positions count too."""
    model = MaskedAutoencoder("vit_tiny_patch16_224", **{"image_size": 16, **SIZES, **DECODER, **changes})
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table(model: Classifier | MaskedAutoencoder) -> torch.Tensor:
    return model.get_parameter("encoder.pos_embed")


def weight_and_bias(model: Classifier) -> list[nn.Parameter]:
    return list(model.head.parameters())


def classifier(**changes) -> Classifier:
    model = Classifier(autoencoder(), 5, **changes)
    randomize(model.head)  # as made, it is too small for a gradient to reach the encoder
    return model


@pytest.mark.parametrize(("pool", "timms"), [("mean", "avg"), ("cls", "token")])
def test_equal_to_timm_with_its_drop_path(pool, timms):
    ours = classifier(pool=pool, drop_path=0.4)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=DEPTH, num_heads=3, num_classes=5,
        global_pool=timms, fc_norm=False, drop_path_rate=0.4,
    )  # fmt: skip
    state = {name.removeprefix("encoder."): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    images_BCHW = random_images(4, 3, 16, 16)
    logits_BC = {}
    for mode in (True, False):
        for model in (ours, theirs):
            torch.manual_seed(3)  # the same paths are dropped
            logits_BC[mode, model is ours] = model.train(mode)(images_BCHW)
        torch.testing.assert_close(logits_BC[mode, True], logits_BC[mode, False], rtol=1e-5, atol=1e-5)
    assert logits_BC[True, True].shape == (4, 5)
    assert not torch.allclose(logits_BC[True, True], logits_BC[False, True])


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_are_those_of_the_autoencoder(pool):
    source = autoencoder()
    model = Classifier(source, 5, pool=pool, drop_path=0.3).eval()
    images_BCHW = random_images(3, 3, 16, 16)
    with torch.no_grad():
        whole = source.features(images_BCHW, pool)
        torch.testing.assert_close(model.features(images_BCHW), whole, rtol=1e-5, atol=1e-5)
        everything_BK = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(3)])
        torch.testing.assert_close(model.features(images_BCHW, everything_BK), whole, rtol=1e-5, atol=1e-5)
        keep_BK = everything_BK[:, :5]
        latent = source.encode(images_BCHW, keep_BK)
        torch.testing.assert_close(model.encode(images_BCHW, keep_BK), latent, rtol=1e-5, atol=1e-5)
        part = latent[:, 0] if pool == "cls" else latent[:, 1:].mean(dim=1)
        torch.testing.assert_close(model.features(images_BCHW, keep_BK), part, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(part, whole)


def test_another_resolution_takes_a_resampled_table():
    source = autoencoder(image_size=(16, 24))
    model = Classifier(source, 5, image_size=(20, 12))
    assert torch.equal(table(model), resample_abs_pos_embed(table(source), new_size=[5, 3], old_size=[4, 6]))
    assert (model.grid_size, model.num_patches) == ((5, 3), 15)
    assert model(random_images(2, 3, 20, 12)).shape == (2, 5)
    # As many patches, but of another grid.
    turned = table(Classifier(source, 5, image_size=(24, 16)))
    assert turned.shape == table(source).shape
    assert not torch.allclose(turned, table(source))
    assert torch.equal(table(Classifier(source, 5)), table(source))


def test_the_autoencoder_stays_as_it_is():
    source = autoencoder().eval()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    fixed = [name for name, parameter in source.named_parameters() if not parameter.requires_grad]
    model = Classifier(source, 5, image_size=32, drop_path=0.5)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert [name for name, parameter in source.named_parameters() if not parameter.requires_grad] == fixed
    assert not source.training
    source.features(random_images(1, 3, 16, 16))


def test_building_is_a_function_of_the_seed_alone():
    source = autoencoder()
    before = torch.get_rng_state()
    models = [Classifier(source, 1000, seed=seed) for seed in (0, 0, 1)]
    models.append(Classifier(source, 1000, head="batchnorm"))
    assert torch.equal(before, torch.get_rng_state())
    weights, biases = zip(*(weight_and_bias(model) for model in models), strict=True)
    first, again, other, probe = weights
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(2e-5, rel=0.05)
    assert probe.std().item() == pytest.approx(0.01, rel=0.05)
    assert not any(bias.any() for bias in biases)


def test_the_head_of_a_linear_probe_normalises_without_parameters():
    model = classifier(head="batchnorm")
    assert [name for name, _ in model.head.named_parameters()] == ["1.weight", "1.bias"]
    images_BCHW = random_images(6, 3, 16, 16)
    weight_CD, bias_C = weight_and_bias(model)
    with torch.no_grad():
        features_BD = model.features(images_BCHW)
        variance_D, mean_D = torch.var_mean(features_BD, dim=0, unbiased=False)
        expected = (features_BD - mean_D) / (variance_D + 1e-6).sqrt() @ weight_CD.T + bias_C
        torch.testing.assert_close(model(images_BCHW), expected, rtol=1e-4, atol=1e-4)


HALF = ("encoder.blocks.2.norm2.", "encoder.blocks.2.mlp.", "encoder.norm.", "head.")
TRAINED = {
    0: ("head.",),
    0.5: HALF,
    1: ("encoder.blocks.2.", "encoder.norm.", "head."),
    2: ("encoder.blocks.1.", "encoder.blocks.2.", "encoder.norm.", "head."),
    3: ("encoder.blocks.", "encoder.norm.", "head."),
    math.inf: ("",),
    None: ("",),
}


@pytest.mark.parametrize("blocks", TRAINED)
@pytest.mark.parametrize("head", ["linear", "batchnorm"])
def test_a_step_changes_what_trains_and_nothing_else(blocks, head):
    model = classifier(head=head, drop_path=0.1)
    freeze(model, 0)  # what an earlier call froze or let go is forgotten
    freeze(model, blocks)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    # What is frozen is given to the optimiser too: it must get no gradient.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    logits_BC = model(random_images(8, 3, 16, 16))
    nn.functional.cross_entropy(logits_BC, torch.arange(8) % 5).backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if name.startswith(TRAINED[blocks])}
    assert changed == {name for group in parameter_groups(model, 1.0, 0.05) for name, _ in group["params"]}


@pytest.mark.parametrize("blocks", [-1, -0.5, 0.3, 1.5, DEPTH + 1, math.nan, -math.inf])
def test_other_parts_cannot_be_frozen(blocks):
    model = classifier()
    freeze(model, 2)
    message = rf"{blocks} trained blocks: .*0 \(.*0\.5 \(.*1 to 3 \(.*None \("
    with pytest.raises(ValueError, match=message):
        freeze(model, blocks)
    assert model.trained_blocks == 2
    assert not table(model).requires_grad


@pytest.mark.parametrize("blocks", [0, 0.5, 1, 2])
def test_what_is_frozen_drops_no_paths_and_keeps_no_graph(blocks):
    model = classifier(drop_path=0.6)
    model.eval()
    freeze(model, blocks)
    assert not any(module.training for module in model.modules())
    # The first module that trains, and so sees what the frozen ones give.
    first = {0: "head", 0.5: "encoder.blocks.2.norm2", 1: "encoder.blocks.2", 2: "encoder.blocks.1"}[blocks]
    seen: list[torch.Tensor] = []
    model.get_submodule(first).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images_BCHW = random_images(8, 3, 16, 16).requires_grad_()
    logits_BC = [model.train(mode)(images_BCHW) for mode in (False, True, True)]
    assert model.head.training
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert not any(tensor.requires_grad for tensor in seen)
    # The part that trains does drop paths.
    assert torch.equal(logits_BC[1], logits_BC[2]) == (blocks == 0)
    freeze(model, None)
    assert all(module.training for module in model.modules())
    assert not torch.equal(model(images_BCHW), model(images_BCHW))
    with torch.no_grad():
        assert not model(images_BCHW).requires_grad


def test_layers_decay_as_by_hand():
    groups = parameter_groups(classifier(), lr=2.0, weight_decay=0.05, layer_decay=0.5)
    found = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name, _ in group["params"]}
    layers = {
        "encoder.cls_token": 0.0625, "encoder.pos_embed": 0.0625, "encoder.patch_embed.": 0.0625,
        "encoder.blocks.0.": 0.125, "encoder.blocks.1.": 0.25, "encoder.blocks.2.": 0.5,
        "encoder.norm.": 1.0, "head.": 1.0,
    }  # fmt: skip
    expected = {}
    for name, parameter in classifier().named_parameters():
        scale = next(scale for start, scale in layers.items() if name.startswith(start))
        plain = parameter.ndim == 1 or name in ("encoder.cls_token", "encoder.pos_embed")
        expected[name] = (scale, 0.0 if plain else 0.05)
    assert found == expected
    assert sum(len(group["params"]) for group in groups) == len(found)
    assert all(group["lr"] == 2.0 * group["lr_scale"] for group in groups)

    # The layers keep their rates when those below do not train.
    model = classifier()
    freeze(model, 0.5)
    for group in parameter_groups(model, lr=1.0, weight_decay=0.05, layer_decay=0.5):
        assert {found[name] for name, _ in group["params"]} == {(group["lr_scale"], group["weight_decay"])}


def test_a_schedule_sets_the_rate_of_each_layer():
    model = classifier()
    groups = parameter_groups(model, torch.tensor(0.0), 0.05, layer_decay=0.5)
    optimizer = torch.optim.AdamW(groups, fused=True)
    for group in optimizer.param_groups:
        group["lr"].fill_(0.1 * group["lr_scale"])
    assert sorted({round(group["lr"].item(), 6) for group in optimizer.param_groups}) == [
        0.00625, 0.0125, 0.025, 0.05, 0.1,
    ]  # fmt: skip
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(random_images(8, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    # Adam's first step is the rate itself, in the direction of the sign.
    for name, rate in (("encoder.patch_embed.proj.bias", 0.00625), ("head.bias", 0.1)):
        moved = (model.get_parameter(name) - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=0)


def test_lars_is_the_one_by_hand():
    model = classifier(head="batchnorm")
    freeze(model, 0)
    optimizer = make_lars(model, lr=0.8)
    weight, bias = weight_and_bias(model)
    expected = {parameter: parameter.detach().clone() for parameter in (weight, bias)}
    velocity = {parameter: torch.zeros_like(parameter) for parameter in expected}
    for step in range(2):
        optimizer.zero_grad()
        logits_BC = model(random_images(8, 3, 16, 16, seed=step))
        nn.functional.cross_entropy(logits_BC, torch.arange(8) % 5).backward()
        with torch.no_grad():
            for parameter, value in expected.items():
                assert parameter.grad is not None
                trust = 0.001 * value.norm() / parameter.grad.norm() if parameter is weight else 1.0
                velocity[parameter] = 0.9 * velocity[parameter] + trust * parameter.grad
                value -= 0.8 * velocity[parameter]
        optimizer.step()
        for parameter, value in expected.items():
            torch.testing.assert_close(parameter.detach(), value, rtol=1e-5, atol=1e-7)
    assert {parameter for group in optimizer.param_groups for parameter in group["params"]} == set(expected)


@pytest.mark.parametrize("blocks", [0, 0.5, 1, 3, None])
@pytest.mark.parametrize("head", ["linear", "batchnorm"])
def test_flops_are_those_counted(blocks, head):
    source = autoencoder(image_size=(16, 24), channels=4, width=48, mlp_ratio=3)
    model = Classifier(source, 100, head=head)
    freeze(model, blocks)
    block: Any
    for block in model.encoder.blocks:
        block.attn.fused_attn = False  # the counter does not know the CPU's fused kernel
    with FlopCounterMode(display=False) as counter:
        model(random_images(2, 4, 16, 24)).sum().backward()
    assert training_flops(model) == pytest.approx(counter.get_total_flops() / 2, rel=0.001)


def test_a_classifier_learns():
    model = Classifier(MaskedAutoencoder("vit_tiny_patch16_224", image_size=16, **SIZES, **DECODER), 2)
    optimizer = torch.optim.AdamW(parameter_groups(model, 2e-3, 0.05, layer_decay=0.75))
    labels_B = torch.arange(32) % 2
    images_BCHW = random_images(32, 3, 16, 16)
    images_BCHW[labels_B == 1, :, :8] *= 0.3
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images_BCHW), labels_B).backward()
        optimizer.step()
    assert nn.functional.cross_entropy(model(images_BCHW), labels_B).item() < 0.1


def test_what_does_not_fit_is_refused():
    source = autoencoder()
    with pytest.raises(ValueError, match="image size 18x16 is not divisible by the patch size 4"):
        Classifier(source, 5, image_size=(18, 16))
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"drop path rate {rate} is not in"):
            Classifier(source, 5, drop_path=rate)
    with pytest.raises(ValueError, match="0 classes"):
        Classifier(source, 0)
    with pytest.raises(ValueError, match=r"shape \[2, 3, 20, 16\].*\[3, 16, 16\]"):
        Classifier(source, 5)(random_images(2, 3, 20, 16))
