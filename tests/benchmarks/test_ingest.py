"""The ingest benchmark as a person calls it: a tiny run, and what it says to wrong input."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.meter import slope

ROOT = Path(__file__).parents[2]


def ingest(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.ingest", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280
    )


def write_tar(path: Path, num: int) -> None:
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(num):
            data = io.BytesIO()
            size = (40 + number % 7, 30 + number % 5, 3)
            Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(data, "JPEG")
            info = tarfile.TarInfo(f"{number:03d}.jpg")
            info.size = len(data.getvalue())
            tar.addfile(info, io.BytesIO(data.getvalue()))


@pytest.mark.chaos  # three loaders, one after the other; their parts have fast tests in test_ingest_arms.py
def test_a_tiny_run_gives_ratios_of_equal_pixels(tmp_path):
    write_tar(tmp_path / "photos.tar", 20)
    done = ingest(
        *("--source", str(tmp_path / "photos.tar"), "--copies", "8", "--batch", "16", "--image-size", "16"),
        *("--rounds", "1", "--repeats", "0", "--seconds", "0.5", "--only", "raw", "ours"),
        *("--json", str(tmp_path / "out.json")),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    details = result["details"]
    assert details["pixels"]["photos"] == {"raw": 0.0, "ours": 0.0}
    arms = details["photos"]["arms"]
    assert arms["raw"]["cpu_s_per_1000"]["median"] > 0
    assert result["over_raw"] == pytest.approx(
        arms["ours"]["images_per_s"]["median"] / arms["raw"]["images_per_s"]["median"], rel=0.5
    )
    assert "over_webloader" not in result
    assert "tiny_over_raw" not in result
    assert "tiny images were left out" in done.stdout


def test_the_rate_does_not_hang_on_where_bursts_fall():
    # Two tasks that make 100 images/s each; the second one's arrive at once, when the first one's have been taken.
    times, counts = [], []
    for pair in range(6):
        for batch in range(10):
            times.append(2.0 * pair + 0.2 * batch)
            counts.append(20)
        times += [2.0 * pair + 1.81] * 10
        counts += [20] * 10
    rates = [slope(np.array(times[:stop]), np.array(counts[:stop])) for stop in range(80, 120)]
    quotients = [sum(counts[1:stop]) / times[stop - 1] for stop in range(80, 120)]
    assert max(abs(rate - 200) for rate in rates) < 15
    assert max(abs(quotient - 200) for quotient in quotients) > 15, "else the slope is not needed"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda _: None, "no source"),
        (lambda path: path.write_bytes(b"not a tar" * 100), "no folder and no whole tar"),
        (lambda path: path.mkdir(), "is a folder: name an uncompressed .tar"),
        (lambda path: write_tar(path, 3), "holds 96 images: with batches of 64, give more --copies"),
    ],
    ids=["missing", "no tar", "folder", "few"],
)
def test_wrong_input_is_one_line(tmp_path, make, told):
    make(tmp_path / "photos.tar")
    done = ingest("--source", str(tmp_path / "photos.tar"))
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_names_every_arm():
    done = ingest("--help")
    assert done.returncode == 0
    for name in ("raw", "read_webdataset_default", "webloader", "memory"):
        assert name in done.stdout
