"""Files that create another one where somebody unpickles them, and how to put one in a checkpoint's place."""

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch

_TRACE = "exploded"


class _Bomb:
    def __init__(self, folder: Path):
        self._folder = folder

    def __reduce__(self) -> Any:
        return (open, (str(self._folder / _TRACE), "w"))


def bomb(folder: Path) -> bytes:
    """A pickle that creates a file in a folder."""
    return pickle.dumps(_Bomb(folder))


def torch_bomb(folder: Path, *, zipped: bool = True) -> bytes:
    """A checkpoint as the official code saves it, with weights, and among its arguments a bomb."""
    file = io.BytesIO()
    content = {"model": {"cls_token": torch.zeros(1, 1, 24)}, "args": _Bomb(folder)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def exploded(folder: Path) -> bool:
    """Whether a bomb for this folder went off."""
    return (folder / _TRACE).exists()


def replace_file(checkpoint: Path, name: str, data: bytes) -> None:
    """Puts a file in the place of a checkpoint's, with a checksum that agrees."""
    (checkpoint / name).write_bytes(data)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
