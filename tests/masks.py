"""Images whose masks can be seen in them, packed without Ray."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.data.index import read_index
from pipelines.data.packing import Packing, PackingOptions, plan_packing
from pipelines.data.shards import INFO, Manifest, encode_info, load_manifest
from pipelines.data.sources import find_source, list_images, list_masks
from pipelines.data.writing import write_shards
from pipelines.storage import Store


def png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def write_scenes(folder: Path, num: int, *, size: tuple[int, int] = (32, 40), seed: int = 0) -> None:
    """Noise with a bright box and a dark one in ``images``, and in ``masks`` 1 and 2 where they are, 0 elsewhere."""
    rng = np.random.default_rng(seed)
    height, width = size
    for n in range(num):
        image_HWC = rng.integers(100, 150, (height, width, 3)).astype(np.uint8)
        mask_HW = np.zeros((height, width), np.uint8)
        for value, left in ((1, 0), (2, width // 2)):
            top, bottom = sorted(rng.choice(height, 2, replace=False))
            box = slice(top, bottom + 1), slice(left + 2, left + rng.integers(8, width // 2))
            image_HWC[box] = image_HWC[box] // 8 + (220 if value == 1 else 0)
            mask_HW[box] = value
        for kind, pixels in (("images", image_HWC), ("masks", mask_HW)):
            path = folder / kind / f"{n % 2}" / f"{n:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(pixels))


def pack(
    folder: Path, out: Path, *, masks: bool = True, resize: int = 0, most: int = 1 << 20
) -> tuple[Packing, Manifest]:
    """Packs what ``write_scenes`` wrote, into shards of so many bytes at most."""
    listing = list_images(find_source(str(folder / "images")), "train")
    options = PackingOptions("train", most, seed=0, resize=resize, quality=90, labels=True)
    packing = plan_packing(listing, options, list_masks(listing, str(folder / "masks")) if masks else None)
    store = Store(str(out))
    for _ in write_shards(packing.shards, packing.source, options, store):
        pass
    facts: list[dict[str, Any]] = [read_index(store, shard.name)[1] for shard in packing.shards]
    manifest = Manifest(
        location=str(out),
        split="train",
        shard_names=tuple(shard.name for shard in packing.shards),
        shard_lengths=tuple(len(read_index(store, shard.name)[0]) for shard in packing.shards),
        shard_bytes=tuple(int(each["tar_bytes"]) for each in facts),
        shard_digests=tuple(each["tar_sha256"] for each in facts),
        classes=packing.classes,
        mask_classes=max(int(each.get("mask_classes", 0)) for each in facts),
    )
    store.write(INFO, encode_info(manifest))
    return packing, load_manifest(str(out))
