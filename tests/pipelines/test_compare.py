"""The comparison of runs that the real record has written: its numbers, its warnings, and that it trusts no text."""

import base64
import itertools
import json
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.compare import DARK, DARK_PAGE, LIGHT, LIGHT_PAGE, main
from pipelines.comparison import Points, read_run, thin
from pipelines.config import Config, identity, identity_hash
from pipelines.errors import UserError
from pipelines.spool import SPOOL_FILE, Spool
from pipelines.storage import Store
from pipelines.training.runfolder import RunFolder
from tests.stores import moto_server, put, s3_environment

ROOT = Path(__file__).parents[2]
HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x onerror='alert(2)'>\""


def write_run(
    storage: str | Path, name: str, *, steps: int = 40, score: float = 90.0, digest: str = "d1", **keys: dict
) -> Path:
    """A finished pretraining run, as the commands leave it; without steps, one that has only begun."""
    config = Config.model_validate({**keys, "run": {"name": name, "storage": str(storage), **keys.get("run", {})}})
    store = Store(str(storage)).child(name)
    mine = identity(config, digest)
    store.write("config.json", config.model_dump_json(indent=2))
    store.write("identity.json", json.dumps(mine))
    folder = RunFolder(store)
    if steps:
        spool = Spool(folder.path)
        spool.status("RUNNING")
        spool.metrics(0, {"probe/knn_top1": score - 50})
        for step in range(1, steps + 1):
            spool.metrics(step, {"train/loss": 1 / step, "train/lr": 1e-4 * step})
        draw(folder.path, spool, steps // 2, "red")
        draw(folder.path, spool, steps, "blue")
        scores = {"probe/knn_top1": score - 5, "probe/linear_top1": score - 2, "test/linear_top1": score}
        spool.metrics(steps, scores | {"test/random_linear_top1": 99.0})
        for i, value in enumerate((1.0, score + 1)):  # measured twice: the newest counts
            spool.metrics(i, {"transfer/digits/linear_fast_top1": value})
        spool.status("FINISHED")
        spool.close()
        result = {"step": steps, "identity": identity_hash(mine), "scores": scores, "skipped": {}}
        folder.write("result.json", json.dumps(result))
        folder.push()
    return folder.path


def draw(folder: Path, spool: Spool, step: int, colour: str) -> None:
    file = f"pictures/reconstruction-{step:08d}.png"
    (folder / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (6, 2), colour).save(folder / file)
    spool.image(step, "reconstruction", file)


class Page(HTMLParser):
    """What a page holds: its elements, its text by element, its tables row by row."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, dict[str, list[str]]] = {}
        self.sections: list[str] = []
        self.text = ""
        self._rows: list[list[str]] = []
        self._in_section = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.elements.append((tag, found))
        if tag == "table":
            self._rows = []
            self._name = found["id"]
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "section":
            self._in_section = True
            self.sections.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.tables[self._name] = {row[0]: row[1:] for row in self._rows}
            self._rows = []
        elif tag == "section":
            self._in_section = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._rows and self._rows[-1]:
            self._rows[-1][-1] += data
        if self._in_section:
            self.sections[-1] += data + " "

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def compare(storage: str | Path, out: Path, *names: str) -> Page:
    assert main([*names, "--storage", str(storage), "--out", str(out)]) == 0
    return Page(out.read_text())


def assert_stands_alone(page: Page) -> None:
    """Nothing runs, and nothing is fetched."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "a", "form"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "data", "xlink:href", "action"):
                assert value.startswith("data:image/png;base64,"), (tag, value)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_two_runs_side_by_side(tmp_path, capsys):
    write_run(tmp_path, "fast", score=90.0, optim={"base_lr": 1e-3})
    write_run(tmp_path, "slow", score=80.5, optim={"base_lr": 1e-4}, scale={"workers": 4})
    page = compare(tmp_path, tmp_path / "page.html", "fast", "slow")
    assert page.tables["states"]["state"] == ["finished, 40 steps", "finished, 40 steps"]
    assert page.tables["differs"] == {
        "": ["fast", "slow"],
        "optim.base_lr": ["0.001", "0.0001"],
        "scale.workers": ["1", "4"],
    }
    # what defines the result comes before what does not
    assert list(page.tables["differs"])[1:] == ["optim.base_lr", "scale.workers"]
    assert page.tables["scores"] == {
        "": ["fast", "slow"],
        "test/linear_top1": ["90.00 %", "80.50 %"],
        "test/random_linear_top1": ["99.00 %", "99.00 %"],
        "transfer/digits/linear_fast_top1": ["91.00 %", "81.50 %"],
        "probe/knn_top1": ["85.00 %", "75.50 %"],
        "probe/linear_top1": ["88.00 %", "78.50 %"],
    }
    # the highest is marked in each row but the random encoder's
    assert sum(cell.get("class") == "best" for cell in page.all("td")) == 4
    assert_stands_alone(page)
    # one loss picture with both curves, of 40 points each
    assert len(page.sections) == 4
    assert "must not be compared" not in page.text
    lines = [line["points"].split() for line in page.all("polyline")]
    assert [len(points) for points in lines] == [40, 40, 2, 2, 1, 1, 40, 40]
    pictures = [image["src"].partition(",")[2] for image in page.all("img")]
    newest = [(tmp_path / name / "pictures/reconstruction-00000040.png").read_bytes() for name in ("fast", "slow")]
    assert [base64.b64decode(picture) for picture in pictures] == newest
    out = capsys.readouterr().out
    assert "transfer/digits/linear_fast_top1  91.00 %" in out
    assert "train/loss                        0.025" in out
    assert str(tmp_path / "page.html") in out


@pytest.mark.parametrize(
    ("changed", "title"),
    [
        ({"model": {"mask_ratio": 0.5}}, "model.mask_ratio 0.5"),
        ({"model": {"target": "raw"}}, "model.target raw"),
        ({"model": {"loss_on": "all"}}, "model.loss_on all"),
        ({"data": {"augment": "none"}}, "data.augment none"),
        ({"model": {"arch": "vit_base_patch32_224"}}, "model.patch_size 32"),
        ({"digest": "d2"}, "data.digest d2"),
    ],
)
def test_losses_that_measure_something_else_get_pictures_of_their_own(tmp_path, capsys, changed, title):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", optim={"base_lr": 1.0})
    write_run(tmp_path, "c", **changed)
    page = compare(tmp_path, tmp_path / "page.html", "a", "b", "c")
    losses = [section for section in page.sections if "Training loss" in section]
    assert len(losses) == 2
    assert all("must not be compared" in section for section in losses)
    assert title in losses[1]
    runs = [line["data-run"] for line in page.all("polyline")]
    assert runs[:3] == ["0", "1", "2"]
    out = capsys.readouterr().out
    assert "train/loss is left out" in out
    assert "0.025" not in out


def test_a_mask_strategy_that_another_version_knows_parts_the_losses_too(tmp_path):
    for name, strategy in (("a", "random"), ("b", "block")):
        folder = write_run(tmp_path, name)
        config = json.loads((folder / "config.json").read_text())
        config["model"]["mask_strategy"] = strategy
        (folder / "config.json").write_text(json.dumps(config))
    page = compare(tmp_path, tmp_path / "page.html", "a", "b")
    assert "Training loss at model.mask_strategy block" in page.text


def test_a_run_without_points_and_one_alone(tmp_path):
    write_run(tmp_path, "new", steps=0)
    write_run(tmp_path, "old")
    both = compare(tmp_path, tmp_path / "both.html", "old", "new")
    assert both.tables["states"]["state"] == ["finished, 40 steps", "no points yet"]
    assert both.tables["scores"]["test/linear_top1"] == ["90.00 %", "–"]
    assert all("no points yet" in section for section in both.sections)
    alone = compare(tmp_path, tmp_path / "alone.html", "new")
    assert not alone.all("polyline")
    assert "Nothing differs" in alone.text
    assert_stands_alone(alone)


def test_what_users_wrote_stays_text(tmp_path, capsys):
    storage = tmp_path / "<b onclick=x>"
    folder = write_run(storage, "bad", run={"experiment": HOSTILE}, data={"train": "https://me:secret@h/x?sig=secret"})
    write_run(storage, "good")
    with (folder / SPOOL_FILE).open("a") as file:
        file.write(json.dumps({"step": 0, "time": 0, "metrics": {f"transfer/\x1b[31m{HOSTILE}/x_top1": 5.0}}) + "\n")
        file.write('{"torn": \n')
        file.write(json.dumps({"step": 41, "time": 0, "metrics": {"train/loss": "nan", "train/lr": HOSTILE}}) + "\n")
    page = compare(storage, tmp_path / "page.html", "bad", "good")
    assert_stands_alone(page)
    assert page.tables["differs"]["run.experiment"][0] == HOSTILE
    assert any(HOSTILE in row for row in page.tables["scores"])
    assert str(storage) in page.text
    assert page.tables["states"]["points that are no number"] == ["2", "0"]
    assert "secret" not in (tmp_path / "page.html").read_text()
    assert "\x1b" not in capsys.readouterr().out


def test_curves_are_thinned_and_keep_their_spikes(tmp_path):
    values = np.random.default_rng(0).normal(size=20_000)
    values[[7_777, 13_001]] = 50, -50
    points: Points = [(step, float(value)) for step, value in enumerate(values)]
    kept = thin(points)
    assert len(kept) <= 302
    assert {points[0], points[-1], points[7_777], points[13_001]} <= set(kept) <= set(points)
    assert kept == sorted(kept)
    write_run(tmp_path, "long", steps=3000)
    page = compare(tmp_path, tmp_path / "page.html", "long")
    assert max(len(line["points"].split()) for line in page.all("polyline")) <= 302
    assert (tmp_path / "page.html").stat().st_size < 60_000


def test_no_two_of_many_runs_are_drawn_alike(tmp_path):
    names = [f"run{i}" for i in range(24)]
    for name in names:
        write_run(tmp_path, name, steps=2)
    page = compare(tmp_path, tmp_path / "page.html", *names)
    assert len({(line["class"], line["stroke-dasharray"]) for line in page.all("polyline")}) == 24
    with pytest.raises(UserError, match="found 25"):
        main([*names, "one-more", "--storage", str(tmp_path)])


def test_a_run_that_went_on_is_not_finished(tmp_path):
    folder = write_run(tmp_path, "a")
    (folder / "identity.json").write_text(json.dumps({"train.steps": 80}))
    spool = Spool(folder)
    spool.metrics(50, {"train/loss": 0.01})
    spool.status("FAILED")
    spool.close()
    run = read_run(str(tmp_path), "a")
    assert run.state == "failed, 50 steps"
    assert run.score("test/linear_top1") == "90.00 % at step 40"


def test_mistakes_are_one_line(tmp_path):
    folder = write_run(tmp_path, "cells-b16", steps=0)
    command = [sys.executable, "-m", "pipelines.compare", "cells-b17", "--storage", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no run 'cells-b17'" in done.stderr
    assert "did you mean cells-b16?" in done.stderr
    with pytest.raises(UserError, match="name the runs to compare, 1 to 24 of them, found 0"):
        main(["--storage", str(tmp_path)])
    (folder / "config.json").write_text('{"protocol": "linear"}')
    with pytest.raises(UserError, match="'cells-b16' is no pretraining run"):
        main(["cells-b16", "--storage", str(tmp_path)])
    (folder / "config.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"config\.json is damaged: expected a JSON object"):
        main(["cells-b16", "--storage", str(tmp_path)])


def test_runs_in_an_object_store(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the record of a remote run lies
    with moto_server() as address:
        put(address, "bucket")
        for name, value in s3_environment(address).items():
            monkeypatch.setenv(name, value)
        write_run("s3://bucket/runs", "far")
        page = compare("s3://bucket/runs", tmp_path / "page.html", "far")
        with pytest.raises(UserError, match=r"did you mean far\?"):
            main(["fra", "--storage", "s3://bucket/runs"])
    assert page.tables["states"]["state"] == ["finished, 40 steps"]
    assert len(page.all("img")) == 1


def seen(colours: tuple[str, ...], eye: list[list[float]]) -> list[np.ndarray]:
    """CIELAB of sRGB colours, as an eye sees them (Machado et al. 2009, a matrix on linear RGB)."""
    found = []
    for colour in colours:
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.clip(eye @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
        xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]] @ linear
        x, y, z = np.cbrt(xyz / [0.9505, 1, 1.089])
        found.append(np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)]))
    return found


@pytest.mark.parametrize(("colours", "paper"), [(LIGHT, LIGHT_PAGE), (DARK, DARK_PAGE)])
def test_colours_can_be_told_apart_by_every_eye(colours, paper):
    eyes = {
        "normal": [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]],
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    for eye, matrix in eyes.items():
        labs = seen(colours, matrix)
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(labs, 2)) > 30, eye
    lightness = np.array([lab[0] for lab in seen((*colours, paper), eyes["normal"])])
    luminance = ((lightness + 16) / 116) ** 3 + 0.05
    assert (np.maximum(luminance[:-1], luminance[-1]) / np.minimum(luminance[:-1], luminance[-1]) > 2.95).all()
