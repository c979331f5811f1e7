"""The paper's ablations as commands: every cell of a table is a pretraining run, scored by a probe.

    python -m tune.ablate --table 1f --config pipelines/recipes/cifar10_cpu.toml --seeds 3
    ray job submit --working-dir . -- python tune/ablate.py --table 1f --config ... --seeds 3

``--recipe FILE`` is ``--config FILE``. All tables of a recipe share a folder, ``ablate-`` and the recipe's
``run.name``: what one has trained, another does not train again, and the same command goes on with what was ended or
killed. Table 2 needs no data, and no Ray.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines import provenance
from pipelines.cli import parse_with_file, to_toml
from pipelines.commands import command_line
from pipelines.config import Config, flat, identity, total_steps, warmup_note
from pipelines.errors import UserError, run_command
from pipelines.kinds import TAG, refuse_other
from pipelines.lease import Lease, hold
from pipelines.pretrain import Images, check, resolve
from pipelines.runs import finished_when
from pipelines.spool import redact
from pipelines.storage import Store
from pipelines.tracking import RunDescription, create_run, resolve_tracking_uri, shown_record
from pipelines.training.runfolder import RunFolder
from tune import parent, tables
from tune.claims import judge
from tune.journal import Cell, Journal
from tune.tables import TABLES, Row

if TYPE_CHECKING:
    from tune.sections import Measured

# PyTorch, timm and Ray are imported in functions: who mistypes a flag need not wait seconds for them.
PROG = command_line("tune.ablate")
INTERRUPTED = 130  # the exit code of what Ctrl-C has ended
LINEAR, KNN = "probe/linear_top1", "probe/knn_top1"
_FILE = "ablation.json"


class Ablation(Config):
    """Trains the cells of a table of the paper's ablations; every other flag is one of the pretraining runs."""

    table: Literal["", "1a", "1b", "1c", "1d", "1e", "1f", "fig5", "fig7", "fig9", "table2"] = ""
    """1a, 1b: decoder depth, width; 1c: mask tokens in the encoder; 1d: target; 1e: augmentation; 1f: mask; fig5: mask
    ratio; fig7: schedule; fig9: partial fine-tuning, by pipelines.transfer; table2: seconds a step."""
    rows: tuple[str, ...] = ()
    """Some of the table's rows, by what the table calls them ("50 %" "75 %"); empty: all."""
    seeds: int = Field(default=1, ge=1)
    """Trainings of each cell; with several, claims are decided by the interval of a difference."""
    concurrent: int = Field(default=0, ge=0)
    """Trainings at once, at most; 0: as many as fit."""
    retry_failed: bool = False
    """Train those again that failed."""
    transfer: str = ""
    """Of fig9: TOML file of the transfer, as pipelines/recipes/transfer; empty: the paper's recipe."""
    archs: tuple[str, ...] = ("vit_small_patch16_224", "vit_base_patch16_224")
    """Of table2: plain ViTs of timm."""
    images: int = Field(default=16, ge=1)
    """Of table2: images a step, of 224 x 224 pixels."""
    turns: int = Field(default=5, ge=1)
    """Of table2: steps of each kind that count."""


@dataclass(frozen=True)
class _Ready:
    """A table that has been found to make sense.

    Args:
        ablation: Every path absolute.
        images: The data of its trainings.
        config: Of its trainings, where they do not differ.
        rows: Of the table; none of table2.
    """

    ablation: Ablation
    images: Images
    config: Config
    rows: list[Row]

    @property
    def store(self) -> Store:
        """The folder of all tables of the recipe."""
        return _store(self.ablation)

    @property
    def title(self) -> str:
        """Of the table."""
        return _title(self.ablation.table, TABLES[self.ablation.table].title)

    def cell(self, row: Row, seed: int) -> Cell:
        """What a row trains."""
        return Cell(tables.changes(self.config, row), self.config.run.seed + seed)

    def cells(self) -> list[Cell]:
        """All of the table, each once; all seeds of a row together."""
        # Rows of figure 9 tune one and the same encoder.
        seeds = 1 if self.ablation.table == "fig9" else self.ablation.seeds
        found = [self.cell(row, seed) for row in self.rows if row.values is not None for seed in range(seeds)]
        return list({cell.name: cell for cell in found}.values())


def _title(table: str, about: str) -> str:
    return f"{'Figure ' + table[3:] if table.startswith('fig') else 'Table ' + table.removeprefix('table')}: {about}"


def _name(ablation: Ablation) -> str:
    return f"ablate-{ablation.run.name}"


def _store(ablation: Ablation) -> Store:
    return Store(ablation.run.storage).child(_name(ablation))


def pretraining(ablation: Ablation) -> Config:
    """The pretraining configuration that a table varies, as the user gave it."""
    return Config.model_validate(ablation.model_dump(include=set(Config.model_fields)))


def read_ablation(argv: Sequence[str] | None = None) -> Ablation:
    """Reads the command; every path absolute.

    Raises:
        UserError: An unknown key or flag, or a value that does not fit.
    """
    arguments = sys.argv[1:] if argv is None else argv
    # A table is made for a recipe: --recipe FILE is --config FILE.
    arguments = [re.sub(r"^--recipe(?==|$)", "--config", argument) for argument in arguments]
    ablation = parse_with_file(Ablation, prog=PROG, argv=arguments, default=Ablation())
    if not ablation.table:
        names = ", ".join([*TABLES, "table2"])
        raise UserError(f"no table is given: name one with --table: {names} (see {PROG} --help)")
    return Ablation.model_validate({**ablation.model_dump(), **resolve(pretraining(ablation)).model_dump()})


def prepare(ablation: Ablation) -> _Ready:
    """Finds what is wrong before anything starts.

    Raises:
        UserError: Something is.
    """
    refuse_other(_store(ablation), "ablation")
    train, labelled, test = check(pretraining(ablation))
    if labelled is None:
        raise UserError("probe.train is not given: a table is scored by a probe, which needs labelled shards")
    if ablation.table == "fig9" and test is None:
        raise UserError("fig9 tunes on probe.train and reads the test set: give it with --probe.test")
    if ablation.transfer and not Path(ablation.transfer).is_file():
        raise UserError(f"no transfer file '{ablation.transfer}'")
    config = parent.trial_config(pretraining(ablation), _store(ablation), 0.0)
    rows = tables.chosen(tables.fitting(ablation.table, config), ablation.rows)
    return _Ready(ablation, Images(train, labelled, test), config, rows)


def definition(ready: _Ready) -> dict[str, Any]:
    """What makes cells comparable, whichever table has them: the recipe and how it is probed."""
    assert ready.images.labelled is not None
    return identity(ready.config, ready.images.train.digest) | parent.probed(ready.config, ready.images.labelled)


def describe(ablation: Ablation, images: Images | None = None) -> RunDescription:
    """What MLflow is told of what stands above the cells."""
    data = {"train": images.train, "probe_train": images.labelled} if images else {}
    return RunDescription(
        experiment=ablation.run.experiment,
        name=_name(ablation),
        params=flat(pretraining(ablation)),
        tags={TAG: "ablation", **provenance.tags()},
        datasets=provenance.dataset_inputs(data),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    started = time.perf_counter()
    ablation = read_ablation(argv)
    refuse_other(_store(ablation), "ablation")
    if ablation.table == "table2":
        return _table2(ablation)
    ready = prepare(ablation)
    from pipelines.ray_session import connect

    parent.refuse_other_trials(ready.store, ready.cells())
    store, who = ready.store, f"'{_name(ablation)}'"
    if store.exists(_FILE):
        parent.refuse_change(store, _FILE, who, definition(ready))
    journal = Journal(store)
    if ablation.retry_failed:
        journal.forget_failed()
    ended = {name for name, trial in journal.trials.items() if trial.state in ("finished", "failed")}
    left = [cell for cell in ready.cells() if cell.name not in ended]
    print(f"{ready.title}: {len(ready.cells())} trainings, {len(left)} of them still to be done", flush=True)
    if note := warmup_note(ready.config, ready.images.train.num_samples):
        print(f"warning: {note}", flush=True)
    with ExitStack() as stack:
        if left:
            lease = stack.enter_context(hold(store, who, "ablation"))
            stack.enter_context(connect(address=ablation.scale.address))
            if not _train(ready, journal, left, lease):
                print(f"{who} ended: the same command goes on with it")
                return INTERRUPTED
        if ablation.table == "fig9":
            (cell,) = ready.cells()
            if (trial := journal.trials[cell.name]).state == "failed":
                raise UserError(f"the recipe's run has failed: {trial.reason}; train it again with --retry-failed")
            measured = _tuned(ready, cell)
        else:
            measured = [measure(ready, row, journal) for row in ready.rows]
    _publish(ready, measured)
    took = f"{(time.perf_counter() - started) / 60:.1f} min"
    print(f"{who}: {took if left else f'had finished already{finished_when(store)}'}")
    if not any(one.scores for one in measured):
        print("error: no cell has a score", file=sys.stderr)
        return 1
    return 0


def _train(ready: _Ready, journal: Journal, cells: Sequence[Cell], lease: Lease) -> bool:
    """Trains cells; says whether all have ended."""
    # They take seconds to import: not for a mistake in the command, nor where nothing is to be trained.
    import ray
    from ray.tune.schedulers import FIFOScheduler

    from tune.running import fitted, listed, run_trials, share
    from tune.trainable import Study, stop_sign

    store, ablation, folder = ready.store, ready.ablation, RunFolder(ready.store)
    config = fitted(ready.config)
    room = share(config, ablation.concurrent)
    store.write(_FILE, json.dumps(definition(ready), indent=2))
    values = config.model_dump()
    values["scale"] |= {"reading_cpus": room.reading_cpus, "threads": room.threads}
    uri = resolve_tracking_uri(ablation.run.storage)
    run_id = create_run(folder.path, describe(ablation, ready.images), tracking_uri=uri)
    folder.write("config.toml", to_toml(ablation, f"The ablation {_name(ablation)}. Feed it back with --config."))
    folder.push()
    study = Study(
        Config.model_validate(values),
        replace(ready.images, test=None),
        None,
        LINEAR,
        _name(ablation),
        redact(uri),
        run_id,
        store.is_local,
        dict(journal.trials),
        stop_sign(()),
        lease,
    )
    with parent.own_record(folder, store.is_local) as spool:
        spool.artifact("config.toml")
        ended = run_trials(
            study,
            journal,
            param_space=listed(cells),
            searcher=None,
            scheduler=FIFOScheduler(),
            num_samples=1,
            planned=len(journal.trials.keys() | {cell.name for cell in cells}),
            concurrent=room.concurrent,
            folder=store.location,
            learned=lambda: None,
        )
        if not ended:
            # What was being trained ends here, and is sent to the record as that.
            ray.shutdown()
            parent.end_running(journal, store)
        spool.status("FINISHED" if ended else "KILLED")
    return ended


def measure(ready: _Ready, row: Row, journal: Journal) -> "Measured":
    """A row with what the journal has of it."""
    from tune.sections import Measured

    changes = tables.changes(ready.config, row)
    known = [journal.trials.get(ready.cell(row, seed).name) for seed in range(ready.ablation.seeds)]
    trials = [trial for trial in known if trial and row.values is not None]
    finished = [trial for trial in trials if trial.state == "finished" and trial.score is not None]
    return Measured(
        row,
        row.values is not None and not changes,
        {trial.seed: trial.score for trial in finished if trial.score is not None},
        {trial.seed: trial.probes[KNN] for trial in finished if KNN in trial.probes},
        max((trial.flops for trial in finished), default=0.0),
        next((trial.reason for trial in trials if trial.state == "failed"), ""),
    )


def _tuned(ready: _Ready, cell: Cell) -> "list[Measured]":
    """Figure 9, from the recipe's run."""
    from tune import partial

    images = ready.images
    assert images.labelled is not None
    assert images.test is not None
    return partial.tune(
        cell.name,
        ready.config.run.storage,
        pretraining(ready.ablation),
        ready.rows,
        file=ready.ablation.transfer,
        seeds=ready.ablation.seeds,
        steps=total_steps(ready.config, images.train.num_samples),
        digests={"train": images.labelled.digest, "test": images.test.digest},
    )


def _publish(ready: _Ready, measured: "Sequence[Measured]") -> None:
    """Prints the table and what it shows, draws it, and writes its section."""
    from tune import sections

    ablation, table = ready.ablation, TABLES[ready.ablation.table]
    score = "partially tuned" if ablation.table == "fig9" else "linear"
    rows = sections.lines(measured, score)
    by_label = {one.row.label: one.scores for one in measured}
    claims = [claim.among(by_label) for claim in table.claims] if ablation.rows else table.claims
    said = sections.said([judge(claim, by_label) for claim in claims], table.unjudged)
    said += [f"{one.row.label}: failed: {one.failed}" for one in measured if one.failed]
    labelled = ready.images.labelled
    assert labelled is not None
    steps = total_steps(ready.config, ready.images.train.num_samples)
    seeds = f"{ablation.seeds} seeds, +- the 95 % interval of the mean" if ablation.seeds > 1 else "one seed"
    probe = ready.config.probe
    looked_at = min(probe.samples or labelled.num_samples, labelled.num_samples)
    split = f"a validation split, {100 * probe.val_share:g} % of {looked_at:,} labelled images"
    split = "the test images" if ablation.table == "fig9" else split
    setting = (
        f"The recipe `{ablation.run.name}`: {ready.config.model.arch}, {ready.images.train.num_samples:,} images of "
        f"{ready.config.data.image_size[0]}x{ready.config.data.image_size[1]} pixels, {steps:,} steps of "
        f"{ready.config.batch.global_size}; {seeds}. Top-1 in percent on {split}. Sizes are the paper's as shares of "
        "its default, where the recipe's default is another. The paper's numbers are of ViT-L/16 on ImageNet-1K, "
        "800 epochs."
    )
    print(f"\n{ready.title}\n{parent.aligned(rows)}\n\n{setting}\n")
    title = f"{ready.title} ({ablation.run.name})"
    _keep(
        ablation,
        ready.title,
        setting,
        rows,
        said,
        lambda path: sections.draw_ablation(title, measured, score, path),
        ready.images,
    )


def _keep(
    ablation: Ablation,
    title: str,
    setting: str,
    rows: Sequence[Sequence[str]],
    said: Sequence[str],
    draw: Callable[[Path], None],
    images: Images | None = None,
) -> None:
    """Says what a table shows, and keeps its section and its picture in the folder and in the record."""
    from tune import sections

    for one in said:
        print(f"- {one}")
    name, store = ablation.table, _store(ablation)
    folder = RunFolder(store)
    uri = resolve_tracking_uri(ablation.run.storage)
    create_run(folder.path, describe(ablation, images), tracking_uri=uri)
    (folder.path / "pictures").mkdir(exist_ok=True)
    draw(folder.path / "pictures" / f"{name}.png")
    folder.write(f"tables/{name}.md", sections.section(title, setting, rows, said, f"../pictures/{name}.png"))
    with parent.own_record(folder, followed=False) as spool:
        spool.artifact(f"tables/{name}.md", "tables")
        spool.artifact(f"pictures/{name}.png", "pictures")
        spool.status("FINISHED")
    print(f"\nsection    {store.path(f'tables/{name}.md')}\npicture    {store.path(f'pictures/{name}.png')}")
    if line := shown_record(folder.path, uri):
        print(line)


def _table2(ablation: Ablation) -> int:
    """Measures, and says what a step costs; returns the command's exit code."""
    import torch

    from tune import sections, timing

    if ablation.scale.gpu and not torch.cuda.is_available():
        raise UserError("--scale.gpu: PyTorch finds no GPU here")
    if ablation.scale.threads:
        torch.set_num_threads(ablation.scale.threads)
    device = torch.device("cuda" if ablation.scale.gpu else "cpu")
    timings = []
    for arch in ablation.archs:
        print(f"{arch}: {ablation.turns} turns of {len(timing.KINDS)} kinds of a step", flush=True)
        timings.append(
            timing.measure(arch, images=ablation.images, turns=ablation.turns, device=device,
                           precision=ablation.train.precision)
        )  # fmt: skip
    what = torch.cuda.get_device_name() if ablation.scale.gpu else f"{torch.get_num_threads()} CPU threads"
    rows = timing.lines(timings)
    setting = (
        f"Training steps of {ablation.images} images of 224 x 224 pixels, 75 % of them masked, on {what}; the kinds "
        "take turns. Theory: FLOPs of the step with mask tokens over those of the other."
    )
    title = _title("table2", "wall clock of a step")
    print(f"\n{title}\n{parent.aligned(rows)}\n\n{setting}\n")
    labels = [f"{one.arch}, {kind}" for one in timings for kind in timing.KINDS]
    points = {
        "measured": [(one.of_theory(kind) * one.theory[kind], None) for one in timings for kind in timing.KINDS],
        "theory": [(one.theory[kind], None) for one in timings for kind in timing.KINDS],
    }
    panels = {"speed-up of a step over mask tokens in the encoder": points}
    _keep(ablation, title, setting, rows, timing.verdicts(timings),
          lambda path: sections.draw(title, labels, panels, path))  # fmt: skip
    return 0


if __name__ == "__main__":
    run_command(main)
