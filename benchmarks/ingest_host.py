"""The process in which the arms of ``benchmarks.ingest`` without Ray take their turns."""

import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.ingest_arms import PLAIN, check_pixels, read_ranges
from benchmarks.ingest_data import Images
from benchmarks.meter import Turn, measure


def take_turn(arm: Callable, images: Images, seconds: float, wanted: int, **options: Any) -> Turn:
    """Measures an arm for some seconds."""

    def start() -> Iterator[int]:
        for _, sample_B in arm(images, wanted):
            yield len(sample_B)

    return measure(start, seconds, **options)


# What is held against the reference; the limit's processes keep their pixels to themselves.
PIXELS = {**PLAIN, "raw": lambda images, _: read_ranges(images)}


class Host:
    """A process for the arms without Ray, which forks their workers: what lies in it does not lie in the Ray driver."""

    def __init__(self, cores: Sequence[int]):
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, list(cores), os.getpid()), daemon=False)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process.pid is not None
        return self._process.pid

    def ask(self, *request: Any) -> Any:
        """Has a request answered; what is raised there is raised here."""
        self._connection.send(request)
        answer = self._connection.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, cores: list[int], root: int) -> None:
    while True:
        try:
            what, name, images, *rest = connection.recv()
        except EOFError:
            return
        try:
            if what == "check":
                connection.send(check_pixels(PIXELS[name], images))
            else:
                connection.send(take_turn(PLAIN[name], images, *rest, cores=cores, root=root))
        except Exception as error:
            connection.send(error)
