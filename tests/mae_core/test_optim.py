"""The schedule against a slow reference, the groups, and a step that is skipped."""

import numpy as np
import pytest
import torch
from torch import nn

from mae_core.model import MaskedAutoencoder
from mae_core.optim import lr_at, make_average, make_optimizer, parameter_groups, peak_lr, set_lr


def small_model() -> MaskedAutoencoder:
    return MaskedAutoencoder(
        "vit_tiny_patch16_224", image_size=16, patch_size=4, width=24, depth=1, decoder_width=16,
        decoder_depth=1, decoder_heads=2,
    )  # fmt: skip


def test_lr_is_linear_then_cosine():
    warmup, total, peak, floor = 7, 50, 0.3, 0.02
    down = np.cos(np.linspace(0, np.pi, total - warmup + 1)) / 2 + 0.5
    reference = [*np.linspace(0, peak, warmup, endpoint=False), *(floor + (peak - floor) * down), floor]
    ours = [
        lr_at(step, peak=peak, warmup_steps=warmup, total_steps=total, floor=floor) for step in range(len(reference))
    ]
    np.testing.assert_allclose(ours, reference, rtol=1e-12, atol=1e-15)
    assert max(ours) == ours[warmup] == peak


def test_lr_without_warmup_begins_at_the_peak():
    assert lr_at(0, peak=2.0, warmup_steps=0, total_steps=4) == 2.0
    assert lr_at(2, peak=2.0, warmup_steps=0, total_steps=4) == pytest.approx(1.0)


def test_linear_scaling_rule():
    assert peak_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)


def test_groups_decay_weights_and_tokens_only():
    model = small_model()
    decayed, plain = (dict(group["params"]) for group in parameter_groups(model, 0.05))
    assert {"encoder.cls_token", "mask_token", "encoder.patch_embed.proj.weight"} <= decayed.keys()
    assert all(name.endswith(("weight", "_token")) and p.ndim >= 2 for name, p in decayed.items())
    assert all(p.ndim == 1 for p in plain.values())
    trainable = {name for name, _ in model.named_parameters()} - {"encoder.pos_embed", "decoder_pos_embed"}
    assert decayed.keys() | plain.keys() == trainable


def test_optimizer_follows_a_float_lr_and_decays_by_group():
    ours, reference = small_model(), small_model()
    optimizer = make_optimizer(ours, weight_decay=0.3, betas=(0.9, 0.95))
    groups = [{**group, "params": [p for _, p in group["params"]]} for group in parameter_groups(reference, 0.3)]
    plain = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), foreach=False)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        lr = 0.01 * (step + 1)
        set_lr(optimizer, lr)
        for group in plain.param_groups:
            group["lr"] = lr
        for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=generator)
                q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
    for (name, p), q in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_found_inf_skips_a_step_without_a_trace():
    model = small_model()
    optimizer = make_optimizer(model)
    set_lr(optimizer, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [{key: value.clone() for key, value in state.items()} for state in optimizer.state.values()]

    assert model.mask_token is not None
    model.mask_token.grad = torch.full_like(model.mask_token, torch.nan)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for state, kept in zip(optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(state[key], kept[key]) for key in kept)


def test_the_average_is_the_one_by_hand_and_survives_a_stop():
    model = nn.Linear(1, 1, bias=False)
    weights = [3.0, 5.0, -1.0, 2.0]
    expected, averages = 0.0, [make_average(model, 0.25)]
    for t, weight in enumerate(weights):
        with torch.no_grad():
            model.weight.fill_(weight)
        averages[-1].update_parameters(model)
        decay = min(0.25, (1 + t) / (10 + t)) if t else 0.0
        expected = decay * expected + (1 - decay) * weight
        assert averages[-1].module.get_parameter("weight").item() == pytest.approx(expected)
        averages.append(make_average(nn.Linear(1, 1, bias=False), 0.25))
        averages[-1].load_state_dict(averages[-2].state_dict())
    # 2/11 and 3/12 are below and at the decay: both kinds have been seen
    assert expected == pytest.approx(0.25 * (0.25 * (2 / 11 * 3 + 9 / 11 * 5) - 0.75) + 0.75 * 2)
