"""The arms of ``benchmarks.ingest`` that run on Ray, and the Ray that they run on."""

import contextlib
import functools
import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from PIL import Image
from pydantic import BaseModel
from ray.data import DataContext

from benchmarks.ingest_arms import Arm, Batch, decode_crop
from benchmarks.ingest_data import Images, sample_ids
from pipelines.config import Data
from pipelines.data.feed import Crew, Feed, join_crew


@contextlib.contextmanager
def local_ray(cores: Sequence[int], object_store: int = 0) -> Iterator[Path]:
    """A Ray of our own for the length of a block, with workers that stay when they are idle.

    Args:
        cores: What it may use.
        object_store: Bytes of its object store; 0: Ray's choice.

    Yields:
        The folder in which it would spill.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.pop("RAY_ADDRESS", None)
    options: dict[str, Any] = {"object_store_memory": object_store} if object_store else {}
    # Sockets' paths have a limit of length: a short folder of our own.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=len(cores),
            include_dashboard=False,
            _temp_dir=folder,
            # Else a worker that has imported everything is gone by the next turn.
            _system_config={"idle_worker_killing_time_threshold_ms": 600_000},
            logging_level=logging.WARNING,
            log_to_driver=False,
            **options,
        )
        DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        try:
            yield Path(folder)
        finally:
            crew.cache_clear()  # its actor goes with this Ray
            ray.shutdown()


@functools.cache
def crew() -> Crew:
    """The only consumer, as a run has it: made once."""
    return join_crew(0, 1, num_cpus=_default(Data, "cpus_per_task"))


def ours(images: Images, wanted: int, first_step: int = 0) -> Iterator[Batch]:
    """The deterministic pipeline, from a step on."""
    # Its settings stay in the process's context, and the other arms must not inherit them.
    with DataContext.current(DataContext.get_current().copy()):
        steps = (first_step, first_step + -(-wanted // images.batch))
        feed = Feed(images.stream(), steps, crew=crew())
        try:
            for batch in feed:
                yield batch.images_BHWC, batch.sample_B
        finally:
            feed.close()


def _default(section: type[BaseModel], name: str) -> Any:
    """What a run has without being told."""
    return section.model_fields[name].default


def read_webdataset(images: Images, wanted: int) -> Iterator[Batch]:
    """Ray's WebDataset reader without its decoder, and the same decode and crop after it."""
    ids = sample_ids(images.manifest)

    def work(block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        sample_B = np.array([ids[key] for key in block["__key__"]])
        pixels = decode_crop(images, list(block[images.extension]), sample_B, np.zeros_like(sample_B))
        return {"images": pixels, "sample": sample_B}

    return _map_shards(images, wanted, work, decoder=None)


def read_webdataset_default(images: Images, wanted: int) -> Iterator[Batch]:
    """Ray's WebDataset reader with its own decoder, and Pillow's crop of the same boxes after it."""
    ids = sample_ids(images.manifest)

    def work(block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        sample_B = np.array([ids[key] for key in block["__key__"]])
        decoded = block[images.extension]
        sizes = np.array([image.shape[:2] for image in decoded])
        crops = images.view.crops(sizes[:, 0], sizes[:, 1], np.zeros_like(sample_B), sample_B, 0)
        pixels = [
            _pil_crop(image, *box, images.view.image_size) for image, box in zip(decoded, crops.boxes(), strict=True)
        ]
        return {"images": np.stack(pixels), "sample": sample_B}

    return _map_shards(images, wanted, work)


def _pil_crop(
    image: np.ndarray, top: int, left: int, height: int, width: int, flip: bool, size: tuple[int, int]
) -> np.ndarray:
    box = (left, top, left + width, top + height)
    cropped = Image.fromarray(image).convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    return np.asarray(cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else cropped)


def _map_shards(images: Images, wanted: int, work: Callable, **options: Any) -> Iterator[Batch]:
    times = -(-wanted // images.manifest.num_samples)
    shards = (images.urls * times)[: -(-wanted * len(images.urls) // images.manifest.num_samples)]
    dataset = ray.data.read_webdataset(shards, **options).map_batches(work, batch_size=images.batch)
    batches: Any = dataset.iter_batches(batch_size=images.batch)
    for batch in batches:
        yield batch["images"], batch["sample"]


ON_RAY: dict[str, Arm] = {
    "ours": ours,
    "read_webdataset": read_webdataset,
    "read_webdataset_default": read_webdataset_default,
}
