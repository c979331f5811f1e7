"""Which code ran, with which packages, on which data: where the numbers of a run come from."""

import getpass
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mae_core.names import printable
from pipelines.data.shards import Manifest
from pipelines.tracking import DatasetInput

ROOT = Path(__file__).parents[1]
_PACKAGES = ("ray", "torch", "timm", "mlflow", "pyarrow", "numpy")


def git_commit() -> str:
    """The commit of the code that runs, with a mark where it was changed.

    A job's copy of the code has no repository: ``MAE_GIT_COMMIT`` may say it; else it is ``unknown``, and the digest of
    the code stands alone.
    """
    if told := os.environ.get("MAE_GIT_COMMIT"):
        return told
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def code_digest() -> str:
    """SHA-256 over the code of the method and the pipeline: which code ran, also without a repository."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("mae_core/**/*.py"), *ROOT.glob("pipelines/**/*.py")]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def user() -> str:
    """Who runs this: the user's name, or number where a container has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def source() -> str:
    """The command that runs, as a path in the repository; that of pretraining in a process that Ray has started."""
    path = Path(sys.argv[0]).absolute() if sys.argv else ROOT
    inside = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path()
    known = inside.suffix == ".py" and inside.parts[0] in ("pipelines", "tune", "benchmarks")
    return inside.as_posix() if known else "pipelines/pretrain.py"


def tags() -> dict[str, str]:
    """Commit, digest of the code, and versions, as tags of an MLflow run, and what fills the columns of its UI."""
    versions = {f"version.{name}": importlib.metadata.version(name) for name in _PACKAGES}
    commit = git_commit()
    columns = {
        "mlflow.source.name": source(),
        "mlflow.source.type": "JOB" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else "LOCAL",
        "mlflow.user": user(),
    }
    if found := re.match(r"[0-9a-f]{7,40}", commit):
        # Without the mark of changed code, which git.commit has.
        columns["mlflow.source.git.commit"] = found[0]
    return {
        "git.commit": commit,
        "code.digest": code_digest(),
        "python": platform.python_version(),
        **versions,
        **columns,
    }


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
