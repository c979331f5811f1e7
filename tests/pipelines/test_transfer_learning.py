"""The trainings of a transfer without Ray: stops in the middle, averaged weights, the choice of a learning rate."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.data.readers import MicroBatch
from pipelines.storage import Store
from pipelines.training import checkpoint, transfer_learning
from pipelines.training.scores import confusion, read_scored, summarise, top1
from pipelines.training.transfer_learning import Learning, Training
from pipelines.transfer_config import Transfer, TransferTrain

NUM, CLASSES = 96, 3
IMAGES = np.random.default_rng(0).integers(0, 256, (NUM, 2, 2, 3), dtype=np.uint8)
LABELS = IMAGES.astype(int).sum(axis=(1, 2)).argmax(axis=1)  # the brightest channel
TRAIN, TEST = (SimpleNamespace(num_samples=NUM, name=name) for name in ("train", "test"))


class Brightest:
    """A task with dropout, so that a step depends on what it draws."""

    pairs = False

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Dropout(0.2), nn.Linear(12, CLASSES))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.0)

    def loss(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        logits_BC = model(self._flat(batch))
        return nn.functional.cross_entropy(logits_BC, torch.from_numpy(batch.label_B), reduction="sum")

    def confusion(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        return confusion(model(self._flat(batch)).argmax(dim=1), torch.from_numpy(batch.label_B), CLASSES)

    def score(self, confusion_CC: torch.Tensor) -> float:
        return top1(confusion_CC)

    def flops(self, model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    def _flat(self, batch: MicroBatch) -> torch.Tensor:
        return torch.from_numpy(batch.images_BHWC / 128 - 1).float().flatten(1)


class KilledError(Exception):
    """Somebody has killed it."""


class Worker:
    """The only rank, on images in memory; it is killed after some steps."""

    rank, world_size, device, crew, num_classes, spool = 0, 1, torch.device("cpu"), None, CLASSES, None
    val_ids = np.arange(NUM // 2, NUM)

    def __init__(self, store: Store, steps: int = 10**6, seeds: tuple[int, ...] = (0, 1), **train: Any):
        values = {"epochs": 3.0, "global_size": 16, "micro_size": 8, "warmup_epochs": 0.0} | train
        # Every step is kept.
        self.transfer = Transfer(
            protocol="finetune", seeds=seeds, checkpoint_minutes=1e-9, train=TransferTrain(**values)
        )
        self.job = SimpleNamespace(store=store, train=TRAIN, test=TEST, lease=None)
        self.steps_left, self.said, self.evaluated = steps, [], []

    def members(self, _seed: int) -> np.ndarray:
        return np.arange(NUM // 2)

    def stream(self, manifest, ids, cut, _end, training) -> Any:
        if training is None:
            self.evaluated.append(manifest.name)
        ids = np.arange(NUM) if ids is None else ids
        return SimpleNamespace(worker=self, ids=ids, cut=cut, training=training)

    def say(self, line: str) -> None:
        self.said.append(line)

    def agree(self, value: Any) -> Any:
        return value

    def left_out(self, skipped: list[dict[str, str]]) -> None:
        assert not skipped

    def check_readable(self, *_: Any) -> None:
        pass

    def take_unreadable(self) -> list[tuple[str, str]]:
        return []


def feed(stream, steps, *, crew, num_tasks=0):
    """Micro-batches as a function of seed and step."""
    for step in range(*steps):
        order = stream.ids
        if stream.training is not None:
            if stream.worker.steps_left == 0:
                raise KilledError
            stream.worker.steps_left -= 1
            order = np.random.default_rng([stream.training, step]).permutation(order)
        else:
            order = order[step * stream.cut.global_size :]
        for turn in range(stream.cut.accumulation):
            rows = order[turn * stream.cut.rows : (turn + 1) * stream.cut.rows]
            yield MicroBatch(0, 0, IMAGES[rows], rows, rows * 0, LABELS[rows], np.ones(len(rows), np.float32), [])


@pytest.fixture(autouse=True)
def _in_memory(monkeypatch):
    monkeypatch.setattr(transfer_learning, "Feed", feed)


def learning(worker: Worker) -> Learning:
    return Learning(worker, Brightest())  # type: ignore[arg-type]


def trained(store: Store, *stops: int, **train: Any) -> dict[str, torch.Tensor]:
    """The weights that are scored, after kills in the middle."""
    training = Training(3, 1.0, store, "seed 3", "")
    for steps in stops:
        with pytest.raises(KilledError):
            learning(Worker(store, steps, **train)).train(training)
    last = Worker(store, **train)
    found = learning(last).train(training).model.state_dict()
    assert any("continuing" in line for line in last.said) == bool(stops)
    return found


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_killed_training_ends_with_the_same_weights(tmp_path, ema):
    whole = trained(Store(str(tmp_path / "whole")), ema=ema)
    killed = trained(Store(str(tmp_path / "killed")), 2, 3, ema=ema)
    assert whole.keys() == killed.keys() == {"1.weight", "1.bias"}
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "average.safetensors", "manifest.json"])
def test_a_broken_checkpoint_is_passed_over_and_said_so(tmp_path, file):
    whole = trained(Store(str(tmp_path / "whole")), ema=0.9)
    store, training = Store(str(tmp_path / "broken")), Training(3, 1.0, Store(str(tmp_path / "broken")), "seed 3", "")
    with pytest.raises(KilledError):
        learning(Worker(store, 5, ema=0.9)).train(training)
    newest, older = checkpoint.steps(store.child("checkpoints"))
    path = store.child("checkpoints").child(checkpoint.folder_name(newest)).local(file)
    # As where it was killed before the manifest was written, or where the disk gives back other bytes.
    path.unlink() if file == "manifest.json" else path.write_bytes(
        bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]
    )
    last = Worker(store, ema=0.9)
    model = learning(last).train(training).model.state_dict()
    assert all(torch.equal(value, model[name]) for name, value in whole.items())
    warning, continuing = last.said[:2]
    assert warning.startswith(f"warning: checkpoint {checkpoint.folder_name(newest)} ")
    assert file in warning
    assert f"continuing from the checkpoint of step {older}" in continuing


def test_the_averaged_weights_are_scored(tmp_path):
    last, average = (trained(Store(str(tmp_path / str(ema))), ema=ema)["1.weight"] for ema in (0.0, 0.9))
    assert (last - average).abs().max() > 1e-3


def learned(worker: Worker) -> list[dict[str, Any]]:
    """What its seeds come to."""
    learning(worker).learn()
    scored = [read_scored(worker.job.store, seed) for seed in worker.transfer.seeds]
    return [one for one in scored if one is not None]


STEPS = 3 * NUM // 2 // 16


def test_the_learning_rate_is_chosen_once_on_the_validation_split(tmp_path):
    rates = (1e-7, 0.3, 1e-6)
    store = Store(str(tmp_path))
    # Killed in the second training: the first one is not done again.
    with pytest.raises(KilledError):
        learning(Worker(store, STEPS + 5, base_lrs=rates)).learn()
    worker = Worker(store, base_lrs=rates)
    scored = learned(worker)
    # The rest of the second, the third, and the second seed.
    assert 10**6 - worker.steps_left <= 3 * STEPS - 4
    tried = scored[0]["tried"]
    assert [one["base_lr"] for one in tried] == list(rates)
    assert tried[1]["validation"] > max(tried[0]["validation"], tried[2]["validation"]) + 10
    assert [one["chosen"]["base_lr"] for one in scored] == [0.3, 0.3]
    assert worker.evaluated.count("test") == 2, "the test images are read once a seed, with what was chosen"
    assert top1(torch.tensor(scored[0]["val"])) == pytest.approx(tried[1]["validation"])
    assert summarise(worker.transfer, scored)["tried"] == tried
    assert not list(tmp_path.glob("**/checkpoints/*")), "no weights are left behind"
    # Another seed, of a later command, takes what was chosen.
    later = Worker(store, STEPS, seeds=(2,), base_lrs=rates)
    (other,) = learned(later)
    assert (other["chosen"]["base_lr"], other["tried"]) == (0.3, tried)


def test_a_seed_that_has_been_scored_is_not_trained_again(tmp_path):
    store = Store(str(tmp_path / "one"))
    (first,) = learned(Worker(store, seeds=(0,)))
    # Killed in the second of three: it goes on there.
    with pytest.raises(KilledError):
        learning(Worker(store, STEPS // 2, seeds=(0, 1, 2))).learn()
    worker = Worker(store, 2 * STEPS - STEPS // 2, seeds=(0, 1, 2))
    several = learned(worker)
    assert worker.evaluated.count("test") == 2
    assert worker.steps_left == 0
    assert several[0] == first
    timeless = [{**one, "seconds": 0} for one in several]
    at_once = learned(Worker(Store(str(tmp_path / "all")), seeds=(0, 1, 2)))
    assert timeless == [{**one, "seconds": 0} for one in at_once], "which seeds are asked for together changes nothing"
    assert learned(Worker(store, 0, seeds=(0, 1, 2))) == several
