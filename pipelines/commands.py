"""Commands as they are printed: each runs as it is pasted into the shell at hand."""

import os
import shlex
import shutil
import sys
from pathlib import Path

DEFAULT_STORAGE = "runs"


def python() -> str:
    """The interpreter that runs here, as a shell finds it: by name where that is on the PATH, else by its path.

    Whoever reads the output of a Ray job sits at another machine: there it is the ``python`` of that.
    """
    if not sys.executable or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return "python"
    # Links stay: the interpreter of a virtual environment is one to that which it was made with.
    here = Path(sys.executable).absolute()
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found and Path(found).absolute().parent == here.parent:
            return name
    return str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)


def command_line(module: str, *arguments: str, storage: str = DEFAULT_STORAGE) -> str:
    """Spells ``python -m MODULE ARGUMENTS`` so that it runs as it is pasted.

    Args:
        module: What ``-m`` runs.
        arguments: As a program takes them; they are quoted here.
        storage: The folder or address of the runs: ``--storage`` is added where it is not the default.
    """
    words = [python(), "-m", module, *arguments]
    if storage != DEFAULT_STORAGE:
        from pipelines.storage import absolute  # takes a while, and few commands need it

        if absolute(storage) != absolute(DEFAULT_STORAGE):
            words += ["--storage", storage]
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    """A word as a shell takes it; bytes that are no UTF-8 as bash and its kin write them."""
    if not any("\udc80" <= char <= "\udcff" for char in word):
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'").encode("utf-8", "surrogateescape")
    return f"$'{escaped.decode('utf-8', 'backslashreplace')}'"


def open_record(tracking_uri: str) -> str:
    """Spells the command that opens a SQLite record in the MLflow UI."""
    return command_line("mlflow", "ui", "--backend-store-uri", tracking_uri)
