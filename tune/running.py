"""Runs trials on Ray Tune: as many at once as the machines carry, each fed fairly, and none lost by a restart."""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.repeater import Repeater

from pipelines.config import Config, Scale, worker_cpus
from pipelines.errors import UserError
from tune.journal import Cell, Journal
from tune.scheduler import JournalingScheduler
from tune.space import Space
from tune.trainable import CELL, SCORE, PretrainingTrial, Study


@dataclass(frozen=True)
class Share:
    """What each trial may take, where several run at once.

    Args:
        concurrent: Trials at once.
        reading_cpus: CPUs for reading and decoding of each.
        threads: PyTorch threads of each of a trial's workers.
    """

    concurrent: int
    reading_cpus: float
    threads: int


def fitted(config: Config) -> Config:
    """A trial's configuration with the CPUs that each of its workers claims, where these are left open."""
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    claimed = worker_cpus(config.scale, config.data.cpus_per_task, nodes)
    return config.model_copy(update={"scale": config.scale.model_copy(update={"cpus_per_worker": claimed})})


def share(config: Config, at_most: int) -> Share:
    """How many trials run at once, and with what.

    Args:
        config: Of a trial.
        at_most: Trials at once that the user allows; 0: as many as fit.

    Raises:
        UserError: Not even one fits.
    """
    scale, reading = config.scale, config.data.cpus_per_task
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    training = scale.workers * scale.cpus_per_worker
    # Ray counts in ten-thousandths.
    fit = int(cpus / (training + max(reading, scale.reading_cpus)) + 1e-4)
    # A worker, and a reading task, has its place on one node; a part of a GPU on one GPU.
    fit = min(fit, sum(places(node, scale) for node in nodes) // scale.workers)
    largest = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    wanted = f"{training:g} CPUs to train and {reading:g} to read"
    if scale.gpu:
        wanted += f", and {scale.workers * scale.gpus_per_worker:g} GPUs"
    if not fit or reading > largest:
        raise UserError(
            f"no trial fits: one needs {wanted}; there are {cpus:g} CPUs and {gpus:g} GPUs, {largest:g} CPUs on the "
            f"largest node, where a worker claims {scale.cpus_per_worker:g}. Lower scale.workers or "
            "scale.cpus_per_worker"
        )
    concurrent = min(fit, at_most or fit)
    free = (cpus - concurrent * training) / concurrent
    cores = min(int(node.get("CPU", 1)) for node in nodes)
    threads = max(1, cores // (concurrent * scale.workers))
    return Share(concurrent, scale.reading_cpus or int(100 * free) / 100, scale.threads or threads)


def places(node: dict[str, float], scale: Scale) -> int:
    """How many workers a node has room for."""
    places = int(node.get("CPU", 0.0) / (scale.cpus_per_worker or 1.0) + 1e-4)
    return min(places, int(node.get("GPU", 0.0)) * int(1 / scale.gpu_share + 1e-4)) if scale.gpu else places


class _Progress(ray.tune.Callback):
    """A line for each report, and one for each end."""

    def __init__(self, journal: Journal, study: Study, planned: int, learned: Callable[[], None]):
        self._journal, self._study, self._planned, self._learned = journal, study, planned, learned
        self._shown: dict[str, int] = {}  # the last step of each trial

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # Tune writes its callbacks down, to go on with them; a search goes on from its journal, and a record that is
        # being written cannot be pickled.
        return ray.tune.Callback, ()

    def _say(self, trial: TuneTrial, text: str) -> None:
        name = self._study.cell(trial.config).name
        number = list(self._journal.trials).index(name) + 1
        print(f"[{number}/{self._planned}] {name}  {text}", flush=True)
        self._learned()

    def on_trial_result(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: Any, **_: Any) -> None:  # noqa: ARG002
        if result.get("aborted") or result.get("replayed"):
            return
        if reason := result.get("failed"):
            self._say(trial, f"failed: {reason}")
            return
        known = self._journal.trials[self._study.cell(trial.config).name]
        if result["step"] <= self._shown.get(known.name, 0):
            # Done again by another process.
            return
        self._shown[known.name] = result["step"]
        # A last score is noted after this.
        state = "finished" if result["done"] and known.state == "running" else known.state
        end = {"running": "", "stopped": "  stopped", "finished": "  finished"}.get(state, "")
        self._say(trial, f"step {result['step']}  {result[SCORE]:.2f} %  {result['seconds']:.0f} s{end}")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **_: Any) -> None:  # noqa: ARG002
        self._say(trial, f"failed: {self._journal.trials[self._study.cell(trial.config).name].reason}")


class Ending(ray.tune.Stopper):
    """Ends all trials when the user wants to stop."""

    wanted = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        """No: a trial that ended at a report of its own would count as finished."""
        return False

    def stop_all(self) -> bool:
        """Whether all end now."""
        return self.wanted


@contextmanager
def _interruptible(ending: Ending, sign: Any) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the search in order; a second one at once."""

    def handle(number: int, _: Any) -> None:
        print("ending: what is known is kept, and can be gone on from", flush=True)
        ending.wanted = True
        sign.put_up.remote()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def listed(cells: Sequence[Cell]) -> dict[str, Any]:
    """Tune's space of exactly these trials, in their order."""
    return {CELL: ray.tune.grid_search([{"values": dict(cell.values), "seed": cell.seed} for cell in cells])}


class _Distinct(OptunaSearch):
    """Optuna's sampler (TPE), which suggests no point twice: two trials of one point would be one run."""

    def __init__(self, space: Space, known: list[dict[str, Any]], seed: int):
        super().__init__(space.optuna(), metric=SCORE, mode="max", points_to_evaluate=known or None, seed=seed)
        self._points = space
        self._suggested: set[tuple[Any, ...]] = set()
        self._asked: dict[str, str] = {}  # under which name a trial's point was asked for
        self._num_asked = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next point; the space has one more."""
        while True:
            asked = str(self._num_asked)
            self._num_asked += 1
            values = super().suggest(asked)
            assert values is not None
            point = tuple(sorted(self._points.snapped(values).items()))
            if point not in self._suggested:
                self._suggested.add(point)
                self._asked[trial_id] = asked
                return values
            super().on_trial_complete(asked, error=True)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Passed on."""
        super().on_trial_result(self._asked[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Passed on."""
        super().on_trial_complete(self._asked[trial_id], result, error)


def optuna(space: Space, journal: Journal, seeds: int, seed: int) -> Searcher:
    """Optuna's sampler (TPE), which learns from the trials before a restart as they report again.

    Args:
        space: What varies.
        journal: What is known.
        seeds: Trials of each point.
        seed: Of the sampler.
    """
    known: list[dict[str, Any]] = []
    for trial in journal.trials.values():
        if trial.values not in known:
            known.append(dict(trial.values))
    logging.getLogger("optuna").setLevel(logging.WARNING)
    search = _Distinct(space, known, seed)
    return Repeater(search, repeat=seeds) if seeds > 1 else search


def run_trials(
    study: Study,
    journal: Journal,
    *,
    param_space: dict[str, Any],
    searcher: Searcher | None,
    scheduler: TrialScheduler,
    num_samples: int,
    planned: int,
    concurrent: int,
    folder: str,
    learned: Callable[[], None],
) -> bool:
    """Runs trials until all have ended, or the user stops them.

    Args:
        study: What they share.
        journal: Where it is written down.
        param_space: From ``listed``; empty with a searcher.
        searcher: A sampler, or None.
        scheduler: Decides which go on.
        num_samples: Tune's; 1 for listed trials.
        planned: Trials in all.
        concurrent: At once.
        folder: Where Tune keeps its own notes.
        learned: Called after each report.

    Returns:
        Whether all have ended.
    """
    # Ctrl-C, files and lines for each trial are ours; and a trial that is told to end has no score.
    os.environ |= {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    # It warns of the files that are left out, and shows failures whole: the journal has their reasons.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    ending = Ending()
    trainable = ray.tune.with_resources(ray.tune.with_parameters(PretrainingTrial, study=study), study.resources)
    tuner = ray.tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=ray.tune.TuneConfig(
            metric=SCORE,
            mode="max",
            search_alg=searcher,
            scheduler=JournalingScheduler(scheduler, journal, study),
            num_samples=num_samples,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray.tune.RunConfig(
            name="ray-tune",
            storage_path=folder,
            verbose=0,
            stop=ending,
            callbacks=[_Progress(journal, study, planned, learned)],
            # Of a trial's own process: it goes on from the run's last checkpoint.
            failure_config=ray.tune.FailureConfig(max_failures=study.config.scale.max_failures),
            # The runs keep their own.
            checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    with _interruptible(ending, study.stop):
        tuner.fit()
    return not ending.wanted
