"""The benchmark of the probes, on few features."""

import json

import pytest

from benchmarks.probes import main
from pipelines.errors import UserError


def test_few_features(tmp_path, capsys):
    path = tmp_path / "probes.json"
    small = ["--num", "400", "--queries", "90", "--width", "64", "--num-classes", "3", "--rounds", "2"]
    assert main([*small, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["linear_s"] > 0
    assert result["knn_s"] > 0
    assert {name: len(found) for name, found in result["details"]["seconds"].items()} == {"linear": 2, "knn": 2}
    # What is planted is found, or the time of nothing was measured: by chance it would be 33 %.
    assert min(result["details"]["top1"].values()) > 60
    assert "400 features of width 64, 10 learning rates" in capsys.readouterr().out


def test_wrong_flags_are_one_line():
    with pytest.raises(UserError, match="num"):
        main(["--num", "0"])
