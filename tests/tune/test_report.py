"""What a search says of its order: ties, noise, and what an untrained encoder is worth."""

import numpy as np
import pytest

from mae_core.probes import split_indices
from pipelines.config import Config
from pipelines.data.shards import Manifest
from pipelines.spool import SPOOL_FILE, Spool, read_spool
from pipelines.storage import Store
from tests.tune.test_trial import trial
from tune.journal import Cell, Journal
from tune.parent import validation_size
from tune.report import said, standard_error, table, untrained
from tune.search import tell_best
from tune.space import encoder_part
from tune.trial import Trial, best_score, ranking

LINEAR = "probe/linear_top1"


def scored(*correct: int, num=171):
    """Finished trials that have so many of the validation images right."""
    return [trial(0.1 * place, 100 * right / num) for place, right in enumerate(correct, 1)]


def test_ties_and_noise_are_counted_in_images():
    # Two standard errors of 162 of 171 are 3.42 points, which are 5.8 images.
    trials = scored(162, 161, 161, 157, 156, 150)
    assert 2 * standard_error(100 * 162 / 171, 171) == pytest.approx(3.416, abs=1e-3)
    (told,) = said(ranking(trials), [], 171)
    assert told == "3 of 6 within one image of the best, 4 within two standard errors (3.42 points), n = 171"
    # One that was ahead when it was stopped is no worse.
    (told,) = said(ranking([*trials, trial(0.9, 99.0, state="stopped"), trial(0.8, None, state="failed")]), [], 171)
    assert told.startswith("4 of 7 within one image of the best, 5 within")
    assert told.endswith("n = 171; those that were stopped by their last score")
    assert said(ranking([trial(0.5, None, state="failed")]), [], 171) == []


def test_a_score_without_errors_is_not_taken_for_certain():
    expected = pytest.approx(100 * (0.005 * 0.995 / 100) ** 0.5)
    assert [standard_error(score, 100) for score in (0.0, 100.0)] == [expected, expected]
    assert standard_error(50.0, 100) == pytest.approx(5.0)


def of(width: int, ratio: float, random: float | None, score=60.0, seed=0) -> Trial:
    values = {"model.mask_ratio": ratio, "model.width": width}
    known = {} if random is None else {LINEAR: random, "probe/knn_top1": 1.0}
    return Trial(f"{width}-{ratio}-{seed}", values, seed, ((9, score),), "finished", 1.0, 1e15 * width, "", {}, known)


def test_the_untrained_encoder_has_a_row_for_each_shape():
    trials = [of(24, 0.5, 40.0), of(24, 0.5, 50.0, seed=1), of(24, 0.7, None), of(48, 0.7, 55.0, score=58.0)]
    ranked, encoders = ranking(trials), untrained(trials, LINEAR)
    assert [(one.values, one.score, one.num_seeds) for one in encoders] == [
        ({"model.width": 24}, 45.0, 2),
        ({"model.width": 48}, 55.0, 1),
    ]
    rows = [line.split() for line in table(ranked, encoders, "linear").splitlines()]
    assert rows[0] == ["mask_ratio", "width", "linear", "top-1", "seeds", "PFLOP", "seconds", "state"]
    assert rows[-2][:3] == ["-", "any", "24"]
    assert rows[-2][3:6] == ["45.00", "%", "+-"]
    assert rows[-1] == ["-", "any", "48", "55.00", "%", "1", "0", "-", "random", "encoder"]
    assert len(rows) == 1 + 3 + 2
    assert said(ranked, encoders, 1000)[1] == "the best is +15.00 points over its random encoder"
    assert "no more than noise" in said(ranked, encoders, 40)[1]


def test_what_a_decoder_or_a_schedule_has_shapes_no_encoder():
    shaping = {"model.arch": "a", "model.depth": 2, "model.class_tokens": 1, "model.encoder_mask_tokens": True}
    others = {"model.decoder": "mlp", "model.decoder_width": 8, "model.mask": "grid", "model.mask_ratio": 0.5,
              "model.mask_cell": 2, "model.target": "raw", "model.loss_on": "all", "optim.base_lr": 1.0,
              "data.augment": "none", "batch.global_size": 8, "train.steps": 9}  # fmt: skip
    assert encoder_part(shaping | others) == shaping


def test_the_best_is_what_the_table_has_first():
    trials = [trial(0.1, 94.0), trial(0.2, 96.0, state="stopped"), trial(0.3, 99.0, state="running")]
    assert best_score(ranking(trials)) == 94.0
    assert best_score([]) is None


def test_the_record_has_the_best_score_of_the_table(tmp_path):
    journal, spool = Journal(Store(str(tmp_path))), Spool(tmp_path)

    def report(ratio, step, score, state):
        journal.report(Cell({"model.mask_ratio": ratio}, 0), step, score, 1.0, 1.0, state, {})
        tell_best(journal, spool)

    # What a trial had on its way is no score of the search.
    report(0.5, 75, 95.32, "running")
    report(0.5, 100, 94.74, "finished")
    report(0.7, 25, 95.91, "stopped")
    tell_best(journal, spool, ended=True)
    told = [(line["step"], line["metrics"]["search/best"]) for line, _ in read_spool(tmp_path / SPOOL_FILE) if line]
    assert told == [(1, 95.32), (2, 94.74), (3, 94.74), (4, 94.74)]
    assert "94.74 %" in table(ranking(journal.trials.values()), [], "linear").splitlines()[1]
    # A search that goes on and has nothing to do says nothing twice.
    tell_best(journal, spool, ended=True)
    assert sum(1 for _ in read_spool(tmp_path / SPOOL_FILE)) == 4


@pytest.mark.parametrize(("samples", "looked_at"), [(0, 400), (100, 100), (900, 400)])
def test_the_size_of_the_validation_split_is_that_of_what_is_looked_at(samples, looked_at):
    labelled = Manifest("x", "train", ("a.tar",), (400,), (1,), ("d",), ("0", "1"))
    config = Config.model_validate({"probe": {"samples": samples, "val_share": 0.3}})
    found = validation_size(config, labelled, seed=3)
    assert abs(found - 0.3 * looked_at) < 4 * (looked_at * 0.3 * 0.7) ** 0.5
    if looked_at == 400:
        assert found == len(np.unique(split_indices(400, 0.3, seed=3)[1]))
