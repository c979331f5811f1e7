"""``pipelines.sync`` on a run with transfers, none of which has reached MLflow."""

import json
import sys

import pytest
from mlflow import MlflowClient

from pipelines import sync
from pipelines.config import identity_hash
from pipelines.errors import UserError
from pipelines.spool import Spool
from pipelines.tracking import RunRecord


def write_record(folder, uri, **metrics):
    """A record as a run leaves it while MLflow is away."""
    folder.mkdir(parents=True)
    RunRecord(experiment="tests", name=folder.name, uid=folder.name, tracking_uri=uri).write(folder)
    spool = Spool(folder)
    spool.metrics(0, metrics)
    spool.status("FINISHED")
    spool.close()


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sync", *map(str, arguments)])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return sync.main()


def test_the_transfers_of_a_run_are_sent_too(tmp_path, monkeypatch, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    names = ("cells", "cells/transfer/cells-knn-1", "cells/transfer/cells-linear-2")
    folders = [tmp_path / name for name in names]
    for i, folder in enumerate(folders):
        write_record(folder, uri, **{"test/top1": 10.0 * i})
    assert run(monkeypatch, "cells", "--storage", tmp_path) == 0
    told = capsys.readouterr().out
    assert "cells: sent 1 points" in told
    assert "cells/transfer/cells-linear-2: sent 1 points" in told
    client = MlflowClient(tracking_uri=uri)
    runs = [client.get_run(RunRecord.read(folder).mlflow_run_id or "") for folder in folders]
    assert [run.data.metrics["test/top1"] for run in runs] == [0, 10, 20]
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    # They have their parent, although it was not there when they began.
    assert [run.data.tags.get("mlflow.parentRunId") for run in runs] == [None, *[runs[0].info.run_id] * 2]
    assert run(monkeypatch, "cells", "--storage", tmp_path) == 0
    assert capsys.readouterr().out.count("sent 0 points and 0 files") == 3


def test_a_score_that_the_run_lacks_is_noted_and_sent(tmp_path, monkeypatch, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_folder, folder = tmp_path / "cells", tmp_path / "cells/transfer/cells-knn-1"
    for one in (run_folder, folder):
        write_record(one, uri, **{"train/loss": 1.0})
        (one / "identity.json").write_text(json.dumps({"step": 5}))
    (run_folder / "result.json").write_text(json.dumps({"step": 5, "identity": identity_hash({"step": 5})}))
    result = {"key": "transfer/cells/knn_top1", "scores": {"test/top1": 42.5}}
    (folder / "result.json").write_text(json.dumps(result))
    for told in ("transfer/cells/knn_top1 is 42.50 % on the pretraining run now\n", ""):
        assert run(monkeypatch, "cells", "--storage", tmp_path) == 0
        assert capsys.readouterr().out.partition("cells: sent")[0] == told
    client = MlflowClient(tracking_uri=uri)
    history = client.get_metric_history(RunRecord.read(run_folder).mlflow_run_id or "", "transfer/cells/knn_top1")
    assert [(point.step, point.value) for point in history] == [(0, 42.5)]


def test_transfers_of_a_file_of_weights_have_no_run_above(tmp_path, monkeypatch, capsys):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    write_record(tmp_path / "weights-mae" / "transfer" / "cells-knn-1", "http://127.0.0.1:9", **{"test/top1": 5.0})
    write_record(tmp_path / "weights-mae" / "transfer" / "cells-knn-2", uri, **{"test/top1": 5.0})
    with pytest.raises(UserError, match="not reachable") as failed:
        run(monkeypatch, "weights-mae", "--storage", tmp_path)
    assert "cells-knn-1" in str(failed.value)
    told = capsys.readouterr().out
    assert "cells-knn-2: sent 1 points" in told, "one that fails holds up no other"
