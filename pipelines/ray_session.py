"""Where Ray runs: a cluster that a job was submitted to, or one of our own on this machine."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import ray

from pipelines.errors import UserError


@contextlib.contextmanager
def connect(num_cpus: int = 0, address: str = "") -> Iterator[None]:
    """Joins a cluster for the length of a block, or starts a local Ray and stops it at the end.

    A cluster is joined only on purpose: by ``address``, or by ``RAY_ADDRESS``, which ``ray job submit`` sets.

    Args:
        num_cpus: CPUs of the local Ray; those that this process may use where 0.
        address: The cluster's address (``auto`` finds one on this machine), or empty.

    Raises:
        UserError: There is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS", "")
    if not sys.stdout.isatty():
        # What Ray's nodes have to say would come in colours.
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    # Workers speak through pipelines.console and their errors; what Ray's own parts say besides stays in its logs.
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    try:
        _start(address, num_cpus, options)
        yield
    finally:
        # Also where Ctrl-C came while it started.
        ray.shutdown()


def _start(address: str, num_cpus: int, options: dict[str, Any]) -> None:
    if address:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"no Ray cluster at '{address}': {str(error).splitlines()[0]}") from None
    else:
        # The raylet warns of every dozen of processes beyond this; a run has more actors than a small machine has CPUs.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
        # Where memory runs out, one process that can be done again is killed, a reading task. By default (since Ray
        # 2.56) it is all that started last until there is room, what Ray Train runs on among it.
        os.environ.setdefault("RAY_worker_killing_policy_by_group", "true")
        cpus = num_cpus or len(os.sched_getaffinity(0))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
