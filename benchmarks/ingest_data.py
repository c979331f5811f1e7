"""What ``benchmarks.ingest`` reads: the photos several times over, as shards and as files; and more shards by links."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipelines.data.index import index_name, read_index
from pipelines.data.packing import PackingOptions, member_bytes, plan_packing
from pipelines.data.plan import Cut, Plan
from pipelines.data.readers import Stream, View
from pipelines.data.shards import INFO, Manifest, encode_info, load_index, load_manifest
from pipelines.data.sources import close_archive, find_source, list_images
from pipelines.data.writing import write_shards
from pipelines.errors import UserError
from pipelines.storage import Store

NUM_SHARDS = 16
SEED = 0


@dataclass(frozen=True)
class Images:
    """A data set of the benchmark and what is made of it: the same for all arms.

    Attributes:
        manifest: Its shards.
        view: Size and crops.
        batch: Images a batch.
        extension: The images' extension in the shards.
        files: Folder of the same images as files, named by sample id; empty: there is none.
    """

    manifest: Manifest
    view: View
    batch: int
    extension: str
    files: str = ""

    @property
    def urls(self) -> list[str]:
        """Paths of the shards."""
        return [f"{self.manifest.location}/{name}" for name in self.manifest.shard_names]

    def stream(self) -> Stream:
        """All of it in the plan's order, without end, for one consumer."""
        return Stream(
            self.manifest, Plan(self.manifest.num_samples, seed=SEED), Cut(self.batch, self.batch, 1), self.view
        )


def make_photos(source: str, copies: int, folder: Path, size: int, batch: int) -> Images:
    """Packs a tar of images several times over into 16 shards, and extracts the same images.

    Args:
        source: An uncompressed tar of images.
        copies: How often each image is there.
        folder: Empty; receives ``shards/`` and ``files/``.
        size: Height and width of a crop.
        batch: Images a batch.

    Raises:
        UserError: There is no such source, it is no tar, or it holds no images.
    """
    found = find_source(source)
    if found.kind != "tar":
        raise UserError(f"source '{source}' is a {found.kind}: name an uncompressed .tar of images")
    listing = list_images(found, "train")
    listing = replace(
        listing,
        paths=[f"copy{copy:03d}/{path}" for copy in range(copies) for path in listing.paths],
        sizes_S=np.tile(listing.sizes_S, copies),
        wheres_S=np.tile(listing.wheres_S, copies),
    )
    total = int(member_bytes(listing.sizes_S).sum())
    options = PackingOptions("train", -(-total // NUM_SHARDS), seed=SEED, resize=0, quality=90, labels=False)
    packing = plan_packing(listing, options)
    store = Store(str(folder / "shards"))
    for _ in write_shards(packing.shards, packing.source, options, store):
        pass
    close_archive()
    indexes, facts = zip(*(read_index(store, shard.name) for shard in packing.shards), strict=True)
    manifest = Manifest(
        location=store.location,
        split="train",
        shard_names=tuple(shard.name for shard in packing.shards),
        shard_lengths=tuple(len(index) for index in indexes),
        shard_bytes=tuple(int(each["tar_bytes"]) for each in facts),
        shard_digests=tuple(each["tar_sha256"] for each in facts),
        classes=(),
    )
    store.write(INFO, encode_info(manifest))
    images = _images(manifest, size, batch, source)
    return replace(images, files=_extract(images, folder / "files"))


def load_tiny(location: str, size: int, batch: int) -> Images:
    """Shards of tiny images that were packed before.

    Raises:
        UserError: There are none.
    """
    return _images(load_manifest(location), size, batch, location)


def _images(manifest: Manifest, size: int, batch: int, source: str) -> Images:
    kinds = {kind for shard in range(len(manifest.shard_names)) for kind in load_index(manifest, shard).extensions[:]}
    if len(kinds) > 1:
        raise UserError(f"'{source}' holds {' and '.join(sorted(kinds))}: the arms are compared on images of one kind")
    if manifest.num_samples < 2 * batch:
        raise UserError(f"'{source}' holds {manifest.num_samples} images: with batches of {batch}, give more --copies")
    view = View((size, size), 3, seed=SEED, crop_scale=(0.2, 1.0), flip=True)
    return Images(manifest, view, batch, kinds.pop())


def _extract(images: Images, folder: Path) -> str:
    folder.mkdir()
    sample = 0
    for shard, url in enumerate(images.urls):
        index = load_index(images.manifest, shard)
        with Path(url).open("rb") as tar:
            for offset, size in zip(index.offset_S.tolist(), index.size_S.tolist(), strict=True):
                (folder / f"{sample:07d}").write_bytes(os.pread(tar.fileno(), size, offset))
                sample += 1
    return str(folder)


def sample_ids(manifest: Manifest) -> dict[str, int]:
    """The sample id of each key."""
    keys = [key for shard in range(len(manifest.shard_names)) for key in load_index(manifest, shard).keys[:]]
    return {key: sample for sample, key in enumerate(keys)}


def multiply(images: Images, times: int, folder: Path) -> Images:
    """More shards of the same size: links to the same files under further names."""
    old = images.manifest

    def repeated(column: Sequence) -> tuple:
        return tuple(column) * times

    names = tuple(f"train-{number:06d}.tar" for number in range(len(old.shard_names) * times))
    for name, url in zip(names, images.urls * times, strict=True):
        for there, here in ((url, name), (index_name(url), index_name(name))):
            (folder / here).symlink_to(there)
    manifest = replace(
        old,
        location=str(folder),
        shard_names=names,
        shard_lengths=repeated(old.shard_lengths),
        shard_bytes=repeated(old.shard_bytes),
        shard_digests=repeated(old.shard_digests),
    )
    return replace(images, manifest=manifest)
