"""Layers of a Vision Transformer as fast as this processor does them; their parameters and results are PyTorch's.

Float32 products on a CPU go to the library that is the faster one there (``cpu_products.py``), the values behind a GELU
are not kept for the backward pass, and bfloat16 attention is plain products. The results are the same up to the order
of sums.
"""

from collections.abc import Iterable
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from mae_core.cpu_products import Pass, product

# An operator of our own, so that a compiler leaves the operands as they lie: a transpose is not worth a copy.
_OPERATORS = torch.library.Library("mae_core", "DEF")
_OPERATORS.define(
    "linear(Tensor values, Tensor weight, Tensor? bias, str kind) -> Tensor", tags=(torch.Tag.needs_exact_strides,)
)
_linear = torch.ops.mae_core.linear.default


@torch.library.impl(_OPERATORS, "linear", "CPU")
def _(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: Pass) -> torch.Tensor:
    return product(values, weight, bias, kind)


@torch.library.register_fake("mae_core::linear")
def _(
    values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,  # noqa: ARG001
    kind: Pass,  # noqa: ARG001
) -> torch.Tensor:
    return values.new_empty((*values.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    values, weight = ctx.saved_tensors
    return *_gradients(grad, values, weight, ctx.needs_input_grad[:3]), None


def _gradients(
    grad: torch.Tensor, values: torch.Tensor, weight: torch.Tensor, needed: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    grad = grad.reshape(-1, weight.shape[0])
    of_values, of_weight, of_bias = needed
    return (
        _linear(grad, weight.t(), None, "values").view(values.shape) if of_values else None,
        _linear(grad.t(), values.reshape(-1, weight.shape[1]).t(), None, "weight") if of_weight else None,
        grad.sum(dim=0) if of_bias else None,
    )


torch.library.register_autograd("mae_core::linear", _backward, setup_context=_save)


@register_flop_formula(torch.ops.mae_core.linear)
def _(values_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * torch.Size(values_shape).numel() * weight_shape[0]


def _is_ours(values: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product is one that ``cpu_products`` chooses a library for."""
    return bool(
        values.device.type == "cpu"
        and values.dtype == weight.dtype == torch.float32
        and values.numel()
        and not torch.is_autocast_enabled("cpu")
    )


def linear(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``nn.functional.linear``; in float32 on a CPU by the faster one of two libraries.

    Args:
        values: [..., I].
        weight: [O, I].
        bias: [O], or None.

    Returns:
        [..., O].
    """
    if _is_ours(values, weight):
        return _linear(values, weight, bias, "forward")
    return nn.functional.linear(values, weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` with that product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As ``nn.Linear.forward``."""
        return linear(input, self.weight, self.bias)


class _GeluLinear(torch.autograd.Function):
    """``linear`` behind a GELU whose values are not kept: what it was given is kept anyway, and gives them anew."""

    @staticmethod
    def forward(before: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _linear(nn.functional.gelu(before), weight, bias, "forward")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        before, weight = ctx.saved_tensors
        of_after, *others = _gradients(grad_outputs[0], nn.functional.gelu(before), weight, ctx.needs_input_grad)
        return None if of_after is None else torch.ops.aten.gelu_backward(of_after, before), *others


class PlainMlp(Mlp):
    """timm's MLP of two layers with a GELU between, without its options; keeps less for the backward pass.

    Where somebody has put something else in the place of GELU or the second layer, or hooks on them, it is timm's.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As ``Mlp.forward``."""
        before = self.fc1(x)
        if (
            type(self.act) is nn.GELU
            and self.act.approximate == "none"
            and type(self.fc2) is Linear
            and not _has_hooks(self.act)
            and not _has_hooks(self.fc2)
            and _is_ours(before, self.fc2.weight)
            and not torch.compiler.is_compiling()  # a compiler decides that itself
        ):
            return _GeluLinear.apply(before, self.fc2.weight, self.fc2.bias)  # type: ignore[return-value]
        return self.fc2(self.act(before))


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks)


class SelfAttention(Attention):
    """timm's attention without its options: scaled-dot-product attention, with two ways that are faster on a CPU."""

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """As ``Attention.forward``, for tokens [B, T, D] that all see each other."""
        assert attn_mask is None, "all tokens see each other"
        assert not is_causal, "all tokens see each other"
        B, T, D = x.shape
        # Cut along the third axis, the three gradients come back as one tensor in the layer's own order.
        query, key, value = (
            part.transpose(1, 2) for part in self.qkv(x).view(B, T, 3, self.num_heads, self.head_dim).unbind(2)
        )
        if not self.fused_attn:
            mixed = self._plain(query, key, value)
        elif x.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad:
            # The fused backward takes four times as long there as plain products. Their weights, which it does not
            # keep either, are computed anew.
            mixed = checkpoint(self._plain, query, key, value, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(B, T, D))

    def _plain(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        weights = ((query * self.scale) @ key.transpose(2, 3)).softmax(dim=-1, dtype=query.dtype)
        return self.attn_drop(weights) @ value


def use_fast_layers(model: nn.Module) -> None:
    """Turns plain linear layers, attentions and MLPs of a model into those of this file, parameters and keys kept."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif is_plain_attention(module):
            module.__class__ = SelfAttention
        elif is_plain_mlp(module):
            module.__class__ = PlainMlp


def is_plain_attention(module: nn.Module) -> bool:
    """Whether a module is timm's attention without any of its options; the younger ones need not be there."""
    attention: Any = module
    return (
        type(module) is Attention
        and all(type(getattr(attention, name, nn.Identity())) is nn.Identity for name in ("q_norm", "k_norm", "norm"))
        and getattr(attention, "gate", None) is None
        and attention.num_heads * attention.head_dim == attention.qkv.in_features == attention.proj.out_features
        and not attention.attn_drop.p
        and not attention.proj_drop.p
    )


def is_plain_mlp(module: nn.Module) -> bool:
    """Whether a module is timm's MLP of two linear layers with an exact GELU, without any of its options."""
    mlp: Any = module
    return (
        type(module) is Mlp
        and isinstance(mlp.fc2, nn.Linear)
        and type(mlp.act) is nn.GELU
        and mlp.act.approximate == "none"
        and type(mlp.norm) is nn.Identity
        and not mlp.drop1.p
        and not mlp.drop2.p
    )


def transformer_flops(blocks: Iterable[Any], num_tokens: int) -> int:
    """FLOPs of the matrix products of transformer blocks, for the tokens of one image, forward.

    Args:
        blocks: timm's, of width D with H hidden values in their MLPs: 8 T D^2 for the four projections, 4 T^2 D for
            attention and 4 T D H for the MLP each.
        num_tokens: T.
    """
    T, total = num_tokens, 0
    for block in blocks:
        D, H = block.mlp.fc1.in_features, block.mlp.fc1.out_features
        total += 8 * T * D**2 + 4 * T**2 * D + 4 * T * D * H
    return total
