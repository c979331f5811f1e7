"""Plots of scores, drawn by matplotlib without a display."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

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
    figure.suptitle(title)
    # By name: a label belongs to one place on every line.
    labels = {point.x: point.label for points in lines.values() for point in points}
    places = {x: place for place, x in enumerate(sorted(labels))}
    for (name, points), colour, mark in zip(lines.items(), COLOURS, _MARKS, strict=False):
        points = sorted(points, key=lambda point: point.x)
        half = [point.half or 0.0 for point in points]
        scores = [point.score for point in points]
        style = {"color": colour, "marker": mark, "capsize": 3}
        axes[0].errorbar([places[point.x] for point in points], scores, yerr=half, label=name, **style)
        if costs:
            paid = [(point.flops / 1e12, one, point) for point, one in zip(points, scores, strict=True) if point.flops]
            axes[1].plot([cost for cost, _, _ in paid], [one for _, one, _ in paid], mark, color=colour, label=name)
            for cost, one, point in paid:
                axes[1].annotate(f"{point.label} ({point.seconds:.0f} s)", (cost, one), fontsize=7, xytext=(3, 3),
                                 textcoords="offset points")  # fmt: skip
    axes[0].set_xticks(list(places.values()), [labels[x] for x in places])
    axes[0].set_xlabel(x_title)
    if costs:
        axes[1].set_xlabel("training, TFLOP a seed")
        axes[1].set_xscale("log")
    for axis in axes:
        axis.set_ylabel(y_title)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend()
    figure.savefig(path, dpi=110)
