"""What a run tells of its speed, and the micro-batch that it looks for."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipelines.config import Config
from pipelines.storage import Store
from pipelines.training import micro_size
from pipelines.training.clock import PARTS, StepClock
from tests.pipelines.test_estimate import TINY, changed

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


# ---- the split of a step


def test_a_part_is_what_lies_before_its_mark():
    now = [0.0]
    clock = StepClock(CPU, lambda: now[0])
    for turn in range(3):
        now[0] += 50.0  # between steps: nobody's
        clock.begin()
        for part, seconds in (("data", 1.0), ("forward", 3.0 + turn), ("data", 1.0), ("backward", 4.0)):
            now[0] += seconds
            clock.mark(part)
    found = clock.take()
    assert tuple(found) == PARTS
    # Means of a step.
    assert found == {"data": 2.0, "forward": 4.0, "backward": 4.0, "communication": 0.0, "optimizer": 0.0}
    assert set(clock.take().values()) == {0}


THREE_WORKERS = """
import sys, time, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from pipelines.training.clock import StepClock
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=3)
torch.manual_seed(0)
models = [torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)) for _ in range(2)]
models[1].load_state_dict(models[0].state_dict())
watched, plain = (DistributedDataParallel(model, gradient_as_bucket_view=True) for model in models)
clock = StepClock(torch.device("cpu"))
clock.watch(watched)
for _ in range(3):
    torch.manual_seed(rank)
    images = torch.randn(4, 32)
    for model in (plain, watched):
        model.zero_grad()
        loss = model(images).square().mean()
        dist.barrier()
        if model is watched:
            clock.begin()
            if rank == 0:
                time.sleep(1.0)
        loss.backward()
        if model is watched:
            clock.mark("communication")
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(one.grad, other.grad)
found = clock.take()
print(found["backward"], found["communication"])
dist.destroy_process_group()
"""


def three_workers(folder: Path) -> list[list[float]]:
    """Mean seconds of the backward pass and of the communication, by rank; rank 0 is 1 s late."""
    command = [sys.executable, "-c", THREE_WORKERS, str(folder / "meet")]
    workers = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(3)
    ]
    told = [worker.communicate(timeout=250) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], told
    return [[float(value) for value in out.split()] for out, _ in told]


def test_the_clocks_all_reduce_changes_no_bit(tmp_path):
    slow, *_ = three_workers(tmp_path)
    # Who is slow has computed for so long.
    assert slow[0] > 1.0


@pytest.mark.timing
def test_what_the_all_reduce_adds_is_told(tmp_path):
    slow, *fast = three_workers(tmp_path)
    assert slow[0] > slow[1]
    for backward, communication in fast:
        # The others have waited for the slow one.
        assert communication > backward


# ---- the micro-batch


@pytest.mark.parametrize("room", [0, 1, 3, 7, 8, 9, 100, 639, 640, 5000])
def test_the_largest_that_fits_is_found_to_a_sixteenth(room):
    tried = []

    def fits(rows):
        tried.append(rows)
        return rows <= room

    found = micro_size.largest(fits, 640)
    assert min(room, 640) * 15 / 16 - 1 < found <= min(room, 640)
    assert len(tried) < 13
    assert max(tried) <= 640


def test_the_fastest_is_taken_while_steps_are_short_and_memory_is_left():
    rate = {8: 10.0, 16: 20.0, 32: 40.0, 64: 30.0, 128: 35.0, 200: 90.0}
    tried = []

    def fastest(room=10**9, seconds=1.0, limit=128):
        tried.clear()

        def step(rows):
            tried.append(rows)
            return seconds * rows / rate[rows] / 4

        return micro_size.fastest(step, lambda: 1000 * tried[-1], room, limit)

    assert fastest() == 32
    assert max(tried) == 128
    assert fastest(limit=200) == 200
    assert fastest(room=50_000) == 32
    assert max(tried) == 32
    assert fastest(seconds=16.0) == 8
    assert fastest(limit=8) == 8


def test_it_is_looked_for_once_in_a_run_on_a_device(tmp_path, monkeypatch):
    config, store, found = changed("batch", micro_size=0), Store(str(tmp_path)), iter((24, 48, 12))
    monkeypatch.setattr(micro_size, "find", lambda *_, **__: next(found))
    resolved, told = micro_size.resolve(config, store, CPU, 1)
    assert resolved.batch.micro_size == 24
    assert told.startswith("micro-batches of 22 images (the fastest of those tried: 24), 3 a step")
    again, told = micro_size.resolve(config, store, CPU, 1)
    assert again == resolved
    assert "as found before" in told
    # What changes the memory or the device is another search.
    other = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_activations": True})})
    assert micro_size.resolve(other, store, CPU, 1)[0].batch.micro_size == 48
    monkeypatch.setattr(micro_size, "_name", lambda _: "another device")
    assert micro_size.resolve(other, store, CPU, 1)[0].batch.micro_size == 12
    assert json.loads((tmp_path / micro_size.FILE).read_text())["devices"] == ["another device"]
    assert micro_size.resolve(TINY, store, CPU, 1) == (TINY, "")


@pytest.mark.parametrize(("seconds", "found"), [({8: 2.0, 12: 4.0}, 8), ({8: 2.0, 12: 2.5}, 12)])
def test_it_is_found_by_real_steps(monkeypatch, seconds, found):
    """The steps are real ones; of a clock they take 2 s for 8 images twice, and more or less than half more for 12."""
    now, sizes, honest = [0.0], [], micro_size.train_step

    def timed(trainer, batches, lr):
        told = honest(trainer, batches, lr)
        sizes.append(trainer.cut.micro_size)
        now[0] += seconds[trainer.cut.micro_size] / 10
        return told

    monkeypatch.setattr(micro_size, "train_step", timed)
    monkeypatch.setattr(micro_size, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    config = Config.model_validate(changed("model", target="pca", target_components=4).model_dump())
    assert micro_size.find(config, CPU, limit=12) == found
    assert sizes == [8, 8, 8, 12, 12]
