"""A profile of some steps: a trace for Chrome's or Perfetto's viewer, and a table of the slowest operators."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

PROFILE = "profile"  # the folder below the run's and among its artifacts
STEPS = 10
BEFORE = 5  # steps that are not in it: kernels are chosen and compiled, memory is taken


class Profile:
    """Watches the first steps of a run and writes what it saw, once.

    Args:
        folder: Where ``trace.json.gz`` and ``operators.txt`` are written.
        device: Where the steps compute.
    """

    def __init__(self, folder: Path, device: torch.device):
        self._folder, self._device = folder, device
        self._files: list[Path] = []
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=BEFORE - 1, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profile.start()
        self._open = True

    @property
    def written(self) -> bool:
        """Whether the files are there."""
        return bool(self._files)

    def step(self) -> list[Path]:
        """A step has ended.

        Returns:
            The files, when they have been written.
        """
        if not self._open:
            return []
        self._profile.step()
        return self._closed() if self._files else []

    def end(self) -> list[Path]:
        """No step follows: what has been seen of fewer is written, if anything has."""
        return self._closed() if self._open else []

    def _closed(self) -> list[Path]:
        self._open = False
        self._profile.stop()
        return self._files

    def _write(self, seen: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trace, table = self._folder / "trace.json.gz", self._folder / "operators.txt"
        seen.export_chrome_trace(str(trace))
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table.write_text(seen.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60) + "\n")
        self._files = [trace, table]
