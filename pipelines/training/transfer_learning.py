"""Protocols of transfer that train: one training for each seed, its checkpoints, and its scores at the end."""

import contextlib
import json
import random
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from ray.train.collective import broadcast_from_rank_zero
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mae_core.optim import lr_at, peak_lr
from mae_core.randomness import Purpose, hash_u64
from pipelines.data.feed import Feed
from pipelines.data.plan import Cut
from pipelines.data.readers import MicroBatch
from pipelines.data.shards import Manifest
from pipelines.errors import UserError
from pipelines.storage import Store
from pipelines.training import checkpoint
from pipelines.training.transfer_worker import Worker


class Task(Protocol):
    """What is learned: ``Classification`` is one."""

    @property
    def pairs(self) -> bool:
        """Whether a micro-batch must have an even number of rows."""
        ...

    def model(self, seed: int) -> nn.Module:
        """What a seed begins with, on the worker's device."""
        ...

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        """Its optimiser, every rate 0; a group's rate is the schedule's times its ``lr_scale``, 1 where it has none."""
        ...

    def loss(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The losses of a micro-batch's samples, each times its weight, summed; may draw from global generators."""
        ...

    def confusion(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The confusion matrix [C, C] of a micro-batch, int64 on the CPU: rows true, columns predicted."""
        ...

    def score(self, confusion_CC: torch.Tensor) -> float:
        """What the protocol is scored by, in percent."""
        ...

    def flops(self, model: Any) -> int:
        """Of one training step a sample."""
        ...


class Learning:
    """The trainings of a transfer on one rank.

    Args:
        worker: The rank.
        task: What is learned.
    """

    def __init__(self, worker: Worker, task: Task):
        self.worker, self.task = worker, task

    def learn(self, seed: int) -> dict[str, Any]:
        """Trains with one seed and scores on the validation split, and on the test images."""
        worker, task = self.worker, self.task
        transfer, train = worker.transfer, worker.transfer.train
        store = worker.job.store.child(f"seed-{seed}")
        done = broadcast_from_rank_zero(_read_json(store, "scored.json") if worker.rank == 0 else None)
        if done:
            worker.say(f"seed {seed} has been scored already")
            return done
        model = task.model(seed)
        ids = worker.members(seed)
        cut = self.cut(len(ids))
        steps = max(1, round(train.epochs * len(ids) / cut.global_size))
        schedule = {
            "peak": peak_lr(train.base_lr, cut.global_size),
            "warmup_steps": min(round(train.warmup_epochs * len(ids) / cut.global_size), steps // 2),
            "total_steps": steps,
        }
        optimizer = task.optimizer(model)
        start, seconds = self.resume(store, model, optimizer)
        stream = worker.stream(worker.job.train, ids, cut, steps * cut.global_size, seed)
        batches: Any = iter(Feed(stream, (start, steps), crew=worker.crew, num_tasks=transfer.scale.segment_tasks))
        wrapped: nn.Module = model
        if worker.world_size > 1:
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        step_of = _Step(wrapped, optimizer, cut, worker, task, seed)
        model.train()
        began = saved = shown = time.perf_counter()
        losses: list[torch.Tensor] = []
        for step in range(start, steps):
            losses.append(step_of(step, batches, lr_at(step, **schedule)))
            now = time.perf_counter()
            if (step + 1) % transfer.log_every == 0 or step + 1 == steps:
                self._log(
                    seed, step + 1, steps, torch.stack(losses).mean().item(), len(losses) * cut.global_size, shown
                )
                losses, shown = [], now
            if now - saved > 60 * transfer.checkpoint_minutes and step + 1 < steps:
                self.save(store, step + 1, model, optimizer, seconds + now - began)
                saved = time.perf_counter()
        seconds += time.perf_counter() - began
        if next(batches, None) is not None:
            raise RuntimeError("the data holds more than the steps of the training")
        val_CC = self.evaluate(model, worker.job.train, np.sort(worker.val_ids))
        test_CC = self.evaluate(model, worker.job.test, None)
        worker.say(f"seed {seed}  {transfer.protocol}  validation {task.score(val_CC):.2f} %")
        scored = {
            "seed": seed,
            "val": val_CC.tolist(),
            "test": test_CC.tolist(),
            "seconds": seconds,
            "flops": task.flops(model) * steps * cut.global_size,
            "chosen": {"steps": steps},
        }
        if worker.rank == 0:
            store.write("scored.json", json.dumps(scored))
            store.child("checkpoints").delete()
        return scored

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

    def _log(self, seed: int, done: int, steps: int, loss: float, images: int, since: float) -> None:
        rate, worker = images / (time.perf_counter() - since), self.worker
        if worker.spool:
            suffix = "" if seed == worker.transfer.seeds[0] else f"_seed_{seed}"
            worker.spool.metrics(done, {f"train/loss{suffix}": loss, f"perf/images_per_s{suffix}": rate})
        worker.say(f"seed {seed}  step {done:>{len(str(steps))}} of {steps}  loss {loss:.4f}  {rate:,.0f} images/s")

    def resume(self, store: Store, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Goes back to the newest whole checkpoint: steps done, and seconds that they took."""
        checkpoints, found, worker = store.child("checkpoints"), None, self.worker
        if worker.rank == 0:
            found = checkpoint.newest_whole(checkpoints, lambda line: worker.say(f"warning: {line}"))
        found = broadcast_from_rank_zero(found)
        if found is None:
            return 0, 0.0
        folder = checkpoints.child(checkpoint.folder_name(found))
        model.load_state_dict(safetensors.torch.load(folder.read("model.safetensors")))
        checkpoint.load_optimizer(folder, model, optimizer)
        worker.say(f"continuing from the checkpoint of step {found}")
        return found, float(checkpoint.read_state(checkpoints, found)["seconds"])

    def save(self, store: Store, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, seconds: float) -> None:
        """Writes a checkpoint, and deletes older ones."""
        if self.worker.rank == 0:
            tensors = {
                "model.safetensors": {name: value.cpu() for name, value in model.state_dict().items()},
                "optimizer.safetensors": checkpoint.optimizer_state(model, optimizer),
            }
            checkpoint.write(store.child("checkpoints"), step, tensors, {"format": "pt"}, {"seconds": seconds})
            checkpoint.prune(store.child("checkpoints"), 2, step)

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


class _Step:
    """One optimiser step over the global batch; every sample weighs 1 over it, whoever computes it."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, cut: Cut, worker: Worker, task: Task, seed: int
    ):
        self._model, self._optimizer, self._cut = model, optimizer, cut
        self._worker, self._task, self._seed = worker, task, seed

    def __call__(self, step: int, batches: Iterator[MicroBatch], lr: float) -> torch.Tensor:
        cut, worker = self._cut, self._worker
        for group in self._optimizer.param_groups:
            scaled = lr * group.get("lr_scale", 1.0)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(scaled)
            else:
                group["lr"] = scaled
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=worker.device)
        for turn in range(cut.accumulation):
            batch = next(batches)
            worker.left_out(batch.skipped)
            self._draw_anew(step, turn)
            model, last = self._model, turn == cut.accumulation - 1
            apart = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else None
            with apart or contextlib.nullcontext():
                loss = self._task.loss(self._model, batch) / (cut.global_size / cut.world_size)
                loss.backward()
            total += loss.detach() / cut.world_size
        if cut.world_size > 1:
            dist.all_reduce(total)
        self._optimizer.step()
        return total

    def _draw_anew(self, step: int, turn: int) -> None:
        """Mixup, erasing and drop path draw from the global generators: seeded here by (seed, step, turn, rank)."""
        key = int(hash_u64(Purpose.MIX, self._seed, step, turn, self._worker.rank))
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)
        torch.manual_seed(key & 0x7FFFFFFFFFFFFFFF)


def _read_json(store: Store, name: str) -> Any:
    return json.loads(store.read(name)) if store.exists(name) else None
