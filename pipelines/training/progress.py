"""What is told of the steps since the last log point: a line in the terminal, a point in the record."""

import functools
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from mae_core.device_rate import bfloat16_gain, matrix_rate
from mae_core.flops import step_flops
from mae_core.model import MaskedAutoencoder
from pipelines.config import Config
from pipelines.spool import Spool
from pipelines.training.duration import Duration, bfloat16_hint
from pipelines.training.recorder import Recorder
from pipelines.training.step import Trainer, precision
from pipelines.training.unreadable import Unreadable, over_ranks, told


class Progress:
    """Takes the time of the steps and tells of them, a window of ``log.every`` steps at once. All ranks make one.

    Args:
        config: The run's configuration.
        model: The model, not wrapped.
        steps: The run's steps.
        num_samples: Training images.
        unreadable: What could not be read.
        device: Where collectives run.
        spool: The run's record, on rank 0.
        say: Shows a line in the driver's terminal.
    """

    def __init__(
        self,
        config: Config,
        model: MaskedAutoencoder,
        steps: int,
        num_samples: int,
        unreadable: Unreadable,
        device: torch.device,
        spool: Spool | None,
        say: Callable[[str], None],
    ):
        self._config, self._steps, self._num_samples = config, steps, num_samples
        self._unreadable, self._device, self._spool, self._say = unreadable, device, spool, say
        self._flops = step_flops(model).training
        # Of all devices, each with the threads that it has here and busy at the same time.
        self._full_rate = over_ranks(matrix_rate(device, precision(config.train.precision, device)), device)
        on_cpus = device.type == "cpu"
        self._duration = Duration(config, model, steps, num_samples, self._full_rate, on_cpus)
        self._began = 0.0
        self._peak = PeakMemory(device)
        self._recorder = Recorder(say, 60 * config.checkpoint.patience_minutes)
        self._tracking_s: list[float] = []
        self._held: list[tuple[int, dict[str, float]]] = []

    def begin(self, start: int) -> None:
        """The steps begin, after those that are done already; says how long they will take at least."""
        if self._device.type == "cpu" and self._spool:  # on rank 0
            hint = bfloat16_hint(self._config.train.precision, bfloat16_gain(self._device))
            if hint:
                self._say(hint)
        self._began = time.perf_counter()
        for line in self._duration.begin(start, self._began):
            self._say(line)

    def step(self, done: int) -> None:
        """Takes in that a step is done; says once how long the rest will take."""
        for line in self._duration.step(done, time.perf_counter()):
            self._recorder.do(functools.partial(self._say, line))

    def leave_out(self, seconds: float) -> None:
        """Takes what was no step out of the window's time."""
        self._began += seconds
        self._duration.leave_out(seconds)

    def collect(self, done: int, trainer: Trainer) -> None:
        """Counts and lists what the steps since the last time could not read; all ranks call it."""
        fresh, trainer.skipped = trainer.skipped, []
        self._unreadable.counts += self._unreadable.collect(fresh, done)

    def tell(
        self, done: int, lr: float, window_S4: torch.Tensor, trainer: Trainer, *, guard_s: float, hold: bool
    ) -> None:
        """One progress line and one point of the record; the next window begins. All ranks call it.

        Args:
            done: Steps done.
            lr: The last one's learning rate.
            window_S4: What ``train_step`` gave for each of the window's steps.
            trainer: With what it has summed up since the last time, which is taken.
            guard_s: Seconds that the ranks' agreement took (``Guard``).
            hold: Keeps the point back until one is told that is not held: steps that may be done again have no point
                yet, since a point is written once.
        """
        elapsed = time.perf_counter() - self._began
        unreadable = self._unreadable.counts
        # A step that was skipped has no loss worth a mean, and says so by its own count.
        good_S4 = window_S4[window_S4[:, 2] == 0]
        loss, grad_norm = (good_S4.mean(dim=0) if len(good_S4) else window_S4[-1]).tolist()[:2]
        bad = int(window_S4[:, 2].sum())
        steps = len(window_S4)
        wait = over_ranks(trainer.wait_s, self._device, dist.ReduceOp.MAX)
        trainer.wait_s = 0.0
        split = trainer.clock.take()
        images_per_s = steps * self._config.batch.global_size / elapsed
        flops_per_s = images_per_s * self._flops
        mfu = flops_per_s / self._full_rate
        peak_mib = self._peak.mib()
        other = max(0.0, elapsed / steps - sum(split.values()))
        if self._spool:
            samples_seen = done * self._config.batch.global_size
            values = {
                "train/loss": loss,
                "train/lr": lr,
                "train/grad_norm": grad_norm,
                "train/nonfinite_steps": float(bad),
                "perf/images_per_s": images_per_s,
                "perf/flops_per_s": flops_per_s,
                "perf/mfu": mfu,
                "perf/peak_memory_mib": peak_mib,
                **{f"perf/{part}_s": seconds for part, seconds in split.items()},
                "perf/other_s": other,
                "perf/guard_s": guard_s / steps,
                "data/wait_s": wait / steps,
                "data/skipped": float(unreadable.total()),
                "epoch": samples_seen / self._num_samples,
                "samples_seen": float(samples_seen),
                # This one's own is not known yet.
                "perf/tracking_s": self._tracking_s[-1] if self._tracking_s else 0.0,
            }
            self._held.append((done, values))
            left = (self._steps - done) * elapsed / steps
            notes = (f"  not finite {bad}" if bad else "") + (f"  unreadable: {told(unreadable)}" if unreadable else "")
            shares = ", ".join(
                f"{part} {100 * seconds * steps / elapsed:.0f}"
                for part, seconds in {**split, "other": other}.items()
                if seconds
            )
            line = (
                f"step {done:>{len(str(self._steps))}} of {self._steps}  loss {loss:.4f}  lr {lr:.2e}  "
                f"{images_per_s:,.0f} images/s  {flops_per_s / 1e12:,.3g} TFLOP/s  MFU {100 * mfu:.0f} %  "
                f"({shares} %)  waiting {100 * wait / elapsed:.0f} %  {peak_mib / 1024:.1f} GiB  "
                f"left {clock(left)}{notes}"
            )
            began = time.perf_counter()
            if not hold:
                self.let_go()
            self._recorder.do(functools.partial(self._say, line))
            self._tracking_s.append(time.perf_counter() - began)
        self._began = time.perf_counter()

    def let_go(self) -> None:
        """Hands over the points that were kept back."""
        held, self._held = self._held, []
        for done, values in held:
            if self._spool:
                self._recorder.do(functools.partial(self._spool.metrics, done, values))

    def flush(self) -> None:
        """Waits until all that was told is in the record.

        Raises:
            OSError: It could not be written.
        """
        self._recorder.flush()

    def tracking(self) -> dict[str, float]:
        """What telling has cost the loop at its log points since it began: their number, and seconds of one."""
        if not self._tracking_s:
            return {"points": 0}
        p50, p99, most = np.quantile(self._tracking_s, [0.5, 0.99, 1.0]).tolist()
        return {"points": len(self._tracking_s), "p50": p50, "p99": p99, "max": most}


class PeakMemory:
    """The most memory so far: on a GPU what PyTorch has allocated there, else what the process had to itself.

    Pages of Ray's object store count as resident in each process that has looked at them, and stay so: a worker's share
    of them rises by a batch with every batch, up to the whole store, which is there once for all and is not its own.

    Args:
        device: Where the steps compute.
    """

    def __init__(self, device: torch.device):
        self._device, self._most = device, 0.0

    def mib(self) -> float:
        """That of all time up to now; between two calls the shared pages count as at the second."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        peak, shared = _resident_mib()
        self._most = max(self._most, peak - shared)
        return self._most


def _resident_mib() -> tuple[float, float]:
    """The most that this process has had resident, and what of its memory is shared now."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:  # no Linux: nothing tells the shared pages apart
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 0.0
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "kB" in value}
    return kib["VmHWM"] / 1024, kib["RssShmem"] / 1024


def clock(seconds: float) -> str:
    """``2:05``, or with hours ``1:02:05``."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
