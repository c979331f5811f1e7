"""What is told of an ablation: tables for the terminal and for Markdown, and their pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pipelines.plots import COLOURS
from tune.claims import Judged
from tune.tables import Row
from tune.trial import mean_interval

_MARKS = ("o", "s", "^")


@dataclass(frozen=True)
class Measured:
    """A row of a table with what it has come to here.

    Args:
        row: The row.
        is_recipe: Whether it is the recipe itself.
        scores: Percent, by seed.
        knn: Of nearest neighbours, likewise.
        flops: Of a training; 0: not known.
        failed: Why a seed has no score; empty: none has failed.
    """

    row: Row
    is_recipe: bool
    scores: Mapping[int, float]
    knn: Mapping[int, float]
    flops: float
    failed: str = ""

    @property
    def label(self) -> str:
        """The paper's, with what is another here."""
        notes = [self.row.note] * bool(self.row.note) + ["the recipe"] * self.is_recipe
        return self.row.label + (f" ({', '.join(notes)})" if notes else "")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows under a head, as a table of Markdown."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body])


def _score(scores: Mapping[int, float]) -> str:
    if not scores:
        return "-"
    mean, half = mean_interval(list(scores.values()))
    return f"{mean:.2f}" + (f" +- {half:.2f}" if half is not None else "")


def lines(measured: Sequence[Measured], score: str) -> list[list[str]]:
    """An ablation's table: ours beside the paper's, in the paper's order.

    FLOPs are over those of the recipe itself, or of the first row where the recipe is none of them.

    Args:
        measured: Its rows.
        score: What the scores are.
    """
    costs = [one.flops for one in measured if one.is_recipe and one.flops] or [one.flops for one in measured]
    base = next((flops for flops in costs if flops), 0.0)
    rows = [["", score, "kNN", "seeds", "FLOPs", "paper: fine-tuned", "linear", "FLOPs"]]
    for one in measured:
        row = one.row
        paper = [f"{value:.1f}" if value is not None else "-" for value in (row.finetune, row.linear)]
        rows.append(
            [
                one.label,
                "failed" if one.failed and not one.scores else _score(one.scores),
                _score(one.knn),
                str(len(one.scores)) if one.scores else "-",
                f"{one.flops / base:.2f}x" if one.flops else "-",
                *paper,
                f"{row.flops:.1f}x" if row.flops is not None else "-",
            ]
        )
    empty = [column for column in range(1, len(rows[0])) if all(row[column] == "-" for row in rows[1:])]
    return [[word for column, word in enumerate(row) if column not in empty] for row in rows]


def section(title: str, setting: str, rows: Sequence[Sequence[str]], said: Sequence[str], picture: str) -> str:
    """A section of Markdown.

    Args:
        title: Its heading.
        setting: What was run, in a sentence or some.
        rows: The table, under its head.
        said: What it shows, an item each.
        picture: Its file, as a link from the section's.
    """
    items = "\n".join(f"- {one}" for one in said)
    return f"## {title}\n\n{setting}\n\n{markdown(rows)}\n\n{items}\n\n![{title}]({picture})\n"


def said(judged: Sequence[Judged], unjudged: str) -> list[str]:
    """What is said of the paper's claims, an item each."""
    told = [f"{one.verdict}: {one.claim.text} ({one.detail})" for one in judged]
    return told + [f"not judged: {unjudged} (the paper's; nothing is fine-tuned here)"] * bool(unjudged)


Points = Sequence[tuple[float, float | None] | None]
"""Values with half of their intervals, one for each label; None where there is none."""


def draw(title: str, labels: Sequence[str], panels: Mapping[str, Mapping[str, Points]], path: Path) -> None:
    """Draws values of the same labels, one below the other, in panels beside each other.

    Args:
        title: Of the whole.
        labels: From top to bottom.
        panels: By what stands below each, its kinds of values by name; one without any is left out.
        path: PNG file to write.
    """
    drawn = {
        below: {name: points for name, points in kinds.items() if any(point is not None for point in points)}
        for below, kinds in panels.items()
    }
    drawn = {below: kinds for below, kinds in drawn.items() if kinds}
    width = 4.0 * max(1, len(drawn)) + 0.07 * max(map(len, labels))
    figure = Figure(figsize=(width, 1.7 + 0.32 * len(labels)), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, (below, kinds) in zip(
        figure.subplots(1, max(1, len(drawn)), sharey=True, squeeze=False)[0], drawn.items(), strict=False
    ):
        for place, (name, points) in enumerate(kinds.items()):
            at = np.arange(len(labels)) + 0.18 * (place - (len(kinds) - 1) / 2)
            found = [(y, *point) for y, point in zip(at, points, strict=True) if point is not None]
            y, x, half = zip(*found, strict=True)
            axes.errorbar(x, y, xerr=[one or 0.0 for one in half], fmt=_MARKS[place], color=COLOURS[place], capsize=3,
                          markersize=5, label=name)  # fmt: skip
        axes.set_xlabel(below, fontsize=9)
        axes.grid(alpha=0.3)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(kinds), frameon=False)
    figure.savefig(path)


def draw_ablation(title: str, measured: Sequence[Measured], score: str, path: Path) -> None:
    """Draws an ablation's table: ours on the left, the paper's on the right.

    Args:
        title: Of the whole.
        measured: The rows; one without a score has the paper's alone.
        score: What ours are.
        path: PNG file to write.
    """

    def ours(scores: Sequence[Mapping[int, float]]) -> Points:
        return [mean_interval(list(one.values())) if one else None for one in scores]

    def paper(values: Sequence[float | None]) -> Points:
        return [(value, None) if value is not None else None for value in values]

    panels = {
        "here, top-1 %": {score: ours([one.scores for one in measured]), "kNN": ours([one.knn for one in measured])},
        "paper (ViT-L, ImageNet-1K), top-1 %": {
            "fine-tuned": paper([one.row.finetune for one in measured]),
            "linear": paper([one.row.linear for one in measured]),
        },
    }
    draw(title, [one.label for one in measured], panels, path)
