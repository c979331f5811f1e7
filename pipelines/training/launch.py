"""Starts a run's workers, where there is room for them."""

import itertools
import os
from collections.abc import Callable, Sequence

import ray
import ray.train
import ray.train.torch

from pipelines.config import Scale, worker_cpus
from pipelines.errors import UserError
from pipelines.storage import Store


def check_resources(scale: Scale, reading: float) -> Scale:
    """Holds what the run asks for against what this machine, or the cluster, has.

    Args:
        scale: What it asks for.
        reading: CPUs that one reading task claims.

    Returns:
        It, with the CPUs that a worker claims.

    Raises:
        UserError: It can never be met.
    """
    have = ray.cluster_resources()
    may_grow = bool(scale.address or os.environ.get("RAY_ADDRESS"))
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    scale = scale.model_copy(update={"cpus_per_worker": worker_cpus(scale, reading, nodes)})
    if scale.min_workers:
        _check_room_for_reading(scale, reading)
    cpus = have.get("CPU", 0)
    wanted, wanted_gpus = scale.workers * scale.cpus_per_worker, scale.workers * scale.gpus_per_worker
    if may_grow:
        # A cluster may still grow: Ray waits for what is missing.
        gpus = f" and {wanted_gpus:g} GPUs" if scale.gpu else ""
        if wanted + reading > cpus or wanted_gpus > have.get("GPU", 0):
            print(
                f"waiting for the cluster to grow: the run needs {wanted + reading:g} CPUs{gpus}, "
                f"there are {cpus:g} and {have.get('GPU', 0):g}",
                flush=True,
            )
        return scale
    if wanted + reading > cpus:
        share = max(0.0, (cpus - reading) / scale.workers)
        raise UserError(
            f"{scale.workers} workers with {scale.cpus_per_worker:g} CPUs each and {reading:g} for "
            f"reading data are more than the {cpus:g} CPUs there are: lower scale.workers, or set "
            f"scale.cpus_per_worker to {share:.2g} or less"
        )
    if wanted_gpus > have.get("GPU", 0):
        raise UserError(f"scale.gpu asks for {wanted_gpus:g} GPUs; there are {have.get('GPU', 0):g}")
    return scale


def _check_room_for_reading(scale: Scale, reading: float) -> None:
    """Sees that workers never fill a node: an elastic run starts as many as fit, and then nobody could read for them.

    Raises:
        UserError: They can.
    """
    for node in ray.nodes():
        cpus = node["Resources"].get("CPU", 0.0) if node["Alive"] else 0.0
        gpus = node["Resources"].get("GPU", 0.0) if scale.gpu else scale.workers
        # Ray counts in ten-thousandths.
        fit = min(int(cpus / scale.cpus_per_worker + 1e-4), int(gpus), scale.workers)
        if fit and cpus - fit * scale.cpus_per_worker < reading - 1e-4:
            share = int(100 * (cpus - reading) / fit) / 100
            raise UserError(
                f"scale.min_workers needs CPUs for reading beside the workers on every node: {fit} workers with "
                f"{scale.cpus_per_worker:g} CPUs each do not leave data.cpus_per_task, {reading:g}, of the {cpus:g} "
                f"CPUs of {node['NodeManagerAddress']}; set scale.cpus_per_worker to {max(0.0, share):g}"
            )


def run_here(worker: Callable[[], None], scale: Scale) -> None:
    """Runs a run's only worker in this process (Ray Train's local mode), which holds what the worker needs.

    No process has to start and to import PyTorch, but nobody replaces this one if it is lost.

    Args:
        worker: What it does.
        scale: How often it is tried again.

    Raises:
        ray.train.TrainingFailedError: It failed for good.
    """
    trainer = ray.train.torch.TorchTrainer(
        worker,
        scaling_config=ray.train.ScalingConfig(num_workers=0, use_gpu=scale.gpu),
        run_config=ray.train.RunConfig(name="ray-train"),
    )
    for failures in itertools.count(1):
        try:
            trainer.fit()
            return
        except Exception as error:
            # Whatever it is, as where the worker is a process of its own.
            if failures > scale.max_failures:
                raise ray.train.WorkerGroupError(f"{type(error).__name__}: {error}", {0: error}) from error


def run_workers(
    worker: Callable[[], None], scale: Scale, store: Store, callbacks: Sequence[ray.train.UserCallback] = ()
) -> None:
    """Runs the workers until the run has ended; lost ones are replaced.

    Args:
        worker: What each does; pickled by value.
        scale: How many, and on what.
        store: The run's folder.
        callbacks: Told of what happens to the workers.

    Raises:
        ray.train.TrainingFailedError: It failed for good.
    """
    # Where a node has just been lost, Ray Train asks for a place there until it has heard of the loss. It asks anew
    # each time that this has passed: 60 s by default.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    # A worker that does not answer for so long is taken for dead: 600 s by default. Its process answers from another
    # thread than the one that compiles, trains and copies a checkpoint; what keeps Python's lock for long is rare.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "40")
    resources = {"CPU": scale.cpus_per_worker, **({"GPU": scale.gpus_per_worker} if scale.gpu else {})}
    ray.train.torch.TorchTrainer(
        worker,
        scaling_config=ray.train.ScalingConfig(
            num_workers=(scale.min_workers, scale.workers) if scale.min_workers else scale.workers,
            # Looking costs one call to an actor; Ray looks for new nodes every 20 s.
            elastic_resize_monitor_interval_s=10.0,
            use_gpu=scale.gpu,
            resources_per_worker=resources,
        ),
        # Ray Train keeps its own notes there; the checkpoints are ours (training/checkpoint.py).
        run_config=ray.train.RunConfig(
            name="ray-train",
            storage_path=store.location,
            callbacks=list(callbacks),
            failure_config=ray.train.FailureConfig(max_failures=scale.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    ).fit()
