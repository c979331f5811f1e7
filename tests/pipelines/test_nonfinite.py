"""Steps whose loss or gradient is not finite: skipped by all ranks, and what a row of them leads to."""

import contextlib
import json
import multiprocessing
import os
import re
import socket
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch

from benchmarks.audit import CONTINUED
from cluster.processes import wait_until
from pipelines.data.plan import Plan
from pipelines.errors import DIVERGED
from pipelines.pretrain import main
from pipelines.storage import Store
from pipelines.training import checkpoint
from pipelines.training.nonfinite import FILE, seen_before
from pipelines.training.runfolder import RunFolder
from tests.pipelines.test_pretrain import arguments, command, delivered, losses, points, recipe, steps_done
from tests.pipelines.two_ranks import FAULTS, neighbour, rank

__all__ = ["recipe"]  # a fixture


def in_ranks(work, *each):
    """What a function of ``two_ranks`` puts, by rank; each rank is a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawned = multiprocessing.get_context("spawn")
    results = spawned.Queue()
    world_size = len(each[0]) if each else 2
    ranks = [spawned.Process(target=work, args=(number, port, *each, results)) for number in range(world_size)]
    for one in ranks:
        one.start()
    told = dict(results.get(timeout=120) for _ in ranks)
    for one in ranks:
        one.join(60)
        assert one.exitcode == 0
    return told


def test_workers_of_one_machine_are_counted_also_on_several_nodes():
    assert in_ranks(neighbour, ["a", "b", "a"]) == {0: 2, 1: 1, 2: 2}


def test_what_is_not_finite_on_one_rank_is_skipped_by_all():
    told = in_ranks(rank)
    for number in range(2):
        assert [bad for bad, *_ in told[number]] == [0, 0, 1, 0, 1, 0]
        # What rank 0 wished has come to both, in that step.
        assert [wishes for _, wishes, *_ in told[number]] == [0, 3, 0, 0, 0, 0]
        states = [state for _, _, state, _ in told[number]]
        for bad in FAULTS:
            assert all(np.array_equal(a, b) for a, b in zip(states[bad - 1], states[bad], strict=True))
            assert not np.array_equal(states[bad][0], states[bad + 1][0])
            assert np.isfinite(states[bad + 1][0]).all()
    assert all(np.array_equal(a, b) for a, b in zip(told[0][5][2], told[1][5][2], strict=True))
    # By hand, of the first step: each of 4 samples weighs a quarter, whoever computes it, and one of them nothing. The
    # loss of one is the sum of 16 weights and, 4 times each, 4 biases, all 1: 32.
    for number in range(2):
        loss, norm, of_weight, of_bias = told[number][0][3]
        assert loss == pytest.approx(0.75 * 32)
        np.testing.assert_allclose(of_weight, np.full((4, 4), 0.75))
        np.testing.assert_allclose(of_bias, np.full(4, 0.75 * 4))
        assert norm == pytest.approx(0.75 * (16 * 1 + 4 * 16) ** 0.5)


def test_the_same_place_is_known_again(tmp_path):
    folder = RunFolder(Store(str(tmp_path)))
    folder.append_line(FILE, {"step": 30, "back_to": 20, "identity": "mine", "samples": []})
    assert seen_before(folder, "mine", [29, 30], 25)
    assert seen_before(folder, "mine", [22, 23], 20)
    assert not seen_before(folder, "mine", [31, 32], 30)
    assert not seen_before(folder, "another", [30], 20)


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_run_that_always_goes_bad_ends_with_a_word_to_its_user(recipe, shards, tmp_path, capfd):
    flags = ["--optim.base-lr", "1e30", "--optim.warmup-epochs", "3", "--log.pictures", "0"]
    assert main(arguments(recipe(60), shards, tmp_path, "run", *flags)) == DIVERGED
    told = capfd.readouterr()
    assert told.out.count("going back to the last checkpoint") == 1
    (line,) = [line for line in told.err.splitlines() if line.startswith("error:")]
    assert re.search(r"not finite in the steps \d+ to \d+, as it was before .* lower optim\.base_lr", line)
    folder = tmp_path / "run"
    written = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    rows = [line["step"] for line in written]
    assert rows[:10] == rows[10:] == list(range(rows[0], rows[0] + 10))
    plan = Plan(300, seed=0)
    for line in written:
        assert line["samples"] == plan.samples(line["step"] * 40, line["step"] * 40 + 40)[0].tolist()
    # None was written in the row or after it.
    assert checkpoint.steps(Store(str(folder)).child("checkpoints")) == [step for step in (40, 20) if step <= rows[0]]
    # The second time its points are written too.
    assert sum(values.get("train/nonfinite_steps", 0) for values in points(folder).values()) > 5
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(json.loads((folder / "run.json").read_text())["mlflow_run_id"])
    assert run.info.status == "FAILED"
    assert run.data.tags["mae.nonfinite_steps"] == f"{rows[0]} to {rows[9]}"
    assert FILE in [item.path for item in client.list_artifacts(run.info.run_id)]


def guard_share(folder: Path, global_size: int) -> float:
    """What the ranks' agreement took, as a share of the steps' time; the first points are of a start."""
    told = [values for step, values in points(folder).items() if "perf/guard_s" in values and step > 20]
    return sum(v["perf/guard_s"] for v in told) / sum(global_size / v["perf/images_per_s"] for v in told)


def _spoil(pid: int, pattern: bytes, by: bytes) -> int:
    """Writes over bytes in a process's memory, as a broken memory module would; says how often they were there."""
    found = 0
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb+", buffering=0) as memory:
        for line in maps:
            if " rw-p " not in line:
                continue
            start, stop = (int(part, 16) for part in line.split()[0].split("-"))
            with contextlib.suppress(OSError):
                memory.seek(start)
                there = memory.read(stop - start)
                place = there.find(pattern)
                while place >= 0:
                    memory.seek(start + place)
                    memory.write(by)
                    found += 1
                    place = there.find(pattern, place + len(pattern))
    return found


@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.geteuid() != 0, reason="writes into the memory of another process")
def test_a_run_whose_memory_goes_bad_once_ends_as_if_it_had_not(recipe, shards, tmp_path, capfd):
    steps, more = 160, ("--log.pictures", "0")
    assert main(arguments(recipe(steps), shards, tmp_path, "undisturbed", *more)) == 0
    capfd.readouterr()
    share = guard_share(tmp_path / "undisturbed", 40)
    print(f"the ranks' agreement takes {100 * share:.2f} % of a step")
    assert share < 0.02
    folder, log = tmp_path / "spoilt", tmp_path / "log.txt"
    final = f"checkpoints/step-{steps:08d}/model.safetensors"
    # The table of positions is no parameter that changes: its bytes are known.
    fixed = safetensors.torch.load_file(tmp_path / "undisturbed" / final)["pos_embed"].flatten()
    pattern = fixed[-16:].numpy().tobytes()
    with command(arguments(recipe(steps), shards, tmp_path, "spoilt", *more), log) as process:
        wait_until(lambda: steps_done(folder) >= 45, 120, lambda: log.read_text()[-3000:])
        workers = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if "RayTrainWorker" in " ".join(child.cmdline())
        ]
        nan = np.full(16, np.nan, np.float32).tobytes()
        assert _spoil(workers[-1].pid, pattern, nan)
        assert process.wait(240) == 0, log.read_text()[-3000:]
    told = log.read_text()
    assert told.count("going back to the last checkpoint") == 1
    assert told.count(CONTINUED) == 1
    assert delivered(folder) == delivered(tmp_path / "undisturbed")
    # Also in the record: no point of the bad steps has taken the place of theirs.
    assert losses(folder) == losses(tmp_path / "undisturbed")
    theirs = safetensors.torch.load_file(tmp_path / "undisturbed" / final)
    for name, value in safetensors.torch.load_file(folder / final).items():
        assert torch.equal(value, theirs[name]), name
