"""Where things stand in the pictures of a search: values on an axis, and texts where they cover nothing."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from tune.trial import Trial

_BINS = 6
# More values than these have no ticks and no cells of their own.
_MANY = 16


def short(key: str) -> str:
    """A key without its section."""
    return key.rpartition(".")[2]


def shown(value: Any) -> str:
    """A value as a person reads it: three digits of a number that is not whole."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Scale:
    """Where the values of a key stand: on a line, on a logarithmic one, or at equal distances in their order."""

    key: str
    values: tuple[Any, ...]

    @property
    def few(self) -> bool:
        """Whether each value has a place, a tick and a cell of its own."""
        return self._words or len(self.values) <= _MANY

    @property
    def log(self) -> bool:
        """Over more than a decade, or where each value is at least twice the one before."""
        return self._logarithmic and not self._even

    def at(self, value: Any) -> float:
        """The place of a value."""
        return float(self.values.index(value)) if self._even else float(value)

    def edges(self) -> np.ndarray:
        """Of cells around the values, or of some as wide as each other where the values are many."""
        places = np.array([self.at(value) for value in self.values])
        places = np.log(places) if self.log else places
        if self.few:
            half = np.diff(places) / 2 if len(places) > 1 else np.array([0.5])
            first, last = places[0] - half[0], places[-1] + half[-1]
            edges = np.array([first, *(places[:-1] + half[: len(places) - 1]), last])
        else:
            margin = 0.03 * (places[-1] - places[0])
            edges = np.linspace(places[0] - margin, places[-1] + margin, _BINS + 1)
        return np.exp(edges) if self.log else edges

    def cell(self, value: Any) -> int:
        """The number of the cell that a value lies in."""
        return int(np.searchsorted(self.edges()[1:-1], self.at(value), side="right"))

    def inches(self, narrowest: float) -> float:
        """A length of the axis that leaves this to the narrowest cell."""
        edges = np.log(self.edges()) if self.log else self.edges()
        return narrowest * float((edges[-1] - edges[0]) / np.diff(edges).min())

    def apply(self, axes: Axes, which: Literal["x", "y"], inches: float, tick: float) -> None:
        """Sets an axis' label and scale, and its ticks at the values if these have room.

        Args:
            axes: Where.
            which: Axis.
            inches: Its length.
            tick: Length that a tick's label needs, in inches.
        """
        axis = axes.xaxis if which == "x" else axes.yaxis
        axis.set_label_text(short(self.key))
        if self.log:
            logarithmic(axes, which)
        if self.few and self.inches(tick) <= inches:
            axis.set_ticks([self.at(value) for value in self.values], [shown(value) for value in self.values])
            axis.set_ticks([], minor=True)

    @property
    def _words(self) -> bool:
        return any(isinstance(value, str | bool) for value in self.values)

    @property
    def _logarithmic(self) -> bool:
        if self._words or self.values[0] <= 0:
            return False
        doubling = len(self.values) > 2 and all(b >= 2 * a for a, b in itertools.pairwise(self.values))
        return doubling or max(self.values) > 10 * min(self.values)

    @property
    def _even(self) -> bool:
        """Words, and a few numbers of which some would stick together, as 0, 0.01 and 0.3."""
        if self._words or not self.few or len(self.values) < 3:
            return self._words
        gaps = np.diff(np.log(self.values) if self._logarithmic else self.values)
        return bool(gaps.max() > 4.5 * gaps.min())


def logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Makes an axis logarithmic, with ticks at 1, 2 and 5."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def scale_of(trials: Iterable[Trial], key: str) -> Scale:
    """The scale of a key of all trials."""
    return Scale(key, tuple(sorted({trial.values[key] for trial in trials})))


class Labels:
    """Texts beside the points of one picture, each where it covers neither a mark nor another text."""

    def __init__(self, axes: Axes, marks: Sequence[tuple[float, float]]):
        figure = axes.figure.get_figure(root=True)
        assert figure is not None
        figure.draw_without_rendering()  # what follows asks where the layout has put things
        self._axes, self._figure = axes, figure
        self._inside = axes.get_window_extent()
        radius = 4 * figure.dpi / 72
        self._taken = [
            Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius)
            for x, y in (axes.transData.transform(mark) for mark in marks)
        ]

    def put(self, x: float, y: float, text: str, offsets: Iterable[tuple[float, float]], **style: Any) -> None:
        """Writes at the first offset, in points, where there is room; nowhere if there is none."""
        for dx, dy in offsets:
            far = {"arrowstyle": "-", "linewidth": 0.5, "color": "0.3"} if math.hypot(dx, dy) > 20 else None
            note = self._axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", fontsize=7, arrowprops=far,
                                       ha="center" if not dx else "left" if dx > 0 else "right",
                                       va="center" if not dy else "bottom" if dy > 0 else "top", **style)  # fmt: skip
            note.set_in_layout(False)
            note.get_window_extent()  # puts the text in its place; that of the text alone leaves the line out
            box = Text.get_window_extent(note)
            inside = self._inside.x0 <= box.x0 and box.x1 <= self._inside.x1
            inside = inside and self._inside.y0 <= box.y0 and box.y1 <= self._inside.y1
            if inside and not any(box.overlaps(other) for other in self._taken):
                self._taken.append(box)
                return
            note.remove()


def ring() -> Iterable[tuple[float, float]]:
    """Offsets around a point, nearer ones first."""
    for radius in (5, 14, 26, 40, 56, 75, 96):
        for x, y in ((-1, 1), (0, 1), (1, -1), (1, 1), (1, 0), (-1, 0), (0, -1), (-1, -1)):
            yield radius * x, radius * y
