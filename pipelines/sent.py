"""``sent.json``: how far MLflow has a run's spool. Nothing here imports MLflow."""

import hashlib
from pathlib import Path

import pydantic

from pipelines.spool import SPOOL_FILE

SENT_FILE = "sent.json"
_TAIL_BYTES = 256


class Cursor(pydantic.BaseModel):
    """How far a spool has been sent: an offset in bytes, and a digest of what lies before it."""

    offset: int = 0
    digest: str = ""


class SentState(pydantic.BaseModel):
    """``sent.json``. Points and files have a cursor each: an artifact store that fails holds up no metric."""

    run_id: str = ""
    points: Cursor = Cursor()
    files: Cursor = Cursor()
    nonfinite: dict[str, int] = {}
    """How many values that are no number each metric has had."""


def digest(spool: Path, offset: int) -> str:
    """Tells apart what lies before an offset of two spools, by its last bytes; empty where nothing does."""
    if offset == 0 or not spool.exists():
        return ""
    with spool.open("rb") as file:
        file.seek(max(0, offset - _TAIL_BYTES))
        return hashlib.sha256(file.read(min(_TAIL_BYTES, offset))).hexdigest()[:16]


def has_all(folder: Path, run_id: str | None) -> bool:
    """Whether MLflow has taken the whole spool of a folder, as far as the folder knows.

    Args:
        folder: A run's local folder.
        run_id: Of the run in the MLflow that is meant; None where it has none.
    """
    spool, path = folder / SPOOL_FILE, folder / SENT_FILE
    if run_id is None or not path.exists() or not spool.exists():
        return False
    state, size = SentState.model_validate_json(path.read_bytes()), spool.stat().st_size
    cursors = state.points, state.files
    return state.run_id == run_id and all(
        cursor.offset == size and cursor.digest == digest(spool, size) for cursor in cursors
    )
