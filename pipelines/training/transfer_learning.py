"""Protocols of transfer that train: one training for each seed, its checkpoints, and its scores at the end."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
from pipelines.data.shards import Manifest
from pipelines.errors import UserError
from pipelines.lease import check_of
from pipelines.storage import Store
from pipelines.training import checkpoint
from pipelines.training.scores import read_scored, seed_folder, write_scored
from pipelines.training.transfer_step import Step, Task
from pipelines.training.transfer_worker import Worker

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
    """

    seed: int
    base_lr: float
    store: Store
    name: str
    suffix: str
    keep: bool = False


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Args:
        model: What is scored.
        steps: Optimiser steps.
        samples: Seen in all steps together.
        seconds: Of training.
    """

    model: nn.Module
    steps: int
    samples: int
    seconds: float


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

    def choose(self) -> dict[str, Any] | None:
        """Where there are several learning rates: trains each with the first seed, and takes the best.

        The best is that on the validation split; none sees the test images. The choice is made once and kept, for
        the seeds of later commands too.

        Returns:
            The ``base_lr``, the ``seed`` that it was chosen with, what was ``tried``; None where there is no choice.
        """
        worker, rates = self.worker, self.worker.transfer.train.base_lrs
        if not rates:
            return None
        if kept := self._kept(_read, worker.job.store, _CHOSEN):
            return kept
        seed = worker.transfer.seeds[0]
        candidates = [self._candidate(seed, lr) for lr in rates]
        scores = [self.validate(training) for training in candidates]
        best = candidates[scores.index(max(scores))]
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

    def validate(self, training: Training) -> float:
        """Trains, and scores on the validation split; in percent."""
        if done := self._kept(_read, training.store, _VALIDATED):
            return done["validation"]
        trained = self.train(training)
        val_CC = self.evaluate(trained.model, self.worker.job.train, np.sort(self.worker.val_ids))
        score = self.task.score(val_CC)
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
        val_CC = self.evaluate(trained.model, worker.job.train, np.sort(worker.val_ids))
        test_CC = self.evaluate(trained.model, worker.job.test, None)
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
        }
        if worker.rank == 0:
            write_scored(worker.job.store, scored)
            training.store.child("checkpoints").delete()

    def _kept(self, read: Callable[..., Any], *what: Any) -> Any:
        """What rank 0 finds of an earlier attempt, or None; the same on all ranks."""
        return self.worker.agree(read(*what) if self.worker.rank == 0 else None)

    def train(self, training: Training) -> Trained:
        """Trains to the end, from the newest whole checkpoint on."""
        worker, task, seed = self.worker, self.task, training.seed
        transfer, train = worker.transfer, worker.transfer.train
        model = task.model(seed)
        ids = worker.members(seed)
        cut = self.cut(len(ids))
        steps = max(1, round(train.epochs * len(ids) / cut.global_size))
        schedule = {
            "peak": peak_lr(training.base_lr, cut.global_size),
            "warmup_steps": min(round(train.warmup_epochs * len(ids) / cut.global_size), steps // 2),
            "total_steps": steps,
        }
        state = State(model, task.optimizer(model), make_average(model, train.ema) if train.ema else None)
        start, seconds = self.resume(training, state)
        stream = worker.stream(worker.job.train, ids, cut, steps * cut.global_size, seed)
        batches: Any = iter(Feed(stream, (start, steps), crew=worker.crew, num_tasks=transfer.scale.segment_tasks))
        wrapped: nn.Module = model
        if worker.world_size > 1:
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        step_of = Step(wrapped, state.optimizer, cut, worker, task, seed)
        model.train()
        began = saved = shown = time.perf_counter()
        losses: list[torch.Tensor] = []
        for step in range(start, steps):
            losses.append(step_of(step, batches, lr_at(step, **schedule)))
            if state.average:
                state.average.update_parameters(model)
            now, done = time.perf_counter(), step + 1
            logs = done % transfer.log_every == 0 or done == steps
            if logs or done == start + 1:
                worker.check_readable((done - start) * cut.global_size, worker.job.train)
            if logs:
                rate = len(losses) * cut.global_size / (now - shown)
                self._log(training, done, steps, torch.stack(losses).mean().item(), rate)
                losses, shown = [], now
            if training.keep if done == steps else now - saved > 60 * transfer.checkpoint_minutes:
                self.save(training, done, state, seconds + now - began)
                saved = time.perf_counter()
        seconds += time.perf_counter() - began
        if next(batches, None) is not None:
            raise RuntimeError("the data holds more than the steps of the training")
        return Trained(state.average.module if state.average else model, steps, steps * cut.global_size, seconds)

    def cut(self, num: int) -> Cut:
        """How batches of a training on so many images are cut.

        Raises:
            UserError: They cannot be cut into pairs, and must be.
        """
        train, world_size = self.worker.transfer.train, self.worker.world_size
        size = min(train.global_size, num)
        cuts = (Cut(size, micro, world_size) for micro in range(train.micro_size, 0, -1))
        found = next((cut for cut in cuts if cut.rows % 2 == 0 or not self.task.pairs), None)
        if found is None:
            raise UserError(f"a batch of {size} images on {world_size} workers cannot be mixed by pairs")
        return found

    def _log(self, training: Training, done: int, steps: int, loss: float, rate: float) -> None:
        worker, suffix = self.worker, training.suffix
        if worker.spool:
            worker.spool.metrics(done, {f"train/loss{suffix}": loss, f"perf/images_per_s{suffix}": rate})
        worker.say(f"{training.name}  step {done:>{len(str(steps))}} of {steps}  loss {loss:.4f}  {rate:,.0f} images/s")

    def resume(self, training: Training, state: State) -> tuple[int, float]:
        """Goes back to the newest whole checkpoint: steps done, and seconds that they took."""
        checkpoints, found, worker = training.store.child("checkpoints"), None, self.worker
        if worker.rank == 0:
            found = checkpoint.newest_whole(checkpoints, lambda line: worker.say(f"warning: {line}"))
        found = worker.agree(found)
        if found is None:
            return 0, 0.0
        folder = checkpoints.child(checkpoint.folder_name(found))
        state.model.load_state_dict(safetensors.torch.load(folder.read("model.safetensors")))
        checkpoint.load_optimizer(folder, state.model, state.optimizer)
        if state.average:
            state.average.load_state_dict(safetensors.torch.load(folder.read("average.safetensors")))
        worker.say(f"{training.name}  continuing from the checkpoint of step {found}")
        return found, float(checkpoint.read_state(checkpoints, found)["seconds"])

    def save(self, training: Training, step: int, state: State, seconds: float) -> None:
        """Writes a checkpoint, and deletes older ones."""
        if self.worker.rank == 0:
            tensors = {
                "model.safetensors": state.model.state_dict(),
                "optimizer.safetensors": checkpoint.optimizer_state(state.model, state.optimizer),
            }
            if state.average:
                tensors["average.safetensors"] = state.average.state_dict()
            checkpoints, lease = training.store.child("checkpoints"), self.worker.job.lease
            checkpoint.write(checkpoints, step, tensors, {"format": "pt"}, {"seconds": seconds}, check_of(lease))
            checkpoint.prune(checkpoints, 2, step)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, manifest: Manifest, ids: np.ndarray | None) -> torch.Tensor:
        """The confusion matrix [C, C] over labelled images, all of them or those with some ids."""
        model.eval()
        worker = self.worker
        rows, num = worker.transfer.train.micro_size, manifest.num_samples if ids is None else len(ids)
        cut = Cut(rows * worker.world_size, rows, worker.world_size)
        stream = worker.stream(manifest, ids, cut, num, None)
        counts_CC = torch.zeros(worker.num_classes, worker.num_classes, dtype=torch.int64)
        for batch in Feed(stream, (0, -(-num // cut.global_size)), crew=worker.crew):
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
