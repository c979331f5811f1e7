"""Protocols of transfer that train: one training for each seed, its checkpoints, and its scores at the end."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from mae_core.optim import lr_at, make_average, peak_lr
from pipelines.data.feed import Feed
from pipelines.data.plan import Cut
from pipelines.data.readers import MicroBatch, Stream
from pipelines.data.shards import Manifest
from pipelines.errors import UserError
from pipelines.lease import check_of
from pipelines.storage import Store
from pipelines.training import checkpoint, nonfinite
from pipelines.training.guard import BAD_STEPS_IN_A_ROW
from pipelines.training.job import GoBackError
from pipelines.training.loop import DivergedError
from pipelines.training.scores import (
    SHEET,
    check_scored,
    read_random,
    read_scored,
    seed_folder,
    write_random,
    write_scored,
)
from pipelines.training.transfer_step import Step, Task
from pipelines.training.transfer_worker import Worker
from pipelines.transfer_config import schedule, with_random

_CHOSEN, _VALIDATED = "chosen.json", "validated.json"


@dataclass(frozen=True)
class Training:
    """One training of a transfer.

    Args:
        seed: Of all that is drawn.
        base_lr: Learning rate for 256 samples a step.
        store: Its folder.
        name: In progress lines.
        suffix: Of its metrics.
        keep: Whether the weights at its end are kept.
        random: Whether it is on a random encoder.
    """

    seed: int
    base_lr: float
    store: Store
    name: str
    suffix: str
    keep: bool = False
    random: bool = False


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Args:
        model: What is scored.
        steps: Optimiser steps.
        samples: Seen in all steps together.
        seconds: Of training.
        skipped: Steps that were skipped, as they were not finite.
    """

    model: nn.Module
    steps: int
    samples: int
    seconds: float
    skipped: int


@dataclass(frozen=True)
class State:
    """What changes in a training.

    Args:
        model: The model, not wrapped.
        optimizer: Its optimiser.
        average: The moving average of its weights, where there is one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None


class StoppedHereError(Exception):
    """The transfer was asked to stop, and has a checkpoint of where it is."""


class Learning:
    """The trainings of a transfer on one rank.

    Args:
        worker: The rank.
        task: What is learned.
    """

    def __init__(self, worker: Worker, task: Task):
        self.worker, self.task = worker, task

    def learn(self) -> None:
        """Trains and scores with the seeds that have no score yet, each where an earlier attempt has left off."""
        choice = self.choose()
        for seed in self.worker.transfer.seeds:
            if self._kept(read_scored, self.worker.job.store, seed):
                self.worker.say(f"seed {seed} has been scored already")
                continue
            if choice is None:
                lr, tried = self.worker.transfer.train.base_lr, []
            else:
                lr, tried = choice["base_lr"], choice["tried"]
            # The seed that the rates were tried with has been trained at the best one.
            known = choice is not None and seed == choice["seed"]
            self.score(self._candidate(seed, lr) if known else self._training(seed, lr), tried)
        self._score_random(choice)

    def _score_random(self, choice: dict[str, Any] | None) -> None:
        """Trains on a random encoder, with the first seed, where that is asked for and has not been done."""
        worker = self.worker
        transfer, store = worker.transfer, worker.job.store
        if not with_random(transfer) or self._kept(read_random, store):
            return
        seed, lr = transfer.seeds[0], choice["base_lr"] if choice else transfer.train.base_lr
        name = "random encoder"
        training = Training(seed, lr, store.child("random"), name, "_random", random=True)
        worker.say(f"{name}: one more training, with seed {seed} (--no-random-baseline leaves it out)")
        scored: dict[str, Any] = {"seed": seed, "test": None}
        try:
            trained = self.train(training)
        except DivergedError as error:
            worker.say(f"{error}; the random encoder has no score")
        else:
            scored["test"] = self.evaluate(trained.model, worker.job.test, None).tolist()
            worker.take_unreadable()
        if worker.rank == 0:
            write_random(store, scored)
            training.store.child("checkpoints").delete()

    def choose(self) -> dict[str, Any] | None:
        """Where there are several learning rates: trains each with the first seed, and takes the best.

        The best is that on the validation split; none sees the test images. One that does not stay finite is not
        taken. The choice is made once and kept, for the seeds of later commands too.

        Returns:
            The ``base_lr``, the ``seed`` that it was chosen with, what was ``tried``; None where there is no choice.

        Raises:
            DivergedError: None stays finite.
        """
        worker, rates = self.worker, self.worker.transfer.train.base_lrs
        if not rates:
            return None
        if kept := self._kept(_read, worker.job.store, _CHOSEN):
            return kept
        seed = worker.transfer.seeds[0]
        candidates = [self._candidate(seed, lr) for lr in rates]
        scores = [self.validate(training) for training in candidates]
        finite = [score for score in scores if score is not None]
        if not finite:
            raise DivergedError(f"the loss did not stay finite at any of train.base_lrs {rates}: give lower ones")
        best = candidates[scores.index(max(finite))]
        choice = {
            "base_lr": best.base_lr,
            "seed": seed,
            "tried": [{"base_lr": lr, "validation": score} for lr, score in zip(rates, scores, strict=True)],
        }
        if worker.rank == 0:
            worker.job.store.write(_CHOSEN, json.dumps(choice))
            for training in candidates:
                if training is not best:
                    training.store.child("checkpoints").delete()
        return choice

    def _training(self, seed: int, lr: float) -> Training:
        # Seed 0 is what a single one is by default.
        suffix = f"_seed_{seed}" if seed else ""
        return Training(seed, lr, seed_folder(self.worker.job.store, seed), f"seed {seed}", suffix)

    def _candidate(self, seed: int, lr: float) -> Training:
        """The training that tries a learning rate."""
        plain = self._training(seed, lr)
        return Training(
            seed, lr, plain.store.child(f"lr-{lr}"), f"{plain.name}  lr {lr}", f"{plain.suffix}_lr_{lr}", keep=True
        )

    def validate(self, training: Training) -> float | None:
        """Trains, and scores on the validation split, in percent; None where the loss does not stay finite."""
        if done := self._kept(_read, training.store, _VALIDATED):
            return done["validation"]
        try:
            trained = self.train(training)
        except DivergedError as error:
            score = None
            self.worker.say(f"{error}; the other learning rates go on")
        else:
            score = self.task.score(self.evaluate(trained.model, *self.worker.validation))
            self.worker.say(f"{training.name}  {self.worker.transfer.protocol}  validation {score:.2f} %")
        if self.worker.rank == 0:
            training.store.write(_VALIDATED, json.dumps({"validation": score}))
        return score

    def score(self, training: Training, tried: list[dict[str, float]]) -> None:
        """Trains, and scores on the validation split and on the test images.

        Args:
            training: The one that its seed stands for.
            tried: What the learning rates came to, where there were several.
        """
        worker, task = self.worker, self.task
        trained = self.train(training)
        val_CC = self.evaluate(trained.model, *worker.validation)
        first: list[MicroBatch] = []
        test_CC = self.evaluate(trained.model, worker.job.test, None, first)
        check_scored(test_CC)
        worker.say(f"{training.name}  {worker.transfer.protocol}  validation {task.score(val_CC):.2f} %")
        unreadable = worker.take_unreadable()
        scored = {
            "seed": training.seed,
            "val": val_CC.tolist(),
            "test": test_CC.tolist(),
            "seconds": trained.seconds,
            "flops": task.flops(trained.model) * trained.samples,
            "chosen": {"steps": trained.steps, "base_lr": training.base_lr},
            "tried": tried,
            "unreadable": unreadable,
            "skipped_steps": trained.skipped,
        }
        if worker.rank == 0:
            self._draw(trained.model, first[0])
            write_scored(worker.job.store, scored)
            training.store.child("checkpoints").delete()

    @torch.inference_mode()
    def _draw(self, model: nn.Module, batch: MicroBatch) -> None:
        """Draws what the first seed's model makes of the first test images, where that can be drawn."""
        folder = self.worker.folder
        if folder and not (folder.path / SHEET).exists() and (sheet := self.task.sheet(model, batch)):
            sheet.save(folder.path / SHEET)

    def _kept(self, read: Callable[..., Any], *what: Any) -> Any:
        """What rank 0 finds of an earlier attempt, or None; the same on all ranks."""
        return self.worker.agree(read(*what) if self.worker.rank == 0 else None)

    def train(self, training: Training) -> Trained:
        """Trains to the end, from the newest whole checkpoint on.

        Raises:
            GoBackError: Too many steps in a row were not finite: the workers are to begin again.
            DivergedError: They were, in the same place before.
            StoppedHereError: The transfer was asked to stop.
        """
        worker, task, seed, guard = self.worker, self.task, training.seed, self.worker.guard
        transfer, train = worker.transfer, worker.transfer.train
        model = task.model(seed, random=training.random)
        ids = worker.members(seed)
        cut, planned = self.cut(len(ids)), schedule(train, len(ids))
        steps = planned.steps
        rates = {
            "peak": peak_lr(training.base_lr, cut.global_size),
            "warmup_steps": planned.warmup_steps,
            "total_steps": steps,
        }
        state = State(model, task.optimizer(model), make_average(model, train.ema) if train.ema else None)
        start, seconds, skipped = self.resume(training, state)
        stream = worker.stream(worker.job.train, ids, cut, steps * cut.global_size, seed)
        batches: Any = iter(Feed(stream, (start, steps), crew=worker.crew, num_tasks=transfer.scale.segment_tasks))
        wrapped: nn.Module = model
        if worker.world_size > 1:
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        step_of = Step(wrapped, state.optimizer, cut, worker, task, seed)
        model.train()
        began = saved = shown = time.perf_counter()
        window: list[torch.Tensor] = []
        guard.row = []
        for step in range(start, steps):
            window.append(step_of(step, batches, lr_at(step, **rates), guard.wish()))
            guard.heed(step, window[-1])
            if state.average:
                state.average.update_parameters(model)
            now, done = time.perf_counter(), step + 1
            logs = done % transfer.log_every == 0 or done == steps
            if logs or done == start + 1:
                worker.check_readable((done - start) * cut.global_size, worker.job.train)
            if logs:
                guard.catch_up()
                rate = len(window) * cut.global_size / (now - shown)
                skipped += self._log(training, done, steps, torch.stack(window), rate)
                window, shown = [], now
            # A short training may have no more steps than that.
            most = min(BAD_STEPS_IN_A_ROW, max(1, steps // 2)) if done == steps else BAD_STEPS_IN_A_ROW
            if len(guard.row) >= most:
                batches.close()
                self._go_back(training, stream)
            stops = done < steps and guard.stop
            if stops:
                worker.stops_at(done, f"{training.name}  step {done} of {steps}: asked to stop")
            due = training.keep if done == steps else stops or now - saved > 60 * transfer.checkpoint_minutes
            # Never in a row of bad steps: the newest checkpoint is from before it.
            if due and not guard.row:
                self.save(training, done, state, seconds + now - began, skipped)
                saved = time.perf_counter()
            if stops:
                # A rank that ended before the checkpoint is whole would have the others ended too.
                worker.agree(True)
                batches.close()
                raise StoppedHereError
        seconds += time.perf_counter() - began
        if next(batches, None) is not None:
            raise RuntimeError("the data holds more than the steps of the training")
        seen = steps * cut.global_size
        return Trained(state.average.module if state.average else model, steps, seen, seconds, skipped)

    def _go_back(self, training: Training, stream: Stream) -> NoReturn:
        """Writes down a row of bad steps, and begins again at the last checkpoint; all ranks call it.

        Raises:
            GoBackError: The first time.
            DivergedError: It has gone bad in the same place before.
        """
        worker, row, again = self.worker, self.worker.guard.row, False
        if worker.folder and worker.spool:
            again = nonfinite.note(
                row,
                folder=worker.folder,
                spool=worker.spool,
                checkpoints=training.store.child("checkpoints"),
                mine=training.name,
                images=worker.job.train,
                global_size=stream.cut.global_size,
                plan=stream.plan,
            )
        again = worker.agree(again)
        where = f"{training.name}: the loss or a gradient was not finite in the steps {row[0]} to {row[-1]}"
        listed = worker.job.store.path(nonfinite.FILE)
        if again:
            raise DivergedError(
                f"{where}, as it was before from the same checkpoint on, so the machine is not at fault: lower "
                f"train.base_lr ({training.base_lr:g}), or look for strange values in the images listed in {listed}"
            )
        worker.say(f"{where}: going back to the last checkpoint (their samples are listed in {listed})")
        raise GoBackError(where)

    def cut(self, num: int) -> Cut:
        """How batches of a training on so many images are cut.

        Raises:
            UserError: Images are to be mixed, and each is alone.
        """
        train, worker = self.worker.transfer.train, self.worker
        cut = Cut(schedule(train, num).global_size, train.micro_size, worker.world_size, groups=worker.crew.groups)
        if cut.rows < 2 and (train.mixup or train.cutmix):
            raise UserError(
                f"a batch of {cut.global_size} images leaves each of {worker.world_size} workers one at a time, and "
                "mixup and cutmix mix two: lower scale.workers, or set train.mixup and train.cutmix to 0"
            )
        return cut

    def _log(self, training: Training, done: int, steps: int, window_S4: torch.Tensor, rate: float) -> int:
        """Tells of some steps; returns how many of them were skipped."""
        worker, suffix = self.worker, training.suffix
        # A step that was skipped has no loss worth a mean, and says so by its own count.
        good_S4 = window_S4[window_S4[:, 2] == 0]
        bad = len(window_S4) - len(good_S4)
        loss = (good_S4 if len(good_S4) else window_S4[-1:])[:, 0].mean().item()
        if worker.spool:
            values = {f"train/loss{suffix}": loss} if len(good_S4) else {}
            values |= {f"train/nonfinite_steps{suffix}": float(bad)} if bad else {}
            worker.spool.metrics(done, {**values, f"perf/images_per_s{suffix}": rate})
        worker.say(
            f"{training.name}  step {done:>{len(str(steps))}} of {steps}  loss {loss:.4f}  {rate:,.0f} images/s"
            f"{f'  not finite {bad}' if bad else ''}"
        )
        return bad

    def resume(self, training: Training, state: State) -> tuple[int, float, int]:
        """Goes back to the newest whole checkpoint: steps done, seconds that they took, and how many were skipped."""
        checkpoints, found, worker = training.store.child("checkpoints"), None, self.worker
        if worker.rank == 0:
            found = checkpoint.newest_whole(checkpoints, lambda line: worker.say(f"warning: {line}"))
        found = worker.agree(found)
        if found is None:
            return 0, 0.0, 0
        folder = checkpoints.child(checkpoint.folder_name(found))
        state.model.load_state_dict(safetensors.torch.load(folder.read("model.safetensors")))
        checkpoint.load_optimizer(folder, state.model, state.optimizer)
        if state.average:
            state.average.load_state_dict(safetensors.torch.load(folder.read("average.safetensors")))
        worker.say(f"{training.name}  continuing from the checkpoint of step {found}")
        told = checkpoint.read_state(checkpoints, found)
        return found, float(told["seconds"]), int(told.get("skipped_steps", 0))

    def save(self, training: Training, step: int, state: State, seconds: float, skipped: int) -> None:
        """Writes a checkpoint, and deletes older ones."""
        if self.worker.rank == 0:
            tensors = {
                "model.safetensors": state.model.state_dict(),
                "optimizer.safetensors": checkpoint.optimizer_state(state.model, state.optimizer),
            }
            if state.average:
                tensors["average.safetensors"] = state.average.state_dict()
            checkpoints, lease = training.store.child("checkpoints"), self.worker.job.lease
            told = {"seconds": seconds, "skipped_steps": skipped}
            checkpoint.write(checkpoints, step, tensors, {"format": "pt"}, told, check_of(lease))
            checkpoint.prune(checkpoints, 2, step)

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, manifest: Manifest, ids: np.ndarray | None, first: list[MicroBatch] | None = None
    ) -> torch.Tensor:
        """The confusion matrix [C, C] over labelled images.

        Args:
            model: What is scored.
            manifest: The data.
            ids: Of the images, ascending; None: all.
            first: Gets this worker's first micro-batch.
        """
        model.eval()
        worker = self.worker
        rows, num = worker.transfer.train.micro_size, manifest.num_samples if ids is None else len(ids)
        cut = Cut(rows * worker.world_size, rows, worker.world_size, groups=worker.crew.groups)
        stream = worker.stream(manifest, ids, cut, num, None)
        counts_CC = torch.zeros(worker.num_classes, worker.num_classes, dtype=torch.int64)
        for batch in Feed(stream, (0, -(-num // cut.global_size)), crew=worker.crew):
            if first is not None and not first:
                first.append(batch)
            counts_CC += self.task.confusion(model, batch)
            worker.left_out(batch.skipped)
        worker.check_readable(num, manifest)
        if worker.world_size > 1:
            on_device = counts_CC.to(worker.device)
            dist.all_reduce(on_device)
            counts_CC = on_device.cpu()
        return counts_CC


def _read(store: Store, name: str) -> Any:
    """A kept file's values; None where there is none."""
    return json.loads(store.read(name)) if store.exists(name) else None
