"""Scores that say nothing: refused where they cannot, marked where they do not."""

import os
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from pipelines import plots
from pipelines.config import Config
from pipelines.data.shards import INFO, Manifest, encode_info, load_manifest
from pipelines.errors import UserError
from pipelines.plots import Point, draw_scores
from pipelines.pretrain import check
from pipelines.storage import Store
from pipelines.training.scores import chance, check_classes, check_scored, summarise
from pipelines.transfer import check_labels, plot, read_transfer, told, told_at_start
from pipelines.transfer_config import Transfer, TransferData, units
from pipelines.transfer_identity import as_pretrained
from tests.conftest import write_images
from tests.masks import pack


def packed(folder, *, classes: int, most: int = 1 << 20) -> Manifest:
    """Shards of a folder of classes, made without Ray."""
    write_images(folder / "images", 6, classes=classes, size=8)
    return pack(folder, folder / "shards", masks=False, most=most)[1]


def test_data_of_one_class_are_refused_for_every_score(tmp_path):
    three = packed(tmp_path, classes=3, most=1)
    one = load_manifest(f"{three.location}/train-000000.tar")
    assert (one.num_samples, one.classes) == (1, three.classes)
    check_classes("data.test", three)
    with pytest.raises(UserError, match=r"data\.test: all labelled samples in .* are of one class, 'class\d', and"):
        check_labels({"train": three, "test": one})
    with pytest.raises(UserError, match=r"data\.val: all labelled samples in .* give shards with all classes"):
        check_labels({"train": three, "test": three, "val": one})
    alone = f"{three.location}/train-000000.tar"
    for probe in ({"train": alone}, {"train": three.location, "test": alone}):
        config = Config.model_validate({"data": {"train": three.location}, "probe": probe})
        with pytest.raises(UserError, match=r"probe\.(train|test): all labelled samples in .* are of one class"):
            check(config)


def test_data_without_a_label_are_refused(tmp_path):
    # A folder without classes; its manifest names two all the same, as one that others wrote may.
    flat = packed(tmp_path, classes=1)
    assert not flat.labelled
    Store(flat.location).write(INFO, encode_info(replace(flat, classes=("a", "b"))))
    manifest = load_manifest(flat.location)
    with pytest.raises(UserError, match=r"data\.test: none of the 6 samples in .* has a label: pack them"):
        check_labels({"test": manifest, "train": manifest})


@pytest.mark.parametrize(
    ("counts", "found"), [([[0, 0], [0, 0]], "nothing with a label"), ([[3, 1], [0, 0]], "only one")]
)
def test_a_score_on_less_than_two_classes_is_refused(counts, found):
    with pytest.raises(UserError, match=rf"data\.test: {found} .*give test data with two classes"):
        check_scored(torch.tensor(counts))
    check_scored(torch.tensor([[3, 1], [0, 1]]))


def test_chance_is_what_the_best_constant_gets():
    # 60, 30 and 10 images; two deviations of 60 % of 100 are 9.8 %.
    confusion_CC = torch.tensor([[60, 0, 0], [30, 0, 0], [10, 0, 0]])
    assert chance("top1", confusion_CC) == pytest.approx((60, 69.798), abs=1e-3)
    # IoU 60 %, 0 and 0.
    assert chance("miou", confusion_CC) == pytest.approx((20, 20))


def one(test, **more):
    return {"seed": 0, "val": test, "test": test, "seconds": 1.0, "chosen": {}, "unreadable": [], **more}


def test_a_score_at_chance_level_is_marked_in_the_result_and_the_table(tmp_path):
    store, unit = Store(str(tmp_path)), Transfer(protocol="finetune", run="r", data=TransferData(name="cells"))
    untrained = summarise(unit, [one([[60, 0], [40, 0]])])
    assert untrained["at_chance"]
    assert "AT CHANCE: always naming one class gives 60.00 %" in told(unit, untrained, store, 1.0)
    good = summarise(unit, [one([[55, 5], [5, 35]])])
    assert not good["at_chance"]
    assert "CHANCE" not in told(unit, good, store, 1.0)
    masks = summarise(Transfer(protocol="segment"), [one([[600, 0], [400, 0]])])
    assert masks["at_chance"]
    assert not summarise(Transfer(protocol="segment"), [one([[590, 10], [300, 100]])])["at_chance"]


def test_the_random_encoder_stands_beside_the_score(tmp_path):
    store, unit = Store(str(tmp_path)), Transfer(protocol="knn", run="r", data=TransferData(name="cells"))
    random = {"seed": 0, "test": [[7, 3], [3, 7]]}
    result = summarise(unit, [one([[9, 1], [1, 9]])], random)
    assert result["scores"]["test/random_top1"] == 70
    text = told(unit, result, store, 1.0)
    assert "random     70.00 % from a random encoder" in text
    assert "no better" not in text
    assert "is no better than the random one" in told(
        unit, summarise(unit, [one([[6, 4], [3, 7]])], random), store, 1.0
    )
    # One that did not stay finite is none.
    assert summarise(unit, [one([[9, 1], [1, 9]])], random | {"test": None})["scores"]["test/random_top1"] is None
    # Where a random one would be trained as long as the other, it is named and not trained.
    tuned = Transfer(protocol="finetune", run="r", data=TransferData(name="cells"))
    assert "--protocol scratch" in told(tuned, summarise(tuned, [one([[9, 1], [1, 9]])]), store, 1.0)


def start_of(manifest, *flags):
    asked = ["--run", "x", "--data.train", "/a/cells/train", "--data.test", "/a/t", "--protocol", "finetune", *flags]
    (unit,) = units(as_pretrained(read_transfer(asked), Config()), 12)
    return told_at_start(unit, {"train": manifest, "test": manifest}, 5)


def test_images_steps_and_warm_up_are_told_as_they_are(tmp_path):
    manifest = replace(packed(tmp_path, classes=2), shard_lengths=(3811,))
    first, second, *warned = start_of(manifest, "--train.global-size", "64")
    assert first == "finetune: 3,395 images to learn from, 416 to choose on, 3,811 to test on, 5 classes"
    assert second.startswith("finetune: 5,305 steps of 64 images (100 epochs), 265 of them warm-up")
    assert warned == []
    flags = ("--data.label-fraction", "0.1", "--train.epochs", "5", "--train.warmup-epochs", "5")
    first, second, warning, small = start_of(manifest, *flags)
    assert first.startswith("finetune_labels_0.1_5_epochs: 340 images to learn from (10 % of 3,395), 416 to choose on")
    assert ": 5 steps of 340 images (5 epochs), 2 of them warm-up" in second
    assert warning.startswith("warning: --train.warmup-epochs 5 would be 5 of the 5 steps")
    assert "give --train.epochs 10 or more, or --train.warmup-epochs 2" in warning
    assert small == "a step takes all 340 images: --train.global-size 1,024 are more"


def drawn(monkeypatch, tmp_path, *flags):
    """What a plot is asked to draw: lines of labels, and the title of what was varied."""
    asked = ["--run", "x", "--data.train", "/a/cells/train", "--data.test", "/a/t", *flags]
    transfer = as_pretrained(read_transfer(asked), Config())
    told = {}

    def draw(lines, x_title, *_):
        told.update({name: [point.label for point in points] for name, points in lines.items()}, x=x_title)
        _[-1].write_bytes(b"")

    monkeypatch.setattr("pipelines.plots.draw_scores", draw)
    scored = [(unit, summarise(unit, [one([[9, 1], [1, 9]])])) for unit in units(transfer, 4)]
    plot(transfer, None, Store(str(tmp_path)), scored)
    return told


def test_a_plot_is_over_what_was_varied(monkeypatch, tmp_path):
    assert drawn(monkeypatch, tmp_path, "--protocol", "finetune", "--against-scratch") == {
        "x": "weights at the start", "finetune": ["pretrained", "random"],
    }  # fmt: skip
    assert drawn(monkeypatch, tmp_path, "--protocol", "finetune", "--data.label-fraction", "0.1", "1") == {
        "x": "share of the labels", "finetune": ["0.1", "1"],
    }  # fmt: skip
    assert drawn(monkeypatch, tmp_path, "--protocol", "partial", "--blocks", "1", "all") == {
        "x": "blocks that train", "partial": ["1", "all"],
    }  # fmt: skip
    flags = ["--protocol", "knn", "--visible", "0.1", "0.5", "1", "--data.label-fraction", "0.1", "1"]
    assert drawn(monkeypatch, tmp_path, *flags) == {
        "x": "share of visible patches",
        "knn, share of the labels 0.1": ["0.1", "0.5", "1"],
        "knn, share of the labels 1": ["0.1", "0.5", "1"],
    }


def test_a_plot_takes_any_names_and_leaves_no_line_out(monkeypatch, tmp_path):
    names = [os.fsdecode(b"caf\xe9"), "$\\frac{", "a\nb", "🐈", "100 %"]
    lines = {name: [Point(0, name, 50.0, None), Point(1, "b", 60.0 + n, None)] for n, name in enumerate(names)}
    figures = []
    monkeypatch.setattr(plots, "Figure", lambda **size: figures.append(Figure(**size)) or figures[-1])
    draw_scores(lines, "x", "y", "$a$ of " + names[0], tmp_path / "plot.png")
    legend = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert legend == ["caf\\xe9", "\\$\\frac{", "a\\nb", "🐈", "100 %"]
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size[0] > 100
