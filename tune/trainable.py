"""A trial: an ordinary pretraining run, with Ray Train inside, whose probes Ray Tune sees."""

import json
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.tune
import torch
from ray.tune.search.repeater import TRIAL_INDEX

from mae_core.flops import step_flops
from pipelines.config import Config, total_steps
from pipelines.console import make_console
from pipelines.kinds import TAG, refuse_other
from pipelines.lease import Lease
from pipelines.pretrain import Images, describe, open_run, pretrain
from pipelines.storage import Store
from pipelines.tracking import write_record
from pipelines.training.build import build_model
from pipelines.training.runfolder import RunFolder
from tune.journal import Cell
from tune.space import Space, encoder_part, with_values
from tune.trial import Trial

CELL = "cell"  # the key of Tune's configuration under which a listed trial stands
SHARE = "share"  # of the trial's steps, in percent: what the scheduler takes for time
SCORE = "score"
_POLL_S = 0.1
_ENDING_S = 60.0


@dataclass(frozen=True)
class Study:
    """What all trials of a search share.

    Args:
        config: Their configuration where they do not differ, resolved; its storage is the folder of their runs.
        images: Their data sets.
        space: What a sampler's values are points of; None where the trials are listed.
        objective: The metric of the record that is the score.
        search: The search's name.
        tracking_uri: Where the record goes, without credentials.
        parent_run_id: The search's own MLflow run.
        followed: Whether the search's driver sends the record of its trials.
        past: What is known already of each trial, by the name of its run.
        stop: A ``StopSign``: says when all is to end.
        lease: The driver's, of the search's folder: without it nothing is written.
    """

    config: Config
    images: Images
    space: Space | None
    objective: str
    search: str
    tracking_uri: str
    parent_run_id: str | None
    followed: bool
    past: Mapping[str, Trial]
    stop: Any
    lease: Lease | None = None

    @property
    def here(self) -> bool:
        """Whether a trial's only worker is Tune's own process of the trial, which stays for the next one."""
        return self.config.scale.workers == 1

    @property
    def resources(self) -> dict[str, float]:
        """What Tune's process of a trial claims."""
        if not self.here:
            # Beside the head: it only waits. It must claim something, and no CPU that its run needs.
            return {"node:__internal_head__": 0.001}
        scale = self.config.scale
        return {"CPU": scale.cpus_per_worker, **({"GPU": scale.gpus_per_worker} if scale.gpu else {})}

    def cell(self, config: Mapping[str, Any]) -> Cell:
        """The trial that a configuration of Tune means: a listed one, or a sampler's values."""
        if CELL in config:
            return Cell(config[CELL]["values"], config[CELL]["seed"])
        assert self.space is not None
        values = self.space.snapped({key: value for key, value in config.items() if "." in key})
        return Cell(values, self.config.run.seed + config.get(TRIAL_INDEX, 0))

    def run_config(self, cell: Cell) -> Config:
        """The configuration of a trial's run.

        Raises:
            UserError: The values do not fit.
        """
        values = with_values(self.config, cell.values).model_dump()
        values["run"] |= {"name": cell.name, "seed": cell.seed}
        return Config.model_validate(values)


@ray.remote(num_cpus=0)
class StopSign:
    """Tells the trials that the search ends, and which of them scores the untrained encoder of its shape.

    Args:
        scored: The trials that have, by the shape's name.
    """

    def __init__(self, scored: Mapping[str, str]) -> None:
        self._raised = False
        self._scoring = dict(scored)

    def put_up(self) -> None:
        """From now on no trial goes on."""
        self._raised = True

    def is_up(self) -> bool:
        """Whether it is."""
        return self._raised

    def is_first(self, shape: str, trial: str) -> bool:
        """Whether a trial scores a shape's untrained encoder; once more where its process has died meanwhile."""
        return self._scoring.setdefault(shape, trial) == trial


def stop_sign(past: Iterable[Trial]) -> Any:
    """Makes the ``StopSign`` of a search.

    Args:
        past: What is known already.
    """
    return StopSign.remote({shape_name(Cell(one.values, one.seed)): one.name for one in past if one.random})  # type: ignore[attr-defined]


def shape_name(cell: Cell) -> str:
    """Names what an untrained encoder's score depends on, of all that a search varies."""
    return json.dumps([encoder_part(cell.values), cell.seed], sort_keys=True)


class PretrainingTrial(ray.tune.Trainable):
    """What Tune drives: each ``step`` lets the run go on to its next probe and reports the score.

    A trial that the journal knows reports first what it has reported then, so that the scheduler and the sampler learn
    it again; one that had ended ends there, another goes on from its checkpoint.
    """

    def setup(self, config: dict[str, Any], study: Study | None = None) -> None:
        """Begins a trial; the process may have done others."""
        assert study is not None
        self._study = study
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begins another trial in this process, which has imported all that it needs."""
        if not self._end():
            return False
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """Ends the trial, which does not go on."""
        self._end()

    def step(self) -> dict[str, Any]:
        """The next report of the trial; one that has failed says why."""
        try:
            return self._report()
        except Exception as error:
            # Anything can go wrong in a run. Raised here, Tune would tell the scheduler without the reason.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return {"done": True, "failed": lines[-1] if lines else type(error).__name__}

    def _report(self) -> dict[str, Any]:
        if self._broken:
            raise self._broken
        if self._past:
            step, score = self._past.pop(0)
            # How it had ended, which it has at its last report.
            end = self._known.state if self._known and not self._past else "running"
            told = self._told(step, score) | {"replayed": True, "stopped": end == "stopped"}
            return told | {"done": end == "finished"}
        if self._known and self._known.state == "failed":
            return {"done": True, "failed": self._known.reason}
        run = self._run
        assert run is not None
        run.go_on()
        while True:
            if ray.get(self._study.stop.is_up.remote()):
                # It ends with the driver's Ray, in the middle of a step, and goes on from its checkpoint.
                self._run = None
                return {"done": True, "aborted": True}
            for step, scores in run.scores(_POLL_S):
                if step == 0:
                    self._random = scores
                elif step <= self._last_step:
                    # Done again from a checkpoint before it; the journal has it.
                    run.go_on()
                else:
                    return self._probed(run, step, scores)

    def _probed(self, run: "_Run", step: int, scores: dict[str, float]) -> dict[str, Any]:
        if step == run.steps:
            run.finish()
        told = self._told(step, scores[self._study.objective])
        random, self._random = self._random, {}
        # As text: of a last result Tune makes one flat dictionary.
        told |= {"probes": json.dumps(scores), "random": json.dumps(random)}
        return told | {"done": step == run.steps}

    def _begin(self, config: dict[str, Any]) -> None:
        # Raised here, it would count as a death of this process, and be tried again.
        self._broken: Exception | None = None
        try:
            self._open(config)
        except Exception as error:
            self._run, self._broken = None, error

    def _open(self, config: dict[str, Any]) -> None:
        self._cell = self._study.cell(config)
        self._config = self._study.run_config(self._cell)
        self._random: dict[str, float] = {}
        self._steps = total_steps(self._config, self._study.images.train.num_samples)
        with torch.device("meta"):
            self._step_flops = step_flops(build_model(self._config)).training * self._config.batch.global_size
        self._known = self._study.past.get(self._cell.name)
        self._past = list(self._known.scores) if self._known else []
        self._last_step = self._past[-1][0] if self._past else 0
        self._spent = self._known.seconds if self._known else 0.0
        self._began = time.perf_counter()
        ended = self._known is not None and self._known.state != "running"
        if not ended and self._config.probe.at_start:
            # Each shape of an encoder is scored untrained once, by the trial that is first to ask.
            is_first = ray.get(self._study.stop.is_first.remote(shape_name(self._cell), self._cell.name))
            probe = self._config.probe.model_copy(update={"at_start": is_first})
            self._config = self._config.model_copy(update={"probe": probe})
        self._run = None if ended else _Run(self._study, self._config)

    def _end(self) -> bool:
        run, self._run = self._run, None
        return run is None or run.end()

    def _told(self, step: int, score: float) -> dict[str, Any]:
        return {
            "trial": self._cell.name,
            "step": step,
            SHARE: round(100 * step / self._steps),
            SCORE: score,
            "seconds": self._spent + time.perf_counter() - self._began,
            "flops": float(step * self._step_flops),
            "replayed": False,
        }


class _Run:
    """A pretraining run in a thread of this process, which waits at each of its probes."""

    def __init__(self, study: Study, config: Config):
        self._study, self._config = study, config
        self.steps = total_steps(config, study.images.train.num_samples)
        self._console = make_console()
        self._error: BaseException | None = None
        self._waiting: list[tuple[int, dict[str, float]]] = []
        self._thread = threading.Thread(target=self._do, daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Lets the run go on beyond the probes that it has shown."""
        self._console.judge.remote(self._shown)

    _shown = 0

    def scores(self, timeout_s: float) -> list[tuple[int, dict[str, float]]]:
        """The next probe's scores, if there are some in time.

        Raises:
            Exception: That with which the run failed.
        """
        self._thread.join(timeout_s)
        alive = self._thread.is_alive()
        found = ray.get(self._console.scored.remote())
        if found:
            self._shown = found[-1][0]
        elif not alive:
            raise self._error or RuntimeError("the run ended without a last score")
        return found

    def finish(self) -> None:
        """Waits for the run that has shown its last score.

        Raises:
            Exception: That with which the run failed.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def end(self) -> bool:
        """Ends the run at the probe at which it waits; says whether it did."""
        self._console.judge.remote(-1)
        self._thread.join(_ENDING_S)
        return not self._thread.is_alive()

    def _do(self) -> None:
        study, config = self._study, self._config
        try:
            store = Store(config.run.storage).child(config.run.name)
            refuse_other(store, "trial")
            result = open_run(config, study.images.train.digest)
            if result is not None:
                # It had ended when the search was killed, before the search knew.
                ray.get(self._console.score.remote(result["step"], result["scores"]))
                return
            folder = RunFolder(store)
            told = describe(config, study.images, study.parent_run_id)
            tags = {**told.tags, TAG: "trial", "mae.search": study.search}
            write_record(folder.path, told.model_copy(update={"tags": tags}), tracking_uri=study.tracking_uri)
            folder.push()
            options = {"judged": True, "followed": study.followed, "here": study.here, "lease": study.lease}
            pretrain(config, study.images, self._console, **options)
        except BaseException as error:
            self._error = error
        finally:
            # Who waits for a stop would wait for ever, and keep the console's process beside those of later trials.
            self._console.stop.remote()
