"""Which code ran, with which packages, on which data: where the numbers of a run come from."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mae_core.names import printable
from pipelines.data.shards import Manifest
from pipelines.tracking import DatasetInput

_PACKAGES = ("ray", "torch", "timm", "mlflow", "pyarrow", "numpy")


def git_commit() -> str:
    """The commit of the code that runs, with a mark where it was changed.

    A job's copy of the code has no repository: ``MAE_GIT_COMMIT`` may say it; else it is ``unknown``, and the digest of
    the code stands alone.
    """
    if told := os.environ.get("MAE_GIT_COMMIT"):
        return told
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def code_digest() -> str:
    """SHA-256 over the code of the method and the pipeline: which code ran, also without a repository."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted([*root.glob("mae_core/**/*.py"), *root.glob("pipelines/**/*.py")]):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def tags() -> dict[str, str]:
    """Commit, digest of the code, and versions, as tags of an MLflow run."""
    versions = {f"version.{name}": importlib.metadata.version(name) for name in _PACKAGES}
    return {"git.commit": git_commit(), "code.digest": code_digest(), "python": platform.python_version(), **versions}


def dataset_inputs(data: Mapping[str, Manifest | None]) -> tuple[DatasetInput, ...]:
    """Data sets as MLflow lists them among a run's inputs, each by what it is used for; None is left out."""
    return tuple(
        DatasetInput(
            name=name,
            digest=manifest.digest,
            source=printable(manifest.location),
            num_samples=manifest.num_samples,
            context=name,
        )
        for name, manifest in data.items()
        if manifest is not None
    )
