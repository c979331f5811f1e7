"""What a folder knows of what MLflow has."""

from pathlib import Path

import pytest

from pipelines.sent import SENT_FILE, Cursor, SentState, digest, has_all
from pipelines.spool import SPOOL_FILE, Spool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A spool of ten points, all of which have been sent."""
    spool = Spool(tmp_path)
    for step in range(10):
        spool.metrics(step, {"train/loss": 1.0})
    spool.close()
    note(tmp_path)
    return tmp_path


def note(folder: Path, *, back: int = 0) -> None:
    """Notes that all has been sent, but the pictures of the last bytes."""
    path = folder / SPOOL_FILE
    size = path.stat().st_size
    points, files = (Cursor(offset=end, digest=digest(path, end)) for end in (size, size - back))
    (folder / SENT_FILE).write_text(SentState(run_id="run", points=points, files=files).model_dump_json())


def test_all_has_been_sent_until_something_is_written(folder: Path):
    assert has_all(folder, "run")
    assert not has_all(folder, "another")
    assert not has_all(folder, None)
    spool = Spool(folder)
    spool.status("FINISHED")
    spool.close()
    assert not has_all(folder, "run")
    note(folder, back=1)
    assert not has_all(folder, "run"), "the pictures have not been sent"
    note(folder)
    assert has_all(folder, "run")


def test_another_spool_has_not_been_sent(folder: Path):
    path = folder / SPOOL_FILE
    path.write_bytes(path.read_bytes().replace(b"1.0}", b"2.0}"))
    assert not has_all(folder, "run")


def test_without_a_note_nothing_has_been_sent(folder: Path):
    (folder / SENT_FILE).unlink()
    assert not has_all(folder, "run")
