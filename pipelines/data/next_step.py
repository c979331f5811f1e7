"""The command that comes after packing: one that this machine ends in minutes, or with a GPU the paper's sizes."""

import io
import re
import statistics
import warnings
from pathlib import Path

from PIL import Image

from pipelines.commands import command_line
from pipelines.data.index import read_index
from pipelines.data.shards import Manifest
from pipelines.early import num_gpus
from pipelines.reading import DEFAULT_POLICY, read_range
from pipelines.storage import Store

RECIPE = Path(__file__).absolute().parents[1] / "recipes" / "first_cpu.toml"
_STEPS = 1000  # the recipe's, and a GPU's
_PROBED = 20_000  # images of a large labelled set that a first run's probes look at
_RECIPE_SIZE, _RECIPE_SIDE, _RECIPE_PATCH = 64, 64, 8
_PAPER_SIDE, _PAPER_PATCH = 224, 16
_LOOKED_AT = 32
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")


def next_step(manifest: Manifest, test: str = "", *, gpu: bool | None = None) -> str:
    """The command that pretrains on shards that have just been packed.

    Args:
        manifest: The shards.
        test: Shards of their test images, or empty.
        gpu: Whether this machine has a GPU; None: looked for.
    """
    gpu = num_gpus() != 0 if gpu is None else gpu
    num, side = manifest.num_samples, _side(manifest)
    flags = ["--data.train", manifest.location, "--run", _name(manifest)]
    if gpu:
        # The paper's ViT-B for some minutes; a batch of its size would be more than all of a small data set.
        size = next((size for size in (512, 256) if 16 * size <= num), 64)
        flags += [
            "--scale.gpu",
            "--batch.micro-size",
            "0",
            "--train.steps",
            str(_STEPS),
            "--batch.global-size",
            str(size),
        ]
        flags += ["--probe.samples", str(_PROBED)] if num > _PROBED and manifest.labelled else []
        flags += _sides(side, _PAPER_SIDE, _PAPER_PATCH)
    else:
        size, flags = _RECIPE_SIZE, ["--config", _shown(RECIPE), *flags]
        flags += _sides(side, _RECIPE_SIDE, _RECIPE_PATCH)
    # A twentieth of the run, as in the paper.
    flags += ["--optim.warmup-epochs", f"{_STEPS * size / num / 20:.2g}"]
    if manifest.labelled:
        flags += ["--probe.train", manifest.location, *(["--probe.test", test] if test else [])]
    return command_line("pipelines.pretrain", *flags)


def _shown(path: Path) -> str:
    """A path as it can be given in the shell at hand."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


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
    return ["--data.image-size", str(patch * patches), "--model.patch-size", str(patch)]


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
