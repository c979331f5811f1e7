"""Finding a run, its configuration and its newest whole checkpoint."""

import json

import pytest
import torch

from mae_core.optim import make_optimizer
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.runs import find_run, load_encoder, run_config
from pipelines.storage import Store
from pipelines.training import checkpoint
from pipelines.training.build import build_model

TINY = Config.model_validate(
    {
        "data": {"image_size": (16, 16)},
        "model": {
            "arch": "vit_tiny_patch16_224",
            "patch_size": 4,
            "width": 24,
            "depth": 2,
            "heads": 2,
            "decoder_width": 16,
            "decoder_depth": 1,
            "decoder_heads": 2,
        },
    }
)


def write_run(storage, name, steps=(), config=TINY):
    """A run's folder as pretraining leaves it; the weights at each step have that step as their seed."""
    store = Store(str(storage)).child(name)
    store.write("config.json", config.model_dump_json())
    for step in steps:
        model = build_model(config)
        model.init_weights(seed=step)
        tensors = checkpoint.tensors_of(model, make_optimizer(model))
        checkpoint.write(store.child("checkpoints"), step, tensors, {}, {"step": step})
    return store


def test_a_run_is_found_with_its_configuration(tmp_path):
    store = write_run(tmp_path, "cells-b16")
    assert find_run(str(tmp_path), "cells-b16").location == store.location
    assert run_config(store) == TINY


def test_no_such_run_names_the_nearest(tmp_path):
    for name in ("cells-b16", "cells-b32", "digits"):
        write_run(tmp_path, name)
    (tmp_path / "cell-b17").mkdir()  # a folder that is no run
    with pytest.raises(UserError, match=r"no run 'cell-b16' in .*: did you mean cells-b16, cells-b32\?") as told:
        find_run(str(tmp_path), "cell-b16")
    assert "cell-b17" not in str(told.value)
    with pytest.raises(UserError, match=r"it holds cells-b16, cells-b32, digits$"):
        find_run(str(tmp_path), "zzz")
    with pytest.raises(UserError, match="no run at all"):
        find_run(str(tmp_path / "nowhere"), "digits")


@pytest.mark.parametrize("name", ["", "..", "../other/run", ".", "run/checkpoints"])
def test_a_name_is_not_a_way_out_of_the_storage(tmp_path, name):
    write_run(tmp_path, "other/run")
    write_run(tmp_path, "runs/run")
    (tmp_path / "runs" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no run"):
        find_run(str(tmp_path / "runs"), name)


@pytest.mark.parametrize(("text", "told"), [("{", "JSON"), ('{"model": {"archh": "x"}}', r"model\.archh")])
def test_a_configuration_that_is_none(tmp_path, text, told):
    store = write_run(tmp_path, "run")
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(UserError, match=told):
        run_config(store)


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    store = write_run(tmp_path, "run", steps=(10, 20, 30))
    (tmp_path / "run" / "checkpoints" / "step-00000030" / "model.safetensors").write_bytes(b"torn")
    told = []
    model, step = load_encoder(store, TINY, told.append)
    assert step == 20
    assert len(told) == 1
    assert "step-00000030" in told[0]
    assert not model.training
    expected = build_model(TINY)
    expected.init_weights(seed=20)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_no_whole_checkpoint(tmp_path):
    with pytest.raises(UserError, match="none has been written yet"):
        load_encoder(write_run(tmp_path, "new"), TINY, lambda _: None)
    store = write_run(tmp_path, "run", steps=(10,))
    (tmp_path / "run" / "checkpoints" / "step-00000010" / "state.json").unlink()
    told = []
    with pytest.raises(UserError, match="none of its 1 is whole"):
        load_encoder(store, TINY, told.append)
    assert "state.json is missing" in told[0]


def test_a_checkpoint_of_another_shape(tmp_path):
    store = write_run(tmp_path, "run", steps=(10,))
    values = json.loads(TINY.model_dump_json())
    values["model"]["width"] = 48
    with pytest.raises(UserError, match=r"step-00000010 does not fit the run's config\.json: .*size mismatch"):
        load_encoder(store, Config.model_validate(values), lambda _: None)
