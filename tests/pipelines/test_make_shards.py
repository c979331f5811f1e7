"""Packing real folders and archives: the same bytes, nothing lost, nothing half-written taken for whole."""

import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from webdataset.compat import WebDataset

from pipelines import make_shards
from pipelines.data.packing import group_shards, make_keys, plan_packing
from pipelines.data.shards import Manifest, load_index, load_manifest
from pipelines.data.sources import find_source, list_images
from pipelines.errors import UserError, run_command

CLASSES = ("apple", "berry", "cherry")


def picture(seed: int, size: tuple[int, int] = (32, 24), kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    """Enough for several shards of 1 MiB: 300 noisy pictures in class folders, sorted by class."""
    pictures = {f"{CLASSES[n // 100]}/{n:04d}.jpg": picture(n, (160, 128)) for n in range(300)}
    pictures["apple/odd name.v1.PNG"] = picture(1000, kind="PNG")
    pictures["berry/x.jpeg"] = picture(1001)
    return pictures


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_tar(path: Path, files: dict[str, bytes], mode: Literal["w", "w:gz"] = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("train/apple/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "../../../etc/passwd"
        archive.addfile(link)
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("__MACOSX/train/apple/._0000.jpg", b"junk")
    return path


def pack(source: Path | str, out: Path, *flags: str) -> Manifest:
    assert make_shards.main(["--source", str(source), "--out", str(out), *flags]) == 0
    return load_manifest(str(out))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs the command as a user does; it must end with code 2 and one line."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: make_shards.main(list(argv)))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read_samples(manifest: Manifest) -> dict[str, tuple[bytes, int, str]]:
    """Key -> image bytes, label and extension, by the index alone."""
    samples = {}
    for shard, name in enumerate(manifest.shard_names):
        index, tar = load_index(manifest, shard), Path(manifest.location, name).read_bytes()
        for n, key in enumerate(index.keys):
            data = tar[index.offset_S[n] : index.offset_S[n] + index.size_S[n]]
            samples[key] = (data, int(index.label_S[n]), index.extensions[n])
    return samples


def test_every_source_gives_the_same_shards_and_every_image_unchanged(ray_local, tmp_path, images):
    inside = {f"train/{name}": data for name, data in images.items()} | {"train/notes.txt": b"no image"}
    folder = write_folder(tmp_path / "photos", inside | {".hidden/a.jpg": b"junk"})
    manifest = pack(folder, tmp_path / "out", "--shard-mib", "1")
    wanted = contents(tmp_path / "out")
    assert len(manifest.shard_names) > 2
    for source, flags in (
        (write_tar(tmp_path / "a.tar", inside), ()),
        (write_tar(tmp_path / "a.tar.gz", inside, "w:gz"), ("--workers", "1")),
        (write_tar(tmp_path / "b.tgz", inside, "w:gz"), ("--workers", "2")),
        (write_zip(tmp_path / "a.zip", inside), ("--workers", "2")),
    ):
        out = tmp_path / f"out-{source.name}"
        pack(source, out, "--shard-mib", "1", *flags)
        assert contents(out) == wanted, source.name

    assert manifest.classes == CLASSES
    assert manifest.num_samples == len(images)
    samples = read_samples(manifest)
    for name, data in images.items():
        key = make_keys([name])[0]
        label = CLASSES.index(name.split("/")[0])
        extension = {"PNG": "png", "jpeg": "jpg", "jpg": "jpg"}[name.rsplit(".")[-1]]
        assert samples[key] == (data, label, extension)


def test_class_sorted_input_is_scattered(tmp_path, images):
    manifest = pack(write_folder(tmp_path / "in", images), tmp_path / "out", "--shard-mib", "1")
    other = pack(tmp_path / "in", tmp_path / "other", "--shard-mib", "1", "--seed", "1")
    for shard, length in enumerate(manifest.shard_lengths):
        label_S = load_index(manifest, shard).label_S
        counts = np.bincount(label_S, minlength=3)
        assert counts.min() > length / 6, f"shard {shard} holds {counts} of the classes"
        assert np.count_nonzero(np.diff(label_S)) > length / 3, "sorted by class inside a shard"
    assert max(manifest.shard_bytes) < 1.5 * (1 << 20)
    assert list(load_index(manifest, 0).keys) != list(load_index(other, 0).keys)
    assert read_samples(manifest) == read_samples(other)


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_timm_and_webdataset_read_the_shards(tmp_path, images):
    from timm.data.dataset_factory import create_dataset

    manifest = pack(write_folder(tmp_path / "in", images), tmp_path / "out", "--shard-mib", "1")
    labels = sorted(label for _, label, _ in read_samples(manifest).values())

    dataset = create_dataset("wds/", root=str(tmp_path / "out"), split="train", is_training=False)
    assert len(dataset) == len(images)
    assert sorted(int(target) for _, target in dataset) == labels  # type: ignore[arg-type]

    urls = [str(tmp_path / "out" / name) for name in manifest.shard_names]
    raw = {sample["__key__"]: sample for sample in WebDataset(urls, shardshuffle=False)}
    assert {key: (sample.get("jpg", sample.get("png")), int(sample["cls"])) for key, sample in raw.items()} == {
        key: (data, label) for key, (data, label, _) in read_samples(manifest).items()
    }
    gc.collect()


def test_digits_are_divided_once_and_for_all(tmp_path):
    train = pack("digits", tmp_path / "train", "--seed", "3")
    test = pack("digits", tmp_path / "test", "--split", "test")
    assert (train.num_samples, test.num_samples) == (1500, 297)
    assert train.classes == tuple("0123456789")
    keys = read_samples(train).keys() | read_samples(test).keys()
    assert keys == {f"digit_{n:04d}" for n in range(1797)}
    pixels_SP, labels_S = load_digits(return_X_y=True)
    for key, (data, label, extension) in read_samples(test).items():
        image = Image.open(io.BytesIO(data))
        assert (image.size, image.mode, image.format, extension) == ((32, 32), "RGB", "JPEG", "jpg")
        number = int(key.removeprefix("digit_"))
        assert label == labels_S[number]
        small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), float)
        assert np.corrcoef(small.ravel(), pixels_SP[number])[0, 1] > 0.95


def test_flat_folder_has_no_labels_and_a_mixed_one_is_refused(tmp_path, capsys):
    flat = write_folder(tmp_path / "flat", {f"{n}.jpg": picture(n) for n in range(5)})
    manifest = pack(flat, tmp_path / "out")
    assert not manifest.labelled
    assert {label for _, label, _ in read_samples(manifest).values()} == {-1}

    write_folder(flat, {"cats/x.jpg": picture(9)})
    line = refused(capsys, "--source", str(flat), "--out", str(tmp_path / "mixed"))
    assert "cats/x.jpg" in line
    assert "--labels none" in line
    assert pack(flat, tmp_path / "mixed", "--labels", "none").num_samples == 6


def test_keys_are_safe_and_unique():
    names = [
        "a/b_c.jpg",
        "a_b/c.jpg",
        "a/b.c.jpg",
        "a.jpg",
        "a.png",
        "猫.jpg",
        "犬.jpg",
        "y" * 200 + ".jpg",
        "ok-1.jpg",
    ]
    keys = make_keys(names)
    assert len(set(keys)) == len(names)
    assert all(key.isascii() and "." not in key and "/" not in key and len(key) <= 80 for key in keys)
    assert keys[-1] == "ok-1"
    assert make_keys(names[::-1]) == keys[::-1]


def test_what_is_left_out_is_named_and_what_the_decoder_reads_is_packed(tmp_path, capsys):
    files = {
        "a/anim.gif": picture(0, kind="GIF"),
        "a/wave.JP2": picture(1, kind="JPEG2000"),
        "a/scan": picture(2),
        "b/photo.dat": picture(3, kind="WEBP"),
        "b/grey.pgm": picture(4, kind="PPM"),
        "b/x.jfif": picture(5),
        "b/notes.txt": b"no image",
        "b/more.txt": b"BM",
        "b/raw.heic": b"\0\0\0\x18ftypheic" + bytes(80),
        "b/README": b"P5 is no picture here",
        "b/none.png": b"",
        "b/.DS_Store": b"junk",
    }
    told = "2 .txt, 1 .heic, 1 without extension, 1 empty, 1 hidden"
    extensions = {"gif": 0, "jp2": 1, "jpg": 2, "webp": 3, "ppm": 4}
    wanted = None
    for source in (
        write_folder(tmp_path / "in", files),
        write_tar(tmp_path / "a.tar", files),
        write_tar(tmp_path / "a.tar.gz", files, "w:gz"),
        write_zip(tmp_path / "a.zip", files),
    ):
        capsys.readouterr()
        manifest = pack(source, tmp_path / f"out-{source.name}")
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out of ")]
        for part in told.split(", "):
            kind = part.partition(" ")[2]
            assert part in line or (kind == "hidden" and source.suffix == ".zip" and "2 hidden" in line), line
        samples = read_samples(manifest)
        assert len(samples) == 6
        for data, _, extension in samples.values():
            assert data in files.values()
            assert extension in extensions
        wanted = wanted or samples
        assert samples == wanted


def test_what_will_not_decode_is_said_before_packing(tmp_path, capsys):
    files = {f"{n:02d}.png": picture(n, kind="PNG")[: 90 if n % 2 else None] for n in range(40)}
    files |= {f"{n:02d}.jpg": picture(n) for n in range(40)} | {"x.webp": b"<html>404</html>"}
    for source in (write_folder(tmp_path / "in", files), write_tar(tmp_path / "a.tar.gz", files, "w:gz")):
        capsys.readouterr()
        assert pack(source, tmp_path / f"out-{source.name}").num_samples == 81, "what is broken is packed, and said"
        told = capsys.readouterr().out.splitlines()
        before = told[: next(n for n, line in enumerate(told) if line.startswith("packing "))]
        assert any(
            re.match(r"\d of 16 \.png images that were tried cannot be decoded: \d\d\.png: trunc", line)
            for line in before
        )
        assert any(
            "1 of 1 .webp images that were tried cannot be decoded: x.webp: not_an_image" in line for line in before
        )
        assert not any(".jpg" in line for line in before)


def test_one_source_becomes_train_and_test(tmp_path, capsys):
    files = {f"{CLASSES[n % 3]}/{n:03d}.jpg": picture(n, (8, 8)) for n in range(300)}
    files["durian/only.jpg"] = picture(300, (8, 8))
    source = write_folder(tmp_path / "in", files)
    assert make_shards.main(["--source", str(source), "--out", str(tmp_path / "out"), "--split", "0.9,0.1"]) == 0
    told = capsys.readouterr().out.strip().splitlines()[-1]
    train, test = (load_manifest(str(tmp_path / "out" / split)) for split in ("train", "test"))
    for manifest in (train, test):
        assert manifest.location in told, "the next step has the right paths"
        assert manifest.classes == (*CLASSES, "durian")
        for key, (data, label, _) in read_samples(manifest).items():
            assert data == files[key.replace("_", "/") + ".jpg"]
            assert manifest.classes[label] == key.split("_")[0]
    assert not read_samples(train).keys() & read_samples(test).keys()
    assert train.num_samples + test.num_samples == len(files)
    assert 15 <= test.num_samples <= 48

    # Another seed, fewer classes and an archive move no image to the other side.
    del files["durian/only.jpg"]
    archive = write_tar(tmp_path / "a.tar.gz", files, "w:gz")
    flags = ("--split", "0.9,.1", "--seed", "7", "--source", str(archive))
    assert make_shards.main(["--out", str(tmp_path / "other"), *flags]) == 0
    for manifest in (train, test):
        other = read_samples(load_manifest(str(tmp_path / "other" / manifest.split)))
        assert other.keys() == read_samples(manifest).keys() - {"durian_only"}
    assert make_shards.main(["--out", str(tmp_path / "other"), *flags]) == 0
    assert capsys.readouterr().out.count("nothing to do") == 2

    flags = ("--source", str(source), "--out", str(tmp_path / "three"))
    assert make_shards.main([*flags, "--split", "0.8,0.1,0.1"]) == 0
    parts = [load_manifest(str(tmp_path / "three" / split)) for split in ("train", "val", "test")]
    assert sum(part.num_samples for part in parts) == 301
    assert "add up to 1" in refused(capsys, *flags, "--split", "0.9,0.2")
    assert "none falls into 'test'" in refused(capsys, *flags, "--split", "0.9999999,0.0000001")


def test_splits_are_no_classes(tmp_path, capsys):
    files = {f"{split}/{n}.jpg": picture(n) for n, split in enumerate(("Train", "Train", "val", "test"))}
    source = write_folder(tmp_path / "in", files)
    line = refused(capsys, "--source", str(source), "--out", str(tmp_path / "out"))
    assert "Train, test, val, are splits and no classes" in line
    assert f"--source {source}/Train --split Train" in line
    assert pack(source, tmp_path / "out", "--labels", "none").num_samples == 4
    write_folder(source, {"other/9.jpg": picture(9)})
    assert pack(source, tmp_path / "classes").classes == ("Train", "other", "test", "val")


def test_a_split_is_numbered_as_another(tmp_path, capsys):
    train = write_folder(tmp_path / "train", {f"{name}/{n}.jpg": picture(n) for n, name in enumerate("abc")})
    test = write_folder(tmp_path / "test", {f"{name}/{n}.jpg": picture(n) for n, name in enumerate("ac")})
    known = pack(train, tmp_path / "shards")
    alone = pack(test, tmp_path / "alone", "--split", "test")
    assert alone.classes == ("a", "c"), "this is why"
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    for n, classes in enumerate((tmp_path / "shards", tmp_path / "names.txt")):
        manifest = pack(test, tmp_path / f"test-{n}", "--split", "test", "--classes", str(classes))
        assert manifest.classes == known.classes
        assert {key: label for key, (_, label, _) in read_samples(manifest).items()} == {"a_0": 0, "c_1": 2}
    one = write_folder(tmp_path / "one", {"b/1.jpg": picture(1)})
    assert read_samples(pack(one, tmp_path / "out-one", "--classes", str(tmp_path / "shards")))["b_1"][1] == 1
    line = refused(capsys, "--source", str(train), "--out", str(tmp_path / "x"), "--classes", str(tmp_path / "alone"))
    assert "the folder 'b'" in line
    assert "none of the 2 of --classes" in line
    assert "no file of class names" in refused(
        capsys, "--source", str(train), "--out", str(tmp_path / "x"), "--classes", "nowhere.txt"
    )


def test_names_of_any_bytes_are_packed(tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    files = {f"{odd}/{n}.jpg": picture(n) for n in range(2)}
    files |= {
        "🐱/100%.jpg": picture(2),
        "line\nbreak/a\nb.jpg": picture(3),
        "🐱/broken.png": picture(4, kind="PNG")[:60],
    }
    source = write_folder(tmp_path / f"in {odd} \n%", files)
    out = tmp_path / f"out {odd} \n%d"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "pipelines.make_shards", "--source", str(source), "--out", str(out)]
    done = subprocess.run([*command, "--resize", "16"], capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "packed 4 images in 3 classes" in done.stdout.decode("ascii")
    manifest = load_manifest(str(out))
    assert manifest.classes == ("caf\\xe9", "line\nbreak", "🐱")
    assert json.loads(json.dumps(manifest.classes, ensure_ascii=False).encode()) == list(manifest.classes)
    assert sorted(label for _, label, _ in read_samples(manifest).values()) == [0, 0, 1, 2]
    (line,) = (out / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["source"] == "🐱/broken.png"
    assert done.stdout.decode("ascii").count("\n") == len(done.stdout.decode("ascii").splitlines())


def test_a_small_source_is_packed_without_ray(tmp_path):
    source = write_folder(tmp_path / "in", {f"{n}.jpg": picture(n) for n in range(20)})
    code = (
        "import sys; from pipelines import check_shards, make_shards; "
        f"make_shards.main(['--source', {str(source)!r}, '--out', {str(tmp_path / 'out')!r}]); "
        f"check_shards.main([{str(tmp_path / 'out')!r}]); sys.exit('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "packed 20 images" in done.stdout


def test_resize_shrinks_the_large_and_lists_the_broken(tmp_path):
    turned = Image.fromarray(np.zeros((60, 90, 3), np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to look at it
    data = io.BytesIO()
    turned.save(data, "JPEG", exif=exif)
    files = {
        "a/large.jpg": picture(0, (90, 60)),
        "a/small.png": picture(1, (20, 30), "PNG"),
        "b/broken.jpg": picture(2, (90, 60))[:200],
        "b/turned.jpg": data.getvalue(),
    }
    manifest = pack(write_folder(tmp_path / "in", files), tmp_path / "out", "--resize", "30")
    samples = read_samples(manifest)
    assert samples.keys() == {"a_large", "a_small", "b_turned"}
    assert Image.open(io.BytesIO(samples["a_large"][0])).size == (45, 30)
    assert Image.open(io.BytesIO(samples["b_turned"][0])).size == (30, 45)
    assert samples["a_small"][0] == files["a/small.png"]
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["source"] == "b/broken.jpg"


def test_streamed_archives_are_read_in_bounded_groups(tmp_path, images):
    listing = list_images(find_source(str(write_tar(tmp_path / "a.tar.gz", images, "w:gz"))), "train")
    options = make_shards.PackingOptions("train", 1 << 18, seed=0, resize=0, quality=90, labels=True)
    shards = plan_packing(listing, options).shards
    groups = group_shards(shards, listing.source, num_workers=1, budget_bytes=1 << 20)
    assert [shard for group in groups for shard in group] == shards
    assert len(groups) > 1
    assert max(sum(shard.sizes_S.sum() for shard in group) for group in groups) < 1.3 * (1 << 20)


def test_killed_packing_leaves_nothing_whole_and_continues_to_the_same_bytes(ray_local, tmp_path, capsys):
    source = write_folder(tmp_path / "in", {f"{n}.jpg": picture(n, (1200, 1000)) for n in range(32)})
    flags = ("--resize", "900", "--shard-mib", "4")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipelines.make_shards", "--source", str(source), "--out", str(out), *flags]
    process = subprocess.Popen([*command, "--workers", "1"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "train-000001.tar").exists():
        assert process.poll() is None, "packing ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (out / "train-000000.tar").stat().st_mtime_ns
    with pytest.raises(UserError, match="not finished"):
        load_manifest(str(out))

    time.sleep(3.0)  # the killed driver's workers notice it
    (out / ".train-000009.tar.1.tmp").write_bytes(b"half")
    resumed = pack(source, out, *flags, "--workers", "2")
    assert (out / "train-000000.tar").stat().st_mtime_ns == first, "a whole shard was packed again"
    assert resumed.digest == pack(source, tmp_path / "unkilled", *flags).digest
    assert contents(out) == contents(tmp_path / "unkilled")

    capsys.readouterr()
    pack(source, out, *flags)
    assert "nothing to do" in capsys.readouterr().out
    assert contents(out) == contents(tmp_path / "unkilled")


def test_a_folder_of_other_shards_is_not_overwritten_by_accident(tmp_path, capsys):
    source = write_folder(tmp_path / "in", {f"{n}.jpg": picture(n) for n in range(4)})
    out = tmp_path / "out"
    pack(source, out)
    before = contents(out)
    args = ("--source", str(source), "--out", str(out))
    assert "--overwrite" in refused(capsys, *args, "--seed", "1")
    assert "one split" in refused(capsys, *args, "--split", "test")
    assert contents(out) == before
    assert pack(source, out, "--seed", "1", "--overwrite").num_samples == 4
    assert contents(out) != before

    other = write_folder(tmp_path / "home", {"thesis.txt": b"years of work"})
    assert "thesis.txt" in refused(capsys, "--source", str(source), "--out", str(other), "--overwrite")
    assert contents(other) == {"thesis.txt": b"years of work"}


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda tmp, _: tmp / "nowhere", "nowhere"),
        (lambda tmp, _: write_folder(tmp / "empty", {"a/readme.txt": b"x"}), "no image"),
        (lambda tmp, _: write_folder(tmp, {"a.tar": b"no archive at all"}) / "a.tar", "beginning with b'no archi'"),
        (lambda tmp, files: cut(write_tar(tmp / "a.tar", files), 0.5), "truncated"),
        (lambda tmp, files: cut(write_tar(tmp / "a.tar.gz", files, "w:gz"), 0.5), "truncated"),
        (lambda tmp, files: cut(write_zip(tmp / "a.zip", files), 0.5), "truncated"),
    ],
    ids=["missing", "no-images", "no-archive", "tar", "tar.gz", "zip"],
)
def test_bad_sources_are_told_in_one_line(
    tmp_path: Path, capsys, images, make: Callable[[Path, dict[str, bytes]], Path], told: str
):
    assert told in refused(capsys, "--source", str(make(tmp_path, images)), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_errors_inside_tasks_reach_the_user_as_one_line(ray_local, tmp_path, capsys, images):
    archive = write_zip(tmp_path / "a.zip", images)
    data = bytearray(archive.read_bytes())
    data[2000:2010] = bytes(10)  # inside a member: its checksum tells when it is read
    archive.write_bytes(data)
    for workers in ("1", "2"):
        flags = ("--out", str(tmp_path / "out"), "--workers", workers)
        assert "damaged" in refused(capsys, "--source", str(archive), *flags)
    with pytest.raises(UserError, match="not finished"):
        load_manifest(str(tmp_path / "out"))
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp"]

    taken = tmp_path / "file"
    taken.write_bytes(b"")
    archive = write_zip(tmp_path / "b.zip", images)
    assert str(taken) in refused(capsys, "--source", str(archive), "--out", str(taken))


def test_the_command_itself_answers_bad_input_without_a_trace(tmp_path, capsys):
    command = [sys.executable, "-m", "pipelines.make_shards", "--source", "nowhere", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for flags, told in ((("--shard-mb", "1"), "--shard-mib"), (("--quality", "0"), "quality")):
        assert told in refused(capsys, *command[3:], *flags)
