"""What passes between the driver and the workers of a pretraining run."""

from dataclasses import dataclass
from typing import Any

from pipelines.config import Config
from pipelines.data.shards import Manifest
from pipelines.lease import Lease


class GoBackError(RuntimeError):
    """The workers begin again at the last checkpoint, and have said why."""


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker.

    Args:
        config: The resolved configuration, every path absolute.
        train: The images to pretrain on.
        probe_train: Labelled images for the probes, or None.
        probe_test: Labelled images that are read once, or None.
        console: Actor that takes lines for the driver's terminal.
        judged: Whether the run waits at each of its probes until it is told at the console to go on, or to end there.
        followed: Whether somebody else sends the record to MLflow while the run lasts.
        lease: That of the driver, without which nothing is written.
    """

    config: Config
    train: Manifest
    probe_train: Manifest | None
    probe_test: Manifest | None
    console: Any
    judged: bool = False
    followed: bool = False
    lease: Lease | None = None
