"""What every Ray Train worker of a transfer does: learns from labelled images, and scores once at the end."""

import json

import ray
import torch.distributed as dist

from pipelines.errors import UserError
from pipelines.training.classification import Classification
from pipelines.training.scores import summarise
from pipelines.training.segmentation import Segmentation
from pipelines.training.transfer_cached import score_cached
from pipelines.training.transfer_learning import Learning
from pipelines.training.transfer_worker import TransferJob, Worker
from pipelines.transfer_config import CACHED


def transfer_worker(job: TransferJob) -> None:
    """Learns and scores; what would fail the same way again is told to the console, and no start follows."""
    if ray.get(job.console.failure.remote()):
        return
    worker = None
    try:
        worker = Worker(job)
        _run(worker)
    except UserError as error:
        ray.get(job.console.fail.remote(str(error), True))
        raise
    except (ValueError, TypeError, LookupError, AssertionError) as error:
        ray.get(job.console.fail.remote(f"{type(error).__name__}: {error}", False))
        raise
    finally:
        if worker is not None:
            worker.close()


def _run(worker: Worker) -> None:
    """All seeds, each where an earlier attempt has left off; then the result is written."""
    if worker.transfer.protocol in CACHED:
        scored = score_cached(worker)
    else:
        task = Segmentation(worker) if worker.transfer.protocol == "segment" else Classification(worker)
        scored = Learning(worker, task).learn()
    unreadable = [worker.unreadable]
    if worker.world_size > 1:
        unreadable = [set() for _ in range(worker.world_size)]
        dist.all_gather_object(unreadable, worker.unreadable)
    if not (worker.spool and worker.folder):
        return
    result = summarise(worker.transfer, scored, len(set().union(*unreadable)))
    worker.spool.metrics(0, {key: value for key, value in result["scores"].items() if value is not None})
    worker.folder.write("result.json", json.dumps(result, indent=2))
    worker.spool.artifact("result.json")
    worker.spool.status("FINISHED")
    worker.folder.push()
