"""Tables of the paper's ablations: what is trained, what is not trained again, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.processes import wait_until
from pipelines import transfer
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.spool import read_spool
from pipelines.storage import Store
from pipelines.transfer_config import units
from tests.tune.searches import RECIPE, journal, left_over
from tune.ablate import main, prepare, read_ablation
from tune.journal import Cell, Journal
from tune.partial import arguments, tune
from tune.sections import Measured, draw_ablation, lines
from tune.tables import TABLES, Row

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(shards, tmp_path):
    """Arguments of a table."""

    def write(table, *more):
        (tmp_path / "recipe.toml").write_text(RECIPE)
        data = ["--data.train", shards["train"], "--probe.train", shards["train"]]
        where = ["--run.storage", str(tmp_path / "runs"), "--run.name", "tiny"]
        return ["--table", table, "--config", str(tmp_path / "recipe.toml"), *data, *where, *more]

    return write


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_table_that_is_interrupted_says_so_and_goes_on(command, tmp_path):
    folder, log = tmp_path / "runs" / "ablate-tiny", tmp_path / "log.txt"
    asked = command("1c", "--train.steps", "600", "--checkpoint.every-steps", "60", "--concurrent", "1")
    arguments = [sys.executable, "-m", "tune.ablate", *asked]
    with log.open("w") as file:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_until(lambda: any(folder.glob("trials/*/checkpoints/*/manifest.json")), 200, log.read_text)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    (cut,) = folder.glob("trials/*/metrics.jsonl")
    told = [line for line, _ in read_spool(cut) if line]
    assert [line["status"] for line in told if "status" in line][-1] == "KILLED"
    assert 60 <= max(line["step"] for line in told if "step" in line) < 600

    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(one["state"], one["steps"]) for one in journal(folder).values()] == [("finished", [600])] * 2
    told = [line for line, _ in read_spool(cut) if line]
    assert [line["status"] for line in told if "status" in line][-1] == "FINISHED"
    losses = [line["step"] for line in told if "train/loss" in line.get("metrics", {})]
    assert losses == sorted(set(losses)) == list(range(6, 601, 6))


@pytest.mark.chaos  # for its minute alone
def test_a_cell_is_trained_once_whichever_tables_have_it(command, tmp_path, capfd):
    from mlflow import MlflowClient

    folder = tmp_path / "runs" / "ablate-tiny"
    assert main(command("1c")) == 0
    out = capfd.readouterr().out
    assert "Table 1c: mask token in the encoder: 2 trainings, 2 of them still to be done" in out
    first = journal(folder)
    assert [(one["values"], one["state"], one["steps"]) for one in first.values()] == [
        ({"model.encoder_mask_tokens": True}, "finished", [24]),
        ({}, "finished", [24]),
    ]
    assert left_over() == []
    known = Journal(Store(str(folder))).trials.values()
    assert all(set(trial.probes) >= {"probe/linear_top1", "probe/knn_top1"} for trial in known)

    section = (folder / "tables" / "1c.md").read_text()
    with_token, without = known
    assert f"| with mask token | {with_token.score:.2f} | {with_token.probes['probe/knn_top1']:.2f} | 1 |" in section
    assert f"| without mask token (the recipe) | {without.score:.2f} |" in section
    assert "| 84.2 | 59.6 | 3.3x |" in section
    assert "- one seed: mask tokens in the encoder hurt linear probing (" in section

    # Again: nothing is trained, and the table is the same.
    before = (folder / "journal.jsonl").read_text()
    assert main(command("1c")) == 0
    assert "2 trainings, 0 of them still to be done" in capfd.readouterr().out
    assert (folder / "journal.jsonl").read_text() == before
    assert (folder / "tables" / "1c.md").read_text() == section

    # Another table that has the recipe itself among its cells trains the other one alone.
    assert main(command("1a")) == 0
    assert "2 trainings, 1 of them still to be done" in capfd.readouterr().out
    assert [one["values"] for one in journal(folder).values()] == [
        *(one["values"] for one in first.values()),
        {"model.decoder_depth": 2},
    ]

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'mae-on-ray'")
    runs = client.search_runs([experiment.experiment_id])
    (above,) = [run for run in runs if run.data.tags["mae.kind"] == "ablation"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == above.info.run_id]
    assert {run.info.run_name for run in children} == set(journal(folder))
    assert {run.info.status for run in runs} == {"FINISHED"}
    for kind, names in (("tables", {"1a.md", "1c.md"}), ("pictures", {"1a.png", "1c.png"})):
        assert {Path(file.path).name for file in client.list_artifacts(above.info.run_id, kind)} == names

    # Cells of another recipe are not to be compared with these.
    with pytest.raises(UserError, match=r"'ablate-tiny' was begun with another optim.base_lr: 0.01, now 0.5"):
        main(command("1a", "--optim.base-lr", "0.5"))
    with pytest.raises(UserError, match=r"'ablate-tiny' was begun with another probe.knn_k: 20, now 5"):
        main(command("1a", "--probe.knn-k", "5"))


def test_finished_cells_are_not_trained_again(command, tmp_path, capfd):
    store = Store(str(tmp_path / "runs" / "ablate-tiny"))
    asked = command("1c", "--seeds", "2", "--optim.warmup-epochs", "40")
    ready = prepare(read_ablation(asked))
    known = Journal(store)
    for place, cell in enumerate(ready.cells()):
        probes = {"probe/linear_top1": 50.0 + place, "probe/knn_top1": 40.0}
        known.report(cell, 24, 50.0 + place, 1.0, 1e9, "finished", probes)
    # One that has failed is not tried again either, unless it is asked for.
    known.fail(ready.cells()[-1], "not finite")
    before = store.read("journal.jsonl")
    assert main(asked) == 0
    out = capfd.readouterr().out
    assert out.count("warning: optim.warmup_epochs 40 is no shorter than the run, of 3.2 epochs") == 1
    assert "4 trainings, 0 of them still to be done" in out
    assert store.read("journal.jsonl") == before
    assert not store.exists("trials")
    assert "| with mask token | 50.50 +- 6.35 | 40.00 +- 0.00 | 2 |" in store.read("tables/1c.md").decode()
    assert "- without mask token: failed: not finite" in out


@pytest.mark.parametrize(
    ("table", "more", "told"),
    [
        ("", [], "no table is given: name one with --table: 1a, 1b"),
        ("2", [], "'2'"),
        ("1a", ["--seeds", "0"], "seeds: Input should be greater than or equal to 1, found 0"),
        ("1a", ["--probe.train", ""], "a table is scored by a probe"),
        ("fig9", [], "give it with --probe.test"),
        ("1a", ["--transfer", "nowhere.toml"], "no transfer file 'nowhere.toml'"),
        ("1a", ["--model.decoder-width", "18"], "width 18"),
        ("1a", ["--model.decodr-depth", "2"], "did you mean --model.decoder-depth"),
    ],
)
def test_bad_input_is_one_line(command, table, more, told):
    with pytest.raises(UserError) as error:
        prepare(read_ablation(command(table, *more)))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_seeds_and_shared_cells_are_counted(command):
    ready = prepare(read_ablation(command("1c", "--seeds", "3", "--run.seed", "7")))
    assert [cell.seed for cell in ready.cells()] == [7, 8, 9, 7, 8, 9]
    shards = command("1c")[command("1c").index("--data.train") + 1]
    assert len(prepare(read_ablation(command("fig9", "--seeds", "3", "--probe.test", shards))).cells()) == 1


def test_a_journal_without_all_scores_still_reads(tmp_path):
    store, cell = Store(str(tmp_path)), Cell({}, 0)
    line = {"trial": cell.name, "values": {}, "seed": 0, "step": 4, "score": 50.0, "seconds": 1.0, "flops": 2.0}
    store.write("journal.jsonl", json.dumps({**line, "state": "running", "time": 0.0}) + "\n")
    known = Journal(store)
    assert known.trials[cell.name].probes == {}
    known.report(cell, 8, 60.0, 2.0, 4.0, "finished", {"probe/knn_top1": 40.0})
    assert Journal(store).trials == known.trials
    assert known.trials[cell.name].probes == {"probe/knn_top1": 40.0}


def test_a_table_says_what_has_failed_and_what_is_no_option(tmp_path):
    measured = [
        Measured(Row("raw", {}, 84.9, 73.5), True, {0: 50.0, 1: 52.0}, {0: 40.0, 1: 40.5}, 2e15),
        Measured(Row("PCA", {}, 84.6, 72.3, note="6 components"), False, {}, {}, 0.0, "not finite"),
        Measured(Row("token", None, 85.3, 71.6, note="no option"), False, {}, {}, 0.0),
    ]
    head, *rows = lines(measured, "linear")
    assert head == ["", "linear", "kNN", "seeds", "FLOPs", "paper: fine-tuned", "linear"]
    assert rows[0] == ["raw (the recipe)", "51.00 +- 12.71", "40.25 +- 3.18", "2", "1.00x", "84.9", "73.5"]
    assert rows[1] == ["PCA (6 components)", "failed", "-", "-", "-", "84.6", "72.3"]
    assert rows[2] == ["token (no option)", "-", "-", "-", "-", "85.3", "71.6"]
    draw_ablation("a table", measured, "linear", tmp_path / "table.png")
    draw_ablation("nothing yet", measured[1:], "linear", tmp_path / "none.png")
    assert (tmp_path / "none.png").stat().st_size > 1000


def test_figure_9_takes_each_number_of_blocks_from_the_transfer_that_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    config = Config.model_validate({
        "model": {"arch": "vit_tiny_patch16_224", "depth": 3},
        "scale": {"workers": 2, "cpus_per_worker": 0.5, "gpu": False},
        "probe": {"train": "cells/train", "test": "cells/test"},
        "run": {"storage": str(tmp_path)},
    })  # fmt: skip
    (tmp_path / "transfer.toml").write_text("[train]\nepochs = 2.0\n")
    file, digests = str(tmp_path / "transfer.toml"), {"train": "a", "test": "b"}
    asked = transfer.read_transfer(arguments("run", str(tmp_path), config, file, 2))
    assert (asked.train.epochs, asked.scale.workers, asked.scale.cpus_per_worker, asked.seeds) == (2.0, 2, 0.5, (0, 1))

    def finish(argv):
        for place, unit in enumerate(units(transfer.read_transfer(argv), 3)):
            # Beside each, one of other data, which is none of this figure.
            for name, told in ((f"t{place}", digests), (f"other{place}", {"train": "a", "test": "c"})):
                folder = tmp_path / "run" / "transfer" / name
                folder.mkdir(parents=True)
                (folder / "identity.json").write_text(json.dumps(transfer.identity(unit, 24, told)))
                seeds = [{"seed": seed, "test": place + seed / 10 + 50 * ("c" in told.values())} for seed in (0, 1)]
                (folder / "result.json").write_text(json.dumps({"seeds": seeds}))
        return 0

    monkeypatch.setattr(transfer, "main", finish)
    rows = TABLES["fig9"].rows(config)
    found = tune("run", str(tmp_path), config, rows, file=file, seeds=2, steps=24, digests=digests)
    assert {one.row.label: dict(one.scores) for one in found if one.scores} == {
        "0": {0: 0.0, 1: 0.1}, "0.5": {0: 1.0, 1: 1.1}, "1": {0: 2.0, 1: 2.1}, "2": {0: 3.0, 1: 3.1},
        "3": {0: 4.0, 1: 4.1}, "all": {0: 5.0, 1: 5.1},
    }  # fmt: skip
