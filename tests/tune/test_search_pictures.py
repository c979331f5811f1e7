"""Pictures of a search: what stands in them, and that no text covers another or is cut off."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text

from tune.pictures import cost, heat_map, score_over, stopping
from tune.trial import Trial

RATIO, WIDTH = "model.mask_ratio", "model.decoder_width"


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are saved, in their order."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, path: Path) -> None:
        save(self, path)
        saved.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def trials(ratios=(0.3, 0.5, 0.7, 0.75, 0.8, 0.9), widths=(32, 64, 128, 256), seeds=1) -> list[Trial]:
    """A third is stopped after one score, a third after three, some fail; the best has ratio 0.7 and width 128."""
    made = []
    for i, (ratio, width, seed) in enumerate(itertools.product(ratios, widths, range(seeds))):
        final = 60 - 40 * (ratio - 0.7) ** 2 - abs(np.log2(width / 128)) + 0.2 * seed
        state, num = ("finished", 9) if final > 58.5 else ("stopped", 3) if final > 57 else ("stopped", 1)
        if i % 11 == 3:
            state = "failed"
        scores = tuple((500 * k, final * k / 9) for k in range(1, num + 1))
        made.append(Trial(f"t{i}", {RATIO: ratio, WIDTH: width}, seed, scores, state, 9.0 * width, 1e11 * width))
    return made


def of(trials: list[Trial], **changes) -> list[Trial]:
    return [dataclasses.replace(trial, **changes) for trial in trials]


def texts(figure: Figure) -> Iterator[Text]:
    """All that is written, but for ticks outside an axis."""

    def of_axis(axis: Axis) -> Iterator[Text]:
        low, high = sorted(axis.get_view_interval())
        yield axis.label
        yield from (tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)

    def of_axes(axes: Axes) -> Iterator[Text]:
        yield from axes.texts
        for axis in (axes.xaxis, axes.yaxis):
            yield from of_axis(axis)
        for child in axes.child_axes:
            yield from of_axis(child.xaxis)

    for axes in figure.axes:
        yield from of_axes(axes)
    for legend in figure.legends:
        yield from legend.get_texts()
    if figure._suptitle is not None:  # pyright: ignore[reportAttributeAccessIssue]
        yield figure._suptitle  # pyright: ignore[reportAttributeAccessIssue]


def assert_readable(figure: Figure) -> None:
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts(figure)
             if text.get_visible() and text.get_text()]  # fmt: skip
    assert boxes
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, f"{text!r} is cut off"
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, f"{text!r} is cut off"
    for (one, box), (two, other) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other), f"{one!r} and {two!r} overlap"


MANY = trials()
CASES = {
    "many": MANY,
    "seeds": trials(ratios=(0.6, 0.7, 0.8), seeds=4),
    "random": [dataclasses.replace(one, values={RATIO: 0.3 + 0.017 * i, WIDTH: 10 ** (i / 9)}, state=one.state)
               for i, one in enumerate(MANY)],
    "words": [dataclasses.replace(one, values={RATIO: ("raw", "normalized", "pca")[i % 3], WIDTH: i % 2 == 0})
              for i, one in enumerate(MANY)],
    # All on the front, and close together.
    "crowded": [Trial(f"t{i}", {RATIO: 0.5 + 0.001 * i, WIDTH: 64}, 0, ((9, 50 + 0.1 * i),), "finished", i, 1e12 + i)
                for i in range(24)],
    "single": of(MANY[9:10], state="finished"),
    "stopped": [dataclasses.replace(one, state="stopped", scores=one.scores[:1]) for one in MANY],
    "failed": of(MANY, state="failed", scores=()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_everything_written_can_be_read(case, figures, tmp_path):
    some = CASES[case]
    heat_map(some, RATIO, WIDTH, tmp_path / "heat.png", 1.0)
    score_over(
        [dataclasses.replace(one, values={RATIO: one.values[RATIO]}) for one in some], RATIO, tmp_path / "o.png", 1.0
    )
    stopping(some, tmp_path / "stopping.png", 1.0)
    cost(some, tmp_path / "cost.png", 1.0)
    assert len(list(tmp_path.glob("*.png"))) == len(figures) == 4
    for figure in figures:
        assert_readable(figure)


def test_a_cell_is_the_mean_of_its_finished_seeds(figures, tmp_path):
    one, two = of(MANY[:2], values={RATIO: 0.5, WIDTH: 32}, state="finished")
    scored = [dataclasses.replace(one, scores=((9, 50.0),)), dataclasses.replace(two, scores=((9, 60.0),), seed=1)]
    other = of(MANY[2:3], values={RATIO: 0.7, WIDTH: 64}, state="finished", scores=((9, 40.0),))
    stopped = of(MANY[2:3], values={RATIO: 0.7, WIDTH: 32}, state="stopped", scores=((3, 30.0),))
    heat_map(scored + other + stopped, RATIO, WIDTH, tmp_path / "heat.png", 1.0)
    (mesh,) = (found for found in figures[0].axes[0].collections if isinstance(found, QuadMesh))
    assert np.ma.asarray(mesh.get_array()).filled(-1).tolist() == [[55.0, -1.0], [-1.0, 40.0]]
    assert {text.get_text() for text in figures[0].axes[0].texts} == {"55.0", "40.0", "(30.0)"}


def test_scores_within_noise_have_one_colour_and_one_height(figures, tmp_path):
    close = [dataclasses.replace(one, state="finished", scores=((9, 90.0 + 0.1 * i),)) for i, one in enumerate(MANY)]
    noise = 6.0
    heat_map(close, RATIO, WIDTH, tmp_path / "heat.png", noise)
    score_over(close, RATIO, tmp_path / "o.png", noise)
    stopping(close, tmp_path / "stopping.png", noise)
    cost(close, tmp_path / "cost.png", noise)
    heat, *others = (figure.axes[0] for figure in figures)
    (mesh,) = (found for found in heat.collections if isinstance(found, QuadMesh))
    assert mesh.get_clim() == pytest.approx((91.15 - 3, 91.15 + 3))
    for axes in others:
        low, high = axes.get_ylim()
        assert high - low == pytest.approx(noise)
        assert low < 90 < 92.3 < high
    far = [dataclasses.replace(one, scores=((9, 10.0 + 3 * i),)) for i, one in enumerate(close)]
    heat_map(far, RATIO, WIDTH, tmp_path / "heat.png", noise)
    (mesh,) = (found for found in figures[-1].axes[0].collections if isinstance(found, QuadMesh))
    assert mesh.get_clim() == pytest.approx((10.0, 10.0 + 3 * 23))


def test_the_best_of_a_picture_is_the_tables(figures, tmp_path):
    # The best single run belongs to the configuration with the worse mean.
    made = [Trial(f"t{i}", {RATIO: ratio, WIDTH: 32}, i % 2, ((9, score),), "finished", 1.0, 1e12)
            for i, (ratio, score) in enumerate([(0.5, 72.0), (0.5, 60.0), (0.7, 69.0), (0.7, 71.0)])]  # fmt: skip
    stopping(made, tmp_path / "stopping.png", 1.0)
    label = "best: mask_ratio 0.7, decoder_width 32: 70.0 %, mean of 2 seeds"
    assert label in {text.get_text() for text in texts(figures[0])}


def test_widths_stand_on_a_logarithmic_axis_at_their_own_ticks(figures, tmp_path):
    heat_map(MANY, RATIO, WIDTH, tmp_path / "heat.png", 1.0)
    axes = figures[0].axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["32", "64", "128", "256"]


def test_the_line_over_a_key_goes_through_the_best_of_each_value(figures, tmp_path):
    seeds = [of(MANY[:1], values={RATIO: ratio, WIDTH: width}, seed=seed, state="finished", scores=((9, score),))[0]
             for ratio, width, seed, score in
             [(0.5, 32, 0, 50.0), (0.5, 32, 1, 52.0), (0.5, 64, 0, 45.0), (0.7, 64, 0, 60.0)]]  # fmt: skip
    score_over(
        [*seeds, *of(seeds[:1], state="stopped", values={RATIO: 0.9, WIDTH: 32})], RATIO, tmp_path / "o.png", 1.0
    )
    axes = figures[0].axes[0]
    (bars,) = axes.containers
    assert np.array(bars[0].get_xydata()).tolist() == [[0.5, 51.0], [0.7, 60.0]]  # pyright: ignore
    low, high = bars[2][0].get_segments()[0][:, 1]  # pyright: ignore
    assert (high - low) / 2 == pytest.approx(12.706, rel=1e-3)  # Student's t of 1, times the standard error of 1


def test_the_steps_where_trials_were_stopped_are_counted(figures, tmp_path):
    stopping(MANY, tmp_path / "stopping.png", 1.0)
    axes = figures[0].axes[0]
    ends = [trial.scores[-1][0] for trial in MANY if trial.state == "stopped"]
    assert set(ends) == {500, 1500}
    (top,) = axes.child_axes
    assert [label.get_text() for label in top.get_xticklabels()] == [str(ends.count(500)), str(ends.count(1500))]
    assert list(top.get_xticks()) == [500, 1500]
    low, high = axes.get_xlim()
    assert low == 0
    assert high >= 4500
    assert "best: mask_ratio 0.7, decoder_width 128: 60.0 %" in {text.get_text() for text in texts(figures[0])}


def test_the_front_bears_its_values(figures, tmp_path):
    cost(MANY, tmp_path / "cost.png", 1.0)
    for axes in figures[0].axes:
        assert [text.get_text() for text in axes.texts] == ["0.7 · 64", "0.7 · 128"]
