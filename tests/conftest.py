"""What all tests share: one local Ray in a temporary directory of its own."""

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.records import Server

# Set before anything imports Ray: no token file, no telemetry, nothing joined by accident.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# How often Ray Train looks whether workers have ended; by default every 2 s, for which each run would wait.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
# Ray's workers compete on equal terms with what else this machine does; at Ray's niceness of 15 they starve beside it.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray spells it so)
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)


# What takes longest begins first, so that two processes end at about the same time (`make test` deals files to them).
_LONGEST = ("pretrain", "transfer", "tracking", "record_faults", "feed", "writer", "browser", "search", "unreadable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the files of the longest tests to the front."""
    place = {f"test_{name}": number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray with 2 CPUs for the whole test session."""
    import ray

    # Socket paths have a length limit: a short directory of our own, not pytest's.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            _temp_dir=folder,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
        yield
        ray.shutdown()


def write_images(folder: Path, num: int, *, classes: int = 3, size: int = 24, seed: int = 0) -> None:
    """Class folders of small JPEGs whose classes can be told apart: bright, dark, and striped noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    for i in range(num):
        label = i % classes
        pixels = rng.integers(0, 80, (size, size, 3)) + 85 * label
        if label == classes - 1:
            pixels[::4] = 255 - pixels[::4]
        path = folder / f"class{label}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


@pytest.fixture(scope="session")
def shards(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Packed shards: 300 training images, one of which is broken, and 60 test images."""
    from pipelines.make_shards import main

    root = tmp_path_factory.mktemp("shards")
    for split, num, seed in (("train", 300, 0), ("test", 60, 1)):
        write_images(root / f"{split}-images", num, seed=seed)
        if split == "train":
            path = root / "train-images" / "class1" / "0001.jpg"
            path.write_bytes(path.read_bytes()[:200])
        assert main(["--source", str(root / f"{split}-images"), "--out", str(root / split), "--split", split]) == 0
    return {split: str(root / split) for split in ("train", "test")}


@pytest.fixture
def cluster(ray_local: None) -> Iterator[dict[str, str]]:
    """A Ray head with dashboard; the environment that reaches it."""
    from tests.jobs import head

    with head() as environment:
        yield environment


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Server]":
    """An MLflow server for the whole test session."""
    from tests.records import Server

    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A folder for Ray: socket paths have a length limit."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield folder
