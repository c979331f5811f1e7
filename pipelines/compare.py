"""Sets pretraining runs side by side: a table in the terminal, and one HTML page that needs nothing beside itself.

    python -m pipelines.compare RUN... [--storage runs] [--out compare.html]

What stands in the folders of runs is text of other people: all of it is escaped.
"""

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Annotated

import pydantic
import tyro

from pipelines.cli import parse
from pipelines.commands import command_line
from pipelines.comparison import (
    CURVES,
    NO_POINTS,
    OWN_KEYS,
    Points,
    Run,
    differing,
    loss_groups,
    number,
    read_run,
    score_rows,
    shown,
    thin,
)
from pipelines.config import also
from pipelines.errors import UserError, run_command
from pipelines.storage import Store, absolute

PROG = command_line("pipelines.compare")
# Any two of the six are 31 or more apart in CIELAB to normal, protan, deutan and tritan eyes, and stand out from the
# page; the strokes tell them apart without colour, too.
LIGHT = ("#2519a9", "#b09109", "#368c70", "#852d81", "#585400", "#000000")
DARK = ("#676fd9", "#ffd232", "#2eff9f", "#9c4a74", "#ce321b", "#cee7ff")
LIGHT_PAGE, DARK_PAGE = "#ffffff", "#14171a"
STROKES = ("", "7 4", "2 3", "9 3 2 3")
WARNING = (
    "Losses of different targets, masks, patches or images must not be compared: only scores of the features rank runs."
)


class Args(pydantic.BaseModel):
    """Set pretraining runs side by side: a table here, and one HTML page."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of the runs; one is enough."""
    storage: Annotated[str, also("--run.storage")] = "runs"
    """Folder or s3:// address that holds the runs."""
    out: str = "compare.html"
    """The page."""


# ---- the terminal


def table(runs: Sequence[Run]) -> str:
    """State, differing configuration and scores as text, a column for each run."""
    rows = [("", [run.name for run in runs]), ("state", [run.state for run in runs])]
    rows += differing(runs) + [(key, values) for key, values, _ in score_rows(runs)]
    groups = loss_groups(runs)
    if len(groups) == 1:
        rows.append(("train/loss", [run.score("train/loss") for run in runs]))
    cells = [[_plain(cell, 44) for cell in (title, *values)] for title, values in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    if len(groups) > 1:
        lines.append(f"train/loss is left out ({', '.join(key for key, _ in next(iter(groups)))}): {WARNING}")
    return "\n".join(lines)


def _plain(text: str, most: int) -> str:
    """Without what could steer a terminal; of a long one, the end, where paths differ."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text if len(text) <= most else f"…{text[1 - most :]}"


# ---- the page


def chart(title: str, curves: dict[int, Points]) -> str:
    """An SVG of curves by the number of their run."""
    width, height, left, right, top, bottom = 560, 260, 62, 12, 10, 30
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return f'<p class="empty">{NO_POINTS}</p>'
    last = max(1, *(step for step, _ in points))
    low, high = min(value for _, value in points), max(value for _, value in points)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-300):
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)

    def x(step: float) -> float:
        return left + (width - left - right) * step / last

    def y(value: float) -> float:
        return height - bottom - (height - top - bottom) * (value - low) / (high - low)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)} over steps">']
    for value in _ticks(low, high):
        parts.append(f'<path class="grid" d="M{left} {y(value):.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    for step in _ticks(0, last):
        parts.append(f'<text x="{x(step):.1f}" y="{height - 8}" text-anchor="middle">{step:,.6g}</text>')
    for i, curve in curves.items():
        style = f'class="c{i % len(LIGHT)}" stroke-dasharray="{_stroke(i)}"'
        drawn = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in thin(curve))
        parts.append(f'<polyline {style} data-run="{i}" points="{drawn}"/>')
        if 0 < len(curve) <= 40:
            parts += [f'<circle class="c{i % len(LIGHT)}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.5"/>' for s, v in curve]
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5 >= high - low)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _stroke(i: int) -> str:
    # Neighbours differ, so that one shows through another on the same line; with the colour, no two runs are alike.
    return STROKES[(i + i // len(LIGHT)) % len(STROKES)]


def _panel(title: str, key: str, runs: Sequence[Run], numbers: Iterable[int], note: str = "") -> str:
    curves = {i: runs[i].curves.get(key, []) for i in numbers}
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 34 8"><path class="c{i % len(LIGHT)}" stroke-dasharray="{_stroke(i)}" '
        f'd="M1 4H33"/></svg>{escape(runs[i].name)} <b>{number(key, curve[-1][1]) if curve else NO_POINTS}</b></li>'
        for i, curve in curves.items()
    )
    return f"<section><h3>{escape(title)}</h3>{note}{chart(title, curves)}<ul>{legend}</ul></section>"


def _loss_panels(runs: Sequence[Run]) -> list[str]:
    groups = loss_groups(runs)
    if len(groups) == 1:
        return [_panel(CURVES["train/loss"], "train/loss", runs, range(len(runs)))]
    note = f'<p class="warning">{WARNING} Each has a picture and an axis of its own here.</p>'
    return [
        _panel(f"Training loss at {', '.join(f'{k} {v}' for k, v in what)}", "train/loss", runs, numbers, note)
        for what, numbers in groups.items()
    ]


def _html_table(name: str, runs: Sequence[Run], rows: Iterable[tuple[str, list[str], set[int]]]) -> str:
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><th>{escape(title)}</th>"
        + "".join(f"<td class='{'best' if i in best else ''}'>{escape(value)}</td>" for i, value in enumerate(values))
        + "</tr>"
        for title, values, best in rows
    )
    return f'<div class="wide"><table id="{name}"><tr><th></th>{head}</tr>{body}</table></div>'


def page(runs: Sequence[Run], place: str) -> str:
    """The whole HTML page; it loads nothing, and its policy forbids that it could."""
    states = [("state", [run.state for run in runs], set())]
    if any(run.nonfinite for run in runs):
        states.append(("points that are no number", [str(run.nonfinite) for run in runs], set()))
    differ = [(key, values, set()) for key, values in differing(runs)]
    told = {*OWN_KEYS, *(row[0] for row in differ)}
    same = [(key, shown(runs[0].config, key)) for key in runs[0].config if key not in told]
    panels = _loss_panels(runs) + [_panel(CURVES[key], key, runs, range(len(runs))) for key in list(CURVES)[1:]]
    pictures = "".join(
        f"<figure><figcaption>{escape(run.name)}, step {run.picture[0]:,}</figcaption>"
        f'<img alt="reconstructions of {escape(run.name)}" '
        f'src="data:image/png;base64,{base64.b64encode(run.picture[1]).decode()}"></figure>'
        for run in runs
        if run.picture
    )
    colours = [":root{" + "".join(f"--c{i}:{c};" for i, c in enumerate(side)) + "}" for side in (LIGHT, DARK)]
    marks = "".join(f".c{i}{{stroke:var(--c{i})}}" for i in range(len(LIGHT)))
    return "".join([
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Runs side by side</title>',
        """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; """,
        'img-src data:"><meta name="viewport" content="width=device-width">',
        f"<style>{colours[0]}{_STYLE}{marks}@media(prefers-color-scheme:dark){{{colours[1]}{_NIGHT}}}</style></head>",
        f"<body><h1>Runs side by side</h1><p>{escape(place)}</p>{_html_table('states', runs, states)}",
        "<h2>Scores</h2><p>The highest of a row is bold. A difference that another seed could make says nothing.</p>",
        _html_table("scores", runs, score_rows(runs)),
        "<h2>Configuration that differs</h2>",
        _html_table("differs", runs, differ) if differ else "<p>Nothing differs.</p>",
        f"<details><summary>{len(same)} keys have the same value in every run</summary>",
        "<ul>" + "".join(f"<li>{escape(key)} = {escape(value)}</li>" for key, value in same) + "</ul></details>",
        f'<h2>Curves over optimiser steps</h2><div class="panels">{"".join(panels)}</div>',
        f'<h2>Newest reconstructions</h2><div class="panels">{pictures or "<p>No pictures yet.</p>"}</div>',
        "</body></html>",
    ])  # fmt: skip


_STYLE = (
    f"body{{font:15px/1.45 system-ui,sans-serif;margin:1.5rem auto;max-width:1240px;padding:0 1rem;color:#1b1f23;"
    f"background:{LIGHT_PAGE}}}.wide{{overflow-x:auto}}table{{border-collapse:collapse}}"
    "th,td{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #8886;white-space:nowrap}"
    "tr th:first-child{font-weight:400}.best,li b{font-weight:700}.warning{border-left:4px solid #d97706;"
    "padding-left:.6rem;font-weight:600}.panels{display:grid;gap:1.5rem;grid-template-columns:repeat(auto-fit,"
    "minmax(min(100%,420px),1fr))}section ul{list-style:none;padding:0}figure{margin:0}img{max-width:100%}"
    "svg{width:100%;fill:none}.key{width:34px;height:8px;margin-right:.5rem}polyline,.key path{stroke-width:2}"
    ".grid{stroke:#8886;stroke-width:1}text{fill:currentColor;font-size:12px}.empty{font-style:italic}"
)
_NIGHT = f"body{{color:#e6e6e6;background:{DARK_PAGE}}}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes the page."""
    args = parse(Args, prog=PROG, argv=argv)
    most = len(LIGHT) * len(STROKES)
    names = list(dict.fromkeys(args.runs))
    if not 1 <= len(names) <= most:
        raise UserError(f"name the runs to compare, 1 to {most} of them, found {len(names)} (see {PROG} --help)")
    runs = [read_run(args.storage, name) for name in names]
    folder, _, name = absolute(args.out).rpartition("/")
    out = Store(folder or "/")
    out.write(name, page(runs, Store(absolute(args.storage)).shown()))
    print(f"{table(runs)}\npage  {out.shown(name)}")
    return 0


if __name__ == "__main__":
    run_command(main)
