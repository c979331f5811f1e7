"""Protocols of transfer that train: one training for each seed, its checkpoints, and its scores at the end."""

import json
import time
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
from pipelines.storage import Store
from pipelines.training import checkpoint
from pipelines.training.transfer_step import Step, Task
from pipelines.training.transfer_worker import Worker


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

    def learn(self) -> list[dict[str, Any]]:
        """Trains with all seeds, each where an earlier attempt has left off, and scores them at the end.

        Where there are several learning rates, each is trained with the first seed, and the best on the validation
        split goes on: the others never see the test images.
        """
        worker, (first, *others) = self.worker, self.worker.transfer.seeds
        candidates = [self._candidate(first, lr) for lr in worker.transfer.train.base_lrs]
        tried = [self.validate(training) for training in candidates]
        if tried:
            chosen = candidates[tried.index(max(tried))]
        else:
            chosen = Training(first, worker.transfer.train.base_lr, self._folder(first), f"seed {first}", "")
        for training in candidates:
            if training is not chosen and worker.rank == 0:
                training.store.child("checkpoints").delete()
        scored = [self.score(chosen)]
        scored[0]["tried"] = [
            {"base_lr": training.base_lr, "validation": score}
            for training, score in zip(candidates, tried, strict=True)
        ]
        for seed in others:
            scored.append(
                self.score(Training(seed, chosen.base_lr, self._folder(seed), f"seed {seed}", f"_seed_{seed}"))
            )
        return scored

    def _folder(self, seed: int) -> Store:
        return self.worker.job.store.child(f"seed-{seed}")

    def _candidate(self, seed: int, lr: float) -> Training:
        """The training that tries a learning rate."""
        return Training(seed, lr, self._folder(seed).child(f"lr-{lr}"), f"seed {seed}  lr {lr}", f"_lr_{lr}", keep=True)

    def validate(self, training: Training) -> float:
        """Trains, and scores on the validation split; in percent."""
        if done := self._done(training, "validated.json"):
            return done["validation"]
        trained = self.train(training)
        val_CC = self.evaluate(trained.model, self.worker.job.train, np.sort(self.worker.val_ids))
        score = self.task.score(val_CC)
        self.worker.say(f"{training.name}  {self.worker.transfer.protocol}  validation {score:.2f} %")
        if self.worker.rank == 0:
            training.store.write("validated.json", json.dumps({"validation": score}))
        return score

    def score(self, training: Training) -> dict[str, Any]:
        """Trains, and scores on the validation split and on the test images."""
        worker, task = self.worker, self.task
        if done := self._done(training, "scored.json"):
            worker.say(f"{training.name} has been scored already")
            return done
        trained = self.train(training)
        val_CC = self.evaluate(trained.model, worker.job.train, np.sort(worker.val_ids))
        test_CC = self.evaluate(trained.model, worker.job.test, None)
        worker.say(f"{training.name}  {worker.transfer.protocol}  validation {task.score(val_CC):.2f} %")
        scored = {
            "seed": training.seed,
            "val": val_CC.tolist(),
            "test": test_CC.tolist(),
            "seconds": trained.seconds,
            "flops": task.flops(trained.model) * trained.samples,
            "chosen": {"steps": trained.steps, "base_lr": training.base_lr},
        }
        if worker.rank == 0:
            training.store.write("scored.json", json.dumps(scored))
            training.store.child("checkpoints").delete()
        return scored

    def _done(self, training: Training, name: str) -> Any:
        """What an earlier attempt has written of a training, or None."""
        here = self.worker.rank == 0 and training.store.exists(name)
        return self.worker.agree(json.loads(training.store.read(name)) if here else None)

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
            if done % transfer.log_every == 0 or done == steps:
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
            checkpoints = training.store.child("checkpoints")
            checkpoint.write(checkpoints, step, tensors, {"format": "pt"}, {"seconds": seconds})
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
        if worker.world_size > 1:
            on_device = counts_CC.to(worker.device)
            dist.all_reduce(on_device)
            counts_CC = on_device.cpu()
        return counts_CC
