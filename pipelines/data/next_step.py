"""The command that comes after packing: one that this machine ends in minutes, or with a GPU the paper's sizes."""

import io
import re
import shlex
import statistics
import warnings
from pathlib import Path

from PIL import Image

from pipelines.data.index import read_index
from pipelines.data.shards import Manifest
from pipelines.reading import DEFAULT_POLICY, read_range
from pipelines.storage import Store

RECIPE = "pipelines/recipes/first_cpu.toml"
_RECIPE_STEPS, _RECIPE_SIZE, _RECIPE_SIDE, _RECIPE_PATCH = 1000, 64, 64, 8
_PAPER_SIDE, _PAPER_PATCH, _PAPER_SIZE = 224, 16, 4096
_LOOKED_AT = 32
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
_GPUS = ("/dev/nvidia0", "/dev/kfd")  # device files: a library that knows would take seconds to import


def next_step(manifest: Manifest, test: str = "", *, gpu: bool | None = None) -> str:
    """The command that pretrains on shards that have just been packed.

    Args:
        manifest: The shards.
        test: Shards of their test images, or empty.
        gpu: Whether this machine has a GPU; None: looked for.
    """
    gpu = any(Path(file).exists() for file in _GPUS) if gpu is None else gpu
    num, side = manifest.num_samples, _side(manifest)
    here = shlex.quote(manifest.location)
    flags = [f"--data.train {here}", f"--run.name {_name(manifest)}"]
    if gpu:
        flags += ["--scale.gpu", "--batch.micro-size 0"]
        # A batch of the paper's is more than all of a small data set.
        size = next((size for size in (4096, 1024, 256) if 16 * size <= num), 64)
        flags += [f"--batch.global-size {size}"] if size != _PAPER_SIZE else []
        flags += _sides(side, _PAPER_SIDE, _PAPER_PATCH)
    else:
        flags.insert(0, f"--config {RECIPE}")
        # A twentieth of the run, as in the paper.
        flags.append(f"--optim.warmup-epochs {_RECIPE_STEPS * _RECIPE_SIZE / num / 20:.2g}")
        flags += _sides(side, _RECIPE_SIDE, _RECIPE_PATCH)
    if manifest.labelled:
        flags.append(f"--probe.train {here}" + (f" --probe.test {shlex.quote(test)}" if test else ""))
    return f"python -m pipelines.pretrain {' '.join(flags)}"


def _name(manifest: Manifest) -> str:
    """A name for the run: the folder's, or that above where it is only a split's."""
    parts = [part for part in re.split(r"[/:]+", manifest.location) if part]
    while len(parts) > 1 and parts[-1] in (manifest.split, "shards"):
        parts.pop()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", parts[-1]).lstrip("._-") or "first"


def _sides(side: int, usual: int, patch: int) -> list[str]:
    """Flags for images that are smaller than what is usual: as many patches, as far as they can be."""
    if side >= usual:
        return []
    patches = usual // patch
    patch = max(1, side // patches)
    # An image size is patches of a whole number of pixels; the smallest images are enlarged.
    return [f"--data.image-size {patch * patches} {patch * patches}", f"--model.patch-size {patch}"]


def _side(manifest: Manifest) -> int:
    """The median of the shorter sides of some images, in pixels; a large one where none can be looked at."""
    store, name = Store(manifest.location), manifest.shard_names[0]
    index, _ = read_index(store, name)
    sides = []
    for offset, size in list(zip(index.offset_S.tolist(), index.size_S.tolist(), strict=True))[:_LOOKED_AT]:
        try:
            data = io.BytesIO(read_range(store, name, offset, size, DEFAULT_POLICY))
            with warnings.catch_warnings(action="ignore"), Image.open(data, formats=_FORMATS) as image:
                sides.append(min(image.size))
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
    return int(statistics.median(sides)) if sides else _PAPER_SIDE
