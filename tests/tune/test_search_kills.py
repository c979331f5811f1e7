"""Searches whose processes are killed: nothing is lost that was known, and nothing is told twice."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ray.tune.schedulers import FIFOScheduler

from cluster.processes import wait_until
from pipelines.spool import read_spool
from pipelines.storage import Store
from tests.jobs import left_behind
from tests.tune.searches import arguments, journal, left_over
from tune.journal import Cell, Journal
from tune.scheduler import JournalingScheduler
from tune.search import main

ROOT = Path(__file__).parents[2]
HOW = ["--samples", "3", "--reports", "4", "--scheduler", "none", "--concurrent", "1"]


def lines(folder):
    """The journal's."""
    path = folder / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def reports(folder):
    return [line for line in lines(folder) if "step" in line]


def statuses(folder, trial):
    told = [line for line, _ in read_spool(folder / "trials" / trial / "metrics.jsonl") if line]
    return [line["status"] for line in told if "status" in line]


def trial_processes():
    """Those of Tune's trials among the descendants of this one, by the name that Tune gives their class."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(part.startswith("ray::ResourceTrainable") for part in process.cmdline()):
                found.append(process)
    return found


@pytest.mark.chaos
def test_a_trial_goes_on_when_its_own_process_dies(shards, tmp_path):
    folder, killed = tmp_path / "runs" / "found", []

    def kill():
        # In the middle of the second trial of the process.
        wait_until(lambda: len(reports(folder)) >= 6, 250)
        (process,) = trial_processes()
        name = lines(folder)[-1]["trial"]
        process.kill()
        process.wait(60)
        # As if the newest had not been written yet: a probe of which the journal knows is done again.
        checkpoints = folder / "trials" / name / "checkpoints"
        known = max(line["step"] for line in reports(folder) if line["trial"] == name)
        for path in checkpoints.glob("step-*"):
            if int(path.name.removeprefix("step-")) >= known:
                shutil.rmtree(path)
        killed.append((name, known))

    killer = threading.Thread(target=kill)
    killer.start()
    assert main(arguments(tmp_path, shards, *HOW)) == 0
    killer.join()
    ((name, known),) = killed
    assert known < 24, "killed too late to show anything"
    trials = journal(folder)
    assert len(trials) == 3
    assert {one["state"] for one in trials.values()} == {"finished"}
    assert all(one["steps"] == [6, 12, 18, 24] for one in trials.values())
    assert [(line["trial"], line["reason"]) for line in lines(folder) if line["state"] == "failed"] == [
        (name, "its process died")
    ]
    for trial in trials:
        seconds = [line["seconds"] for line in reports(folder) if line["trial"] == trial]
        assert seconds == sorted(seconds)
    assert statuses(folder, name) == ["RUNNING", "RUNNING", "FINISHED"]
    assert left_over() == []


def test_seconds_count_once_what_was_trained_before_a_death(tmp_path):
    store, cell = Store(str(tmp_path)), Cell({"model.mask_ratio": 0.5}, 0)
    before = Journal(store)
    before.begin(cell)
    before.report(cell, 6, 40.0, 100.0, 1.0, "running", {})
    # The search goes on: its trials begin with what was known then, and do so again when their process dies.
    known = Journal(store)
    study = SimpleNamespace(cell=lambda _: cell, past=dict(known.trials))
    scheduler = JournalingScheduler(FIFOScheduler(), known, study)  # type: ignore[arg-type]
    trial = SimpleNamespace(config={})

    def report(step, seconds, replayed=False):
        told = {"step": step, "score": 50.0, "seconds": seconds, "flops": 1.0, "probes": "{}", "random": "{}"}
        scheduler.on_trial_result(None, trial, {**told, "replayed": replayed, "stopped": False})  # type: ignore[arg-type]

    scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    report(6, 100.0, replayed=True)
    for step, seconds in ((12, 110.0), (18, 107.0), (24, 105.0)):
        report(step, seconds)
        scheduler.on_trial_error(None, trial)  # type: ignore[arg-type]
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    assert known.trials[cell.name].scores[-1] == (24, 50.0)
    assert known.trials[cell.name].seconds == pytest.approx(122.0)


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("sampler", "how"), [("random", signal.SIGINT), ("optuna", signal.SIGINT), ("random", signal.SIGKILL)]
)
def test_an_interrupted_search_goes_on_where_it_was(shards, tmp_path, short_folder, sampler, how):
    run = [sys.executable, "-u", "-m", "tune.search"]
    run += arguments(tmp_path, shards, *HOW, "--sampler", sampler, name="killed")
    # Socket paths have a length limit.
    environment = {**os.environ, "RAY_TMPDIR": short_folder}
    folder = tmp_path / "runs" / "killed"
    with subprocess.Popen(run, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        shown = 0
        for line in process.stdout:
            shown += "%" in line
            if shown == 6:
                break
        process.send_signal(how)
        rest = process.stdout.read()
        assert process.wait(60) == (130 if how == signal.SIGINT else -how), rest
    # Also when nobody is left to tell them, Ray's processes end, and the one that sends the record.
    for place in (short_folder, str(folder)):
        wait_until(lambda place=place: not left_behind(place), 60, lambda place=place: f"left: {left_behind(place)}")
    before = journal(folder)
    assert sorted(one["state"] for one in before.values()) == ["finished", "running"]
    kept = reports(folder)
    done = subprocess.run([*run, "--resume"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (known,) = [line["score"] for line in kept if line["state"] == "finished"]
    assert f"; 2 are known already, the best of them at {known:.2f} %" in done.stdout
    after = journal(folder)
    assert {one["state"] for one in after.values()} == {"finished"}
    assert len(after) == 3
    # What was known is kept, nothing was reported twice, and the one that was cut went on from its checkpoint.
    assert reports(folder)[: len(kept)] == kept
    assert all(one["steps"] == [6, 12, 18, 24] for one in after.values())
    (cut,) = [name for name, one in before.items() if one["state"] == "running"]
    assert statuses(folder, cut) == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]
    checkpoints = sorted(path.name for path in (folder / "trials" / cut / "checkpoints").glob("step-*"))
    assert checkpoints[-1] == "step-00000024"
