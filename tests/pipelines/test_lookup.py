"""Chosen samples: the right images in the order asked for, across shards and grains; unknown keys are named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.lookup import find_keys, key_of, read_samples
from pipelines.data.readers import View
from pipelines.data.shards import load_manifest
from pipelines.errors import UserError
from pipelines.make_shards import main as make_shards

NUM = 700  # more than a grain
VIEW = View((8, 8), 3)


def colour(number):
    return [number % 251, number // 251 * 80, 7]


@pytest.fixture(scope="module")
def coloured(ray_local, tmp_path_factory):
    """Shards whose image ``NNNN`` has one colour, which says the number."""
    root = tmp_path_factory.mktemp("coloured")
    (root / "images").mkdir()
    for number in range(NUM):
        path = root / "images" / f"{number:04d}.png"
        Image.fromarray(np.full((8, 8, 3), colour(number), np.uint8)).save(path)
        path.write_bytes(path.read_bytes() + bytes(3000))  # for more than one shard; decoders stop at the end
    assert make_shards(["--source", str(root / "images"), "--out", str(root / "shards"), "--shard-mib", "1"]) == 0
    return load_manifest(str(root / "shards"))


def test_samples_come_in_the_order_asked_for(coloured):
    assert len(coloured.shard_names) > 1
    ids = np.random.default_rng(0).permutation(NUM)[:150].tolist()
    ids = [NUM - 1, 0, *ids, 5, 5]
    read = list(read_samples(coloured, ids, VIEW, rows=40))
    assert [len(part.sample_B) for part in read] == [40, 40, 40, 34]
    # kept until here, so that pixels in memory that is used again would show
    images = np.concatenate([part.images_BHWC for part in read])
    assert np.concatenate([part.sample_B for part in read]).tolist() == ids
    for id_, image in zip(ids, images, strict=True):
        number = int(Path(key_of(coloured, id_)).name)
        assert (image == colour(number)).all(), f"sample {id_} is not image {number}"


def test_nothing_asked_for(coloured):
    assert list(read_samples(coloured, [], VIEW)) == []


def test_keys(coloured):
    keys = [key_of(coloured, id_) for id_ in (699, 3, 350)]
    assert find_keys(coloured, keys) == [699, 3, 350]
    assert find_keys(coloured, []) == []
    with pytest.raises(UserError, match="no sample has the key '0699x' among the 700 of the shards: did you mean 0699"):
        find_keys(coloured, ["0001", "0699x"])
    with pytest.raises(UserError, match="they look like '0"):
        find_keys(coloured, ["zzz"])


def test_what_cannot_be_read_is_left_out(shards):
    manifest = load_manifest(shards["train"])
    ids = find_keys(manifest, ["class0_0000", "class1_0001", "class2_0002"])
    (read,) = read_samples(manifest, ids, View((16, 16), 3))
    assert read.sample_B.tolist() == [ids[0], ids[2]]
    assert len(read.images_BHWC) == 2
    assert [line["key"] for line in read.skipped] == ["class1_0001"]
