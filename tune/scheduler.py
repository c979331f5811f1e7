"""Which trials go on: Tune's schedulers, with every decision in the journal before the trial hears of it."""

import json
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from tune.journal import Journal
from tune.trainable import SCORE, SHARE, Study


class JournalingScheduler(FIFOScheduler):
    """Writes down what an inner scheduler decides; what had been decided before a restart stands.

    Args:
        inner: The scheduler.
        journal: Where it is written.
        study: Says which trial is which.
    """

    @property
    def supports_buffered_results(self) -> bool:
        """No: a trial waits for each decision."""
        return False

    def __init__(self, inner: TrialScheduler, journal: Journal, study: Study):
        super().__init__()
        self._inner, self._journal, self._study = inner, journal, study
        # Seconds of this search that a trial had taken when its process died; what came before it counts by itself.
        self._died: dict[str, float] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Passed on."""
        return self._inner.set_search_properties(metric, mode, **spec)

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Notes that the trial has begun, or begins again because its process has died."""
        cell = self._study.cell(trial.config)
        if cell.name not in self._journal.trials or cell.name in self._died:
            self._journal.begin(cell)
        self._inner.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Decides, and writes it down."""
        if not result["replayed"] and self._is_known(trial, result):
            return TrialScheduler.CONTINUE
        decision = self._inner.on_trial_result(tune_controller, trial, result)
        if result["replayed"]:
            return TrialScheduler.STOP if result["stopped"] else TrialScheduler.CONTINUE
        self._note(trial, result, "stopped" if decision == TrialScheduler.STOP else "running")
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """Notes the last score of a trial that was not stopped."""
        if result.get("aborted"):
            return
        cell = self._study.cell(trial.config)
        known = self._journal.trials[cell.name]
        if reason := result.get("failed"):
            if known.state != "failed":
                self._journal.fail(cell, reason)
            self._inner.on_trial_error(tune_controller, trial)
            return
        self._inner.on_trial_complete(tune_controller, trial, result)
        if known.state == "running" and not result["replayed"] and not self._is_known(trial, result):
            self._note(trial, result, "finished")

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Notes that a trial's own process has died: what its run fails with comes as a result.

        Tune may begin it again; then it is added once more.
        """
        cell = self._study.cell(trial.config)
        before = self._study.past.get(cell.name)
        self._died[cell.name] = self._journal.trials[cell.name].seconds - (before.seconds if before else 0.0)
        self._journal.fail(cell, "its process died")
        self._inner.on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Passed on."""
        self._inner.on_trial_remove(tune_controller, trial)

    def _is_known(self, trial: TuneTrial, result: dict[str, Any]) -> bool:
        """Whether a probe is done again, from a checkpoint before it."""
        scores = self._journal.trials[self._study.cell(trial.config).name].scores
        return "step" in result and bool(scores) and result["step"] <= scores[-1][0]

    def _note(self, trial: TuneTrial, result: dict[str, Any], state: Any) -> None:
        cell, probes = self._study.cell(trial.config), json.loads(result["probes"])
        seconds = self._died.get(cell.name, 0.0) + result["seconds"]
        random = json.loads(result["random"])
        self._journal.report(cell, result["step"], result[SCORE], seconds, result["flops"], state, probes, random)


def asha(reports: int, reduction: int) -> TrialScheduler:
    """ASHA (Li et al., 2020): at each rung the worse trials end.

    Args:
        reports: Probes of a whole trial; the first rung is at the first of them.
        reduction: One in so many goes on beyond a rung.
    """
    return ASHAScheduler(time_attr=SHARE, max_t=100, grace_period=max(1, 100 // reports), reduction_factor=reduction)
