"""What stands between the steps of a pretraining run: probes, pictures, and a verdict on the scores."""

import contextlib
import time
from collections.abc import Callable, Iterator

import ray
from ray.train.collective import broadcast_from_rank_zero

from mae_core.model import MaskedAutoencoder
from pipelines.data.readers import View
from pipelines.spool import Spool
from pipelines.training.build import build_model
from pipelines.training.job import Job
from pipelines.training.pictures import save_reconstructions
from pipelines.training.probing import Prober
from pipelines.training.runfolder import RunFolder
from pipelines.training.unreadable import Unreadable, UnreadableError, told


class Evaluation:
    """Says by every run what its features are worth.

    Args:
        job: The run.
        steps: The run's steps.
        model: The model, not wrapped.
        prober: Looks at images with all ranks.
        unreadable: What could not be read.
        spool: The run's record, on rank 0.
        folder: The run's folder, on rank 0.
        say: Shows a line in the driver's terminal.
    """

    def __init__(
        self,
        job: Job,
        steps: int,
        model: MaskedAutoencoder,
        prober: Prober,
        unreadable: Unreadable,
        spool: Spool | None,
        folder: RunFolder | None,
        say: Callable[[str], None],
    ):
        self._job, self._steps, self._model, self._prober = job, steps, model, prober
        self._unreadable, self._spool, self._folder, self._say = unreadable, spool, folder, say

    def hold(self) -> bool:
        """Keeps what is looked at on the way, where it is small; then the probes read nothing. All ranks call it."""
        with self._left_out(0):
            return self._prober.hold(*self._prober.looked_at(self._job.probe_train, self._job.train))

    def on_the_way(self, done: int, when_read: Callable[[], None]) -> bool:
        """Scores the features on held-out training labels and draws reconstructions; all ranks call it.

        Args:
            done: Steps done.
            when_read: Called when the probe has read its images.

        Returns:
            Whether the run goes on, the same on all ranks.
        """
        start = time.perf_counter()
        self._model.eval()
        with self._left_out(done):
            # Before its first step the encoder is looked at as at the last: it is what the others are held against.
            scores = self._prober.validate(
                self._model, self._job.probe_train, self._job.train, when_read, last=not done
            )
        self._model.train()
        self._tell_left_out(done)
        if self._spool:
            self._spool.metrics(done, scores)
            self._say(f"step {done} of {self._steps}  {_in_words(scores)}  ({time.perf_counter() - start:.0f} s)")
        self._draw(done)
        return self._verdict(done, scores)

    def at_the_end(self) -> dict[str, float]:
        """The last probes, on the test data where there are some; all ranks call it.

        Returns:
            The scores on rank 0, nothing on the others.
        """
        job = self._job
        self._model.eval()
        with self._left_out(self._steps):
            if job.probe_train and job.probe_test:
                models = {"test/": self._model}
                if job.config.probe.random_baseline:
                    device = next(self._model.parameters()).device
                    models["test/random_"] = build_model(job.config).to(device).eval()
                scores = self._prober.test(models, job.probe_train, job.probe_test)
            else:
                scores = self._prober.validate(self._model, job.probe_train, job.train, last=True)
        self._tell_left_out(self._steps)
        self._draw(self._steps)
        if self._spool:
            self._spool.metrics(self._steps, scores)
            if job.judged:
                ray.get(job.console.score.remote(self._steps, scores))
        return scores

    def _verdict(self, done: int, scores: dict[str, float]) -> bool:
        """What whoever judges the run says to a probe's scores; the same on all ranks."""
        if not self._job.judged:
            return True
        goes_on = False
        if self._spool:
            ray.get(self._job.console.score.remote(done, scores))
            while (verdict := ray.get(self._job.console.verdict.remote(done))) is None:
                time.sleep(0.05)
            goes_on = verdict
        return bool(broadcast_from_rank_zero(goes_on))

    @contextlib.contextmanager
    def _left_out(self, done: int) -> Iterator[None]:
        """Around a probe: lists what it could not read also where that is what ends it, on all ranks together."""
        try:
            yield
        except UnreadableError:
            self._tell_left_out(done)
            raise

    def _tell_left_out(self, done: int) -> None:
        skipped, self._prober.skipped = self._prober.skipped, []
        if found := self._unreadable.collect(skipped, done):
            self._say(f"left out of the probe, because they could not be read: {told(found)}")

    def _draw(self, done: int) -> None:
        config = self._job.config
        if self._spool and self._folder and config.log.pictures:
            file = f"pictures/reconstruction-{done:08d}.png"
            view = View(config.data.image_size, config.data.channels, crop_share=config.probe.crop_share)
            # Not of the test data, which is read once, at the end.
            images = self._job.probe_train or self._job.train
            if save_reconstructions(self._model, config, images, view, self._folder.path / file):
                self._spool.image(done, "reconstruction", file)


def _in_words(scores: dict[str, float]) -> str:
    """Scores in words: percentages with a unit, others as they are."""
    return "  ".join(
        f"{name.split('/')[-1].replace('_', ' ')} {value:.2f}{' %' if 'top1' in name else ''}"
        for name, value in scores.items()
    )
