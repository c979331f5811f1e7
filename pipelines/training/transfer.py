"""What every Ray Train worker of a transfer does: learns from labelled images, and scores at the end."""

import ray

from pipelines.errors import DIVERGED, FAILED, USAGE_ERROR, UserError
from pipelines.training.classification import Classification
from pipelines.training.loop import DivergedError
from pipelines.training.segmentation import Segmentation
from pipelines.training.transfer_cached import score_cached
from pipelines.training.transfer_learning import Learning, StoppedHereError
from pipelines.training.transfer_worker import TransferJob, Worker
from pipelines.transfer_config import CACHED


def transfer_worker(job: TransferJob) -> None:
    """Learns and scores; what would fail the same way again is told to the console, and no start follows."""
    if ray.get(job.console.failure.remote()) or ray.get(job.console.is_stopped.remote()):
        return
    worker = None
    try:
        worker = Worker(job)
        if worker.transfer.protocol in CACHED:
            score_cached(worker)
        else:
            task = Segmentation(worker) if worker.transfer.protocol == "segment" else Classification(worker)
            Learning(worker, task).learn()
        if worker.rank == 0:
            ray.get(job.console.finish.remote())
    except StoppedHereError:
        return
    except DivergedError as error:
        ray.get(job.console.fail.remote(str(error), DIVERGED))
        raise
    except UserError as error:
        ray.get(job.console.fail.remote(str(error), USAGE_ERROR))
        raise
    except (ValueError, TypeError, LookupError, AssertionError) as error:
        ray.get(job.console.fail.remote(f"{type(error).__name__}: {error}", FAILED))
        raise
    finally:
        if worker is not None:
            worker.close()
