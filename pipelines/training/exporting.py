"""A run's newest point as gauges for Prometheus, at the metrics port of the node of rank 0.

Ray puts ``ray_`` before its metrics: ``train/loss`` of the record is ``ray_mae_train_loss{run="NAME"}`` there. Every
node says where its port is: ``ray.nodes()``, ``MetricsExportPort``; a head with a dashboard writes a file of all of
them for Prometheus. Ray collects the values of a process every 10 s; setting one asks nobody.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from ray.util.metrics import Gauge

from pipelines.spool import Spool


def metric_name(name: str) -> str:
    """What a metric of the record is called, without Ray's ``ray_``."""
    return "mae_" + re.sub(r"\W", "_", name)


class ExportedSpool(Spool):
    """A run's spool whose newest values are gauges too, until others come or the process ends.

    Args:
        folder: The run's local folder.
        run: The run's name, the gauges' tag ``run``.
    """

    def __init__(self, folder: Path, run: str):
        super().__init__(folder)
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a step's values, and shows them."""
        super().metrics(step, values)
        for name, value in values.items():
            if name not in self._gauges:
                gauge = Gauge(metric_name(name), description=f"{name} in the record of a run", tag_keys=("run",))
                self._gauges[name] = gauge.set_default_tags({"run": self._run})
            self._gauges[name].set(float(value))
