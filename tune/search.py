"""Searches a space of configurations for the best features: Ray Tune over pretraining runs, scored by a probe.

    python -m tune.search --config pipelines/recipes/digits.toml --space tune/spaces/mask_ratio_decoder_width.toml
    ray job submit --working-dir . -- python tune/search.py --config ... --space ...

Every trial is an ordinary pretraining run under the search's folder. The same ``run.name`` with ``--resume`` goes on
with a search that was ended or killed.
"""

import functools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
from pydantic import Field

from pipelines import provenance
from pipelines.cli import parse_with_file, to_toml
from pipelines.commands import command_line
from pipelines.config import Config, flat, identity, total_steps, warmup_note
from pipelines.errors import UserError, run_command
from pipelines.kinds import TAG, refuse_other
from pipelines.lease import Lease, hold
from pipelines.pretrain import Images, check, resolve
from pipelines.pretrain import main as pretrain_main
from pipelines.runs import finished_when
from pipelines.spool import Spool, redact
from pipelines.storage import Store
from pipelines.tracking import RUN_FILE, RunDescription, create_run, resolve_tracking_uri, send, shown_record
from pipelines.training.runfolder import RunFolder
from tune import parent
from tune.journal import Cell, Journal
from tune.report import said, standard_error, table, untrained
from tune.space import Space, check_points, load_space, with_values
from tune.trial import Ranked, Trial, best_score, ranking

# PyTorch, timm and Ray are imported in functions: who mistypes a flag need not wait seconds for them.
PROG = command_line("tune.search")
INTERRUPTED = 130  # the exit code of what Ctrl-C has ended
OBJECTIVES = {"linear": "probe/linear_top1", "knn": "probe/knn_top1"}


class Search(Config):
    """Searches a space of configurations for the best features; every other flag is one of the pretraining runs."""

    space: str = ""
    """TOML file of what varies: see tune/spaces."""
    samples: int = Field(default=16, ge=1)
    """Points of the space to try; of the sampler grid: points a range is cut into."""
    sampler: Literal["random", "grid", "optuna"] = "random"
    """How points are chosen; optuna learns from the trials before (TPE)."""
    seeds: int = Field(default=1, ge=1)
    """Trainings of each point, ranked by their mean."""
    objective: str = "linear"
    """What is sought: top-1 of the linear probe (linear) or of nearest neighbours (knn) on a validation split."""
    reports: int = Field(default=4, ge=1, le=50)
    """Probes of a whole trial, evenly spread: where it can be stopped."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha: the worse trials end at each rung; none: all are trained to the end."""
    reduction: int = Field(default=2, ge=2)
    """Of asha: one trial in so many goes on beyond a rung."""
    concurrent: int = Field(default=0, ge=0)
    """Trials at once, at most; 0: as many as fit."""
    resume: bool = False
    """Go on with the search of this name."""
    retry_failed: bool = False
    """With resume: train those again that failed."""
    final: bool = False
    """Train the best configuration longer at the end, and read the test set (probe.test) once."""
    final_factor: float = Field(default=4.0, gt=0)
    """How much longer."""

    @pydantic.field_validator("objective")
    @classmethod
    def _is_a_probe(cls, value: str) -> str:
        if "loss" in value:
            raise ValueError(
                "the reconstruction loss cannot rank configurations: it falls with easier masks and targets, not with "
                "better features (grid masking has a lower loss and worse features: the paper, table 1f); "
                "choose linear or knn"
            )
        if value not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}")
        return value


def pretraining(search: Search) -> Config:
    """The pretraining configuration that a search varies, as the user gave it."""
    return Config.model_validate(search.model_dump(include=set(Config.model_fields)))


def trial_config(search: Search, num_samples: int) -> Config:
    """What a trial has where the space says nothing: no test data, no pictures, and as many probes as are asked for.

    Of untrained encoders each shape is scored once, whichever trial does it.

    Args:
        search: The search, resolved.
        num_samples: Images of an epoch.
    """
    config = pretraining(search)
    epochs = total_steps(config, num_samples) * config.batch.global_size / num_samples
    store = Store(config.run.storage).child(config.run.name)
    return parent.trial_config(config, store, epochs / search.reports, at_start=config.probe.at_start)


def cells(search: Search, space: Space) -> list[Cell]:
    """The trials of a search whose points do not depend on their scores; all seeds of a point together."""
    points = space.grid(search.samples) if search.sampler == "grid" else space.random(search.samples, search.run.seed)
    return [Cell(values, search.run.seed + seed) for values in points for seed in range(search.seeds)]


def definition(search: Search, space: Space, images: Images) -> dict[str, Any]:
    """What makes a search the same search: another one must not go on in its folder."""
    assert images.labelled is not None
    config, varied = pretraining(search), {axis.key for axis in space.axes}
    values = identity(config, images.train.digest) | parent.probed(config, images.labelled)
    base = {key: value for key, value in values.items() if key not in varied}
    asked = {
        key: getattr(search, key) for key in ("sampler", "seeds", "objective", "reports", "scheduler", "reduction")
    }
    return {"space": space.digest, **asked, "probe.early_share": search.probe.early_share, **base}


def open_search(store: Store, search: Search, wanted: dict[str, Any]) -> None:
    """Makes the search's folder, or finds the one to go on with.

    Raises:
        UserError: There is one already, or none, or another.
    """
    name = search.run.name
    if not store.exists("search.json"):
        if search.resume:
            raise UserError(f"no search '{name}' to resume in {search.run.storage}")
        store.write("search.json", json.dumps(wanted, indent=2))
        return
    if not search.resume:
        raise UserError(f"search '{name}' exists: go on with it with --resume, or choose another --run")
    parent.refuse_change(store, "search.json", f"search '{name}'", wanted)


def best_config(search: Search, best: Ranked) -> Config:
    """The recipe that a search has found: the user's, with the best values, and a name beside the search's."""
    values = with_values(pretraining(search), best.values).model_dump()
    values["run"] |= {"name": f"{search.run.name}-best"}
    return Config.model_validate(values)


def describe(search: Search, space: Space, images: Images) -> RunDescription:
    """What MLflow is told of the search itself."""
    asked = {key: getattr(search, key) for key in type(search).model_fields if key not in Config.model_fields}
    axes = {f"space.{axis.key}": f"{axis.values or (axis.low, axis.high, axis.step)}" for axis in space.axes}
    return RunDescription(
        experiment=search.run.experiment,
        name=search.run.name,
        params={**asked, **axes, **flat(pretraining(search))},
        tags={TAG: "search", **provenance.tags()},
        datasets=provenance.dataset_inputs({"train": images.train, "probe_train": images.labelled}),
    )


@dataclass(frozen=True)
class _Ready:
    """A search that has been found to make sense.

    Args:
        search: Every path absolute.
        space: What varies.
        images: The data of its trials.
        config: Of its trials, where they do not differ.
        cells: Its trials, where no sampler chooses them as it goes.
    """

    search: Search
    space: Space
    images: Images
    config: Config
    cells: list[Cell]

    @functools.cached_property
    def validation_size(self) -> int:
        """Images on which a trial's last probe scores; the fewest over the seeds."""
        labelled, config = self.images.labelled, self.config
        assert labelled is not None
        seeds = range(config.run.seed, config.run.seed + self.search.seeds)
        return min(parent.validation_size(config, labelled, seed) for seed in seeds)

    @property
    def planned(self) -> int:
        """Trials in all."""
        points = min(self.search.samples, self.space.size or self.search.samples)
        return len(self.cells) or points * self.search.seeds


def read_search(argv: Sequence[str] | None = None) -> _Ready:
    """Reads the command, and finds what is wrong before anything starts.

    Raises:
        UserError: Something is.
    """
    search = parse_with_file(Search, prog=PROG, argv=argv, default=Search())
    search = Search.model_validate({**search.model_dump(), **resolve(pretraining(search)).model_dump()})
    if not search.space:
        raise UserError(f"no space is given: name one with --space tune/spaces/FILE.toml (see {PROG} --help)")
    refuse_other(Store(search.run.storage).child(search.run.name), "search")
    train, labelled, test = check(pretraining(search))
    if labelled is None:
        raise UserError("probe.train is not given: a search is scored by a probe, which needs labelled shards")
    if search.final and test is None:
        raise UserError("--final reads the test set once: give it with --probe.test")
    config = trial_config(search, train.num_samples)
    space = load_space(search.space, config)
    found = cells(search, space) if search.sampler != "optuna" else []
    check_points(config, [cell.values for cell in found] or space.grid(2))
    return _Ready(search, space, Images(train, labelled, None), config, found)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    started = time.perf_counter()
    ready = read_search(argv)

    from pipelines.ray_session import connect

    search = ready.search
    store = Store(search.run.storage).child(search.run.name)
    parent.refuse_other_trials(store, ready.cells)
    if search.final:
        refuse_other(Store(search.run.storage).child(_final_name(search)), "run")
    known = [trial.state for trial in Journal(store).trials.values()]
    when = finished_when(store) if len(known) >= ready.planned and "running" not in known else ""
    with hold(store, f"search '{search.run.name}'", "search") as lease, connect(address=search.scale.address):
        ended, ranked, text = _run(ready, store, lease)
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{text}\n")
    how = f"had finished already{when}" if when else f"{'finished' if ended else 'ended'} in {minutes:.1f} min"
    print(f"search '{search.run.name}' {how}")
    if not ended:
        print(f"go on with it: {PROG} --resume and the same arguments")
        return INTERRUPTED
    if not ranked or ranked[0].score is None:
        print("error: no trial has a score: see the reasons above", file=sys.stderr)
        return 1
    print(f"best       {store.path('best.toml')} (a recipe for pipelines.pretrain --config)")
    uri = resolve_tracking_uri(search.run.storage)
    if line := shown_record(RunFolder(store).path, uri):
        print(line)
    return final(search, ranked[0], store) if search.final else 0


def _run(ready: _Ready, store: Store, lease: Lease) -> tuple[bool, list[Ranked], str]:
    """Runs the trials, with the search's own record.

    Returns:
        Whether all have ended; the configurations, best first; and what is to be said of them.
    """
    # Tune and its samplers take seconds to import: not for a mistake in the command.
    import ray

    from tune.running import fitted, listed, optuna, run_trials, share
    from tune.trainable import Study, stop_sign

    search, space, config = ready.search, ready.space, ready.config
    config = fitted(config)
    room = share(config, search.concurrent)
    open_search(store, search, definition(search, space, ready.images))
    values = config.model_dump()
    values["scale"] |= {"reading_cpus": room.reading_cpus, "threads": room.threads}
    folder, journal = RunFolder(store), Journal(store)
    if search.retry_failed:
        journal.forget_failed()
    uri = resolve_tracking_uri(search.run.storage)
    run_id = create_run(folder.path, describe(search, space, ready.images), tracking_uri=uri)
    folder.write("config.toml", to_toml(search, f"The search '{search.run.name}'. Feed it back with --config."))
    folder.push()
    steps = total_steps(config, ready.images.train.num_samples)
    known = f"; {len(journal.trials)} are known already" if journal.trials else ""
    if (top := best_score(ranking(journal.trials.values()))) is not None:
        known += f", the best of them at {top:.2f} %"
    print(f"search '{search.run.name}': {ready.planned} trials of {steps:,} steps, {room.concurrent} at once{known}",
          flush=True)  # fmt: skip
    if note := warmup_note(config, ready.images.train.num_samples):
        print(f"warning: {note}", flush=True)
    study = Study(
        Config.model_validate(values),
        ready.images,
        None if ready.cells else space,
        OBJECTIVES[search.objective],
        search.run.name,
        redact(uri),
        run_id,
        store.is_local,
        dict(journal.trials),
        stop_sign(journal.trials.values()),
        lease,
    )
    with parent.own_record(folder, store.is_local) as spool:
        spool.artifact("config.toml")
        ended = run_trials(
            study,
            journal,
            param_space=listed(ready.cells) if ready.cells else {},
            searcher=None if ready.cells else optuna(space, journal, search.seeds, search.run.seed),
            scheduler=_scheduler(search),
            num_samples=1 if ready.cells else ready.planned,
            planned=ready.planned,
            concurrent=room.concurrent,
            folder=store.location,
            learned=lambda: tell_best(journal, spool),
        )
        ranked = ranking(journal.trials.values())
        text = _told(ready, journal, ranked)
        if ended:
            tell_best(journal, spool, ended=True)
            _conclude(ready, journal, ranked, text, folder, spool)
        if not ended:
            # What was being trained ends here, and is sent to the record as that.
            ray.shutdown()
            parent.end_running(journal, store)
        spool.status("FINISHED" if ended else "KILLED")
    return ended, ranked, text


def _told(ready: _Ready, journal: Journal, ranked: Sequence[Ranked]) -> str:
    """The table, and below it how far it is to be believed."""
    search, trials = ready.search, journal.trials.values()
    encoders = untrained(trials, OBJECTIVES[search.objective])
    return "\n".join([table(ranked, encoders, search.objective), *said(ranked, encoders, ready.validation_size)])


def tell_best(journal: Journal, spool: Spool, *, ended: bool = False) -> None:
    """A point of the search's own record, over the number of reports: the score of what its table has first.

    Who is first may change after the last report, by the state of a trial: the end has a point of its own.
    """
    reports = sum(len(trial.scores) for trial in journal.trials.values())
    if (top := best_score(ranking(journal.trials.values()))) is not None:
        spool.metrics(reports + ended, {"search/best": top})


def _scheduler(search: Search) -> Any:
    from ray.tune.schedulers import FIFOScheduler

    from tune.scheduler import asha

    return asha(search.reports, search.reduction) if search.scheduler == "asha" else FIFOScheduler()


def _conclude(
    ready: _Ready, journal: Journal, ranked: Sequence[Ranked], text: str, folder: RunFolder, spool: Spool
) -> None:
    """Writes the best recipe, the table and the pictures, and hands them to the record."""
    from tune import pictures

    search, trials = ready.search, list(journal.trials.values())
    _tag_trials(ready, trials, ranked)
    folder.write("table.txt", text + "\n")
    spool.artifact("table.txt")
    if not ranked or ranked[0].score is None:
        return
    num = ready.validation_size
    told = f"Found by the search '{search.run.name}': {ranked[0].score:.2f} % on its validation split, n = {num}."
    folder.write("best.toml", to_toml(best_config(search, ranked[0]), told))
    spool.artifact("best.toml")
    (folder.path / "pictures").mkdir(exist_ok=True)
    keys = [axis.key for axis in ready.space.axes]
    # Scores that differ by less look alike: the width of the 95 % interval of one of them.
    noise = 4 * standard_error(ranked[0].score, num)
    drawn = {
        "stopping": lambda path: pictures.stopping(trials, path, noise),
        "cost": lambda path: pictures.cost(trials, path, noise),
    }
    for key in keys:
        drawn[f"over-{key}"] = lambda path, key=key: pictures.score_over(trials, key, path, noise)
    if len(keys) > 1:
        drawn["heat-map"] = lambda path: pictures.heat_map(trials, keys[0], keys[1], path, noise)
    for name, draw in drawn.items():
        draw(folder.path / "pictures" / f"{name}.png")
        spool.artifact(f"pictures/{name}.png", "pictures")


def _tag_trials(ready: _Ready, trials: Sequence[Trial], ranked: Sequence[Ranked]) -> None:
    """Writes into the record of each trial how it ended, and the place of its configuration in the table."""
    runs = Store(ready.config.run.storage)
    places = {tuple(sorted(one.values.items())): place for place, one in enumerate(ranked, 1) if one.score is not None}
    for trial in trials:
        store = runs.child(trial.name)
        if not store.exists(RUN_FILE):
            continue  # it failed before it had a record
        tags = {"mae.state": trial.state}
        if place := places.get(tuple(sorted(trial.values.items()))):
            tags["mae.rank"] = str(place)
        folder = RunFolder(store)
        spool = Spool(folder.path)
        spool.tags(tags)
        spool.close()
        if not store.is_local:
            # On a disk the search's own follower sends it.
            send(folder.path, timeout_s=30.0)
            folder.push()


def _final_name(search: Search) -> str:
    return f"{search.run.name}-final"


def final(search: Search, best: Ranked, store: Store) -> int:
    """Trains the best configuration longer, as a run of its own, which reads the test set at its end."""
    values = best_config(search, best).model_dump()
    values["run"] |= {"name": _final_name(search)}
    longer = {key: value * search.final_factor for key, value in values["train"].items() if key in ("steps", "epochs")}
    values["train"] |= {"epochs": longer["epochs"], "steps": math.ceil(longer["steps"])}
    text = to_toml(Config.model_validate(values), f"The best of the search '{search.run.name}', trained longer.")
    store.write("final.toml", text)
    print(f"training the best configuration {search.final_factor:g} times as long: {values['run']['name']}", flush=True)
    local = store.local("final.toml") if store.is_local else None
    if local is None:
        local = RunFolder(store).path / "final.toml"
        local.write_text(text)
    return pretrain_main(["--config", os.fspath(local)])


if __name__ == "__main__":
    run_command(main)
