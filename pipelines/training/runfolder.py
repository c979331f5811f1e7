"""The files of a run that rank 0 writes as it goes: in the run's folder, or beside it where that is remote."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.storage import Store

_FILES = (
    "run.json", "config.json", "config.toml", "metrics.jsonl", "sent.json", "skipped.jsonl", "nonfinite.jsonl",
    "result.json", "sync.log", "table.txt", "best.toml", "confusion.npy", "per_class.csv", "confusion.png",
    "segmentation.png",
)  # fmt: skip


class RunFolder:
    """A local folder with the run's small files.

    Where the run's storage is remote, it is a temporary one: filled with what is there already, and sent along
    with every checkpoint and at the end.

    Args:
        store: The run's folder.
        guard: Called before anything is sent; raises where this must not be.
    """

    def __init__(self, store: Store, guard: Callable[[], None] = lambda: None):
        self._store, self._guard = store, guard
        if store.is_local:
            self.path = store.local()
            self.path.mkdir(parents=True, exist_ok=True)
            return
        self.path = Path(tempfile.mkdtemp(prefix="mae-run-"))
        for name in set(_FILES) & set(store.names()):
            (self.path / name).write_bytes(store.read(name))

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a file with one JSON object a line; a torn last line is left out."""
        path = self.path / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def append_line(self, name: str, value: dict[str, Any]) -> None:
        """Adds one JSON object to a file."""
        with (self.path / name).open("a") as file:
            file.write(json.dumps(value) + "\n")

    def write(self, name: str, text: str) -> None:
        """Writes a whole file, or none."""
        Store(str(self.path)).write(name, text)

    def push(self) -> None:
        """Sends the files to the run's storage, where that is another place."""
        if self._store.is_local:
            return
        self._guard()
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and (name in _FILES or name.startswith(("pictures/", "tables/", "profile/"))):
                self._store.write(name, path.read_bytes())
