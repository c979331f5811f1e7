"""The arms of the ingest benchmark: equal pixels, and as many images as were asked for."""

import tarfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from benchmarks.ingest_arms import PLAIN, check_pixels, read_ranges
from benchmarks.ingest_data import Images, make_photos
from benchmarks.ingest_host import PIXELS
from benchmarks.ingest_on_ray import ON_RAY, crew
from tests.conftest import write_images

BATCH = 8
# Pillow resamples in other steps; the same crop all the same.
MOST_LEVELS = {"read_webdataset_default": 2.0}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Images:
    """Some 100 images in 16 shards, each of which holds only a few."""
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "images", 25, size=40)
    with tarfile.open(folder / "photos.tar", "w") as tar:
        tar.add(folder / "images", ".")
    (folder / "packed").mkdir()
    return make_photos(str(folder / "photos.tar"), 4, folder / "packed", size=16, batch=BATCH)


@pytest.fixture(scope="module")
def apart():
    """A process that forks the arms' workers, as the benchmark has one: Ray's threads are not in it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def on_ray(ray_local):
    """The benchmark makes its crew once, for the only Ray that its process has."""
    yield ON_RAY
    crew.cache_clear()


def difference_and_number(name: str, images: Images) -> tuple[float, int]:
    """How far an arm's pixels are off, and how many images it delivers until they are more than two passes."""
    number = 0
    for _, sample_B in PLAIN[name](images, 0):
        number += len(sample_B)
        if number > 2 * images.manifest.num_samples:
            break
    return check_pixels(PIXELS[name], images), number


@pytest.mark.parametrize("name", PLAIN)
def test_arms_without_ray_deliver_the_same_pixels_for_ever(images, apart, name):
    difference, number = apart.submit(difference_and_number, name, images).result()
    assert difference == 0.0
    assert number > 2 * images.manifest.num_samples, "it ended with its data"


@pytest.mark.parametrize("name", ON_RAY)
def test_arms_on_ray_deliver_the_same_pixels_and_what_was_asked_for(images, on_ray, name):
    arm, num = on_ray[name], images.manifest.num_samples
    assert check_pixels(arm, images, 2 * BATCH) <= MOST_LEVELS.get(name, 0.0)
    seen: Counter[int] = Counter()
    for images_BHWC, sample_B in arm(images, 2 * num):
        assert len(images_BHWC) == len(sample_B)
        seen.update(sample_B.tolist())
    assert sorted(seen) == list(range(num))
    assert set(seen.values()) == {2}


def test_another_crop_is_seen(images):
    def mirrored(images, wanted):
        return ((np.ascontiguousarray(batch[:, :, ::-1]), sample_B) for batch, sample_B in read_ranges(images))

    assert check_pixels(mirrored, images) > 5
