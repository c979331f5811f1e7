"""Plots of scores, drawn by matplotlib without a display."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from mae_core.names import printable

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by all eyes
_MARKS = ("o", "s", "^", "D")


@dataclass(frozen=True)
class Point:
    """One score.

    Args:
        x: Where it stands; equal distances are drawn between the x of a plot, in their order.
        label: What stands below it.
        score: Percent.
        half: Half of its 95 % interval; None where there is a single seed.
        seconds: Of training; 0 where there was none.
        flops: Of training.
    """

    x: float
    label: str
    score: float
    half: float | None
    seconds: float = 0.0
    flops: float = 0.0


def draw_scores(lines: Mapping[str, Sequence[Point]], x_title: str, y_title: str, title: str, path: Path) -> None:
    """Draws scores over what was varied, and where training cost something, over its cost beside it.

    Args:
        lines: The points of each line, by its name.
        x_title: What was varied.
        y_title: What the scores are.
        title: Of the whole.
        path: PNG file to write.
    """
    costs = any(point.flops for points in lines.values() for point in points)
    figure = Figure(figsize=(10 if costs else 5.5, 4), layout="constrained")
    axes = figure.subplots(1, 2 if costs else 1, squeeze=False)[0]
    figure.suptitle(_plain(title))
    # By name: a label belongs to one place on every line.
    labels = {point.x: point.label for points in lines.values() for point in points}
    places = {x: place for place, x in enumerate(sorted(labels))}
    looks = itertools.product(_MARKS, COLOURS)  # as many as nobody can tell apart any more
    for (name, points), (mark, colour) in zip(lines.items(), itertools.cycle(looks), strict=False):
        name = _plain(name)
        points = sorted(points, key=lambda point: point.x)
        half = [point.half or 0.0 for point in points]
        scores = [point.score for point in points]
        style = {"color": colour, "marker": mark, "capsize": 3}
        axes[0].errorbar([places[point.x] for point in points], scores, yerr=half, label=name, **style)
        if costs:
            paid = [(point.flops / 1e12, one, point) for point, one in zip(points, scores, strict=True) if point.flops]
            axes[1].plot([cost for cost, _, _ in paid], [one for _, one, _ in paid], mark, color=colour, label=name)
            for cost, one, point in paid:
                axes[1].annotate(
                    f"{_plain(point.label)} ({point.seconds:.0f} s)",
                    (cost, one),
                    fontsize=7,
                    xytext=(3, 3),
                    textcoords="offset points",
                )
    axes[0].set_xticks(list(places.values()), [_plain(labels[x]) for x in places])
    axes[0].set_xlabel(x_title)
    if costs:
        axes[1].set_xlabel("training, TFLOP a seed")
        axes[1].set_xscale("log")
    for axis in axes:
        axis.set_ylabel(y_title)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend()
    with warnings.catch_warnings():
        # Of a name with letters that the font does not have, it draws boxes.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from")
        figure.savefig(path, dpi=110)


def _plain(name: str) -> str:
    """A name as matplotlib shows it: it takes what stands between two dollar signs for a formula."""
    return printable(name).replace("$", r"\$")
