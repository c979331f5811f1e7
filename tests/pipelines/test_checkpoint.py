"""Checkpoints: what was saved comes back bit for bit; what is broken is seen and passed over."""

import pytest
import safetensors.torch
import torch

from mae_core.model import MaskedAutoencoder
from mae_core.optim import make_optimizer, set_lr
from pipelines.storage import Store
from pipelines.training import checkpoint
from pipelines.training.snapshot import file_bytes
from tests.bombs import bomb, exploded, replace_file, torch_bomb


def small_model(seed, **options):
    return MaskedAutoencoder(
        "vit_tiny_patch16_224",
        image_size=16,
        patch_size=4,
        width=24,
        depth=2,
        num_heads=2,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
        seed=seed,
        **options,
    )


def trained(steps, model=None, optimizer=None):
    model = model or small_model(0)
    optimizer = optimizer or make_optimizer(model)
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        set_lr(optimizer, 1e-3)
        optimizer.zero_grad()
        model(torch.rand(4, 3, 16, 16, generator=generator), torch.rand(4, 16, generator=generator))["loss"].backward()
        optimizer.step()
    return model, optimizer


@pytest.fixture
def checkpoints(tmp_path):
    return Store(str(tmp_path)).child("checkpoints")


def save(checkpoints, step, model, optimizer):
    checkpoint.write(checkpoints, step, checkpoint.tensors_of(model, optimizer), {}, {"step": step})


def test_training_goes_on_bit_for_bit(checkpoints):
    model, optimizer = trained(3)
    save(checkpoints, 3, model, optimizer)
    again = small_model(1)
    again_optimizer = make_optimizer(again)
    checkpoint.restore(checkpoints, 3, again, again_optimizer)
    trained(2, model, optimizer)
    trained(2, again, again_optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_file_is_what_the_library_would_write():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "wide": torch.randn(700, 1000, generator=generator),
        "turned": torch.randn(4, 6, generator=generator).t(),
        "count": torch.tensor(3.0),
        "none": torch.empty(0, 3),
        "label": torch.arange(5),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "yes": torch.tensor([True, False]),
    }
    data = b"".join(file_bytes(tensors, {"format": "pt"}))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert data == safetensors.torch.save(whole, {"format": "pt"})


BREAKS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("fault", sorted(BREAKS))
def test_a_broken_checkpoint_is_passed_over_and_said_so(checkpoints, file, fault):
    model, optimizer = trained(1)
    for step in (10, 20):
        save(checkpoints, step, model, optimizer)
    BREAKS[fault](checkpoints.local("step-00000020") / file)
    told = []
    assert checkpoint.newest_whole(checkpoints, told.append) == 10
    assert len(told) == 1
    assert "step-00000020" in told[0]
    assert file in told[0]


@pytest.mark.parametrize("manifest", [None, b"", b"{}", b"[1]", b'{"files": 3}', b'{"files": {}}'])
def test_without_a_manifest_it_is_no_checkpoint(checkpoints, manifest):
    model, optimizer = trained(1)
    save(checkpoints, 10, model, optimizer)
    save(checkpoints, 20, model, optimizer)
    path = checkpoints.local("step-00000020") / "manifest.json"
    path.unlink() if manifest is None else path.write_bytes(manifest)
    assert checkpoint.newest_whole(checkpoints, lambda _: None) == 10


def test_a_pickle_is_no_checkpoint_and_is_not_executed(checkpoints, tmp_path):
    model, optimizer = trained(1)
    for step in (10, 20):
        save(checkpoints, step, model, optimizer)
    folder = checkpoints.local("step-00000020")
    for name, data in (("model.safetensors", bomb(tmp_path)), ("optimizer.safetensors", torch_bomb(tmp_path))):
        good = (folder / name).read_bytes()
        replace_file(folder, name, data)
        told = []
        assert checkpoint.newest_whole(checkpoints, told.append) == 10
        assert told == [f"checkpoint step-00000020 {name} is no safetensors file; taking the next older one"]
        with pytest.raises(Exception, match=r"[Hh]eader"):
            checkpoint.restore(checkpoints, 20, model, optimizer)
        replace_file(folder, name, good)
    assert checkpoint.newest_whole(checkpoints, told.append) == 20
    assert not exploded(tmp_path)


def test_old_ones_go_and_broken_later_ones_do_not_count(checkpoints):
    model, optimizer = trained(1)
    for step in (10, 20, 30, 90):
        save(checkpoints, step, model, optimizer)
    (checkpoints.local("step-00000025")).mkdir()  # was being written when the run was killed
    checkpoint.prune(checkpoints, keep=2, newest=30)
    assert checkpoint.steps(checkpoints) == [90, 30, 25, 20]


@pytest.mark.parametrize("options", [{}, {"target": "pca", "target_components": 5, "encoder_mask_tokens": True}])
def test_the_size_is_known_before_anything_is_written(checkpoints, options):
    model = small_model(0, **options)
    for buffer in model.target.buffers():
        buffer.zero_()
    save(checkpoints, 1, *trained(1, model))
    written = 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        data = checkpoints.child("step-00000001").read(name)
        written += len(data) - 8 - int.from_bytes(data[:8], "little")  # without the header and its length
    with torch.device("meta"):
        assert checkpoint.num_bytes(small_model(0, **options)) == written
