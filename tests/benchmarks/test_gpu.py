"""The GPU's benchmark goes through on a CPU, also where little is installed."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def dry_run(missing, *arguments):
    """Runs the command where some packages cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing})); from benchmarks.gpu import main; sys.exit(main())"
    )
    command = [sys.executable, "-W", "error", "-c", code, "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_every_part_is_measured(tmp_path):
    out = tmp_path / "gpu.json"
    done = dry_run(["ray", "mlflow", "pydantic", "tyro", "webdataset"], "--json", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["ended"] for row in rows if "ended" in row} == {"done"}, done.stderr
    assert sum("ended" in row for row in rows) == 8
    arms = [row for row in rows if "arm" in row]
    assert {row["part"].split("_")[1] for row in arms} == {"small", "base", "large", "huge"}
    assert len({row["arm"] for row in arms}) == 6
    assert all(row["loss_equal"] and row["mfu"] > 0 for row in arms)
    assert len({row["flops_per_step"] for row in arms}) == 1  # of the same tiny model
    told = {row["what"]: row["value"] for row in rows if "what" in row}
    assert min(told["the GPU is busy"], told["restored"]) > 0
    table = out.with_suffix(".md").read_text()
    assert table in done.stdout
    assert "| vit_huge_patch14_224 | official style | 4 |" in table


def test_what_cannot_run_or_end_is_told(tmp_path):
    out = tmp_path / "gpu.json"
    parts = ["--parts", "rates", "loop", "checkpoint"]
    done = dry_run(["simplejpeg"], *parts, "--json", str(out))
    assert done.returncode == 0
    ended = {row["part"]: row["ended"] for row in json.loads(out.read_text())["rows"] if "ended" in row}
    assert ended == {"rates": "done", "loop": "left out: no module simplejpeg", "checkpoint": "done"}
    done = dry_run([], *parts, "--minutes", "0.0001", "--json", str(out))
    assert done.returncode == 0
    ended = [row["ended"] for row in json.loads(out.read_text())["rows"] if "ended" in row]
    assert all(text.startswith("ended after its") for text in ended)
