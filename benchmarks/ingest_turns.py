"""Whose turn it is in ``benchmarks.ingest``: arms without Ray run in a process of their own, those on Ray here."""

import os
from collections.abc import Sequence

from benchmarks.ingest_arms import PLAIN, check_pixels
from benchmarks.ingest_data import Images
from benchmarks.ingest_host import Host, take_turn
from benchmarks.ingest_on_ray import ON_RAY
from benchmarks.meter import Turn

# A task's batches arrive at once, after seconds: a longer turn holds more of these bursts.
_LONGER_ON_RAY = 2
_FIRST_GUESS = 500.0  # images a second
_ATTEMPTS = 3
_WARM_BATCHES = 40


class Turns:
    """Runs turns: of arms without Ray in a host, of those on Ray here.

    Args:
        cores: The cores that all arms run on.
        host: The process of the arms without Ray.
    """

    def __init__(self, cores: Sequence[int], host: Host):
        self._cores, self._host = cores, host
        self._rates: dict[tuple[str, str], float] = {}

    def check(self, name: str, images: Images) -> float:
        """The mean difference of an arm's pixels from the reference."""
        if name in PLAIN:
            return self._host.ask("check", name, images)
        # Enough for several tasks at once, so that all workers have started when the first turn comes.
        return check_pixels(ON_RAY[name], images, _WARM_BATCHES * images.batch)

    def turn(self, name: str, images: Images, seconds: float) -> Turn:
        """One arm's turn."""
        if name in PLAIN:
            turn = self._host.ask("turn", name, images, seconds, 0)
            self._rates[name, images.manifest.location] = turn.images_per_s
            return turn
        # An execution on Ray is read to its end, or its workers would be killed in the middle of their tasks. So it
        # gets about as much to read as it can in that time, and what is left after that is not measured.
        seconds *= _LONGER_ON_RAY
        key, limit = (name, images.manifest.location), ("raw", images.manifest.location)
        turn, attempts = None, 0
        while turn is None or (turn.seconds < 0.8 * seconds and attempts < _ATTEMPTS):
            attempts += 1
            rate = self._rates.get(key) or self._rates.get(limit, _FIRST_GUESS)
            turn = take_turn(
                ON_RAY[name],
                images,
                seconds,
                max(int(rate * (1.2 * seconds + 1.5)), 8 * images.batch),
                cores=self._cores,
                root=os.getpid(),
                without=(self._host.pid,),
                drain=True,
            )
            # Through too early, its last tasks were measured while they ran alone.
            self._rates[key] = turn.images_per_s if turn.seconds > 0.8 * seconds else max(turn.images_per_s, 2 * rate)
        return turn
