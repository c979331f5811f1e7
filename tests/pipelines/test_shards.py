"""Shards as they lie on disk: manifest, index, and those that others made."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import ShardWriter

from pipelines import check_shards
from pipelines.data.index import index_tar
from pipelines.data.shards import load_index, load_manifest
from pipelines.errors import UserError, run_command


def picture(seed: int) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


def write_foreign(folder: Path, *, count: int = 10, labels: bool = True) -> dict[str, bytes]:
    """Shards of plain webdataset, with a text and a mask beside each image."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {f"set/{n:03d}": picture(n) for n in range(count)}
    with ShardWriter(str(folder / "own-%04d.tar"), maxcount=4, verbose=0) as writer:
        for n, (key, data) in enumerate(images.items()):
            label = {"cls": n % 3} if labels else {}
            extension = ("jpg", "JPEG", "png")[n % 3]
            writer.write({"__key__": key, extension: data, "seg.png": b"mask", "txt": "words", **label})
    return images


def check(folder: Path, *flags: str) -> int:
    return check_shards.main([str(folder), *flags])


@pytest.fixture
def shards(ray_local, tmp_path: Path) -> Path:
    write_foreign(tmp_path / "shards")
    assert check(tmp_path / "shards", "--write", "--split", "own") == 0
    return tmp_path / "shards"


def test_shards_that_others_made_are_indexed_to_the_byte(ray_local, tmp_path, capsys):
    images = write_foreign(tmp_path)
    with pytest.raises(UserError, match="check_shards"):
        load_manifest(str(tmp_path))
    assert check(tmp_path, "--write", "--split", "own") == 0
    manifest = load_manifest(str(tmp_path))
    assert manifest.split == "own"
    assert manifest.shard_lengths == (4, 4, 2)
    assert manifest.classes == ("0", "1", "2")
    read = {}
    for shard, name in enumerate(manifest.shard_names):
        index, tar = load_index(manifest, shard), (tmp_path / name).read_bytes()
        for n, key in enumerate(index.keys):
            read[key] = tar[index.offset_S[n] : index.offset_S[n] + index.size_S[n]]
            number = int(key[-3:])
            assert index.label_S[n] == number % 3
            assert index.extensions[n] == ("jpg", "jpeg", "png")[number % 3]
    assert read == images
    assert check(tmp_path, "--decode") == 0


def test_shards_without_labels(ray_local, tmp_path):
    write_foreign(tmp_path, labels=False)
    assert check(tmp_path, "--write") == 0
    manifest = load_manifest(str(tmp_path))
    assert (manifest.split, manifest.labelled) == ("train", False)
    assert set(load_index(manifest, 0).label_S.tolist()) == {-1}


def test_a_cut_tar_never_passes_for_a_shorter_one(tmp_path):
    write_foreign(tmp_path, count=3)
    data = (tmp_path / "own-0000.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        boundaries = [member.offset for member in archive.getmembers()]
        end = archive.offset
    assert len(index_tar(io.BytesIO(data))) == 3
    cuts = {0, *boundaries, *(cut + 100 for cut in boundaries), *(cut + 513 for cut in boundaries), end - 1, end}
    for cut in sorted(cuts):
        with pytest.raises(ValueError, match=r"no tar|truncated or damaged .*byte \d+"):
            index_tar(io.BytesIO(data[:cut]))
    for offset in boundaries:
        damaged = bytearray(data)
        damaged[offset + 150] ^= 1
        with pytest.raises(ValueError, match=r"no tar|truncated or damaged"):
            index_tar(io.BytesIO(bytes(damaged)))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"a.cls": b"cat", "a.jpg": b"x"}, "whole number"),
        ({"img.v1.jpg": b"x"}, "dots before its extension"),
        ({"a.txt": b"x"}, "no image"),
    ],
)
def test_index_tells_what_a_shard_lacks(files: dict[str, bytes], told: str):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    data.seek(0)
    with pytest.raises(ValueError, match=told):
        index_tar(data)


def test_a_pattern_chooses_shards(shards: Path):
    whole = load_manifest(str(shards))
    for pattern in ("own-{0001..0002}.tar", "own-000[12].tar", "{own-0002,own-0001}.tar"):
        part = load_manifest(f"{shards}/{pattern}")
        assert part.shard_names == ("own-0001.tar", "own-0002.tar")
        assert part.num_samples == 6
        assert list(load_index(part, 1).keys) == list(load_index(whole, 2).keys)
    assert load_manifest(f"{shards}/*.tar") == whole
    assert part.digest != whole.digest


def test_the_digest_is_of_the_data_and_not_of_its_place(shards: Path, tmp_path):
    whole = load_manifest(str(shards))
    shards.rename(tmp_path / "moved")
    moved = load_manifest(str(tmp_path / "moved"))
    assert moved.location != whole.location
    assert moved.digest == whole.digest


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("nowhere", "no directory"),
        ("own-0000.index.arrow", "is a file"),
        ("x-*.tar", "none of the 3 shards"),
        ("own-{0000..0003}.tar", "own-0003.tar is none of the 3 shards"),
        ("pipe:cat x.tar", "would run a command"),
    ],
)
def test_bad_locations_are_told(shards: Path, place: str, told: str):
    with pytest.raises(UserError, match=told):
        load_manifest(place if place.startswith("pipe:") else f"{shards}/{place}")


def test_damage_is_found(shards: Path, capsys):
    capsys.readouterr()
    victim = shards / "own-0001.tar"
    data = victim.read_bytes()
    index = load_index(load_manifest(str(shards)), 1)
    flipped = bytearray(data)
    flipped[index.offset_S[0] + 5] ^= 1
    victim.write_bytes(flipped)
    assert check(shards) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("own-0001.tar" in line and "SHA-256" in line for line in lines)
    assert not any("own-0000.tar" in line for line in lines)

    victim.write_bytes(data[:-512])
    with pytest.raises(UserError, match=rf"own-0001.tar should have {len(data)} bytes, it has {len(data) - 512}"):
        load_manifest(str(shards))
    victim.unlink()
    with pytest.raises(UserError, match="it is missing"):
        load_manifest(str(shards))
    assert check(shards) == 1
    assert "own-0001.tar: is missing" in capsys.readouterr().out


def test_an_index_of_another_tar_is_refused(shards: Path, capsys):
    (shards / "own-0001.index.arrow").write_bytes((shards / "own-0000.index.arrow").read_bytes())
    with pytest.raises(UserError, match="made of another tar"):
        load_index(load_manifest(str(shards)), 1)
    (shards / "own-0002.index.arrow").write_bytes(b"junk")
    with pytest.raises(UserError, match="no index of a shard"):
        load_index(load_manifest(str(shards)), 2)
    capsys.readouterr()
    assert check(shards) == 1
    assert "2 problems" in capsys.readouterr().out
    assert check(shards, "--write") == 0
    assert check(shards) == 0
    assert load_manifest(str(shards)).split == "own"


def test_broken_images_are_listed_when_decoded(ray_local, tmp_path, capsys):
    tmp_path.joinpath("shards").mkdir()
    with ShardWriter(str(tmp_path / "shards" / "s-%d.tar"), verbose=0) as writer:
        for n in range(4):
            writer.write({"__key__": f"k{n}", "jpg": picture(n)[: 100 if n == 2 else None]})
    assert check(tmp_path / "shards", "--write") == 0
    assert check(tmp_path / "shards") == 0
    capsys.readouterr()
    assert check(tmp_path / "shards", "--decode") == 1
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("s-0.tar: k2: ")]


def test_timms_own_info_and_broken_ones_are_told(shards: Path):
    path = shards / "_info.json"
    info = json.loads(path.read_text())
    for key in ("shard_bytes", "shard_sha256", "classes"):
        del info["splits"]["own"][key]
    for content, told in (
        (json.dumps(info), "lacks"),
        (json.dumps({"splits": {"a": {}, "b": {}}}), "one directory holds one split"),
        ("[]", "lacks"),
        ("{", "no JSON"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=told):
            load_manifest(str(shards))


def test_nothing_to_check_ends_with_one_line(tmp_path, capsys):
    for flags in ((), ("--write",)):
        with pytest.raises(SystemExit) as stop:
            run_command(lambda flags=flags: check_shards.main([str(tmp_path), *flags]))
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
