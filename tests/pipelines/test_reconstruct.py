"""The command that looks into a model, on real runs and shards: what its pictures show, pixel by pixel."""

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mae_core import weights
from mae_core.images import center_crops, crop_resize, decode, normalize
from mae_core.looking import cls_attention, pca_colours
from mae_core.optim import make_optimizer
from mae_core.sheets import heat_overlay
from pipelines.config import Config
from pipelines.data.readers import View
from pipelines.data.shards import load_manifest
from pipelines.drawing import HEAD
from pipelines.errors import UserError
from pipelines.reconstruct import main
from pipelines.spool import Spool
from pipelines.storage import Store
from pipelines.tracking import RunDescription, create_run
from pipelines.training import checkpoint
from pipelines.training.build import build_model
from pipelines.training.pictures import save_reconstructions

ROOT = Path(__file__).parents[2]
SIZE, PATCH, TILE, GAP, MARGIN = 16, 4, 128, 8, 16
CELL = TILE // (SIZE // PATCH)
HIDDEN = round(0.82 * 255)
KEYS = ["class2_0005", "class0_0003"]

# MLflow's own SQLite store, read back in this process, uses what SQLAlchemy 2.1 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


def tiny(data, *, target="raw", channels=3):
    return Config.model_validate(
        {
            "data": {
                "train": data,
                "image_size": (SIZE, SIZE),
                "channels": channels,
                "mean": (0.5,) * channels,
                "std": (0.25,) * channels,
            },
            "model": {
                "arch": "vit_tiny_patch16_224",
                "patch_size": PATCH,
                "width": 24,
                "depth": 2,
                "heads": 2,
                "decoder_width": 16,
                "decoder_depth": 1,
                "decoder_heads": 2,
                "target": target,
            },
        }
    )


def write_run(storage, name, config, steps=(20,), *, flat=False):
    """A run's folder as pretraining leaves it; ``flat``: its decoder predicts zeros. Returns the newest model."""
    store = Store(str(storage)).child(name)
    store.write("config.json", config.model_dump_json())
    model = build_model(config)
    for step in steps:
        model.init_weights(seed=step)
        if flat:
            torch.nn.init.zeros_(model.decoder_pred.weight)
        tensors = checkpoint.tensors_of(model, make_optimizer(model))
        checkpoint.write(store.child("checkpoints"), step, tensors, weights.file_metadata(model), {"step": step})
    return model.eval()


@pytest.fixture
def run(shards, tmp_path):
    """A run 'tiny' in ``tmp_path``; its model."""
    return write_run(tmp_path, "tiny", tiny(shards["train"]))


def look(storage, *more, name="tiny"):
    assert main(["--run", name, "--storage", str(storage), *map(str, more)]) == 0
    return pictures(Path(storage) / name / "looking")


def pictures(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.png")):
        with Image.open(path) as image:
            found[path.stem] = np.array(image)
    return found


def own_pixels(shards, key, channels=3):
    """The image of a key as evaluation sees it, from its file and not from the shards."""
    label, number = key.split("_")
    data = (Path(shards["train"]).parent / "train-images" / label / f"{number}.jpg").read_bytes()
    image = decode(data, channels)
    crops = center_crops(np.array([image.shape[0]]), np.array([image.shape[1]]), out_size=(SIZE, SIZE))
    out = np.empty((SIZE, SIZE, channels), np.uint8)
    crop_resize(image, *next(crops.boxes()), out=out)
    return out


def enlarged(image):
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    return image.repeat(TILE // image.shape[0], axis=0).repeat(TILE // image.shape[1], axis=1)


def sheet_tiles(page, rows):
    """The tiles of a reconstruction sheet: [rows, 3, TILE, TILE, 3]."""
    top = len(page) - MARGIN - rows * (TILE + GAP) + GAP
    places = [[(top + r * (TILE + GAP), MARGIN + c * (TILE + GAP)) for c in range(3)] for r in range(rows)]
    return np.array([[page[y : y + TILE, x : x + TILE] for y, x in row] for row in places])


def cells(tile):
    """A tile cut into the patches that it shows: [N, CELL, CELL, 3]."""
    grid = tile.reshape(SIZE // PATCH, CELL, SIZE // PATCH, CELL, 3).swapaxes(1, 2)
    return grid.reshape(-1, CELL, CELL, 3)


def places(page, tile):
    """Where a tile stands in a picture."""
    corner = (page[: 1 - len(tile), : 1 - tile.shape[1]] == tile[0, 0]).all(axis=2)
    spots = np.argwhere(corner).tolist()
    return [(y, x) for y, x in spots if (page[y : y + len(tile), x : x + tile.shape[1]] == tile).all()]


def hidden_cells(tile):
    return [i for i, cell in enumerate(cells(tile)) if (cell == HIDDEN).all()]


def test_reconstructions_hide_what_they_say_and_keep_the_rest(run, shards, tmp_path):
    ratios = ["--mask-ratios", 0.5, 0.75, 0.9, "--mask-seeds", 0, 1]
    found = look(tmp_path, "--keys", *KEYS, *ratios, "--only", "reconstructions")
    assert sorted(found) == sorted(
        f"reconstruction-ratio-{ratio}-seed-{seed}" for ratio in (0.5, 0.75, 0.9) for seed in (0, 1)
    )
    for ratio, num_hidden in ((0.5, 8), (0.75, 12), (0.9, 15)):
        per_seed = []
        for seed in (0, 1):
            tiles = sheet_tiles(found[f"reconstruction-ratio-{ratio}-seed-{seed}"], len(KEYS))
            for key, (masked, reconstructed, original) in zip(KEYS, tiles, strict=True):
                assert (original == enlarged(own_pixels(shards, key))).all()
                hidden = hidden_cells(masked)
                assert len(hidden) == num_hidden
                for i, (seen, made, own) in enumerate(
                    zip(cells(masked), cells(reconstructed), cells(original), strict=True)
                ):
                    if i in hidden:
                        assert not (made == own).all()
                    else:
                        assert (seen == own).all()
                        assert (made == own).all()
                per_seed.append(hidden)
        # another seed and another sample have other masks
        assert len(set(map(tuple, per_seed))) == 4


def test_the_run_s_own_picture_comes_out_again(run, shards, tmp_path):
    config = tiny(shards["train"])
    path = tmp_path / "of-training.png"
    view = View((SIZE, SIZE), 3, crop_share=config.probe.crop_share)
    assert save_reconstructions(run, config, load_manifest(shards["train"]), view, path)
    found = look(tmp_path, "--only", "reconstructions")["reconstruction-ratio-0.75-seed-0"]
    with Image.open(path) as image:
        of_training = np.array(image)
    assert (found[HEAD:, : of_training.shape[1]] == of_training).all()


def test_normalised_patches_get_their_own_statistics_back(shards, tmp_path):
    write_run(tmp_path, "tiny", tiny(shards["train"], target="normalized"), flat=True)
    write_run(tmp_path, "raw", tiny(shards["train"]), flat=True)
    only = ["--keys", KEYS[0], "--only", "reconstructions"]
    page = look(tmp_path, *only)["reconstruction-ratio-0.75-seed-0"]
    ((masked, reconstructed, original),) = sheet_tiles(page, 1)
    hidden = hidden_cells(masked)
    assert len(hidden) == 12
    for i in hidden:
        # one mean for all the values of a patch, whatever the channel
        mean = cells(original)[i].mean()
        assert np.abs(cells(reconstructed)[i].astype(float) - mean).max() <= 1
    # the sentence that says so stands between the head and the titles
    raw = look(tmp_path, *only, name="raw")["reconstruction-ratio-0.75-seed-0"]
    more = len(page) - len(raw)
    assert more > 10
    assert (page[HEAD + MARGIN : HEAD + MARGIN + more] < 200).any()
    ((_, reconstructed, _),) = sheet_tiles(raw, 1)
    assert all(np.abs(cells(reconstructed)[i].astype(int) - 127).max() <= 1 for i in hidden)


def test_attention_of_each_image_in_its_row(run, shards, tmp_path):
    page = look(tmp_path, "--keys", *KEYS, "--only", "attention", "--heads")["attention"]
    own = np.stack([own_pixels(shards, key) for key in KEYS])
    images_BCHW = normalize(torch.from_numpy(own), (0.5,) * 3, (0.25,) * 3)
    attention_BhHW = cls_attention(run, images_BCHW)
    columns = []
    for row in range(2):
        heats = [attention_BhHW[row].mean(dim=0), *attention_BhHW[row]]
        shown = [own[row], *(heat_overlay(own[row], heat) for heat in heats)]
        spots = [places(page, enlarged(image)) for image in shown]
        assert all(len(spot) == 1 for spot in spots)
        ys, xs = zip(*(spot[0] for spot in spots), strict=True)
        assert len(set(ys)) == 1
        assert list(xs) == sorted(xs)
        columns.append((ys[0], xs))
    assert columns[0][0] < columns[1][0]
    assert columns[0][1] == columns[1][1]
    plain = look(tmp_path, "--keys", *KEYS, "--only", "attention")["attention"]
    assert places(plain, enlarged(heat_overlay(own[0], attention_BhHW[0].mean(dim=0))))
    assert not places(plain, enlarged(heat_overlay(own[0], attention_BhHW[0, 0])))


def test_features_as_colours(run, shards, tmp_path):
    page = look(tmp_path, "--keys", *KEYS, "--only", "pca")["pca"]
    own = np.stack([own_pixels(shards, key) for key in KEYS])
    with torch.no_grad():
        latent = run.encode(normalize(torch.from_numpy(own), (0.5,) * 3, (0.25,) * 3))
    for image, colours in zip(own, pca_colours(latent[:, 1:], (4, 4)), strict=True):
        ((y, x),) = places(page, enlarged(image))
        assert places(page, enlarged(colours)) == [(y, x + TILE + GAP)]


@pytest.fixture(scope="module")
def twins(ray_local, tmp_path_factory):
    """Shards of 30 images, the last of which is a copy of number 7."""
    from pipelines.make_shards import main as make_shards
    from tests.conftest import write_images

    root = tmp_path_factory.mktemp("twins")
    write_images(root / "images", 29, classes=1)
    (root / "images" / "class0" / "twin.jpg").write_bytes((root / "images" / "class0" / "0007.jpg").read_bytes())
    assert make_shards(["--source", str(root / "images"), "--out", str(root / "shards")]) == 0
    return {"train": str(root / "shards"), "image": root / "images" / "class0" / "0007.jpg"}


@pytest.mark.parametrize("number", [3, 29])
def test_a_planted_twin_is_the_nearest_neighbour(twins, tmp_path, number, capfd):
    write_run(tmp_path, "tiny", tiny(twins["train"]))
    keys = ["--keys", "0007"] if number == 3 else ["--keys", "twin", "0007"]
    page = look(tmp_path, *keys, "--only", "neighbours", "--neighbours", number)["neighbours"]
    image = decode(twins["image"].read_bytes(), 3)
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    crop_resize(image, *next(center_crops(np.array([24]), np.array([24]), out_size=(SIZE, SIZE)).boxes()), out=out)
    spots = places(page, enlarged(out))
    # the query and its twin beside it; never the image itself as its own neighbour
    first = [(y, MARGIN + c * (TILE + GAP)) for y in sorted({y for y, _ in spots}) for c in (0, 1)]
    assert spots == first
    assert len(spots) == 2 * (len(keys) - 1)
    # as many columns as neighbours were asked for, and the query's
    row = page[spots[0][0] : spots[0][0] + TILE]
    assert (row != 255).any(axis=(0, 2)).sum() == (number + 1) * TILE


def test_neighbours_are_looked_for_among_so_many(twins, tmp_path):
    write_run(tmp_path, "tiny", tiny(twins["train"]))
    options = ["--num", 30, "--only", "neighbours", "--neighbours", 32, "--neighbours-of", 5]
    page = look(tmp_path, *options)["neighbours"]
    height = 28 + 39 + 30 * (TILE + 16 + GAP) - GAP + MARGIN
    assert len(page) == height
    row = page[HEAD + 39 : HEAD + 39 + TILE]
    # four of five, as some of the images are among the five themselves
    assert (row != 255).any(axis=(0, 2)).sum() == (4 + 1) * TILE


def test_a_broken_checkpoint_is_passed_over_and_said(shards, tmp_path, capfd):
    write_run(tmp_path, "tiny", tiny(shards["train"]), steps=(10, 20))
    before = look(tmp_path, "--only", "attention")["attention"]
    (tmp_path / "tiny" / "checkpoints" / "step-00000020" / "model.safetensors").write_bytes(b"torn")
    capfd.readouterr()
    after = look(tmp_path, "--only", "attention")["attention"]
    out, err = capfd.readouterr()
    assert "tiny, step 10: 8 of 300 images" in out
    assert "step-00000020 model.safetensors has 4 bytes" in err
    assert (before != after).any()


def test_an_image_that_cannot_be_read_is_named_and_left_out(run, shards, tmp_path, capfd):
    found = look(tmp_path, "--keys", "class1_0001", KEYS[0], "--only", "reconstructions", "neighbours")
    ((_, _, original),) = sheet_tiles(found["reconstruction-ratio-0.75-seed-0"], 1)
    assert (original == enlarged(own_pixels(shards, KEYS[0]))).all()
    err = capfd.readouterr().err
    assert "class1_0001 in train-" in err
    assert "(truncated) and is left out" in err
    assert "1 of the 300 images that neighbours are among cannot be read: class1_0001" in err
    with pytest.raises(UserError, match="none of the 1 chosen images can be read"):
        look(tmp_path, "--keys", "class1_0001")


def test_grey_pictures_of_colour_shards(shards, tmp_path):
    write_run(tmp_path, "tiny", tiny(shards["train"], channels=1))
    found = look(tmp_path, "--keys", KEYS[0], "--heads")
    assert sorted(found) == ["attention", "neighbours", "pca", "reconstruction-ratio-0.75-seed-0"]
    own = enlarged(own_pixels(shards, KEYS[0], channels=1))
    assert all(places(page, own) for page in found.values())


def test_weights_show_the_same_as_their_run(run, shards, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = "tiny/checkpoints/step-00000020/model.safetensors"
    of_file = ["--data", shards["train"], "--mean", *["0.5"] * 3, "--std", *["0.25"] * 3, "--target", "raw"]
    of_run = look(tmp_path, "--samples", 3, 17)
    assert main(["--weights", path, "--samples", "3", "17", *of_file]) == 0
    of_weights = pictures("looking")
    assert of_weights.keys() == of_run.keys()
    for name, page in of_weights.items():
        width = min(page.shape[1], of_run[name].shape[1])
        assert (page[HEAD:, :width] == of_run[name][HEAD:, :width]).all(), name
    assert "MLflow" not in capfd.readouterr().out.split("images of")[-1]

    # the encoder alone: all but the reconstructions, and the same
    save_file({name: tensor.contiguous() for name, tensor in weights.encoder_state(run).items()}, "encoder.safetensors")
    alone = ["--weights", "encoder.safetensors", "--num-heads", "2", *of_file, "--out", "alone"]
    assert main([*alone, "--samples", "3", "17"]) == 0
    assert "encoder.safetensors has no decoder, so nothing can be reconstructed" in capfd.readouterr().err
    of_encoder = pictures("alone")
    assert sorted(of_encoder) == ["attention", "neighbours", "pca"]
    for name, page in of_encoder.items():
        width = min(page.shape[1], of_run[name].shape[1])
        assert (page[HEAD:, :width] == of_run[name][HEAD:, :width]).all(), name
    with pytest.raises(UserError, match="has no decoder"):
        main([*alone, "--only", "reconstructions"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "neither is given"),
        (["--run", "tiny", "--weights", "x.pth"], "both are given"),
        (["--run", "tinny"], "no run 'tinny' in .*: did you mean tiny"),
        (["--run", "empty"], "has no whole checkpoint"),
        (["--run", "tiny", "--samples", "3", "300"], "no sample 300: .* numbered from 0 to 299"),
        (["--run", "tiny", "--samples", "-1"], "no sample -1"),
        (["--run", "tiny", "--samples", *map(str, range(101))], "101 samples are named"),
        (["--run", "tiny", "--keys", "class0_003"], "no sample has the key 'class0_003' .* did you mean class0_00"),
        (["--run", "tiny", "--mask-ratios", "0.5", "1.5"], r"mask_ratios\.1: .*less than 1, found 1\.5"),
        (["--run", "tiny", "--mask-ratios", "0"], r"mask_ratios\.0: .*greater than 0"),
        (["--run", "tiny", "--mask-ratios"], "mask_ratios"),
        (["--run", "tiny", "--mask-ratios", "0.99"], "--mask-ratios: mask ratio 0.99 leaves none of the 16 patches"),
        (["--run", "tiny", "--only", "atention"], "atention"),
        (["--run", "tiny", "--mean", "0", "0", "0"], "--mean goes with --weights"),
        (["--run", "tiny", "--data", "nowhere"], "no shards at 'nowhere'"),
        (["--weights", "x.pth"], "--weights needs images to look at"),
        (["--weights", "x.pth", "--data", "{train}"], "no file 'x.pth'"),
        (["--weights", "tiny/config.json", "--data", "{train}"], "cannot be read as a checkpoint"),
        (["--weights", "tiny/checkpoints/step-00000020/model.safetensors", "--data", "{train}", "--std", "1"], "--std"),
    ],
)
def test_mistakes_are_one_line(run, shards, tmp_path, monkeypatch, flags, told):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "empty", tiny(shards["train"]), steps=())
    arguments = [flag.format(**shards) for flag in flags]
    storage = ["--storage", "."] if "--run" in flags else []
    with pytest.raises(UserError, match=told) as error:
        main([*arguments, *storage])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.png"))


def test_weights_that_are_not_finite(shards, tmp_path):
    model = write_run(tmp_path, "tiny", tiny(shards["train"]), steps=(10,))
    next(model.encoder.norm.parameters()).data.fill_(torch.nan)
    tensors = checkpoint.tensors_of(model, make_optimizer(model))
    checkpoint.write(Store(str(tmp_path)).child("tiny").child("checkpoints"), 20, tensors, {}, {})
    with pytest.raises(UserError, match=r"tiny, step 20: .*not finite"):
        look(tmp_path, "--only", "pca")


def test_exit_code_and_imports(tmp_path):
    command = [sys.executable, "-m", "pipelines.reconstruct", "--run", "x", "--storage", str(tmp_path)]
    wrong = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1
    assert "it holds no run at all" in wrong.stderr
    code = "import sys, pipelines.reconstruct; sys.exit(bool({'ray', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def artifacts(uri, run_id, folder="looking"):
    from mlflow.tracking import MlflowClient

    return [Path(file.path).name for file in MlflowClient(tracking_uri=uri).list_artifacts(run_id, folder)]


def test_the_pictures_go_into_the_run_s_record(run, tmp_path, capfd):
    folder, uri = tmp_path / "tiny", f"sqlite:///{tmp_path}/mlflow.db"
    run_id = create_run(folder, RunDescription(experiment="tests", name="tiny"), tracking_uri=uri)
    assert run_id is not None
    spool = Spool(folder)  # as a training that is going on holds it
    spool.status("RUNNING")
    before = (folder / "metrics.jsonl").read_bytes()
    look(tmp_path, "--only", "attention", "pca")
    assert "sent 2 pictures" in capfd.readouterr().out
    assert artifacts(uri, run_id) == ["attention.png", "pca.png"]
    # once more: the new picture takes the place of the old one
    second = look(tmp_path, "--only", "pca", "--num", 3)["pca"]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    with Image.open(client.download_artifacts(run_id, "looking/pca.png", str(tmp_path))) as image:
        assert (np.array(image) == second).all()
    assert client.get_run(run_id).info.status == "RUNNING"
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert sorted(path.name for path in (folder / "looking").iterdir()) == ["attention.png", "pca.png"]
    spool.close()


def test_a_server_that_is_away_fails_nothing_and_gets_the_pictures_later(run, tmp_path, capfd):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "tiny"
    plan = RunDescription(experiment="tests", name="tiny")
    assert create_run(folder, plan, tracking_uri=f"http://127.0.0.1:{port}", timeout_s=5) is None
    capfd.readouterr()
    assert sorted(look(tmp_path, "--only", "attention", "pca")) == ["attention", "pca"]
    err = capfd.readouterr().err
    assert "2 pictures are not in MLflow yet" in err
    assert "not reachable" in err
    # what it says to do does it
    command = shlex.split(err.split("send them later with ")[1].splitlines()[0])
    uri = f"sqlite:///{tmp_path}/later.db"
    done = subprocess.run([*command, "--tracking-uri", uri], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "looking" / "unsent-tiny" / "run.json").read_text())
    assert artifacts(uri, record["mlflow_run_id"]) == ["attention.png", "pca.png"]
