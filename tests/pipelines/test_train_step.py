"""The training step: what it does not do in between."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mae_core.masking import Masking
from mae_core.optim import make_optimizer
from pipelines.config import Config
from pipelines.data.plan import Cut
from pipelines.training.build import build_model, make_trainer
from pipelines.training.dry_run import random_batch
from pipelines.training.step import train_step

# What needs a value on the host, or a shape that hangs on values.
ASKING = {f"aten::{name}" for name in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "_unique2")}


class Asked(TorchDispatchMode):
    """Writes down the operators that wait for the device, and the shapes of all."""

    def __init__(self):
        super().__init__()
        self.asked, self.calls = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ASKING:
            self.asked.append(name)
        if isinstance(out, torch.Tensor):
            self.calls.append((name, tuple(out.shape)))
        return out


def trainer_of(device, **model):
    config = Config.model_validate(
        {
            "data": {"image_size": (16, 16)},
            "model": {"arch": "vit_tiny_patch16_224", "patch_size": 4, "width": 24, "depth": 1, "heads": 2,
                      "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, **model},
            "batch": {"global_size": 8, "micro_size": 4},
        }
    )  # fmt: skip
    model = build_model(config).to(device)
    for buffer in model.target.buffers():
        buffer.zero_()
    optimizer = make_optimizer(model)
    trainer = make_trainer(config, model, model.masking, optimizer, Cut(8, 4, 1), device)
    return trainer, itertools.repeat(random_batch(config, 4))


@pytest.mark.parametrize("options", [
    {"target": "normalized"},
    {"target": "pca", "target_components": 8, "mask": "block"},
    {"decoder": "mlp", "mask": "grid"},
    {"loss_on": "all", "encoder_mask_tokens": True},
], ids=str)  # fmt: skip
def test_a_step_asks_the_host_nothing_and_has_one_shape(options):
    trainer, batches = trainer_of(torch.device("cpu"), **options)
    train_step(trainer, batches, 1e-3)
    steps = []
    for _ in range(2):
        with Asked() as told:
            train_step(trainer, batches, 1e-3)
        steps.append(told.calls)
        assert not told.asked
    assert steps[0] == steps[1]
    assert len(steps[0]) > 100


@pytest.mark.parametrize("mask", ["random", "block", "grid"])
def test_masks_are_made_on_the_device_alone(mask):
    masking = Masking(mask, (4, 4), 0.75)
    keys_B = torch.arange(3)
    with Asked() as told:
        masking.noise(keys_B)
    assert not told.asked
    assert "aten::lift_fresh" not in {name for name, _ in told.calls}, "a table was brought from the host"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_on_a_gpu_never_waits_for_it():
    trainer, batches = trainer_of(torch.device("cuda"), target="normalized")
    for _ in range(3):
        train_step(trainer, batches, 1e-3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [train_step(trainer, batches, 1e-3) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(results).isfinite().all()


def test_gradients_travel_once_a_step(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        trainer, batches = trainer_of(torch.device("cpu"), target="normalized")
        trainer.cut = Cut(16, 4, 1)  # four micro-batches
        wrapped = DistributedDataParallel(trainer.model)
        sent = []

        def note(_, bucket):
            sent.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, note)  # type: ignore[arg-type]
        trainer.model = wrapped
        train_step(trainer, batches, 1e-2)
        assert sent
        assert len(sent) == len(set(sent)), "a bucket of gradients was sent with several micro-batches"
    finally:
        dist.destroy_process_group()


def _two_compiled_workers(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = []
    for compiled in (False, True):
        trainer, batches = trainer_of(torch.device("cpu"), target="normalized")
        trainer.cut = Cut(16, 4, 2)  # two micro-batches each: gradients travel with the second
        model = trainer.model
        # The order of the loop's: what is wrapped for the all-reduce is compiled already.
        module = torch.compile(model, backend="aot_eager") if compiled else model
        trainer.model = DistributedDataParallel(module, gradient_as_bucket_view=True, broadcast_buffers=False)
        train_step(trainer, batches, 1e-2)
        train_step(trainer, batches, 1e-2)
        with torch.compiler.set_stance("fail_on_recompile"):
            told = train_step(trainer, batches, 1e-2)
        # What a checkpoint holds: the model, not its wrappers.
        results.append({"told": told, **model.state_dict()})
    torch.testing.assert_close(results[1], results[0])
    dist.destroy_process_group()


@pytest.mark.chaos
def test_compiled_workers_do_the_same_steps_and_compile_once(tmp_path):
    spawn(_two_compiled_workers, (str(tmp_path),), nprocs=2)
