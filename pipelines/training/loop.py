"""What every Ray Train worker of a pretraining run does."""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train.collective import broadcast_from_rank_zero
from torch.nn.parallel import DistributedDataParallel

from mae_core import cpu_products
from mae_core.optim import lr_at, make_optimizer, peak_lr
from pipelines.config import identity, identity_hash, total_steps, warmup_steps
from pipelines.data.feed import Feed, join_crew
from pipelines.data.readers import MicroBatch
from pipelines.errors import DIVERGED, FAILED, USAGE_ERROR, UserError
from pipelines.lease import check_of, this_machine
from pipelines.storage import Store
from pipelines.tracking import start_follower
from pipelines.training import checkpoint, micro_size, nonfinite
from pipelines.training.build import (
    build_model,
    compiler_told,
    fit_target,
    initial_weights,
    make_stream,
    make_trainer,
    maybe_compiled,
)
from pipelines.training.evaluation import Evaluation
from pipelines.training.exporting import ExportedSpool
from pipelines.training.guard import BAD_STEPS_IN_A_ROW, Guard
from pipelines.training.job import GoBackError, Job
from pipelines.training.outcome import notes, read_record
from pipelines.training.probing import Prober
from pipelines.training.profiling import BEFORE, PROFILE, Profile
from pipelines.training.progress import Progress
from pipelines.training.runfolder import RunFolder
from pipelines.training.step import Trainer, autocast, train_step
from pipelines.training.unreadable import FILE as UNREADABLE
from pipelines.training.unreadable import Unreadable, UnreadableError
from pipelines.training.writer import Writer
from pipelines.weights_file import shown

# A disk that is full or closed stays so: starting again is of no use.
_NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


class DivergedError(RuntimeError):
    """The loss is not finite, and was not when the same steps were done before."""


End = Literal["FINISHED", "JUDGED", "STOPPED"]
MOST_IN_ONE_EXECUTION = 16  # workers; see docs/data.md for how many blocks a second one coordinator deals


def train_worker(job: Job) -> None:
    """Pretrains: from the newest whole checkpoint, or from the start, to the last step and its probes.

    Ray Train starts all workers again when one is lost. What would fail the same way again is told to the console,
    and the next start ends at once, so that the driver can say it.
    """
    if ray.get(job.console.failure.remote()) or ray.get(job.console.is_stopped.remote()):
        return
    run = None
    try:
        run = _Worker(job)
        start = run.resume()
        with compiler_told(run.config):
            end = run.train(start)
        if end == "FINISHED":
            run.finish()
        elif end == "JUDGED":
            run.give_up()
    except DivergedError as error:
        ray.get(job.console.fail.remote(str(error), DIVERGED))
        raise
    except UserError as error:
        ray.get(job.console.fail.remote(str(error), USAGE_ERROR))
        raise
    except (ValueError, TypeError, LookupError, AssertionError) as error:
        ray.get(job.console.fail.remote(f"{type(error).__name__}: {error}", FAILED))
        raise
    except OSError as error:
        if error.errno in _NOT_WRITABLE:
            ray.get(
                job.console.fail.remote(f"{error.strerror}: {error.filename or job.config.run.storage}", USAGE_ERROR)
            )
        raise
    finally:
        if run is not None:
            run.close()


def workers_on_this_machine(world_size: int) -> int:
    """How many of a run's workers share this machine, on one Ray node or on several; all call it."""
    mine = this_machine() or ray.get_runtime_context().get_node_id()
    places = [mine] * world_size
    if world_size > 1:
        dist.all_gather_object(places, mine)
    return places.count(mine)


class _Worker:
    """One rank of a run: its share of the data, its replica of the model, and on rank 0 the record."""

    def __init__(self, job: Job):
        context = ray.train.get_context()
        self.job = job
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        job.console.place.remote(self.rank, ray.get_runtime_context().get_node_id())
        self.device = ray.train.torch.get_device()
        sharing = context.get_local_world_size()
        if self.device.type == "cpu":
            sharing = workers_on_this_machine(self.world_size)
            # Ray sets one thread a worker; the workers of a machine share its cores.
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(job.config.scale.threads or max(1, cores // sharing))
        self.store = Store(job.config.run.storage).child(job.config.run.name)
        config, found = micro_size.resolve(job.config, self.store, self.device, sharing)
        self.config = config
        if found:
            self.say(found)
        self.steps = total_steps(config, job.train.num_samples)
        per_node = config.scale.executions
        self.crew = join_crew(
            self.rank,
            self.world_size,
            num_cpus=config.data.cpus_per_task,
            limit=config.scale.reading_cpus,
            broadcast=broadcast_from_rank_zero,
            per_node=per_node == "node" or (per_node == "auto" and self.world_size > MOST_IN_ONE_EXECUTION),
        )
        self.stream = make_stream(config, job.train, self.world_size, self.crew.groups)
        self.folder = RunFolder(self.store, check_of(job.lease)) if self.rank == 0 else None
        self.spool = ExportedSpool(self.folder.path, config.run.name) if self.folder else None
        if self.spool:
            self.spool.status("RUNNING")
            if found:
                self.spool.tags({"micro_size": str(self.stream.cut.rows)})
        self.follower = start_follower(self.folder.path) if self.folder and not job.followed else None
        self.guard = Guard(self.rank, job.console, self.device)
        self.unreadable = Unreadable(self.folder, self.device)
        self.model = build_model(config).to(self.device)
        self.progress = Progress(
            config, self.model, self.steps, job.train.num_samples, self.unreadable, self.device, self.spool, self.say
        )
        listed = self.store.path(UNREADABLE)
        prober = Prober(config, self.crew, self.device, self.autocast, config.data.max_unreadable, listed)
        self.evaluation = Evaluation(
            job, self.steps, self.model, prober, self.unreadable, self.spool, self.folder, self.say
        )
        self.optimizer = make_optimizer(self.model, config.optim.weight_decay, config.optim.betas)
        self.writer = Writer(
            self.store.child("checkpoints"),
            config.checkpoint.keep,
            self._push,
            say=self.say,
            guard=self._may_write,
            patience_s=60 * config.checkpoint.patience_minutes,
        )

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        return autocast(self.config.train.precision, self.device)

    def say(self, line: str) -> None:
        """Shows a line in the driver's terminal."""
        if self.rank == 0:
            self.job.console.say.remote(line)

    def feed(self, steps: tuple[int, int]) -> Feed:
        """Begins to read the training data of a stretch of steps; all workers call it."""
        return Feed(self.stream, steps, crew=self.crew, num_tasks=self.config.scale.segment_tasks)

    # ---- before the first step

    def resume(self) -> int:
        """Brings the state to where the run stands; decided by rank 0 alone, done by all.

        The order: 1. the run's own newest whole checkpoint; 2. the next older whole one, where newer ones are
        broken; 3. ``run.init_from``; 4. from scratch.

        Returns:
            The first step to do.
        """
        checkpoints = self.store.child("checkpoints")
        found = None
        if self.rank == 0:
            found = checkpoint.newest_whole(checkpoints, lambda line: self.say(f"warning: {line}"))
        found = broadcast_from_rank_zero(found)
        if found is not None:
            checkpoint.restore(checkpoints, found, self.model, self.optimizer)
            self.unreadable.counts.update(checkpoint.read_state(checkpoints, found)["skipped"])
            self.say(f"continuing from the checkpoint of step {found} of {self.steps}")
        elif self.config.run.init_from:
            initial_weights(self.model, self.config.run.init_from)
            self.say(f"starting from the weights of {shown(self.config.run.init_from)}")
        elif self.model.target.needs_fit:
            if self.rank == 0:
                self.say(f"fitting the target {self.config.model.target} on images of the training data")
                fit_target(self.model, self.stream, self.config)
            if self.world_size > 1:
                for buffer in self.model.target.buffers():
                    dist.broadcast(buffer, src=0)
        return found or 0

    # ---- the steps

    def train(self, start: int) -> End:
        """All steps from ``start``, with what stands around them.

        Returns:
            FINISHED: they were done; JUDGED: the run was told to end at a probe; STOPPED: it was asked to stop.

        Raises:
            GoBackError: The workers are to begin again at the last checkpoint.
        """
        config = self.config
        per_epoch = self.job.train.num_samples / config.batch.global_size
        schedule = {
            "peak": peak_lr(config.optim.base_lr, config.batch.global_size),
            "warmup_steps": warmup_steps(config, self.job.train.num_samples),
            "total_steps": self.steps,
        }
        save_every = config.checkpoint.every_steps
        probe_every = max(1, round(config.probe.every_epochs * per_epoch)) if config.probe.every_epochs else self.steps
        # One that falls just before the last would tell nothing new.
        probes = [p for p in range(probe_every, self.steps, probe_every) if start < p < self.steps - probe_every // 2]
        # Probes that read nothing leave the reading of the training data alone.
        held = bool(probes) and self.evaluation.hold()
        ends = [*([] if held else probes), self.steps]
        stretches: dict[int, int] = dict(zip([start, *ends[:-1]], ends, strict=True))
        trainer = self._trainer()
        if start == 0 and config.probe.at_start:
            self.probe(0, (0, stretches[0]))
        else:
            self.reading = self.feed((start, stretches[start]))
        batches = self._audited(self._read_on())
        window: list[torch.Tensor] = []
        save_due = False
        self.last_save = time.perf_counter()
        if self.folder and config.log.profile:
            self.profile = Profile(self.folder.path / PROFILE, self.device)
        self.progress.begin(start)
        for step in range(start, self.steps):
            lr = lr_at(step, **schedule)
            window.append(train_step(trainer, batches, lr, self.guard.wish()))
            self.guard.heed(step, window[-1])
            done = step + 1
            self.progress.step(done)
            if self.profile:
                self._keep(self.profile.step())
            leaving = self.guard.node_goes()
            stops = done < self.steps and (self.guard.stop or bool(leaving))
            save_now = done == self.steps or (save_every and done % save_every == 0)
            save_now = save_now or stops or (self.job.judged and done in probes)
            log_now = save_now or done % config.log.every == 0
            if done == start + 1 and self.spool and (products := cpu_products.summary()):
                self.spool.tags({"cpu_products": products})
            if log_now or done == start + 1:
                self._check_readable(done, trainer)
            if log_now:
                self.guard.catch_up()
                window_S4 = torch.stack(window)
                window = []
                guard_s, self.guard.seconds = self.guard.seconds, 0.0
                hold = bool(self.guard.row) and done < self.steps
                self.progress.tell(done, lr, window_S4, trainer, guard_s=guard_s, hold=hold)
            if len(self.guard.row) >= BAD_STEPS_IN_A_ROW:
                self._go_back()
            if stops:
                self._tell_stop(done, leaving)
            goes_on = stops or done not in probes or self.probe(done, None if held else (done, stretches[done]))
            save_due = save_due or save_now
            minutes = (time.perf_counter() - self.last_save) / 60
            # Only where everything has been told: a run that continues from here leaves out nothing. And never in a row
            # of bad steps: the newest checkpoint is from before it.
            may_save = log_now and (not self.guard.row or done == self.steps)
            if may_save and (save_due or minutes >= config.checkpoint.every_minutes):
                self._save(done, wait=done == self.steps or stops or not goes_on)
                save_due = False
            if stops or not goes_on:
                assert self.reading is not None
                self.reading.close()
                self._end_profile()
                return self._leave(done, leaving) if stops else "JUDGED"
        self._end_profile()
        if next(batches, None) is not None:
            raise RuntimeError("the data holds more than the run's steps")
        return "FINISHED"

    def _tell_stop(self, done: int, node: str) -> None:
        """Says that the steps end here, first of all: whoever stops the run may not wait for its checkpoint."""
        if self.spool:
            if not node:
                self.spool.status("KILLED")
                self.job.console.stops_at.remote(done)
            self.say(f"step {done} of {self.steps}: {node or 'asked to stop'}")

    def _leave(self, done: int, node: str) -> End:
        """Ends the steps after an agreed one, when its checkpoint is whole; all ranks call it.

        Raises:
            GoBackError: Because of a node.
        """
        self.writer.wait()
        # A rank that ended before would have the others ended too.
        broadcast_from_rank_zero(True)
        if node:
            raise GoBackError(f"{node}: going on elsewhere from step {done}")
        return "STOPPED"

    def _check_readable(self, done: int, trainer: Trainer) -> None:
        """Ends a run on images most of which are none; all ranks call it, know the same, and so do the same.

        Raises:
            UnreadableError: More images cannot be read than ``data.max_unreadable`` allows.
        """
        self.progress.collect(done, trainer)
        cut, plan, train = self.stream.cut, self.stream.plan, self.job.train
        read = -(-done // cut.repeats) * cut.global_size
        read = read if plan.end is None else min(read, plan.end)
        share, listed = self.config.data.max_unreadable, self.store.path(UNREADABLE)
        try:
            self.unreadable.check(read, train.num_samples, share, train.location, listed)
        except UnreadableError:
            self.writer.wait()
            self.progress.let_go()
            self.progress.flush()
            raise

    def _go_back(self) -> None:
        """Writes down a row of bad steps, and begins again at the last checkpoint; all ranks call it.

        Raises:
            GoBackError: The first time.
            DivergedError: It has gone bad in the same place before.
        """
        row, again = self.guard.row, False
        self.writer.wait()
        if self.folder and self.spool:
            again = nonfinite.note(
                row,
                folder=self.folder,
                spool=self.spool,
                checkpoints=self.store.child("checkpoints"),
                mine=identity_hash(identity(self.config, self.job.train.digest)),
                images=self.job.train,
                global_size=self.config.batch.global_size,
                plan=self.stream.plan,
            )
            if again:
                self.progress.let_go()
                self.progress.flush()
        again = broadcast_from_rank_zero(again)
        where = f"the loss or a gradient was not finite in the steps {row[0]} to {row[-1]}"
        listed = self.store.path(nonfinite.FILE)
        if again:
            raise DivergedError(
                f"{where}, as it was before from the same checkpoint on, so the machine is not at fault: lower "
                f"optim.base_lr, or look for strange values in the images listed in {listed}"
            )
        self.say(f"{where}: going back to the last checkpoint (their samples are listed in {listed})")
        raise GoBackError(where)

    def _read_on(self) -> Iterator[MicroBatch]:
        """The training data of one stretch after the other."""
        ended = None
        while self.reading is not ended:
            ended = self.reading
            assert ended is not None
            yield from ended

    def _trainer(self) -> Trainer:
        model = maybe_compiled(self.config, self.model, self.device)
        if self.world_size > 1:
            # The only buffers are a fitted target's, which never change.
            model = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        trainer = make_trainer(self.config, model, self.model.masking, self.optimizer, self.stream.cut, self.device)
        if isinstance(model, DistributedDataParallel):
            trainer.clock.watch(model)
        return trainer

    def _end_profile(self) -> None:
        if self.profile:
            self._keep(self.profile.end())
            if not self.profile.written:
                self.say(f"warning: no profile: it is of the steps after the first {BEFORE} of a start, and none came")

    def _keep(self, files: list[Path]) -> None:
        """Notes the files of a profile, where it has just been written."""
        if files and self.spool and self.folder:
            for path in files:
                self.spool.artifact(path.relative_to(self.folder.path).as_posix(), PROFILE)
            self.say(f"profile: {', '.join(str(path) for path in files)}")

    def _audited(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Writes down the ids of what arrives, where the run asks for it; otherwise changes nothing."""
        if not self.config.log.ids:
            yield from batches
            return
        ids = Store(self.config.log.ids_folder) if self.config.log.ids_folder else self.store.child("ids")
        path = ids.local(f"rank-{self.rank:04d}-of-{self.world_size:04d}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Tells one attempt from the next, on all ranks alike: only in another one may a micro-batch come again.
        began = broadcast_from_rank_zero(time.time())
        with path.open("a", buffering=1) as file:
            for batch in batches:
                step = batch.index // self.stream.cut.micros
                ids = batch.sample_B[batch.sample_B >= 0].tolist()
                file.write(json.dumps({"began": began, "step": step, "index": batch.index, "ids": ids}) + "\n")
                yield batch

    last_save = 0.0
    reading: Feed | None = None
    profile: Profile | None = None

    # ---- what stands around the steps

    def _save(self, done: int, *, wait: bool = True) -> None:
        """Saves, after the checkpoint that is still on its way; or later, as soon as that is there."""
        self.last_save = time.perf_counter()
        if self.rank != 0:
            return
        if self.writer.busy and not wait:
            self.last_save = -math.inf
            return
        values = identity(self.config, self.job.train.digest)
        state = {
            "step": done,
            "steps": self.steps,
            "samples_seen": done * self.config.batch.global_size,
            "skipped": dict(self.unreadable.counts),
            "identity": identity_hash(values),
            "world_size": self.world_size,
            "torch": torch.__version__,
        }
        self.writer.save(done, self.model, self.optimizer, state)

    def _may_write(self) -> None:
        check_of(self.job.lease)()
        # A checkpoint without the points before it would lose them: nobody does these steps again.
        self.progress.flush()

    def _push(self) -> None:
        if self.folder:
            self.folder.push()

    def probe(self, done: int, then: tuple[int, int] | None) -> bool:
        """Scores the features, and draws.

        Args:
            done: Steps done.
            then: The steps that follow. Their data is read from when the probe has read its own: tasks that wait
                for their output to be taken keep their CPUs, and the probe's would wait for them for ever. None where
                it is being read already.

        Returns:
            Whether the run goes on.
        """
        start = time.perf_counter()

        def read_on() -> None:
            if then:
                self.reading = self.feed(then)

        goes_on = self.evaluation.on_the_way(done, read_on)
        self.progress.leave_out(time.perf_counter() - start)
        return goes_on

    def finish(self) -> None:
        """The last probes; then the result is written."""
        self.writer.wait()
        self.progress.flush()
        scores = self.evaluation.at_the_end()
        if self.spool and self.folder:
            said = notes(self.config, self.job.train.num_samples, scores, *read_record(self.folder.path))
            result = {
                "step": self.steps,
                "identity": identity_hash(identity(self.config, self.job.train.digest)),
                "scores": scores,
                "skipped": dict(self.unreadable.counts),
                "notes": said,
                "tracking_s": self.progress.tracking(),
            }
            self.folder.write("result.json", json.dumps(result, indent=2))
            if said:
                self.spool.tags({"mae.notes": "; ".join(said)})
            for name in ("config.json", "config.toml", "result.json", "skipped.jsonl"):
                if (self.folder.path / name).exists():
                    self.spool.artifact(name)
            self.spool.status("FINISHED")
            self.folder.push()
            ray.get(self.job.console.finish.remote())

    def give_up(self) -> None:
        """Ends the run where a probe's verdict ends it; the same name continues it."""
        self.writer.wait()
        self.progress.flush()
        if self.spool:
            self.spool.status("FINISHED")
            self._push()

    def close(self) -> None:
        """Ends what runs beside the loop."""
        if self.profile:
            self.profile.end()
        if self.follower and not self.follower.stop(timeout_s=20.0) and not self.store.is_local:
            # Where the folder is here, the driver tries once more, and says it.
            self.say(f"warning: MLflow lacks some of the record, which is whole in {self.store.location}")
        self.writer.close()
        if self.folder:
            with contextlib.suppress(OSError, UserError):  # what ends the run has been told already
                self.folder.push()
