"""A search on a cluster that goes on living: what it leaves there."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.nodes import cluster

ROOT = Path(__file__).parents[2]
RECIPE = """
[data]
image_size = [16, 16]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
cpus_per_task = 0.5
[model]
arch = "vit_tiny_patch16_224"
patch_size = 4
width = 24
depth = 2
heads = 2
decoder_width = 16
decoder_depth = 1
decoder_heads = 2
[batch]
global_size = 40
micro_size = 20
[train]
steps = 4000
[scale]
cpus_per_worker = 0.5
[probe]
val_share = 0.3
"""
# From a process of its own: Ray is another one in the tests.
LEFT_OVER = """
import json, time, ray
ray.init(address="auto", log_to_driver=False)
for _ in range(60):
    groups = [one for one in ray.util.placement_group_table().values() if one["state"] != "REMOVED"]
    taken = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0)
    if not groups and not taken:
        break
    time.sleep(0.5)
print(json.dumps([len(groups), taken]))
"""


@pytest.mark.chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_leaves_no_placement_group_and_takes_no_cpu(shards, tmp_path, workers):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "space.toml").write_text('["model.mask_ratio"]\nvalues = [0.5, 0.75]\n')
    asked = ["--config", str(tmp_path / "recipe.toml"), "--space", str(tmp_path / "space.toml"), "--sampler", "grid"]
    asked += ["--data.train", shards["train"], "--probe.train", shards["train"], "--reports", "50"]
    asked += ["--run.storage", str(tmp_path / "runs"), "--run.name", "cut", "--scale.workers", str(workers)]
    with cluster(head_cpus=2) as nodes:
        environment = {**nodes.environment, "RAY_ADDRESS": nodes.address}
        with subprocess.Popen(
            [sys.executable, "-u", "-m", "tune.search", *asked],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            seen = ""
            for line in process.stdout:
                seen += line
                if " %  " in line:
                    break
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
            assert process.wait(60) == 130, seen + rest
        looked = subprocess.run(
            [sys.executable, "-c", LEFT_OVER],
            env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert json.loads(looked.stdout.splitlines()[-1]) == [0, 0], looked.stderr
