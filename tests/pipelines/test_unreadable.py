"""How many images may be unreadable before a run, a probe or a transfer ends, and that it then says so in one line."""

import contextlib
import json
import re
from collections import Counter

import pytest
import torch

from pipelines.config import Config, defines_result
from pipelines.data.readers import read_images
from pipelines.data.shards import load_manifest
from pipelines.errors import USAGE_ERROR, UserError, run_command
from pipelines.pretrain import main
from pipelines.storage import Store
from pipelines.training.build import build_model, fit_target, make_stream, make_trainer
from pipelines.training.runfolder import RunFolder
from pipelines.training.unreadable import FILE, Unreadable, UnreadableError, allowed, check_readable
from tests.pipelines.test_pretrain import arguments
from tests.pipelines.test_pretrain import recipe as recipe
from tests.pipelines.test_probing import Seen, configuration
from tests.pipelines.test_probing import prober as prober
from tests.stores import spoil

CPU = torch.device("cpu")


def ends(bad: int, read: int, num: int, share: float = 0.01, row: int = 0) -> bool:
    with contextlib.suppress(UnreadableError):
        check_readable(Counter(broken=bad), read, num, share, "/shards", row=row)
        return False
    return True


def test_a_broken_image_in_the_first_step_is_no_twentieth_of_the_data():
    assert not ends(1, 20, 5000)
    assert not ends(50, 200, 5000), "1 % of the data, all of which came first"
    assert ends(51, 200, 5000), "more than 1 % of the data, whatever else it holds"
    # Broken images come again in each epoch, and there too they may come first.
    for epoch in range(1, 60):
        assert not ends(50 * epoch, 5000 * (epoch - 1) + 60, 5000)
    assert ends(51 * 3, 5000 * 3, 5000)
    assert ends(1, 60, 60)
    assert not ends(1, 60, 60, share=0.02)


def test_nothing_is_trained_for_an_epoch_on_what_cannot_be_read():
    million = 10**6
    assert allowed(0.01, 10_000, million) == 200
    for share_of_bad, until in ((0.5, 250), (0.1, 1200), (0.02, 11_000)):
        assert ends(int(share_of_bad * until), until, million)
    assert ends(100, 5000, million, row=100)
    assert not ends(99, 5000, million, row=99)


def test_none_at_all_ends_it_whatever_is_allowed():
    assert ends(40, 40, 5000, share=1.0)
    assert not ends(39, 40, 5000, share=1.0, row=39)
    assert ends(8, 8, 10**6, share=0.5)
    assert not ends(0, 40, 5000, share=0.0)
    assert ends(1, 40, 5000, share=0.0)


def test_the_sentence_says_how_many_why_where_and_what_to_do():
    with pytest.raises(UserError) as error:
        check_readable(Counter(truncated=7, empty=1), 400, 400, 0.01, "s3://x/train", listed="/runs/a/skipped.jsonl")
    assert str(error.value) == (
        "8 of the 400 images read so far of s3://x/train cannot be read (7 truncated, 1 empty, listed in "
        "/runs/a/skipped.jsonl), and data.max_unreadable allows 1 %: mend these files, or pack without them, or raise "
        "--data.max-unreadable"
    )


def test_a_row_goes_over_steps_and_micro_batches(tmp_path, shards):
    """What the steps meet has its position in the plan, by which a row is found across windows and workers."""
    broken = spoil(shards["train"], tmp_path / "train")
    config = configuration().model_dump()
    config["data"]["train"], config["batch"] = broken, {"global_size": 30, "micro_size": 8}
    stream = make_stream(config := Config.model_validate(config), load_manifest(broken), 2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    model = build_model(config)
    ranks = [make_trainer(config, model, model.masking, optimizer, stream.cut, CPU) for _ in range(2)]
    unreadable = Unreadable(RunFolder(Store(str(tmp_path / "run"))), CPU)
    for step in range(4):
        for rank in (1, 0):
            for turn in range(stream.cut.accumulation):
                ranks[rank].next_batch(iter([read_images(stream, stream.cut.index(step, turn, rank))]))
        if step % 2:
            unreadable.counts += unreadable.collect([*ranks[0].skipped, *ranks[1].skipped], step)
            ranks[0].skipped, ranks[1].skipped = [], []
    with pytest.raises(UnreadableError, match="120 images in a row"):
        unreadable.check(10**5, 10**5, 0.5, "/shards", "")
    lines = [json.loads(line) for line in (tmp_path / "run" / FILE).read_text().splitlines()]
    assert len({(line["shard"], line["key"]) for line in lines}) == len(lines) == 120
    assert set(lines[0]) == {"shard", "key", "reason", "step"}
    # A good one between them ends a row.
    other = Unreadable(None, CPU)
    positions = [*range(60), *range(61, 130)]
    other.counts += other.collect([{"reason": "x", "position": p} for p in positions], 1)
    other.check(10**5, 10**5, 0.5, "/shards", "")


def test_a_run_on_images_none_of_which_can_be_read_ends_before_its_first_step_counts(recipe, shards, tmp_path, capsys):
    broken = spoil(shards["train"], tmp_path / "train")
    flags = arguments(recipe(60), {"train": broken}, tmp_path, "run", "--probe.no-at-start", "--log.every", "50")
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: main(flags))
    assert ended.value.code == USAGE_ERROR
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    listed = tmp_path / "run" / FILE
    assert re.search(rf"none of the 40 images read so far of {broken} can be read \(40 .*listed in {listed}\)", line)
    assert len(listed.read_text().splitlines()) == 40
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    assert "train/loss" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("hold_mib", [0, 256])
def test_a_probe_on_too_few_readable_images_ends_alike(prober, shards, tmp_path, hold_mib, monkeypatch):
    # What other tests hold of the shards before they were spoilt, whose manifest is the same.
    monkeypatch.setattr("pipelines.training.probing._KEPT", {})
    train, said = load_manifest(spoil(shards["train"], tmp_path / "train", keep=200)), r"10[01] of the 300 .*the/list"
    for share, ended in ((0.01, True), (0.4, False)):
        one = prober(configuration(hold_mib=hold_mib, val_share=0.3))
        one.max_unreadable, one.listed = share, "/the/list"
        with pytest.raises(UnreadableError, match=said) if ended else contextlib.nullcontext():
            one.hold(train)
            one.validate(Seen(), train, train)  # type: ignore[arg-type]
        assert len(one.skipped) in (100, 101), "they are there to be listed"


def test_a_target_cannot_be_fitted_on_nothing(shards, tmp_path):
    broken = spoil(shards["train"], tmp_path / "train")
    model = {"arch": "vit_tiny_patch16_224", "patch_size": 4, "decoder_width": 8, "decoder_heads": 1}
    values = {"model": {**model, "target": "pca", "target_components": 4}}
    config = Config.model_validate(configuration().model_dump() | values)
    model = build_model(config)
    with pytest.raises(UnreadableError, match="none of the 300 images"):
        fit_target(model, make_stream(config, load_manifest(broken), 1), config)


def test_the_limit_is_no_part_of_a_run():
    assert not defines_result("data.max_unreadable")
