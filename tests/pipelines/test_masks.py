"""Segmentation masks on their way from a folder through shards to micro-batches, without Ray."""

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_core.mask_images import IGNORE
from pipelines import check_shards, make_shards
from pipelines.check_shards import check_shard
from pipelines.data.index import encode_index, index_tar, read_index
from pipelines.data.plan import Cut, Plan
from pipelines.data.readers import MicroBatch, Stream, View, read_images
from pipelines.data.shards import Manifest, load_index, load_manifest
from pipelines.errors import UserError
from pipelines.storage import Store
from tests.masks import pack, png, write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 12)
    return folder


@pytest.fixture(scope="module")
def manifest(scenes: Path) -> Manifest:
    return pack(scenes, scenes / "out")[1]


def stream_of(manifest: Manifest, view: View, rows: int = 8) -> Stream:
    num = manifest.num_samples
    return Stream(manifest, Plan(num, 0, end=num, shuffle=False), Cut(rows, rows, 1), view)


def write_tar(path: Path, members: dict[str, bytes]) -> Manifest:
    """A shard with these members, and its index."""
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    data, store = path.read_bytes(), Store(str(path.parent))
    digest = hashlib.sha256(data).hexdigest()
    index = index_tar(io.BytesIO(data))
    store.write(path.stem + ".index.arrow", encode_index(index, tar_bytes=len(data), tar_sha256=digest))
    return Manifest(str(path.parent), "own", (path.name,), (len(index),), (len(data),), (digest,), (), 3)


def test_a_shard_holds_each_mask_beside_its_image(scenes, manifest):
    assert manifest.mask_classes == 3
    tar = Path(manifest.location, manifest.shard_names[0]).read_bytes()
    index = load_index(manifest, 0)
    made = index_tar(io.BytesIO(tar))
    assert list(made.keys) == list(index.keys)
    for column in ("offset_S", "size_S", "label_S", "mask_offset_S", "mask_size_S"):
        np.testing.assert_array_equal(getattr(made, column), getattr(index, column))
    for n, key in enumerate(index.keys):
        name = key.replace("_", "/") + ".png"
        for kind, offset, size in (
            ("images", index.offset_S[n], index.size_S[n]),
            ("masks", index.mask_offset_S[n], index.mask_size_S[n]),
        ):
            assert tar[offset : offset + size] == (scenes / kind / name).read_bytes()


def test_without_masks_nothing_of_a_shard_has_changed(scenes, tmp_path):
    for n in range(6):
        path = tmp_path / "images" / f"c{n % 2}" / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([n]) * (100 + n))
    packing, manifest = pack(tmp_path, tmp_path / "out", masks=False)
    # What stood before shards knew masks: of the packing, and of the shards' content.
    assert packing.digest == "edeb47ea52b7368b6cd106f5aabb800826615840e4bd148ca57ec7fad1522dcf"
    assert manifest.shard_digests == ("c80619945b669fad5e9fe9dcb44297a2c49099e232cd40fb769affaaea9cf9c6",)
    assert replace(manifest, mask_classes=3).digest == manifest.digest
    assert "mask" not in (tmp_path / "out" / "_info.json").read_text()
    assert b"mask" not in (tmp_path / "out" / "train-000000.index.arrow").read_bytes()
    index, _ = read_index(Store(manifest.location), "train-000000.tar")
    assert set(index.mask_offset_S.tolist()) == {-1}
    assert set(index.mask_size_S.tolist()) == {0}
    with_masks, _ = pack(scenes, tmp_path / "with")
    assert with_masks.digest != pack(scenes, tmp_path / "without", masks=False)[0].digest


def test_masks_shrink_with_their_images(tmp_path):
    write_scenes(tmp_path, 12)
    for path in (tmp_path / "masks").rglob("*.png"):
        path.write_bytes(png(np.array(Image.open(path)) * 100))
    _, manifest = pack(tmp_path, tmp_path / "out", resize=20)
    batch = read_images(stream_of(manifest, View((20, 25), 3, crop_share=1.0, masks=True), rows=12), 0)
    assert (batch.weight_B == 1).all()
    assert batch.mask_BHW is not None
    assert set(np.unique(batch.mask_BHW)) == {0, 100, 200}, "nothing between the classes"
    check_alignment(replace(batch, mask_BHW=batch.mask_BHW // 100), within=0.06)
    index = load_index(manifest, 0)
    with Path(manifest.location, manifest.shard_names[0]).open("rb") as file:
        file.seek(index.mask_offset_S[0])
        assert Image.open(io.BytesIO(file.read(index.mask_size_S[0]))).size == (25, 20)


def check_alignment(batch: MicroBatch, within: float = 0.03) -> None:
    """The masks are where the images are bright or dark, but for what interpolation mixes along edges."""
    assert batch.mask_BHW is not None
    grey_BHW = batch.images_BHWC.mean(axis=3)
    seen_BHW = np.where(grey_BHW > 190, 1, np.where(grey_BHW < 60, 2, 0))
    assert 0.05 < (batch.mask_BHW == 1).mean() < 0.5
    assert np.mean(seen_BHW != batch.mask_BHW) < within


@pytest.mark.parametrize("repeats", [1, 2])
def test_masks_are_cut_and_mirrored_as_their_images(manifest, repeats):
    view = View((64, 80), 3, seed=1, crop_scale=(0.3, 1.0), flip=True, masks=True)
    stream = stream_of(manifest, view, rows=12)
    stream = replace(stream, plan=replace(stream.plan, end=12 * repeats), cut=replace(stream.cut, repeats=repeats))
    batches = [read_images(stream, index) for index in range(repeats)]
    for batch in batches:
        check_alignment(batch)
    plain = read_images(replace(stream, view=replace(view, masks=False)), 0)
    np.testing.assert_array_equal(plain.images_BHWC, batches[0].images_BHWC)
    assert plain.mask_BHW is None


def test_what_weighs_nothing_has_no_pixel_that_counts(tmp_path):
    write_scenes(tmp_path, 3)
    image, other, third = (path.read_bytes() for path in sorted((tmp_path / "images").rglob("*.png")))
    mask, broken, _ = (path.read_bytes() for path in sorted((tmp_path / "masks").rglob("*.png")))
    manifest = write_tar(
        tmp_path / "own.tar",
        {
            "a.mask.png": mask,  # before its image
            "a.png": image,
            "b.png": other,
            "b.mask.png": broken[:-30],
            "c.png": third,  # has none
            "d.png": image[:90],
            "d.mask.png": mask,
        },
    )
    batch = read_images(stream_of(manifest, View((32, 40), 3, crop_share=1.0, masks=True)), 0)
    assert batch.mask_BHW is not None
    assert batch.weight_B.tolist() == [1, 0, 1, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(batch.mask_BHW[0], np.array(Image.open(io.BytesIO(mask))))
    assert (batch.mask_BHW[1:] == IGNORE).all()
    assert [one["key"] for one in batch.skipped] == ["b", "d"]


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (np.zeros((32, 39), np.uint8), "the mask of b: it has 39x32 pixels, and its image 40x32"),
        (np.zeros((32, 40, 3), np.uint8), "the mask of b: a PNG of colour type 2"),
    ],
)
def test_wrong_masks_stop_the_reading_and_are_found_by_the_check(tmp_path, mask, told):
    image, good = png(np.zeros((32, 40, 3), np.uint8)), png(np.full((32, 40), 2, np.uint8))
    members = {"a.png": image, "a.mask.png": good, "b.png": image, "b.mask.png": png(mask)}
    manifest = write_tar(tmp_path / "own.tar", members)
    with pytest.raises(UserError, match=told) as caught:
        read_images(stream_of(manifest, View((32, 40), 3, masks=True)), 0)
    assert "\n" not in str(caught.value)
    assert read_images(stream_of(manifest, View((32, 40), 3)), 0).weight_B.sum() == 2
    store = Store(manifest.location)
    assert check_shard(store, "own.tar", manifest, 0, decode=False).problems == ()
    (problem,) = check_shard(store, "own.tar", manifest, 0, decode=True).problems
    assert problem.startswith("own.tar: b: mask: ")


def test_the_check_knows_classes_and_where_masks_lie(tmp_path):
    image, mask = png(np.zeros((32, 40, 3), np.uint8)), np.full((32, 40), 2, np.uint8)
    mask[:9] = IGNORE
    manifest = write_tar(tmp_path / "own.tar", {"a.png": image, "a.mask.png": png(mask)})
    store = Store(manifest.location)
    checked = check_shard(store, "own.tar", manifest, 0, decode=True)
    assert (checked.problems, checked.mask_classes) == ((), 3)
    (problem,) = check_shard(store, "own.tar", replace(manifest, mask_classes=2), 0, decode=True).problems
    assert "class 2 in its masks, and _info.json has 2 classes" in problem

    index, facts = read_index(store, "own.tar")
    unknown = replace(index, mask_offset_S=index.mask_offset_S * 0 - 1, mask_size_S=index.mask_size_S * 0)
    size = int(facts["tar_bytes"])
    store.write("own.index.arrow", encode_index(unknown, tar_bytes=size, tar_sha256=facts["tar_sha256"]))
    (problem,) = check_shard(store, "own.tar", manifest, 0, decode=False).problems
    assert "check_shards DIR --write" in problem


def test_masks_that_do_not_fit_their_images_are_not_packed(tmp_path):
    write_scenes(tmp_path, 6)
    source = ["--source", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="no folder of masks"):
        make_shards.main([*source, "--masks", str(tmp_path / "nowhere")])
    for n in (0, 2, 3, 4, 5):
        (tmp_path / "masks" / f"{n % 2}" / f"{n:03d}.png").unlink()
    with pytest.raises(
        UserError, match=r"5 of 6 images have no mask: .*000.png, .*002.png, .*004.png and 2 more"
    ) as told:
        make_shards.main([*source, "--masks", str(tmp_path / "masks")])
    assert "\n" not in str(told.value)
    write_scenes(tmp_path, 6)
    (tmp_path / "masks" / "1" / "003.png").write_bytes(png(np.zeros((32, 39), np.uint8)))
    with pytest.raises(UserError, match=r"003\.png': it has 39x32 pixels, and its image 40x32"):
        pack(tmp_path, tmp_path / "out")


def test_masks_of_one_class_are_said_with_the_way_out(tmp_path, capsys):
    write_scenes(tmp_path, 6)
    for path in (tmp_path / "masks").rglob("*.png"):
        path.write_bytes(png(np.where(np.array(Image.open(path)) > 0, 255, 0).astype(np.uint8)))
    source = ["--source", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    assert make_shards.main([*source, "--out", str(tmp_path / "one")]) == 0
    told = capsys.readouterr().out.splitlines()
    before = next(n for n, line in enumerate(told) if line.startswith("packing "))
    for lines in (told[:before], told[before:]):
        (line,) = [line for line in lines if "have one class" in line]
        assert "--mask-255 1" in line
    for flags in ((), ("--decode",)):
        assert check_shards.main([str(tmp_path / "one"), *flags]) == 0
        assert "have one class" in capsys.readouterr().out

    assert make_shards.main([*source, "--out", str(tmp_path / "two"), "--mask-255", "1"]) == 0
    assert check_shards.main([str(tmp_path / "two"), "--decode"]) == 0
    assert "have one class" not in capsys.readouterr().out
    manifest = load_manifest(str(tmp_path / "two"))
    assert manifest.mask_classes == 2
    batch = read_images(stream_of(manifest, View((32, 40), 3, crop_share=1.0, masks=True)), 0)
    assert batch.mask_BHW is not None
    grey_BHW = batch.images_BHWC[:6].mean(axis=3)
    np.testing.assert_array_equal(batch.mask_BHW[:6], (grey_BHW > 190) | (grey_BHW < 60))

    # Tars of others, whose masks nobody has read.
    folder = tmp_path / "own"
    folder.mkdir()
    write_tar(
        folder / "own.tar", {"a.png": png(np.zeros((8, 8, 3), np.uint8)), "a.mask.png": png(np.zeros((8, 8), np.uint8))}
    )
    assert check_shards.main([str(folder), "--write"]) == 0
    assert "not known how many classes they have: --decode" in capsys.readouterr().out
    assert check_shards.main([str(folder), "--write", "--decode"]) == 0
    assert "have one class" in capsys.readouterr().out
