"""Pictures of a search, drawn by matplotlib without a display: what was good, what it cost, and what was stopped."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from pipelines.plots import COLOURS
from tune.placing import Labels, Scale, logarithmic, ring, scale_of, short, shown
from tune.trial import Ranked, State, Trial, configurations, mean_interval, pareto, ranking, summary

_ACCURACY = "probe accuracy on the validation split, %"
_DPI = 110
_BLUE, _BEST = COLOURS[:2]
_COSTS: tuple[tuple[Literal["flops", "seconds"], float, str], ...] = (
    ("flops", 1e12, "training, TFLOP a seed"),
    ("seconds", 1.0, "training and probing, s a seed"),
)
_MARKS: dict[State, dict[str, Any]] = {
    "finished": {"marker": "o", "color": _BLUE},
    "running": {"marker": "D", "color": _BLUE, "markerfacecolor": "none"},
    "stopped": {"marker": "o", "color": "0.45", "markerfacecolor": "none"},
    "failed": {"marker": "x", "color": "black"},
}


def _legend(figure: Figure, trials: Sequence[Trial], more: Sequence[Line2D] = (), **over: Any) -> None:
    """What the marks mean, as they are drawn but for ``over``, and how many there are, below the picture."""
    told = {"stopped": ", at its last score"}
    marks = [
        Line2D([], [], **{"linestyle": "none", "markersize": 6} | style | over,
               label=f"{state}{told.get(state, '')} ({num})")
        for state, style in _MARKS.items()
        if (num := sum(trial.state == state for trial in trials))
    ]  # fmt: skip
    figure.legend(
        handles=[*marks, *more], loc="outside lower center", ncols=2 if more else 4, fontsize=8, frameon=False
    )


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure


def _mark(axes: Axes, x: float, y: float, state: State, **style: Any) -> None:
    axes.plot([x], [y], **{"linestyle": "none", "markersize": 5} | _MARKS[state] | style)


def _without_scores(axes: Axes, empty: Literal["y", "both"]) -> None:
    axes.tick_params(axis=empty, left=False, labelleft=False, bottom=False, labelbottom=False)
    axes.text(0.5, 0.5, "no trial has a score", transform=axes.transAxes, ha="center", color="0.4")


def _at_least(low: float, high: float, width: float) -> tuple[float, float]:
    """A range about the same middle, no narrower than a width: what is less than noise is not to look like much."""
    missing = max(0.0, width - (high - low)) / 2
    return low - missing, high + missing


def _widen(axes: Axes, noise: float) -> None:
    axes.set_ylim(*_at_least(*axes.get_ylim(), noise))


def heat_map(trials: Sequence[Trial], x_key: str, y_key: str, path: Path, noise: float) -> None:
    """Draws the accuracy over two keys, and on it the trials.

    A cell's colour is the mean of its finished configurations, each the mean of its seeds; a stopped trial colours
    nothing, since its score is of an earlier step.

    Args:
        trials: All of them.
        x_key: What stands below.
        y_key: What stands beside.
        path: PNG file to write.
        noise: Points that the colours span at least.
    """
    x, y = scale_of(trials, x_key), scale_of(trials, y_key)
    width, height = min(max(4.0, x.inches(0.55)), 11.0), min(max(3.0, y.inches(0.6)), 7.0)
    figure = _figure(width + 1.9, height + 1.4, f"Accuracy over {short(x_key)} and {short(y_key)}")
    axes = figure.subplots()
    axes.set_facecolor("0.95")
    x.apply(axes, "x", width, 0.35)
    y.apply(axes, "y", height, 0.2)
    found: dict[tuple[int, int], list[float]] = {}
    for one in ranking(trials):
        if one.state == "finished" and one.score is not None:
            found.setdefault((y.cell(one.values[y_key]), x.cell(one.values[x_key])), []).append(one.score)
    cells = np.full((len(y.edges()) - 1, len(x.edges()) - 1), np.nan)
    for place, scores in found.items():
        cells[place] = mean_interval(scores)[0]
    if found:
        low, high = _at_least(float(np.nanmin(cells)), float(np.nanmax(cells)), noise)
        mesh = axes.pcolormesh(
            x.edges(), y.edges(), np.ma.masked_invalid(cells), cmap="viridis", alpha=0.5, vmin=low, vmax=high
        )
        figure.colorbar(mesh, label=_ACCURACY)
    axes.set_xlim(x.edges()[0], x.edges()[-1])
    axes.set_ylim(y.edges()[0], y.edges()[-1])
    _legend(figure, trials, color="black")
    _heat_map_marks(axes, trials, x, y)
    figure.savefig(path)


def _heat_map_marks(axes: Axes, trials: Sequence[Trial], x: Scale, y: Scale) -> None:
    figure = axes.figure.get_figure(root=True)
    assert figure is not None
    spots: dict[tuple[float, float], list[Trial]] = {}
    for trial in trials:
        spots.setdefault((x.at(trial.values[x.key]), y.at(trial.values[y.key])), []).append(trial)
    for (at_x, at_y), there in spots.items():
        states: list[State] = [state for state in _MARKS if any(trial.state == state for trial in there)]
        for place, state in enumerate(states):
            aside = ScaledTranslation((place - (len(states) - 1) / 2) / 8, 0, figure.dpi_scale_trans)
            _mark(axes, at_x, at_y, state, color="black", transform=axes.transData + aside)
    labels = Labels(axes, list(spots))
    for (at_x, at_y), there in spots.items():
        for state, below in (("finished", True), ("running", False), ("stopped", False)):
            scores = [trial.score for trial in there if trial.state == state and trial.score is not None]
            if scores:
                text = f"{mean_interval(scores)[0]:.1f}"
                offsets = [(0, -6)] if below else [(0, 6)]
                labels.put(at_x, at_y, text if below else f"({text})", offsets, color="black" if below else "0.25")


def score_over(trials: Sequence[Trial], key: str, path: Path, noise: float) -> None:
    """Draws the accuracy over one key, as the paper's figure 5.

    Faint: every trial. The line: of each value the best finished configuration, mean and 95 % interval of its seeds.

    Args:
        trials: All of them.
        key: What stands below.
        path: PNG file to write.
        noise: Points that the scale spans at least.
    """
    scale = scale_of(trials, key)
    width = min(max(6.0, scale.inches(0.4)), 11.0)
    figure = _figure(width, 4.4, f"Accuracy over {short(key)}")
    axes = figure.subplots()
    scale.apply(axes, "x", width - 1.0, 0.35)
    axes.set_ylabel(_ACCURACY)
    axes.grid(alpha=0.3)
    for trial in trials:
        at = scale.at(trial.values[key])
        if trial.score is not None:
            _mark(axes, at, trial.score, trial.state, alpha=0.45)
        elif trial.state == "failed":
            _mark(axes, at, 0.03, trial.state, transform=axes.get_xaxis_transform())
    best: dict[Any, Ranked] = {}
    for one in ranking(trials):
        if one.state == "finished" and one.score is not None:
            best.setdefault(one.values[key], one)
    points, more = [], []
    if best:
        points = [(scale.at(value), one.score or 0.0, one.half or math.nan) for value, one in sorted(best.items())]
        at_x, scores, half = zip(*points, strict=True)
        style: dict[str, Any] = {"color": _BEST, "marker": "o", "markersize": 4}
        style |= {"linestyle": "-" if scale.few else "none"}
        axes.errorbar(at_x, scores, yerr=half, capsize=3, **style)
        several = len(configurations(trials)) > len(scale.values)
        label = "best finished configuration of a value" if several else "mean of the finished seeds"
        more.append(Line2D([], [], label=label + ("" if np.isnan(half).all() else ", 95 % interval"), **style))
    elif all(trial.score is None for trial in trials):
        _without_scores(axes, "y")
    _legend(figure, trials, more)
    _widen(axes, noise)
    if points:
        x, y, _ = max(points, key=lambda point: point[1])
        Labels(axes, [point[:2] for point in points]).put(x, y, f"{y:.1f}", ring(), color=_BEST)
    figure.savefig(path)


def stopping(trials: Sequence[Trial], path: Path, noise: float) -> None:
    """Draws every trial's score over its optimiser steps, and the steps where trials ended.

    The seeds of the best configuration, the table's first, are emphasised.

    Args:
        trials: All of them.
        path: PNG file to write.
        noise: Points that the scale spans at least.
    """
    figure = _figure(8.0, 4.8, "Which trials were stopped, and where")
    axes = figure.subplots()
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel(_ACCURACY)
    axes.grid(alpha=0.3, axis="y")
    scored = [trial for trial in trials if trial.scores]
    best = next((one for one in ranking(trials) if one.score is not None), None)
    for trial in scored:
        style = _MARKS[trial.state] | {"linewidth": 1.0, "alpha": 0.6, "markersize": 5}
        if best is not None and trial.values == best.values:
            style |= {"color": _BEST, "linewidth": 2.5, "alpha": 1.0, "zorder": 3}
        # One mark: where it ended.
        axes.plot(*zip(*trial.scores, strict=True), markevery=[len(trial.scores) - 1], **style)
    more = []
    if best is not None:
        values = ", ".join(f"{short(key)} {shown(value)}" for key, value in best.values.items())
        seeds = f", mean of {best.num_seeds} seeds" if best.num_seeds > 1 else ""
        label = f"best: {values}: {best.score:.1f} %{seeds}"
        more.append(Line2D([], [], color=_BEST, linewidth=2.5, label=label))
    else:
        _without_scores(axes, "both")
    axes.set_xlim(left=0)
    _widen(axes, noise)
    _rungs(axes, [trial.scores[-1][0] for trial in scored if trial.state == "stopped"])
    _legend(figure, trials, more, linestyle="-")
    figure.savefig(path)


def _rungs(axes: Axes, ends: Sequence[int]) -> None:
    """A line at each step where trials were stopped, and above it how many, where there is room."""
    if not ends:
        return
    rungs = sorted(set(ends))
    top = axes.secondary_xaxis("top")
    top.set_xlabel("stopped at this step", fontsize=8)
    low, high = axes.get_xlim()
    ticks: list[int] = []
    for rung in rungs:
        axes.axvline(rung, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        if not ticks or rung - ticks[-1] > 0.04 * (high - low):
            ticks.append(rung)
    top.set_xticks(ticks, [str(ends.count(rung)) for rung in ticks], fontsize=8)


def cost(trials: Sequence[Trial], path: Path, noise: float) -> None:
    """Draws the configurations' accuracy over what their training cost, in FLOPs and in seconds, a seed.

    The line is the Pareto front of the finished ones; its members bear their values.

    Args:
        trials: All of them.
        path: PNG file to write.
        noise: Points that the scale spans at least.
    """
    keys = " · ".join(short(key) for key in trials[0].values)
    figure = _figure(12.0, 4.8, f"Accuracy and cost; on the front: {keys}")
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].set_ylabel(_ACCURACY)
    ranked = [one for one in map(summary, configurations(trials)) if one.score is not None]
    fronts = [pareto(ranked, name) for name, _, _ in _COSTS]
    style: dict[str, Any] = {"color": _BEST, "marker": "o", "markersize": 5}
    for axes, front, (name, unit, title) in zip(panels, fronts, _COSTS, strict=True):
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
        axes.margins(0.12)
        paid = [getattr(one, name) / unit for one in ranked]
        if not ranked:
            _without_scores(axes, "both")
        elif min(paid) > 0 and max(paid) > 10 * min(paid):
            logarithmic(axes, "x")
        for one, x in zip(ranked, paid, strict=True):
            _mark(axes, x, one.score or 0.0, one.state, alpha=0.7)
        at_x, scores = [getattr(one, name) / unit for one in front], [one.score for one in front]
        axes.plot(at_x, scores, drawstyle="steps-post", **style)
    _legend(figure, trials, [Line2D([], [], label="Pareto front", **style)] if any(fronts) else [])
    _widen(panels[0], noise)
    for axes, front, (name, unit, _) in zip(panels, fronts, _COSTS, strict=True):
        labels = Labels(axes, [(getattr(one, name) / unit, one.score or 0.0) for one in ranked])
        for one in front:
            text = " · ".join(shown(value) for value in one.values.values())
            labels.put(getattr(one, name) / unit, one.score or 0.0, text, ring(), color=_BEST)
    figure.savefig(path)
