"""A trial by itself, as Tune drives it: what it trains between two reports, and where it ends."""

import json

import pytest
import ray

from pipelines.pretrain import Images, check
from pipelines.spool import read_spool
from pipelines.storage import Store
from pipelines.training import checkpoint
from tests.tune.searches import arguments
from tune.journal import Cell
from tune.search import read_search, trial_config
from tune.trainable import CELL, PretrainingTrial, Study, shape_name, stop_sign
from tune.trial import Trial


@pytest.fixture
def study(shards, tmp_path):
    """That of a search of four reports a trial."""
    search = read_search(arguments(tmp_path, shards, "--reports", "4")).search
    train, labelled, _ = check(search)
    config = trial_config(search, train.num_samples)
    images, sign = Images(train, labelled, None), stop_sign(())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    return Study(config, images, None, "probe/linear_top1", "found", uri, None, True, {}, sign)


def test_a_trial_that_is_stopped_trains_no_step_more(study, tmp_path):
    def cell(ratio):
        return {CELL: {"values": {"model.mask_ratio": ratio}, "seed": 0}}

    # Not by Tune's own constructor, which makes a folder for its files.
    trial = PretrainingTrial.__new__(PretrainingTrial)
    trial.setup(cell(0.5), study)
    reports = [trial.step(), trial.step()]
    assert [(one["step"], one["done"]) for one in reports] == [(6, False), (12, False)]
    # The first trial of a shape tells once what its untrained encoder is worth; the mask ratio makes no other shape.
    assert 0 < json.loads(reports[0]["random"])["probe/linear_top1"] <= 100
    assert reports[1]["random"] == "{}"
    assert trial.reset_config(cell(0.75))
    stopped = tmp_path / "runs" / "found" / "trials" / reports[0]["trial"]
    # The next one in the same process goes to its end; what was stopped does nothing meanwhile.
    others = [trial.step() for _ in range(4)]
    assert {one["random"] for one in others} == {"{}"}
    last = others[-1]
    assert (last["step"], last["done"], last["trial"] != stopped.name) == (24, True, True)
    told = [line for line, _ in read_spool(stopped / "metrics.jsonl") if line]
    assert max(line["step"] for line in told if "step" in line) == 12
    assert [line["status"] for line in told if "status" in line] == ["RUNNING", "FINISHED"]
    assert checkpoint.newest_whole(Store(str(stopped)).child("checkpoints"), print) == 12
    trial.cleanup()


def test_a_shape_that_is_scored_is_not_scored_again(ray_local):
    def first(values, seed, name):
        return ray.get(sign.is_first.remote(shape_name(Cell(values, seed)), name))

    known = {"model.width": 24, "model.mask_ratio": 0.5}
    sign = stop_sign([Trial("known", known, 0, ((9, 50.0),), "finished", 1.0, 1.0, random={"probe/linear_top1": 40.0})])
    assert not first({"model.width": 24, "model.mask_ratio": 0.75}, 0, "other")
    assert first({"model.width": 48, "model.mask_ratio": 0.75}, 0, "wide")
    assert not first({"model.width": 48, "model.mask_ratio": 0.5}, 0, "wide too")
    assert first({"model.width": 48, "model.mask_ratio": 0.75}, 0, "wide"), "its process has died, and begins again"
    assert first({"model.width": 48, "model.mask_ratio": 0.75}, 1, "another seed")
