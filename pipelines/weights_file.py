"""A file of weights, wherever it lies: here, in an object store, on a web server."""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mae_core.names import printable
from pipelines import web
from pipelines.errors import UserError
from pipelines.objects import split_query
from pipelines.storage import Store, absolute

_CHUNK = 8 << 20


@contextlib.contextmanager
def local_file(location: str, key: str) -> Iterator[Path]:
    """Gives a file's path on this machine for the length of a block; one that lies elsewhere is fetched for it.

    Args:
        location: Path or address.
        key: The key of the configuration that names it, for what is said.

    Raises:
        UserError: There is none, or its store cannot be reached.
    """
    location = absolute(location)
    if "://" not in location:
        if not Path(location).is_file():
            raise UserError(f"{key}: no file '{shown(location)}'")
        yield Path(location)
        return
    place, query = split_query(location)
    folder, _, name = place.rpartition("/")
    store = Store(folder + query)
    try:
        content = store.read(name)
    except FileNotFoundError:
        raise UserError(f"{key}: no file '{shown(location)}'") from None
    with tempfile.TemporaryDirectory(prefix="mae-weights-") as here:
        path = Path(here) / name
        path.write_bytes(content)
        del content
        yield path


def shown(location: str) -> str:
    """A file's address as messages and the record name it: on one line, without names, passwords and signatures."""
    return printable(web.shown(location) if "://" in location else location)


def digest(path: Path) -> str:
    """SHA-256 of a file's content, hex."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
