"""Runs that stop and go on with more or fewer workers, by hand and by Ray Train's own elasticity."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks.audit import CONTINUED, delivery, points
from cluster import members, operations
from cluster.processes import wait_until
from pipelines.config import Config, Scale, identity
from pipelines.data.plan import Plan
from pipelines.errors import UserError
from pipelines.pretrain import main, read_config
from pipelines.training.launch import check_resources

ROOT = Path(__file__).parents[2]
GLOBAL_SIZE = 36  # not divisible by four workers' micro-batches: some rows are filler
STEPS = 24
TINY = f"""
[data]
image_size = [16, 16]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
cpus_per_task = 0.3
[model]
arch = "vit_tiny_patch16_224"
patch_size = 4
width = 24
depth = 2
heads = 2
decoder_width = 16
decoder_depth = 1
decoder_heads = 2
[batch]
global_size = {GLOBAL_SIZE}
micro_size = 8
[optim]
base_lr = 1e-2
warmup_epochs = 1.0
[scale]
cpus_per_worker = 0.4
segment_tasks = 2
[probe]
at_start = false
[log]
every = 1
ids = true
pictures = 0
"""


def arguments(root, shards, name, steps, *more):
    recipe = root / "tiny.toml"
    recipe.write_text(TINY)
    flags = {"config": recipe, "data.train": shards["train"], "run.storage": root, "run.name": name}
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))] + [
        *("--train.steps", str(steps)),
        *more,
    ]


def check_samples(folder, steps):
    """Every step saw the plan's samples in the plan's order, each time that it was done."""
    seen = delivery(folder, Plan(300, seed=0), GLOBAL_SIZE, steps)
    assert (seen.lost, seen.repeated, seen.order_equal) == (0, 0, True)
    return seen


def check_numbers(folder, reference, rel):
    """Losses and gradient norms, as far as there are any in the folder."""
    mine, theirs = points(folder), points(reference)
    assert mine
    for step, point in mine.items():
        assert point.loss == pytest.approx(theirs[step].loss, rel=rel), step
        assert point.grad_norm == pytest.approx(theirs[step].grad_norm, rel=rel), step


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """A run of two workers with a checkpoint at every step."""
    root = tmp_path_factory.mktemp("undisturbed")
    saving = ["--checkpoint.every-steps", "1", "--checkpoint.keep", "99", "--scale.workers", "2"]
    assert main(arguments(root, shards, "run", STEPS, *saving)) == 0
    assert check_samples(root / "run", range(STEPS)).done_again == 0
    return root / "run"


def begin_at(whole, start, folder):
    """Makes a run's folder as one has it that has come to a step."""
    name = f"step-{start:08d}"
    shutil.copytree(whole / "checkpoints" / name, folder / "checkpoints" / name)
    shutil.copy(whole / "identity.json", folder)


# Two of the kinds run below without this mark.
@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("start", "workers"), [(22, 1), (1, 2), (8, 3), (15, 4)])
def test_any_checkpoint_continues_on_any_number_of_workers(undisturbed, shards, tmp_path, start, workers):
    folder = tmp_path / "run"
    # While one is being written, the next one waits: on a busy machine not every step has its own.
    saved = sorted(int(path.name.removeprefix("step-")) for path in (undisturbed / "checkpoints").glob("step-*"))
    start = next(step for step in saved if step >= start)
    assert start < STEPS
    begin_at(undisturbed, start, folder)
    command = arguments(tmp_path, shards, "run", STEPS, "--scale.workers", str(workers))
    assert main(command) == 0
    check_rest(folder, undisturbed, range(start, STEPS), rel=0 if workers == 2 else 1e-3)


def check_rest(folder, whole, steps, rel):
    """What was done from a checkpoint on."""
    check_samples(folder, steps)
    # nothing before it is done again
    mine, theirs = points(folder), points(whole)
    first = steps.start + 1
    assert sorted(mine) == list(range(first, steps.stop + 1))
    # The first step was computed from the same checkpoint; the ones after it also carry the rounding of those before.
    assert mine[first].loss == pytest.approx(theirs[first].loss, rel=1e-5)
    assert mine[first].grad_norm == pytest.approx(theirs[first].grad_norm, rel=1e-5)
    check_numbers(folder, whole, rel)


@pytest.mark.chaos
def test_one_worker_continues_bit_equal_and_two_go_on_from_there(shards, tmp_path):
    saving = ["--checkpoint.every-steps", "4", "--checkpoint.keep", "99"]
    whole = tmp_path / "whole"
    assert main(arguments(tmp_path, shards, "whole", 12, *saving)) == 0
    for workers, start, rel in ((1, 4, 0), (2, 8, 1e-3)):
        name = f"on-{workers}"
        begin_at(whole, start, tmp_path / name)
        assert main(arguments(tmp_path, shards, name, 12, "--scale.workers", str(workers))) == 0
        check_rest(tmp_path / name, whole, range(start, 12), rel)


@contextlib.contextmanager
def started(command, log, environment):
    """The command as its user starts it."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.pretrain", *command], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition, process, log, seconds=240):
    def ended():
        return process.poll() is not None

    wait_until(lambda: condition() or ended(), seconds, lambda: log.read_text()[-3000:])
    assert condition(), log.read_text()[-3000:]


def step(folder):
    return max(points(folder), default=0)


def world_sizes(folder):
    """The numbers of workers in the order in which they began."""
    files = sorted((folder / "ids").glob("rank-0000-*"), key=lambda path: path.stat().st_mtime)
    return [int(path.stem.rsplit("-", 1)[1]) for path in files]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A cluster of two nodes that hold one worker each."""
    with operations.cluster(tmp_path_factory.mktemp("cluster"), nodes=2, cpus=1) as state:
        yield state


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_each_node_is_fed_by_an_execution_of_its_own(shards, tmp_path):
    # Ray Data deals the free CPUs to executions by whole numbers: a node with one would starve.
    with operations.cluster(tmp_path / "cluster", nodes=2, cpus=3) as state:
        flags = ["--scale.address", state.head, "--scale.workers", "2", "--scale.executions", "node"]
        # Two workers do not fit on one node.
        flags += ["--data.cpus-per-task", "0.5", "--scale.cpus-per-worker", "2"]
        log, folder = tmp_path / "log.txt", tmp_path / "run"
        with started(arguments(tmp_path, shards, "run", 40, *flags), log, state.environment()) as process:
            assert process.wait(240) == 0, log.read_text()[-3000:]
    check_samples(folder, range(40))
    # A group's share of a batch is a stretch of it; from one execution for both they would have come in turns.
    lines = [json.loads(line) for line in (folder / "ids" / "rank-0001-of-0002.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines if line["step"] == 7] == [7 * 6 + 3, 7 * 6 + 4, 7 * 6 + 5]


# Before the next one: Ray keeps places for the workers of a driver that was killed, for three minutes.
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_goes_on_without_a_lost_node_and_takes_in_a_new_one(nodes, shards, tmp_path):
    steps, folder, log = 6000, tmp_path / "run", tmp_path / "log.txt"
    flags = ["--scale.address", nodes.head, "--checkpoint.every-steps", "10", "--data.cpus-per-task", "0.2"]
    flags += ["--scale.workers", "2", "--scale.min-workers", "1", "--scale.cpus-per-worker", "0.6"]
    command = arguments(tmp_path, shards, "run", steps, *flags)
    with started(command, log, nodes.environment()) as process:
        wait_for(lambda: step(folder) >= 20, process, log)
        assert world_sizes(folder) == [2]
        lost = next(node for node in nodes.nodes if members.training(nodes, node.name))
        operations.kill(nodes, lost.name)
        # Ray Train by itself would ask for the lost node's place for 60 s, before it has even begun to start again.
        wait_for(lambda: world_sizes(folder) == [2, 1], process, log, seconds=62)
        alone = step(folder)
        wait_for(lambda: f"node {lost.address} is lost, and with it worker " in log.read_text(), process, log)
        operations.add(nodes)
        wait_for(lambda: step(folder) >= alone + 20, process, log)
        # the file of two workers is written on: it is the younger one again
        wait_for(lambda: world_sizes(folder) == [1, 2], process, log)
        together = step(folder)
        wait_for(lambda: step(folder) >= together + 20, process, log)
    # Once: the workers of a driver that was killed may write for a moment longer.
    found = sorted(points(folder))
    done = found[-1]
    assert done < steps
    check_samples(folder, range(done - 1))
    assert found == list(range(1, done + 1))
    assert log.read_text().count(CONTINUED) == 2


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_killed_driver_continues_with_one_worker_and_then_with_three(nodes, shards, tmp_path):
    steps, folder, log = 240, tmp_path / "run", tmp_path / "log.txt"
    flags = ["--scale.address", nodes.head, "--checkpoint.every-steps", "5", "--data.cpus-per-task", "0.2"]
    for number, workers in enumerate([2, 1, 3]):
        command = arguments(tmp_path, shards, "run", steps, *flags, "--scale.workers", str(workers))
        with started(command, log, nodes.environment()) as process:
            wait_for(lambda n=number: log.read_text().count(CONTINUED) == n, process, log)
            if number == 2:
                assert process.wait(240) == 0, log.read_text()[-3000:]
                break
            before = step(folder)
            wait_for(lambda b=before: step(folder) >= b + 12, process, log)
        assert step(folder) < steps - 20, "killed too late to show anything"
        # Ray ends the workers of a driver that is gone; the next ones do not write beside them.
        wait_until(lambda: not members.training(nodes), 60)
    assert sorted(world_sizes(folder)) == [1, 2, 3]
    check_samples(folder, range(steps))
    assert sorted(points(folder)) == list(range(1, steps + 1))


def test_min_workers_is_checked_and_no_part_of_a_run():
    with pytest.raises(ValidationError, match=r"scale\.min_workers must be at most scale\.workers, 2, found 3"):
        Config(scale=Scale(workers=2, min_workers=3))
    elastic = Config(scale=Scale(workers=2, min_workers=1))
    assert identity(elastic, "digest") == identity(Config(), "digest")


def test_an_elastic_run_leaves_room_for_reading(ray_local):
    def check(config):
        check_resources(config.scale, config.data.cpus_per_task)

    flags = [
        "--scale.workers",
        "2",
        "--scale.min-workers",
        "1",
        "--data.cpus-per-task",
        "0.5",
        "--scale.cpus-per-worker",
    ]
    with pytest.raises(UserError, match=r"2 workers with 1 CPUs each .* of the 2 CPUs .*cpus_per_worker to 0\.75"):
        check(read_config([*flags, "1"]))
    check(read_config([*flags, "0.75"]))
    # two workers are all that there will be, however many fit
    check(read_config([*flags, "0.1"]))
