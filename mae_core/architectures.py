"""Architectures by name, and what a name says, without importing timm: that and PyTorch take seconds."""

import difflib
import functools
import importlib.util
import re
from collections.abc import Collection
from pathlib import Path

EXAMPLES = ", ".join(f"vit_{size}" for size in ("tiny_patch16_224", "small_patch16_224", "base_patch16_224"))


@functools.cache
def vit_names() -> frozenset[str]:
    """The Vision Transformers that timm registers, read from its source; empty where that is not there to be read."""
    package = importlib.util.find_spec("timm")
    folders = [Path(folder) for folder in (package.submodule_search_locations or ())] if package else []
    sources = [folder / "models" / "vision_transformer.py" for folder in folders]
    text = "".join(path.read_text() for path in sources if path.is_file())
    return frozenset(re.findall(r"^@register_model\ndef (\w+)\(", text, re.MULTILINE))


def check_name(arch: str, names: Collection[str]) -> None:
    """Holds an architecture's name against those that there are.

    Raises:
        ValueError: It is none of them.
    """
    if arch not in names:
        near = difflib.get_close_matches(arch.split(".")[0], names, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"use for example {EXAMPLES}"
        raise ValueError(f"arch '{arch}' is no Vision Transformer of timm: {hint}")


def patch_size(arch: str) -> int | None:
    """The side of a patch in pixels, as an architecture's name has it; None where it does not say."""
    found = re.search(r"_patch(\d+)(?:_|$)", arch)
    return int(found[1]) if found else None


def check_patches(image_size: tuple[int, int], patch_size: int) -> None:
    """Sees that patches cut an image, of a height and a width in pixels, without a rest.

    Raises:
        ValueError: They do not.
    """
    H, W = image_size
    if patch_size < 1 or min(H, W) < 1 or H % patch_size or W % patch_size:
        raise ValueError(f"image size {H}x{W} is not divisible by the patch size {patch_size}: change one of them")
