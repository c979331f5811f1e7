"""What every Ray Train worker of a transfer does: learns from labelled images, and scores once at the end.

With several workers the BatchNorm of the linear probe takes each worker's own statistics.
"""

import contextlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed as dist
from ray.train.collective import broadcast_from_rank_zero
from timm.data import Mixup  # pyright: ignore[reportPrivateImportUsage]
from timm.data.random_erasing import RandomErasing
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from mae_core.classifier import Classifier, freeze, make_lars, parameter_groups, training_flops
from mae_core.images import normalize
from mae_core.masking import random_masking
from mae_core.model import MaskedAutoencoder
from mae_core.optim import lr_at, peak_lr
from mae_core.probes import knn_predict, linear_probe, split_indices
from mae_core.randomness import Purpose, hash_u64, mask_keys, mask_noise
from mae_core.weights import load_state
from pipelines.config import Config
from pipelines.data.feed import Feed, join_crew
from pipelines.data.plan import Cut, Members, Plan
from pipelines.data.readers import MicroBatch, Stream, View
from pipelines.data.shards import Manifest
from pipelines.errors import UserError
from pipelines.reading import ReadPolicy
from pipelines.spool import Spool
from pipelines.storage import Store
from pipelines.tracking import start_follower
from pipelines.training import checkpoint
from pipelines.training.build import build_model
from pipelines.training.probing import Features, Prober
from pipelines.training.runfolder import RunFolder
from pipelines.training.scores import confusion, summarise, top1
from pipelines.transfer_config import CACHED, Transfer

SPLIT_SEED = 0  # the validation split is the same for all seeds and protocols


@dataclass(frozen=True)
class TransferJob:
    """What the driver hands to every worker.

    Args:
        transfer: What is asked for, every path absolute.
        config: Of the pretraining run: model, image size, mean and deviation.
        state: The pretrained weights in the official layout, in the object store.
        train: Labelled images to learn from.
        test: Labelled images that are read once.
        store: The transfer's folder.
        console: Actor that takes lines for the driver's terminal.
    """

    transfer: Transfer
    config: Config
    state: Any
    train: Manifest
    test: Manifest
    store: Store
    console: Any


def transfer_worker(job: TransferJob) -> None:
    """Learns and scores; what would fail the same way again is told to the console, and no start follows."""
    if ray.get(job.console.failure.remote()):
        return
    worker = None
    try:
        worker = _Worker(job)
        worker.run()
    except UserError as error:
        ray.get(job.console.fail.remote(str(error), True))
        raise
    except (ValueError, TypeError, LookupError, AssertionError) as error:
        ray.get(job.console.fail.remote(f"{type(error).__name__}: {error}", False))
        raise
    finally:
        if worker is not None:
            worker.close()


class _Worker:
    """One rank: its share of the images, its replica of the classifier, and on rank 0 the record."""

    def __init__(self, job: TransferJob):
        context = ray.train.get_context()
        self.job, self.transfer, self.config = job, job.transfer, job.config
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.crew = join_crew(
            self.rank, self.world_size, num_cpus=job.transfer.data.cpus_per_task, broadcast=broadcast_from_rank_zero
        )
        self.num_classes = len(job.train.classes)
        self.folder = RunFolder(job.store) if self.rank == 0 else None
        self.spool = Spool(self.folder.path) if self.folder else None
        if self.spool:
            self.spool.status("RUNNING")
        self.follower = start_follower(self.folder.path) if self.folder else None
        learn, self.val_ids = split_indices(job.train.num_samples, self.transfer.data.val_share, seed=SPLIT_SEED)
        self.learn_ids = np.sort(learn)
        self.unreadable: set[tuple[str, str]] = set()

    def say(self, line: str) -> None:
        """Shows a line in the driver's terminal."""
        if self.rank == 0:
            self.job.console.say.remote(line)

    def close(self) -> None:
        """Ends what runs beside the work."""
        if self.follower:
            self.follower.stop(timeout_s=20.0)
        if self.folder:
            self.folder.push()

    def left_out(self, skipped: list[dict[str, str]]) -> None:
        """Notes images that could not be read, each once."""
        self.unreadable.update((one["shard"], one["key"]) for one in skipped)

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        asked = self.transfer.train.precision
        bfloat16 = asked == "bfloat16" or (asked == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16)

    def encoder(self, seed: int) -> MaskedAutoencoder:
        """The pretrained model; from scratch a new one."""
        values = self.config.model_dump()
        values["run"]["seed"] = seed
        model = build_model(Config.model_validate(values))
        if self.transfer.protocol != "scratch":
            load_state(model, ray.get(self.job.state))
        return model.to(self.device)

    def run(self) -> None:
        """All seeds, each where an earlier attempt has left off; then the result is written."""
        scored = self.cached() if self.transfer.protocol in CACHED else [self.learn(s) for s in self.transfer.seeds]
        unreadable = [self.unreadable]
        if self.world_size > 1:
            unreadable = [set() for _ in range(self.world_size)]
            dist.all_gather_object(unreadable, self.unreadable)
        if not (self.spool and self.folder):
            return
        result = summarise(self.transfer, scored, len(set().union(*unreadable)))
        self.spool.metrics(0, {key: value for key, value in result["scores"].items() if value is not None})
        self.folder.write("result.json", json.dumps(result, indent=2))
        self.spool.artifact("result.json")
        self.spool.status("FINISHED")
        self.folder.push()

    # ---- on cached features

    def cached(self) -> list[dict[str, Any]]:
        """Scores on features that are computed once, by all workers; rank 0 scores."""
        values = self.config.model_dump()
        values["probe"]["pool"] = self.transfer.pool
        values["probe"]["crop_share"] = self.crop_share
        values["data"]["image_size"] = self.image_size
        values["batch"]["micro_size"] = self.transfer.train.micro_size
        prober = Prober(Config.model_validate(values), self.crew, self.device, self.autocast)
        began = time.perf_counter()
        # What is chosen by chance needs seeds: the classifier's batches, and the patches that are seen.
        by_chance = self.transfer.protocol == "linear-fast" or self.transfer.visible[0] < 1
        seeds = self.transfer.seeds if by_chance else self.transfer.seeds[:1]
        share = self.transfer.visible[0]
        # All images are read once, for all that look at them.
        looks: list[Any] = [
            Look(self.classifier(0).eval(), share, seed) for seed in (seeds if share < 1 else seeds[:1])
        ]
        known = prober.extract(looks, self.job.train)
        asked = prober.extract(looks, self.job.test)
        self.left_out(prober.skipped)
        if known is None or asked is None:
            return []
        self.say(f"features of {len(known[0].labels_N) + len(asked[0].labels_N):,} images in {_s(began)}")
        last = len(looks) - 1
        return [self._score(known[min(i, last)], asked[min(i, last)], seed) for i, seed in enumerate(seeds)]

    def _score(self, known: Features, asked: Features, seed: int) -> dict[str, Any]:
        began = time.perf_counter()
        is_val_N = np.isin(known.sample_N, self.val_ids)
        learn_N = np.flatnonzero(np.isin(known.sample_N, self.members(seed)))
        val_N = np.flatnonzero(is_val_N)
        if not len(learn_N) or not len(val_N):
            raise UserError(
                f"data.train: {len(known.labels_N)} labelled images leave {len(learn_N)} to learn from and "
                f"{len(val_N)} for validation: give more images, or other shares"
            )
        features, labels = known.features_ND, known.labels_N
        if self.transfer.protocol == "knn":

            def predict(features_MD: torch.Tensor) -> torch.Tensor:
                return knn_predict(
                    features[learn_N],
                    labels[learn_N],
                    features_MD,
                    num_classes=self.num_classes,
                    k=self.transfer.knn_k,
                )

            chosen: dict[str, Any] = {"k": self.transfer.knn_k}
        else:
            probe = linear_probe(
                features[learn_N],
                labels[learn_N],
                features[val_N],
                labels[val_N],
                num_classes=self.num_classes,
                seed=seed,
            )
            predict, chosen = probe.predict, {"learning_rate": probe.learning_rate}
        val_CC = confusion(predict(features[val_N]), labels[val_N], self.num_classes)
        test_CC = confusion(predict(asked.features_ND), asked.labels_N, self.num_classes)
        self.say(f"seed {seed}  {self.transfer.protocol}  validation {top1(val_CC):.2f} %  ({_s(began)})")
        return {
            "seed": seed,
            "val": val_CC.tolist(),
            "test": test_CC.tolist(),
            "seconds": time.perf_counter() - began,
            "chosen": chosen,
        }

    # ---- by training

    @property
    def image_size(self) -> tuple[int, int]:
        """Of the images that are classified."""
        asked = self.transfer.data.image_size
        return asked if min(asked) > 0 else self.config.data.image_size

    @property
    def crop_share(self) -> float:
        """Side of the central crop over the image's shorter side."""
        return self.transfer.data.crop_share or self.config.probe.crop_share

    def members(self, seed: int) -> np.ndarray:
        """The sample ids that one seed learns from, in order."""
        fraction, ids = self.transfer.data.label_fraction[0], self.learn_ids
        if fraction == 1:
            return ids
        num = max(1, round(fraction * len(ids)))
        return np.sort(ids[np.argsort(hash_u64(Purpose.SPLIT, seed, 1, ids), kind="stable")[:num]])

    def classifier(self, seed: int) -> Classifier:
        """The classifier that a seed begins with."""
        transfer = self.transfer
        head_only = transfer.protocol == "linear" or (transfer.protocol == "partial" and transfer.blocks[0] == 0)
        model = Classifier(
            self.encoder(seed),
            self.num_classes,
            pool=transfer.pool,
            head="batchnorm" if head_only else "linear",
            image_size=self.image_size,
            drop_path=transfer.train.drop_path,
            seed=seed,
        )
        freeze(model, {"linear": 0, "partial": transfer.blocks[0]}.get(transfer.protocol))
        return model.to(self.device)

    def stream(self, manifest: Manifest, ids: np.ndarray | None, cut: Cut, end: int, training: int | None) -> Stream:
        """The images of a training (its seed given), or of an evaluation."""
        data, num = self.transfer.data, manifest.num_samples if ids is None else len(ids)
        members = None if ids is None else Members(ids)
        view = View(
            self.image_size,
            self.config.data.channels,
            training or 0,
            None if training is None else data.crop_scale,
            training is not None and data.flip and self.config.data.flip,
            self.crop_share,
            "" if training is None else data.auto_augment,
        )
        plan = Plan(num, training or 0, end=end, shuffle=training is not None, members=members)
        return Stream(manifest, plan, cut, view, ReadPolicy(deadline_s=data.deadline_s))

    def cut(self, num: int) -> Cut:
        """How batches of a training on so many images are cut: in pairs, where images are mixed by pairs."""
        train = self.transfer.train
        size = min(train.global_size, num)
        cuts = (Cut(size, micro, self.world_size) for micro in range(train.micro_size, 0, -1))
        mixes = bool(train.mixup or train.cutmix)
        found = next((cut for cut in cuts if cut.rows % 2 == 0 or not mixes), None)
        if found is None:
            raise UserError(f"a batch of {size} images on {self.world_size} workers cannot be mixed by pairs")
        return found

    def learn(self, seed: int) -> dict[str, Any]:
        """Trains with one seed and scores on the validation split, and on the test images."""
        transfer, train = self.transfer, self.transfer.train
        store = self.job.store.child(f"seed-{seed}")
        done = broadcast_from_rank_zero(_read_json(store, "scored.json") if self.rank == 0 else None)
        if done:
            self.say(f"seed {seed} has been scored already")
            return done
        model = self.classifier(seed)
        ids = self.members(seed)
        cut = self.cut(len(ids))
        steps = max(1, round(train.epochs * len(ids) / cut.global_size))
        schedule = {
            "peak": peak_lr(train.base_lr, cut.global_size),
            "warmup_steps": min(round(train.warmup_epochs * len(ids) / cut.global_size), steps // 2),
            "total_steps": steps,
        }
        optimizer = self.optimizer(model)
        start, seconds = self.resume(store, model, optimizer)
        stream = self.stream(self.job.train, ids, cut, steps * cut.global_size, seed)
        batches: Any = iter(Feed(stream, (start, steps), crew=self.crew, num_tasks=transfer.scale.segment_tasks))
        wrapped: Any = model
        if self.world_size > 1:
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        step_of = _Step(wrapped, optimizer, cut, self, seed)
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
        val_CC = self.evaluate(model, self.job.train, np.sort(self.val_ids))
        test_CC = self.evaluate(model, self.job.test, None)
        self.say(f"seed {seed}  {transfer.protocol}  validation {top1(val_CC):.2f} %")
        scored = {
            "seed": seed,
            "val": val_CC.tolist(),
            "test": test_CC.tolist(),
            "seconds": seconds,
            "flops": training_flops(model) * steps * cut.global_size,
            "chosen": {"steps": steps},
        }
        if self.rank == 0:
            store.write("scored.json", json.dumps(scored))
            store.child("checkpoints").delete()
        return scored

    def _log(self, seed: int, done: int, steps: int, loss: float, images: int, since: float) -> None:
        rate = images / (time.perf_counter() - since)
        if self.spool:
            suffix = "" if seed == self.transfer.seeds[0] else f"_seed_{seed}"
            self.spool.metrics(done, {f"train/loss{suffix}": loss, f"perf/images_per_s{suffix}": rate})
        self.say(f"seed {seed}  step {done:>{len(str(steps))}} of {steps}  loss {loss:.4f}  {rate:,.0f} images/s")

    def optimizer(self, model: Classifier) -> torch.optim.Optimizer:
        """The recipe's optimiser, its rates 0."""
        train = self.transfer.train
        if train.optimizer == "lars":
            return make_lars(model, 0.0)
        lr = torch.zeros((), device=self.device)
        groups = parameter_groups(model, lr, train.weight_decay, train.layer_decay)
        return torch.optim.AdamW(groups, lr=lr, betas=train.betas, fused=True)

    # ---- checkpoints

    def resume(self, store: Store, model: Classifier, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Goes back to the newest whole checkpoint: steps done, and seconds that they took."""
        checkpoints, found = store.child("checkpoints"), None
        if self.rank == 0:
            found = checkpoint.newest_whole(checkpoints, lambda line: self.say(f"warning: {line}"))
        found = broadcast_from_rank_zero(found)
        if found is None:
            return 0, 0.0
        folder = checkpoints.child(checkpoint.folder_name(found))
        model.load_state_dict(safetensors.torch.load(folder.read("model.safetensors")))
        checkpoint.load_optimizer(folder, model, optimizer)
        self.say(f"continuing from the checkpoint of step {found}")
        return found, float(checkpoint.read_state(checkpoints, found)["seconds"])

    def save(
        self, store: Store, step: int, model: Classifier, optimizer: torch.optim.Optimizer, seconds: float
    ) -> None:
        """Writes a checkpoint, and deletes older ones."""
        if self.rank == 0:
            tensors = {
                "model.safetensors": {name: value.cpu() for name, value in model.state_dict().items()},
                "optimizer.safetensors": checkpoint.optimizer_state(model, optimizer),
            }
            checkpoint.write(store.child("checkpoints"), step, tensors, {"format": "pt"}, {"seconds": seconds})
            checkpoint.prune(store.child("checkpoints"), 2, step)

    # ---- scoring

    @torch.inference_mode()
    def evaluate(self, model: Classifier, manifest: Manifest, ids: np.ndarray | None) -> torch.Tensor:
        """The confusion matrix [C, C] over labelled images: rows true, columns predicted."""
        model.eval()
        rows, num = self.transfer.train.micro_size, manifest.num_samples if ids is None else len(ids)
        cut = Cut(rows * self.world_size, rows, self.world_size)
        stream = self.stream(manifest, ids, cut, num, None)
        counts_CC = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
        for batch in Feed(stream, (0, -(-num // cut.global_size)), crew=self.crew):
            images_BCHW, label_B, weight_B = self.on_device(batch)
            with self.autocast():
                predicted_B = model(images_BCHW).argmax(dim=1)
            real = weight_B.cpu() > 0
            counts_CC += confusion(predicted_B.cpu()[real], label_B.cpu()[real], self.num_classes)
            self.left_out(batch.skipped)
        if self.world_size > 1:
            on_device = counts_CC.to(self.device)
            dist.all_reduce(on_device)
            counts_CC = on_device.cpu()
        return counts_CC

    def on_device(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images, labels and weights of a micro-batch; what has no label weighs 0.

        Raises:
            UserError: A label is none of the classes.
        """
        label_B = batch.label_B
        if label_B.max() >= self.num_classes:
            row = int(label_B.argmax())
            raise UserError(
                f"sample {batch.sample_B[row]} has label {label_B[row]}, and there are {self.num_classes} classes: "
                "pack the shards from class folders, or mend their .cls files"
            )
        weight_B = torch.from_numpy(np.where(label_B >= 0, batch.weight_B, 0).astype(np.float32)).to(self.device)
        images_BHWC = torch.from_numpy(batch.images_BHWC.copy()).to(self.device)
        images_BCHW = normalize(images_BHWC, self.config.data.mean, self.config.data.std)
        return images_BCHW, torch.from_numpy(label_B.clip(0)).to(self.device), weight_B


@dataclass(frozen=True)
class Look:
    """An encoder that sees a share of the patches, as the prober takes it.

    Args:
        classifier: Holds the encoder, at the image size asked for.
        share: Of the patches, drawn for each sample anew.
        seed: Of the drawing.
    """

    classifier: Classifier
    share: float
    seed: int

    @property
    def width(self) -> int:
        """D."""
        return self.classifier.width

    def look(self, images_BCHW: torch.Tensor, sample_B: np.ndarray) -> torch.Tensor:
        """Features [B, D]; which patches are seen is a function of (seed, sample)."""
        if self.share == 1:
            return self.classifier.features(images_BCHW)
        num = self.classifier.num_patches
        keys_B = mask_keys(self.seed, np.zeros_like(sample_B), sample_B, 0).to(images_BCHW.device)
        keep_BK, _ = random_masking(mask_noise(keys_B, num), max(1, round(self.share * num)))
        return self.classifier.features(images_BCHW, keep_BK)


class _Step:
    """One optimiser step over the global batch; every sample weighs 1 over it, whoever computes it."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, cut: Cut, worker: _Worker, seed: int):
        train = worker.transfer.train
        self._model, self._optimizer, self._cut, self._worker, self._seed = model, optimizer, cut, worker, seed
        self._smoothing = train.smoothing
        self._mixup = None
        if train.mixup or train.cutmix:
            self._mixup = Mixup(
                mixup_alpha=train.mixup,
                cutmix_alpha=train.cutmix,
                label_smoothing=train.smoothing,
                num_classes=worker.num_classes,
            )
        self._erase = None
        if train.erasing:
            self._erase = RandomErasing(train.erasing, mode="pixel", device=str(worker.device))  # type: ignore[arg-type]

    def __call__(self, step: int, batches: Iterator[MicroBatch], lr: float) -> torch.Tensor:
        cut, worker = self._cut, self._worker
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr * group["lr_scale"])
            else:
                group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=worker.device)
        for turn in range(cut.accumulation):
            batch = next(batches)
            worker.left_out(batch.skipped)
            images_BCHW, label_B, weight_B = worker.on_device(batch)
            self._draw_anew(step, turn)
            target: torch.Tensor = label_B
            if self._erase:
                images_BCHW = self._erase(images_BCHW)
            if self._mixup:
                images_BCHW, target = self._mixup(images_BCHW, label_B)
            last = turn == cut.accumulation - 1
            ddp = isinstance(self._model, DistributedDataParallel) and not last
            with self._model.no_sync() if ddp else contextlib.nullcontext():
                with worker.autocast():
                    logits_BC = self._model(images_BCHW)
                # Mixed targets are smoothed already.
                smoothing = 0.0 if self._mixup else self._smoothing
                loss_B = cross_entropy(logits_BC.float(), target, reduction="none", label_smoothing=smoothing)
                loss = (loss_B * weight_B).sum() / (cut.global_size / cut.world_size)
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


def _s(since: float) -> str:
    return f"{time.perf_counter() - since:.0f} s"
