"""Weights that a run begins with: which file it is, and what it says of its model."""

import json

import pytest
import safetensors.torch
import torch

from mae_core import weights
from pipelines.config import Config, identity
from pipelines.errors import UserError
from pipelines.pretrain import open_run, resolve
from pipelines.storage import Store
from pipelines.training.build import build_model, check_initial_weights, initial_weights
from pipelines.transfer_config import Transfer
from pipelines.transfer_source import source
from tests.stores import moto_server, put, range_server, s3_environment

MODEL = {"arch": "vit_tiny_patch16_224", "patch_size": 4, "width": 48, "depth": 2, "heads": 4,
         "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}  # fmt: skip


def config_of(path, *, size=(8, 16), **model):
    values = {"data": {"image_size": size}, "model": MODEL | model, "run": {"init_from": str(path)}}
    return Config.model_validate(values)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    weights.save(build_model(config_of("")), path)
    return path


def test_other_heads_than_the_file_says_are_refused(file, tmp_path):
    assert check_initial_weights(config_of(file)) == ""
    for changes, told in (
        ({"heads": 3}, r"was written with num_heads 4, and model\.heads is 3 here: .*; give --model\.heads 4"),
        ({"decoder_heads": 4}, r"decoder_num_heads 2, and model\.decoder_heads is 4 .* give --model\.decoder-heads 2"),
        # As many patches, and so the same shapes, in another grid.
        ({"size": (16, 8)}, r"image_size \[8, 16\], and data\.image_size is \[16, 8\] .* give --data\.image-size 8 16"),
    ):
        with pytest.raises(UserError, match=told):
            check_initial_weights(config_of(file, **changes))
    # An official file says nothing of it, and that is said.
    official = tmp_path / "mae.pth"
    torch.save({"model": weights.read_state(file)}, official)
    told = check_initial_weights(config_of(official, heads=3))
    assert "does not say how many heads" in told
    assert "3 in the encoder (--model.heads) and 2 in the decoder (--model.decoder-heads)" in told
    other = config_of(file).model_copy(update={"data": config_of(file).data.model_copy(update={"mean": (0.5,) * 3})})
    assert "was trained on images normalised by mean [0.485" in check_initial_weights(other)


def identity_of(path, **model):
    return identity(resolve(config_of(path, **model)), "data")


def test_a_run_is_that_of_the_weights_and_not_of_their_place(file, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "other.safetensors"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(file.read_bytes())
    assert identity_of(elsewhere) == identity_of(file) != identity(config_of(""), "data")
    config = resolve(config_of(file)).model_dump()
    storage = Config.model_validate(config | {"run": config["run"] | {"storage": str(tmp_path / "runs")}})
    assert open_run(storage, "data") is None
    store = Store(storage.run.storage).child(storage.run.name)
    store.write("checkpoints/step-00000004/manifest.json", "{}")
    moved = storage.model_copy(update={"run": storage.run.model_copy(update={"init_from": str(elsewhere)})})
    assert open_run(moved, "data") is None
    # Another file under the same path is another run.
    before = identity_of(file)
    weights.save(
        build_model(config_of("").model_copy(update={"run": config_of("").run.model_copy(update={"seed": 1})})), file
    )
    assert identity_of(file) != before
    changed = resolve(config_of(file)).model_dump()
    changed = Config.model_validate(changed | {"run": changed["run"] | {"storage": str(tmp_path / "runs")}})
    with pytest.raises(UserError, match=r"exists with another configuration: run\.init_from was"):
        open_run(changed, "data")
    # What a run wrote down can be fed back, and then it must be that file.
    with pytest.raises(UserError, match=r"is not the file that it was"):
        check_initial_weights(storage)
    assert json.loads(store.read("identity.json"))["run.init_from"] == storage.run.init_digest


def test_weights_are_read_from_wherever_they_lie(file, tmp_path, monkeypatch):
    with moto_server() as address, range_server(tmp_path) as web:
        put(address, "weights")
        put(address, f"weights/a/{file.name}", file.read_bytes())
        for name, value in s3_environment(address).items():
            monkeypatch.setenv(name, value)
        expected = safetensors.torch.load_file(file)
        for place in (f"s3://weights/a/{file.name}", f"{web}/{file.name}"):
            assert identity_of(place) == identity_of(file)
            config = resolve(config_of(place))
            assert check_initial_weights(config) == ""
            config = config.model_copy(update={"run": config.run.model_copy(update={"seed": 9})})
            model = build_model(config)
            initial_weights(model, place)
            state = weights.official_state(model)
            assert all(torch.equal(state[key], value) for key, value in expected.items())
            _, _, theirs, _, digest = source(Transfer(weights=place))
            assert digest == config.run.init_digest
            assert torch.equal(theirs["blocks.1.mlp.fc1.weight"], expected["blocks.1.mlp.fc1.weight"])
        for place in ("s3://weights/none.pth", f"{web}/none.pth"):
            with pytest.raises(UserError, match=r"run\.init_from: no file .*none\.pth"):
                resolve(config_of(place))
        put(address, "weights/bad.safetensors", b"nothing")
        bad = config_of("s3://weights/bad.safetensors")
        with pytest.raises(UserError, match=r"run\.init_from: s3://weights/bad\.safetensors cannot be read"):
            check_initial_weights(resolve(bad))


def test_a_missing_file_is_told_before_anything_else(tmp_path):
    with pytest.raises(UserError, match=r"run\.init_from: no file"):
        resolve(config_of(tmp_path / "none.pth"))
