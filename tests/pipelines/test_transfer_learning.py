"""The trainings of a transfer without Ray: stops in the middle, averaged weights, the choice of a learning rate."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mae_core.classifier import Classifier, freeze, make_lars
from mae_core.model import MaskedAutoencoder
from pipelines.data.plan import Cut
from pipelines.data.readers import MicroBatch
from pipelines.spool import Spool
from pipelines.storage import Store
from pipelines.training import checkpoint, transfer_learning
from pipelines.training.guard import Guard
from pipelines.training.job import GoBackError
from pipelines.training.loop import DivergedError
from pipelines.training.nonfinite import FILE
from pipelines.training.runfolder import RunFolder
from pipelines.training.scores import confusion, read_random, read_scored, summarise, top1
from pipelines.training.transfer_learning import Learning, StoppedHereError, Training
from pipelines.training.transfer_step import Step
from pipelines.transfer_config import Transfer, TransferTrain
from tests.pipelines.test_nonfinite import in_ranks
from tests.pipelines.two_ranks import transfer_rank, transfer_steps

NUM, CLASSES = 96, 3
IMAGES = np.random.default_rng(0).integers(0, 256, (NUM, 2, 2, 3), dtype=np.uint8)
LABELS = IMAGES.astype(int).sum(axis=(1, 2)).argmax(axis=1)  # the brightest channel
TRAIN, TEST = (
    SimpleNamespace(num_samples=NUM, name=name, starts=np.array([0, NUM // 4, NUM]), shard_names=("a.tar", "b.tar"))
    for name in ("train", "test")
)


class Brightest:
    """A task with dropout, so that a step depends on what it draws; from a step on it is not finite.

    Args:
        bad: The first such step, counted over all trainings.
        num_bad: How many there are.
        lr: Those only with a learning rate above this one.
    """

    def __init__(self, bad: int = 10**6, num_bad: int = 10**6, lr: float = 0.0):
        self._steps, self._num_bad, self._lr = -bad, num_bad, lr

    def model(self, seed: int, *, random: bool = False) -> nn.Module:  # noqa: ARG002
        torch.manual_seed(seed)
        return nn.Sequential(nn.Dropout(0.2), nn.Linear(12, CLASSES))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        return self._optimizer

    def loss(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        logits_BC = model(self._flat(batch))
        if 0 <= self._steps < self._num_bad and self._optimizer.param_groups[0]["lr"] > self._lr:
            logits_BC = logits_BC * float("nan")
        self._steps += 0.5  # two micro-batches a step
        return nn.functional.cross_entropy(logits_BC, torch.from_numpy(batch.label_B), reduction="sum")

    def confusion(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        return confusion(model(self._flat(batch)).argmax(dim=1), torch.from_numpy(batch.label_B), CLASSES)

    def score(self, confusion_CC: torch.Tensor) -> float:
        return top1(confusion_CC)

    def sheet(self, *_: Any) -> None:
        return None

    def flops(self, model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    def _flat(self, batch: MicroBatch) -> torch.Tensor:
        return torch.from_numpy(batch.images_BHWC / 128 - 1).float().flatten(1)


class KilledError(Exception):
    """Somebody has killed it."""


class Worker:
    """The only rank, on images in memory; it is killed after some steps."""

    rank, world_size, device, num_classes = 0, 1, torch.device("cpu"), CLASSES
    spool: Any = None
    folder: Any = None
    stopped = 0
    crew = SimpleNamespace(groups=1)
    val_ids = np.arange(NUM // 2, NUM)

    def __init__(self, store: Store, steps: int = 10**6, seeds: tuple[int, ...] = (0, 1), **train: Any):
        values = {"epochs": 3.0, "global_size": 16, "micro_size": 8, "warmup_epochs": 0.0} | train
        # Every step is kept.
        self.transfer = Transfer(
            protocol="finetune", seeds=seeds, checkpoint_minutes=1e-9, train=TransferTrain(**values)
        )
        self.job = SimpleNamespace(store=store, train=TRAIN, test=TEST, lease=None)
        self.guard = Guard(1, None, self.device)  # of rank 0 a thread would ask the driver
        self.validation = TRAIN, self.val_ids
        self.steps_left, self.said, self.evaluated = steps, [], []

    def members(self, _seed: int) -> np.ndarray:
        return np.arange(NUM // 2)

    def stream(self, manifest, ids, cut, _end, training) -> Any:
        if training is None:
            self.evaluated.append(manifest.name)
        ids = np.arange(NUM) if ids is None else ids
        plan = SimpleNamespace(samples=lambda start, stop: (np.arange(start, stop) % NUM, None))
        return SimpleNamespace(worker=self, ids=ids, cut=cut, training=training, plan=plan)

    def stops_at(self, done: int, line: str) -> None:
        self.stopped = done
        self.said.append(line)

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


def learning(worker: Worker, task: Brightest | None = None) -> Learning:
    return Learning(worker, task or Brightest())  # type: ignore[arg-type]


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


def recorded(store: Store, **train: Any) -> Worker:
    """A worker with a folder and a record."""
    worker = Worker(store, **train)
    worker.folder = RunFolder(store)
    worker.spool = Spool(worker.folder.path)
    return worker


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    store = Store(str(tmp_path))
    worker = recorded(store, seeds=(0,))
    learning(worker, Brightest(bad=3, num_bad=2)).learn()
    scored = read_scored(store, 0)
    assert scored is not None
    assert scored["skipped_steps"] == 2
    assert summarise(worker.transfer, [scored])["skipped_steps"] == 2
    assert not (tmp_path / FILE).exists()
    assert any("not finite 2" in line for line in worker.said)
    assert all(torch.isfinite(torch.tensor(line["metrics"]["train/loss"])) for line in points(worker))


def points(worker: Worker) -> list[dict[str, Any]]:
    return [line for line in worker.folder.read_lines("metrics.jsonl") if "train/loss" in line.get("metrics", {})]


# The second is too short for as many bad steps as end a long one.
@pytest.mark.parametrize(("epochs", "row"), [(12.0, range(5, 15)), (3.0, range(5, 9))])
def test_a_training_that_stays_bad_goes_back_once_and_is_never_scored(tmp_path, epochs, row):
    store = Store(str(tmp_path))
    with pytest.raises(GoBackError, match=rf"seed 0: .* not finite in the steps 5 to {row[-1]}"):
        learning(recorded(store, epochs=epochs), Brightest(bad=5)).learn()
    # The newest checkpoint is from before the row.
    checkpoints = store.child("seed-0").child("checkpoints")
    assert checkpoint.steps(checkpoints)[0] == 5
    again = recorded(store, epochs=epochs)
    with pytest.raises(DivergedError, match=r"as it was before .* lower train\.base_lr \(0\.001\)"):
        learning(again, Brightest(bad=0)).learn()
    assert read_scored(store, 0) is None
    assert not again.evaluated
    lines = RunFolder(store).read_lines(FILE)
    assert [line["step"] for line in lines] == [*row, *row]
    assert lines[0]["samples"] == list(range(80, 96))
    assert lines[0]["shards"] == ["b.tar"]
    # A machine that was at fault: done again, it is as if nothing had been.
    whole = learned(Worker(Store(str(tmp_path / "whole")), seeds=(0,), epochs=epochs))
    (tmp_path / FILE).unlink()
    mended = learned(Worker(store, seeds=(0,), epochs=epochs))
    assert [one["test"] for one in mended] == [one["test"] for one in whole]


def test_a_learning_rate_that_diverges_is_not_the_best(tmp_path):
    store, rates = Store(str(tmp_path)), (0.3, 30.0)
    task = {"bad": 0, "lr": 0.02}
    with pytest.raises(GoBackError):
        learning(recorded(store, seeds=(0,), base_lrs=rates), Brightest(**task)).learn()
    worker = recorded(store, seeds=(0,), base_lrs=rates)
    learning(worker, Brightest(**task)).learn()
    (scored,) = [read_scored(store, 0)]
    assert scored is not None
    assert scored["chosen"]["base_lr"] == 0.3
    assert [one["validation"] is None for one in scored["tried"]] == [False, True]
    other = Store(str(tmp_path / "none"))
    for _ in range(2):
        with pytest.raises(GoBackError):
            learning(recorded(other, seeds=(0,), base_lrs=rates), Brightest(bad=0)).learn()
    with pytest.raises(DivergedError, match=r"at any of train\.base_lrs"):
        learning(recorded(other, seeds=(0,), base_lrs=rates), Brightest(bad=0)).learn()


def test_a_training_that_is_asked_to_stop_keeps_its_steps(tmp_path, monkeypatch):
    whole = trained(Store(str(tmp_path / "whole")))
    store = Store(str(tmp_path / "stopped"))
    worker, training = Worker(store), Training(3, 1.0, store, "seed 3", "")
    # Nothing is kept by the clock.
    worker.transfer = worker.transfer.model_copy(update={"checkpoint_minutes": 1e9})
    # Rank 0's wish to stop, on its way in the fourth step.
    monkeypatch.setattr(worker.guard, "wish", lambda: 2 * (worker.steps_left <= 10**6 - 3))
    with pytest.raises(StoppedHereError):
        learning(worker).train(training)
    assert worker.stopped == 4
    assert checkpoint.steps(store.child("checkpoints")) == [4]
    last = Worker(store)
    model = learning(last).train(training).model.state_dict()
    assert any("continuing from the checkpoint of step 4" in line for line in last.said)
    assert all(torch.equal(value, model[name]) for name, value in whole.items())


def test_two_workers_do_the_steps_of_one_and_skip_what_is_not_finite_on_any():
    alone = transfer_steps(0, 1)
    # The mean over the batch of what each sample's number makes of a weight of 1, and one step along it.
    assert alone[0] == pytest.approx([21 / 7, 3, 0, 0, 1 - 0.1 * 3])
    told = in_ranks(transfer_rank)
    for number in range(2):
        first, second, third = told[number]
        assert first == pytest.approx(alone[0])
        # Rank 0's wish comes to all with any step.
        assert second[2:] == pytest.approx([1, 3, first[4]])
        # The loss of a weight that the second step has left alone.
        assert third == pytest.approx([3 * first[4], 3, 0, 0, first[4] - 0.1 * 3])


@pytest.mark.parametrize("kind", ["adamw", "lars"])
def test_a_skipped_step_leaves_everything_as_it_is(kind):
    encoder = MaskedAutoencoder("vit_tiny_patch16_224", image_size=8, patch_size=4, width=24, depth=1, num_heads=2)
    model = Classifier(encoder, CLASSES, head="batchnorm")
    freeze(model, 0)
    lr = torch.zeros(())
    optimizer = make_lars(model, 0.0) if kind == "lars" else torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr, fused=True
    )  # fmt: skip
    task = SimpleNamespace(loss=lambda model, batch: model(batch.images_BCHW).square().sum())
    worker: Any = SimpleNamespace(device=torch.device("cpu"), rank=0, left_out=lambda _: None)
    step_of = Step(model, optimizer, Cut(4, 4, 1), worker, task, 0)  # type: ignore[arg-type]
    states = []
    for step, spoilt in enumerate((False, True, False)):
        images_BCHW = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        batch = SimpleNamespace(images_BCHW=images_BCHW * (float("inf") if spoilt else 1), skipped=[])
        bad = step_of(step, iter([batch]), 0.1)[2].item()  # type: ignore[list-item]
        assert bad == spoilt
        moments = [
            value.clone() for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        states.append([*(value.clone() for value in model.state_dict().values()), *moments])
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))
    assert all(torch.isfinite(value).all() for value in states[2])


def test_a_random_encoder_is_trained_once_with_the_first_seed(tmp_path):
    asked = []

    class Noted(Brightest):
        def model(self, seed: int, *, random: bool = False) -> nn.Module:
            asked.append((seed, random))
            return super().model(seed)

    def learn(store: Store, protocol: str, **values: Any) -> Worker:
        worker = recorded(store, seeds=(4, 5))
        worker.transfer = worker.transfer.model_copy(update={"protocol": protocol, **values})
        learning(worker, Noted()).learn()
        return worker

    store = Store(str(tmp_path / "linear"))
    worker = learn(store, "linear")
    assert asked == [(4, False), (5, False), (4, True)]
    found = read_random(store)
    assert found is not None
    assert (found["seed"], torch.tensor(found["test"]).sum()) == (4, NUM)
    assert any("one more training, with seed 4 (--no-random-baseline leaves it out)" in line for line in worker.said)
    assert not list(tmp_path.glob("**/checkpoints/*"))
    # Once; and never where it is not asked for, or would be as long as the training.
    asked.clear()
    learn(store, "linear")
    assert asked == []
    for protocol, baseline in (("linear", False), ("finetune", True)):
        learn(Store(str(tmp_path / f"{protocol}-{baseline}")), protocol, random_baseline=baseline)
    assert not any(random for _, random in asked)
