"""What a compiled model keeps for its backward pass, on a CPU."""

import functools
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch

from pipelines.errors import UserError
from pipelines.training.build import build_model, compiler_told, maybe_compiled
from tests.pipelines.test_estimate import changed

CPU = torch.device("cpu")
DEFAULTS: dict[str, Any] = {
    "ban_recompute_used_far_apart": True,
    "ban_recompute_long_fusible_chains": True,
    "ban_recompute_materialized_backward": True,
}


def kept_sizes(module, model):
    """Sizes of the tensors that a forward pass keeps, parameters and buffers aside; and its loss."""
    kept = {}
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    noise_BN = model.masking.noise(torch.arange(4))
    images_BCHW = torch.randn(4, model.channels, *model.image_size, generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module(images_BCHW, noise_BN)["loss"]
    loss.backward()
    return sorted(kept.values()), loss.item()


def test_a_compiler_that_fails_is_one_line(monkeypatch):
    def without_gcc(*_):
        raise RuntimeError("no g++ was found")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=without_gcc))
    config = changed("train", compile=True)
    model = build_model(config)
    with functorch.patch(DEFAULTS), pytest.raises(UserError) as told, compiler_told(config):
        kept_sizes(maybe_compiled(config, model, CPU), model)
    torch.compiler.reset()
    assert "without_gcc" in str(told.value)
    assert "needs a C++ compiler" in str(told.value)
    assert "\n" not in str(told.value)


def test_values_that_need_no_matrix_product_are_not_kept(monkeypatch):
    config = changed("train", compile=True)
    # The compiler's own decision what to keep, without its code, whose making takes long.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    found = []
    for compiled in (torch.compile, functools.partial(maybe_compiled, config, device=CPU)):
        with functorch.patch(DEFAULTS):
            model = build_model(config)
            found.append(kept_sizes(compiled(model=model), model))
            torch.compiler.reset()
    (usual, loss), (ours, same) = found
    assert same == pytest.approx(loss, rel=1e-5)
    assert sum(ours) < 0.8 * sum(usual)
