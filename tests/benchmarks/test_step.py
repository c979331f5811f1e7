"""The benchmark of the step, on tiny images."""

import json
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step_arms
from benchmarks.step import EQUAL, TRACKS, Step, _arm, _ask, _check, main
from pipelines.errors import UserError

ARMS = ["float32", "transformers_float32", "official_style_float32"]


def test_tiny_steps(tmp_path):
    path = tmp_path / "step.json"
    small = ["--models", "vit_tiny_patch16_224", "--image-size", "32", "--batch", "2", "--device", "cpu"]
    short = ["--threads", "1", "--rounds", "2", "--only", *ARMS, "--json", str(path)]
    # As a command: the process that its arms are copies of ends with it, and would stay until the tests end.
    command = [sys.executable, "-m", "benchmarks.step", *small, *short]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())["models"]["vit_tiny_patch16_224"]["1"]
    assert result["loss_equal"]
    assert {"over_transformers", "over_official_style", "memory_over_transformers"} <= result.keys()
    assert "compiled_over_transformers" not in result  # of arms that were not measured nothing is said
    arms = result["details"]["arms"]
    assert arms.keys() == set(ARMS)
    losses = {name: (arm["first_loss"], arm["last_loss"]) for name, arm in arms.items()}
    assert all(last < first for first, last in losses.values()), "nothing was learned, so nothing was compared"
    # Theirs project and predict what ours leaves out.
    assert arms["float32"]["gflops"] < arms["transformers_float32"]["gflops"]
    assert all(arm["memory_mib"] > 300 for arm in arms.values())  # 27 M parameters and what AdamW keeps of them
    assert "over_transformers" in done.stdout


@pytest.mark.parametrize("name", ["float32", "float32_compiled", "transformers_float32"])
def test_all_arms_have_done_the_same_steps(name, monkeypatch):
    """Or their losses could not be compared; that of a compiled one, whose making takes a minute, among them."""
    done = []
    monkeypatch.setattr(step_arms, "make_step", lambda *_: [lambda: done.append("step") or 1.0] * 2)
    ends: Any = multiprocessing.Pipe()
    here, there = ends
    args = (there, name, Step(steps=3), "vit_tiny_patch16_224", torch.get_num_threads(), "cpu")
    arm = threading.Thread(target=_arm, args=args)
    arm.start()
    _ask(here, "begin")
    _ask(here, "turn")
    here.close()
    arm.join(120)
    assert not arm.is_alive()
    assert len(done) == 5


def test_other_losses_end_it():
    _check({"float32": 1.0, "transformers_float32": 1.000_009, "bfloat16": 1.0019}, EQUAL, "")
    _check({"bfloat16": 1.0, "transformers_bfloat16": 1.0019}, EQUAL, "")
    _check({"float32": 1.0, "float32_compiled": 1.0009, "bfloat16": 1.009}, TRACKS, "")
    for arm, loss, limits in (("transformers_float32", 1.000_02, EQUAL), ("bfloat16", 1.003, EQUAL),
                              ("transformers_float32", 1.002, TRACKS), ("bfloat16", float("nan"), TRACKS)):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"the arms differ.*{arm}"):
            _check({"float32": 1.0, arm: loss}, limits, "differ")


def test_an_arm_that_has_ended_is_told():
    ends: Any = multiprocessing.Pipe()
    ends[1].close()
    with pytest.raises(UserError, match="memory ran out"):
        _ask(ends[0], "turn")


def test_wrong_flags_are_one_line():
    with pytest.raises(UserError, match="threads"):
        main(["--threads", "0"])
    with pytest.raises(UserError, match="no folder"):
        main(["--json", "/nowhere/at/all.json"])
    with pytest.raises(UserError, match="rounds"):
        main(["--rounds", "0"])
    with pytest.raises(UserError, match="only"):
        main(["--only", "float16"])
