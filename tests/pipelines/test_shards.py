"""Shards as they lie on disk: manifest, index, and those that others made."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import ShardWriter

from mae_core.images import decode
from pipelines import check_shards
from pipelines.config import Config, Data, Probe
from pipelines.data.index import KeyRule, TarContents, index_tar, read_tar
from pipelines.data.lookup import find_keys, key_of, read_samples
from pipelines.data.readers import View
from pipelines.data.shards import load_index, load_manifest, need_labels, need_same_classes
from pipelines.errors import UserError, run_command
from pipelines.pretrain import check as check_run
from tests.stores import range_server


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
def shards(tmp_path: Path) -> Path:
    write_foreign(tmp_path / "shards")
    assert check(tmp_path / "shards", "--write", "--split", "own") == 0
    return tmp_path / "shards"


def test_shards_that_others_made_are_indexed_to_the_byte(tmp_path):
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


def test_shards_without_labels(tmp_path):
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


def tar_of(members: Sequence[str | tuple[str, bytes]]) -> io.BytesIO:
    """A tar with these members, in this order, also of one name twice."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for each in members:
            name, content = each if isinstance(each, tuple) else (each, b"x")
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    data.seek(0)
    return data


def found_in(members: Sequence[str | tuple[str, bytes]], keys: KeyRule = "longest") -> tuple[TarContents, list[tuple]]:
    contents = read_tar(tar_of(members), keys)
    columns = (contents.index.keys, contents.index.extensions, contents.index.label_S.tolist())
    return contents, list(zip(*columns, strict=True))


@pytest.mark.parametrize(
    ("members", "samples", "left_out"),
    [
        (["0000.jpg", "22.05.jpg", "k.1.jpg"], [("0000", "jpg", -1), ("22.05", "jpg", -1), ("k.1", "jpg", -1)], {}),
        (["1.jpg", "1.5.jpg"], [("1", "jpg", -1), ("1.5", "jpg", -1)], {}),
        # Labels before their image, far from it, in upper case, and under webdataset's key for it.
        (
            [("b.cls", b"1"), "a.JPG", "b.jpg", ("a.CLS", b" 2\n"), "c.input.jpg", ("c.cls", b"3")],
            [("a", "jpg", 2), ("b", "jpg", 1), ("c.input", "jpg", 3)],
            {},
        ),
        (["a.jpg", "a.seg.png", "a.png"], [("a", "jpg", -1)], {"(.seg.png)": ["a.seg.png"], "(.png)": ["a.png"]}),
        (
            ["d/a.jpg", ("e/a.cls", b"1")],
            [("d/a", "jpg", -1)],
            {"labels without": ["e/a.cls"], "images without": ["d/a.jpg"]},
        ),
        (["a.jpg", ("a.cls", b"1"), "b.jpg"], [("a", "jpg", 1), ("b", "jpg", -1)], {"without a label": ["b.jpg"]}),
        (
            ["a.jpg", "._a.jpg", "__MACOSX/a.jpg", "a.txt", "b.json", "LICENSE"],
            [("a", "jpg", -1)],
            {
                "hidden": ["._a.jpg", "__MACOSX/a.jpg"],
                ".txt": ["a.txt"],
                ".json": ["b.json"],
                "without ext": ["LICENSE"],
            },
        ),
        (["./a.jpg"], [("./a", "jpg", -1)], {}),
        (["a.jpg", "a.jpg"], [("a", "jpg", -1)] * 2, {"a key that has come before": ["a.jpg"]}),
        (
            ["k.one.jpg", "k.two.jpg"],
            [("k.one", "jpg", -1), ("k.two", "jpg", -1)],
            {"alike": ["k.one.jpg", "k.two.jpg"]},
        ),
        (["a.txt"], [], {".txt": ["a.txt"]}),
    ],
)
def test_every_member_of_a_tar_is_a_sample_or_left_out_by_reason(members, samples, left_out):
    contents, found = found_in(members)
    assert found == samples
    assert contents.problems == ()
    assert len(contents.left_out) == len(left_out), contents.left_out
    for reason, names in left_out.items():
        ((count, first),) = (value for key, value in contents.left_out.items() if reason in key)
        assert (count, list(first)) == (len(names), names)


@pytest.mark.parametrize(
    ("members", "keys", "told"),
    [
        (["9.jpg", ("9.cls", b"0"), "9.jpg", ("9.cls", b"1")], "longest", "the key '9' has 2 images, 2 labels (0, 1)"),
        (["a.jpg", ("a.cls", b"0"), "b.jpg", ("a.cls", b"1")], "longest", "the key 'a' has 1 image, 2 labels (0, 1)"),
        (["a.jpg", "a.mask.png", "a.mask.png"], "longest", "the key 'a' has 1 image, 2 masks"),
        (
            ["k.input.jpg", "k.target.jpg", ("k.cls", b"1")],
            "longest",
            "'k.cls' may be of 'k.input.jpg' and 'k.target.jpg'",
        ),
        (["22.05.jpg", "22.06.jpg"], "first-dot", "the key '22' has 2 images ('22.05.jpg', '22.06.jpg')"),
    ],
)
def test_what_makes_a_wrong_label_possible_is_a_problem(members, keys, told):
    contents, _ = found_in(members, keys)
    (problem,) = contents.problems
    assert told in problem
    with pytest.raises(ValueError, match=r"key|label"):
        index_tar(tar_of(members), keys)


def test_webdatasets_own_keys_are_an_option():
    members = ["a.input.jpg", ("a.cls", b"4"), "b.jpg", "b.depth.png"]
    contents, found = found_in(members, "first-dot")
    assert found == [("a", "jpg", 4), ("b", "jpg", -1)]
    assert sorted(contents.left_out) == ["beside their image (.depth.png)", "images without a label"]


def test_links_and_sparse_members_are_counted():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind in (("a.jpg", tarfile.REGTYPE), ("b.jpg", tarfile.SYMTYPE), ("c.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.jpg" if kind != tarfile.REGTYPE else ""
            archive.addfile(member)
        for name, kind in (("d.jpg", tarfile.GNUTYPE_SPARSE), ("e.jpg", tarfile.FIFOTYPE), ("f", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            archive.addfile(member)
    data.seek(0)
    contents = read_tar(data)
    assert list(contents.index.keys) == ["a"]
    assert contents.left_out == {
        "links": (2, ("b.jpg", "c.jpg")),
        "sparse": (1, ("d.jpg",)),
        "not a file": (1, ("e.jpg",)),
    }


def write_shards(folder: Path, **tars: Sequence[str | tuple[str, bytes]]) -> Path:
    """Tars named by the keywords, ``_`` standing for ``-``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in tars.items():
        (folder / f"{name.replace('_', '-')}.tar").write_bytes(tar_of(members).getvalue())
    return folder


def test_a_mixed_up_shard_is_named_and_nothing_is_written(tmp_path, capsys):
    folder = write_shards(tmp_path, a_0=["9.jpg", ("9.cls", b"0"), "9.jpg", ("9.cls", b"1")], a_1=["8.jpg", "8.txt"])
    assert check(folder, "--write") == 1
    told = capsys.readouterr().out
    assert "a-0.tar: the key '9' has 2 images, 2 labels (0, 1)" in told
    assert "no _info.json is written" in told
    assert not (folder / "_info.json").exists()
    (folder / "a-0.tar").unlink()
    assert check(folder, "--write") == 0
    assert "1 .txt (a-1.tar: 8.txt)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (("trainset0", "testset0"), "train"),
        (("traindata_0", "eval_0"), "eval"),
        (("TRAIN0", "HOLDOUT0"), "holdout"),
        (("train_0", "unlabelled_0"), "train"),
        (("train_0", "extra_0"), "extra"),
    ],
)
def test_splits_are_known_by_the_usual_names(tmp_path, names, asked):
    folder = write_shards(tmp_path, **{name: [f"{n}.jpg"] for n, name in enumerate(names)})
    with pytest.raises(UserError, match="holds shards of several splits"):
        check(folder, "--write")
    assert check(folder, "--write", "--split", asked) == 0
    assert load_manifest(str(folder)).num_samples == 1


def test_shards_that_the_info_does_not_list_are_named(tmp_path, capsys):
    folder = write_shards(tmp_path, a_0=["a.jpg"], b_0=["b.jpg"])
    info = folder / "_info.json"
    info.write_text(json.dumps({"splits": {"own": {"filenames": ["a-0.tar"]}}}))
    assert check(folder, "--write", "--split", "own") == 0
    assert "left out: 1 tars that _info.json did not list (b-0.tar)" in capsys.readouterr().out
    assert load_manifest(str(folder)).shard_names == ("a-0.tar",)
    assert check(folder, "--write") == 0
    assert "indexed too: 1 tars that _info.json did not list (b-0.tar)" in capsys.readouterr().out
    assert load_manifest(str(folder)).num_samples == 2


@pytest.mark.parametrize("text", ["{broken", '{"name": "train"}', "[1]"])
def test_an_info_that_says_nothing_is_to_be_deleted(tmp_path, text):
    folder = write_shards(tmp_path, a_0=["a.jpg"])
    (folder / "_info.json").write_text(text)
    with pytest.raises(UserError, match="delete it, then run --write again"):
        check(folder, "--write", "--split", "train")


@pytest.mark.parametrize("label", [b"1_0", b"5" + b" " * 80 + b"7", b"+3", b"", b"2000000"])
def test_what_is_no_label_stops_labelled_use_alone(tmp_path, label):
    folder = write_shards(tmp_path, a_0=["9.jpg", ("9.cls", label)])
    assert check(folder, "--write") == 0
    manifest = load_manifest(str(folder))
    assert manifest.num_samples == 1
    assert not manifest.labelled
    with pytest.raises(UserError, match=r"have no labels .*label"):
        need_labels("probe.train", manifest, "a probe")


def test_an_empty_mask_is_no_image(tmp_path, capsys):
    folder = write_shards(tmp_path, a_0=["a.jpg", ("a.cls", b"1"), ("a.mask.png", b""), "b.jpg", ("b.cls", b"0")])
    assert check(folder, "--write") == 0
    assert "1 empty masks (a-0.tar: a.mask.png)" in capsys.readouterr().out
    assert load_manifest(str(folder)).num_samples == 2


def test_labels_that_are_no_numbers_stop_labelled_use_and_not_pretraining(tmp_path, capsys):
    folder = write_shards(tmp_path, a_0=["9.jpg", ("9.cls", b"3")], a_1=["8.jpg", ("8.cls", b"cat")])
    assert check(folder, "--write") == 0
    assert "labels are not used" in capsys.readouterr().out
    manifest = load_manifest(str(folder))
    assert (manifest.num_samples, manifest.labelled) == (2, False)
    with pytest.raises(UserError, match=r"probe\.train: .* have no labels \(a-1\.tar: '8\.cls' holds b'cat'"):
        need_labels("probe.train", manifest, "a probe")
    assert check(folder) == 0


def test_an_empty_shard_is_named_and_does_not_block_the_others(tmp_path, capsys):
    folder = write_shards(tmp_path, a_0=[("7.jpg", picture(7))], a_1=["notes.txt"], a_2=[("8.jpg", picture(8))])
    assert check(folder, "--write") == 0
    assert "1 shards hold no image: a-1.tar" in capsys.readouterr().out
    manifest = load_manifest(str(folder))
    assert manifest.shard_lengths == (1, 0, 1)
    assert find_keys(manifest, ["8"]) == [1]
    (read,) = read_samples(manifest, [1, 0], View((16, 16), 3))
    assert read.sample_B.tolist() == [1, 0]
    assert check(folder) == 0
    write_shards(tmp_path / "none", a_0=["notes.txt"])
    assert check(tmp_path / "none", "--write") == 1


def test_shards_of_several_splits_are_never_mixed(tmp_path, capsys):
    folder = write_shards(
        tmp_path,
        train_0=["a.jpg", ("a.cls", b"0")],
        train_1=["b.jpg", ("b.cls", b"1")],
        validation_0=["c.jpg", ("c.cls", b"1")],
    )
    with pytest.raises(UserError, match=r"several splits, train \(2 tars\), val \(1 tars\): name one by --split"):
        check(folder, "--write")
    assert check(folder, "--write", "--split", "val") == 0
    assert load_manifest(str(folder)).shard_names == ("validation-0.tar",)
    assert check(folder, "--write", "--split", "train") == 0
    with pytest.raises(UserError, match=r"describes the splits val, train: say which by .*validation-\*\.tar"):
        load_manifest(str(folder))
    assert load_manifest(f"{folder}/train-*.tar").shard_names == ("train-0.tar", "train-1.tar")
    assert load_manifest(f"{folder}/validation-0.tar").split == "val"
    with pytest.raises(UserError, match="of the splits train, val: one at a time"):
        load_manifest(f"{folder}/*.tar")
    capsys.readouterr()
    assert check(folder) == 0
    assert check(folder, "--split", "val") == 0
    assert capsys.readouterr().out.count("no problem found") == 3

    # As an index from before this was noticed has them.
    info = json.loads((folder / "_info.json").read_text())["splits"]
    mixed = {
        key: info["train"][key] + info["val"][key] for key in info["train"] if isinstance(info["train"][key], list)
    }
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": info["train"] | mixed}}))
    with pytest.raises(UserError, match="would mix the splits train and val"):
        load_manifest(str(folder))
    assert check(folder, "--write") == 0
    assert load_manifest(str(folder)).num_samples == 2


def test_timms_info_says_which_shards_are_a_split(tmp_path):
    folder = write_shards(tmp_path, x0=["a.jpg"], x1=["b.jpg"], x2=["c.jpg"])
    splits = {"train": {"filenames": ["x0.tar", "x2.tar"]}, "validation": {"filenames": ["x1.tar"]}}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(UserError, match="describes the splits train, validation: name one by --split"):
        check(folder, "--write")
    assert check(folder, "--write", "--split", "train") == 0
    info = json.loads((folder / "_info.json").read_text())["splits"]
    assert info["validation"] == splits["validation"]
    assert load_manifest(f"{folder}/x[02].tar").shard_names == ("x0.tar", "x2.tar")
    with pytest.raises(UserError, match="check_shards DIR --write"):
        load_manifest(f"{folder}/x1.tar")


def test_the_index_of_a_store_that_is_only_read_lies_elsewhere(tmp_path):
    folder = tmp_path / "tars"
    images = write_foreign(folder)
    before = sorted(path.name for path in folder.iterdir())
    assert check(folder, "--write", "--index-to", str(tmp_path / "index")) == 0
    assert sorted(path.name for path in folder.iterdir()) == before
    manifest = load_manifest(str(tmp_path / "index"))
    ids = find_keys(manifest, ["set/007", "set/002"])
    (read,) = read_samples(manifest, ids, View((16, 16), 3, crop_share=1.0))
    for name, pixels_HWC in zip(("set/007", "set/002"), read.images_BHWC, strict=True):
        np.testing.assert_array_equal(pixels_HWC, decode(images[name]))
    assert load_manifest(f"{tmp_path}/index/own-0001.tar").num_samples == 4
    assert check(tmp_path / "index") == 0
    assert check(folder, "--write") == 0
    assert load_manifest(str(folder)).digest == manifest.digest
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"own-0000\.tar should have"):
        load_manifest(str(tmp_path / "index"))


def test_a_web_servers_splits_are_indexed_elsewhere(tmp_path):
    folder = write_shards(tmp_path / "tars", x0=["a.jpg"], x1=[("b.png", picture(1))], x2=[("c.jpg", picture(2))])
    splits = {"train": {"filenames": ["x0.tar"]}, "validation": {"filenames": ["x1.tar", "x2.tar"]}}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    index = tmp_path / "index"
    with range_server(folder) as address:
        with pytest.raises(UserError, match="keep the index elsewhere, by --index-to DIR"):
            check_shards.main([address, "--write", "--split", "validation"])
        signed = f"{address}?signature=secret"
        with pytest.raises(UserError, match="password or signature"):
            check_shards.main([signed, "--write", "--split", "validation", "--index-to", str(index)])
        assert check_shards.main([address, "--write", "--split", "validation", "--index-to", str(index)]) == 0
        manifest = load_manifest(str(index))
        assert (manifest.location, manifest.shard_names) == (address, ("x1.tar", "x2.tar"))
        (read,) = read_samples(manifest, find_keys(manifest, ["c", "b"]), View((16, 16), 3, crop_share=1.0))
        np.testing.assert_array_equal(read.images_BHWC[0], decode(picture(2)))
        assert check_shards.main([str(index), "--decode"]) == 0
        assert check_shards.main([address, "--write", "--split", "train", "--index-to", str(index)]) == 0
        assert load_manifest(f"{index}/x0.tar").split == "train"
        assert load_manifest(f"{index}/x1.tar").split == "validation"


def test_class_names_come_from_a_file_or_from_other_shards(tmp_path):
    folder = write_shards(tmp_path / "train", a_0=["a.jpg", ("a.cls", b"0"), "b.jpg", ("b.cls", b"2")])
    names = tmp_path / "names.txt"
    names.write_bytes("cat\n犬\n".encode() + b"caf\xe9\n")
    assert check(folder, "--write", "--classes", str(names)) == 0
    manifest = load_manifest(str(folder))
    assert manifest.classes == ("cat", "犬", "caf\\xe9")
    test = write_shards(tmp_path / "test", a_0=["a.jpg", ("a.cls", b"1")])
    assert check(test, "--write", "--classes", str(folder)) == 0
    need_same_classes("data.train", manifest, "data.test", load_manifest(str(test)))
    names.write_text("cat\ndog\n")
    with pytest.raises(UserError, match="the highest label is 2, and --classes names 2 classes"):
        check(folder, "--write", "--classes", str(names))
    # A split that was packed by itself lacks a class.
    with pytest.raises(
        UserError, match=r"label 0 is 'cat' in the one and '犬' in the other; pack data\.test with --classes"
    ):
        need_same_classes("data.train", manifest, "data.test", replace(manifest, classes=manifest.classes[1:]))


def test_a_run_refuses_splits_that_are_mixed_or_numbered_otherwise(tmp_path):
    members = [(f"{n}.jpg", picture(n)) for n in range(4)] + [(f"{n}.cls", str(n % 2).encode()) for n in range(4)]
    both = write_shards(tmp_path / "both", train_0=members, test_0=members)
    names = {"known": "cat\ndog\n", "other": "dog\ncat\n"}
    for name, text in names.items():
        (tmp_path / f"{name}.txt").write_text(text)
    for split, name in (("train", "known"), ("test", "other")):
        assert check(both, "--write", "--split", split, "--classes", str(tmp_path / f"{name}.txt")) == 0
    words = write_shards(tmp_path / "words", a_0=[*members[:4], ("0.cls", b"cat")])
    assert check(words, "--write") == 0

    def refusal(train: Path | str, *probe: Path | str) -> str:
        probes = dict(zip(("train", "test"), map(str, probe), strict=False))
        with pytest.raises(UserError) as caught:
            check_run(Config(data=Data(train=str(train)), probe=Probe(**probes)))
        return str(caught.value)

    assert "describes the splits train, test" in refusal(both)
    assert "label 0 is 'cat' in the one and 'dog'" in refusal(
        both / "train-0.tar", both / "train-0.tar", both / "test-*.tar"
    )
    assert "probe.train: the shards in" in (line := refusal(words, words))
    assert "'0.cls' holds b'cat'" in line


def test_names_of_any_bytes_survive_to_the_end(tmp_path):
    odd = ["caf\udce9", "line\nbreak", "100%", "🐱 猫", "a.b.c"]
    folder = tmp_path / "100% 🐱"
    folder.mkdir()
    shard = "od\udcff\n%d.tar"
    (folder / shard).write_bytes(
        tar_of([(f"{name}.jpg", picture(n)) for n, name in enumerate(odd)] + ["x\n\udcff.txt"]).getvalue()
    )
    # On a terminal that knows nothing but ASCII.
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for flags, told in ((("--write",), "indexed 1 shards"), (("--decode",), "no problem found")):
        command = [sys.executable, "-m", "pipelines.check_shards", str(folder), *flags]
        done = subprocess.run(command, capture_output=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert told in done.stdout.decode("ascii")
    manifest = load_manifest(str(folder))
    assert manifest.shard_names == (shard,)
    ids = find_keys(manifest, odd)
    assert ids == [0, 1, 2, 3, 4]
    assert find_keys(manifest, [key_of(manifest, id_) for id_ in ids]) == ids
    (read,) = read_samples(manifest, ids, View((16, 16), 3, crop_share=1.0))
    assert read.sample_B.tolist() == ids


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


def test_broken_images_are_listed_when_decoded(tmp_path, capsys):
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
        (json.dumps({"splits": {"a": {}, "b": {}}}), "describes the splits a, b: say which"),
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
