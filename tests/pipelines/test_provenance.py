"""Where the numbers of a run come from: what fills MLflow's columns."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import provenance

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("argv", "source"),
    [
        ([str(ROOT / "tune" / "search.py")], "tune/search.py"),
        ([str(ROOT / "pipelines" / "transfer.py")], "pipelines/transfer.py"),
        (["/elsewhere/ray/default_worker.py"], "pipelines/pretrain.py"),
        ([], "pipelines/pretrain.py"),
    ],
)
def test_the_source_is_the_command(argv, source, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert provenance.tags()["mlflow.source.name"] == source


def test_user_and_commit(monkeypatch):
    monkeypatch.setenv("LOGNAME", "somebody")
    monkeypatch.setenv("MAE_GIT_COMMIT", "0123456789abcdef-dirty")
    tags = provenance.tags()
    assert tags["mlflow.user"] == "somebody"
    assert tags["mlflow.source.git.commit"] == "0123456789abcdef"
    assert tags["git.commit"] == "0123456789abcdef-dirty"
    assert tags["mlflow.source.type"] == "LOCAL"
    # A job's copy of the code has no repository.
    monkeypatch.setenv("MAE_GIT_COMMIT", "unknown")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    tags = provenance.tags()
    assert "mlflow.source.git.commit" not in tags
    assert tags["mlflow.source.type"] == "JOB"


def test_a_user_without_a_name_has_a_number():
    # As in a container that runs under any number; getpass reads these names first.
    code = (
        "import os, sys; [os.environ.pop(name, None) for name in ('LOGNAME', 'USER', 'LNAME', 'USERNAME')];"
        "from pipelines import provenance; os.setuid(54321); print(provenance.user())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if "PermissionError" in done.stderr:
        pytest.skip("only root may become another user")
    assert done.stdout.strip() == "54321", done.stderr
