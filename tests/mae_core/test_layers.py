"""Layers that are fast on this processor give what PyTorch's and timm's give."""

import copy
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mae_core.layers import Linear, PlainMlp, SelfAttention, linear, use_fast_layers
from mae_core.model import MaskedAutoencoder


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(function, *tensors, grad):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    out.backward(grad.to(out.dtype))
    return out, *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 5, 7), (0, 7)])
def test_linear_is_pytorchs(shape):
    values, weight, bias, grad = random(*shape), random(11, 7), random(11), random(11, *shape[:-1])
    grad = grad.movedim(0, -1)  # as it may lie in memory behind a transpose
    for function in (linear, lambda *tensors: linear(*tensors).contiguous()):
        found = gradients(function, values, weight, bias, grad=grad)
        torch.testing.assert_close(found, gradients(nn.functional.linear, values, weight, bias, grad=grad))
    found = gradients(lambda values: linear(values, weight), values, grad=grad)
    torch.testing.assert_close(found, gradients(lambda values: nn.functional.linear(values, weight), values, grad=grad))


def test_the_products_of_linear_are_counted():
    values = random(2, 5, 7).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        linear(values, random(11, 7).requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 5 * 7 * 11


def test_under_autocast_linear_is_pytorchs():
    layer = Linear(7, 11)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(random(3, 7)).dtype == torch.bfloat16


@pytest.mark.parametrize("bfloat16", [False, True])
def test_attention_is_timms(bfloat16):
    theirs = Attention(24, num_heads=3, qkv_bias=True)
    ours = copy.deepcopy(theirs)
    use_fast_layers(ours)
    assert type(ours) is SelfAttention
    assert type(ours.qkv) is Linear
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    tokens, grad = random(2, 5, 24), random(2, 5, 24, seed=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        found, expected = (gradients(attention, tokens, grad=grad) for attention in (ours, theirs))
    assert found[0].dtype == expected[0].dtype
    rtol, atol = (0.05, 0.02) if bfloat16 else (None, None)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=rtol, atol=atol)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=rtol, atol=atol)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [(), ("fc1",), ("fc2",), ("fc1", "fc2")])
def test_an_mlp_is_timms(bias, frozen):
    theirs = Mlp(24, 96, bias=bias)
    for name in frozen:
        getattr(theirs, name).requires_grad_(False)
    ours = copy.deepcopy(theirs)
    use_fast_layers(ours)
    assert type(ours) is PlainMlp
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    tokens, grad = random(2, 5, 24), random(2, 5, 24, seed=1)
    torch.testing.assert_close(gradients(ours, tokens, grad=grad), gradients(theirs, tokens, grad=grad))
    parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens))


def test_an_mlp_keeps_each_of_its_hidden_values_once():
    mlp = Mlp(24, 96)
    use_fast_layers(mlp)
    tokens, kept = random(2, 5, 24), {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = mlp(tokens)
    hidden = [size for size in kept.values() if size == 2 * 5 * 96]
    assert len(hidden) == 1, kept
    assert out.requires_grad


@pytest.mark.parametrize(
    "options", [{"drop": 0.1}, {"act_layer": nn.ReLU}, {"norm_layer": nn.LayerNorm}, {"use_conv": True}]
)
def test_an_mlp_with_options_stays_timms(options):
    mlp = Mlp(24, 96, **options)
    use_fast_layers(mlp)
    assert type(mlp) is Mlp


def test_what_is_put_into_an_mlp_is_used():
    """By those who fit adapters to a model, or look at what happens inside."""

    class Doubled(nn.Module):
        weight = property(lambda self: self.inner.weight)
        bias = property(lambda self: self.inner.bias)

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, values):
            return 2 * self.inner(values)

    tokens = random(2, 5, 24)
    mlp: Any = Mlp(24, 96)
    use_fast_layers(mlp)
    expected = mlp(tokens)
    seen = []
    handles = [part.register_forward_hook(lambda *_: seen.append(1)) for part in (mlp.act, mlp.fc2)]
    mlp(tokens)
    assert len(seen) == 2
    for handle in handles:
        handle.remove()
    mlp.fc2 = Doubled(mlp.fc2)
    torch.testing.assert_close(mlp(tokens), 2 * expected)
    mlp.fc2 = mlp.fc2.inner
    for act in (nn.ReLU(), nn.GELU(approximate="tanh")):
        mlp.act = act
        torch.testing.assert_close(mlp(tokens), mlp.fc2(act(mlp.fc1(tokens))), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [
    {"qk_norm": True}, {"scale_norm": True}, {"gated": True}, {"attn_drop": 0.1}, {"proj_drop": 0.1},
    {"attn_head_dim": 4}, {"dim_out": 12},
], ids=str)  # fmt: skip
def test_attention_with_options_stays_timms(options):
    attention = Attention(24, num_heads=3, norm_layer=nn.LayerNorm, **options)
    use_fast_layers(attention)
    assert type(attention) is Attention


def test_a_model_has_them_in_encoder_and_decoder():
    model = MaskedAutoencoder("vit_tiny_patch16_224", image_size=32, decoder_width=16, decoder_depth=1, decoder_heads=2)
    kinds = {type(module) for module in model.modules()}
    assert {Linear, SelfAttention, PlainMlp} <= kinds
    assert not {nn.Linear, Attention, Mlp} & kinds
