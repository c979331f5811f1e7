"""A search on a cluster that goes on living: what it leaves there."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import operations
from tests.tune.searches import arguments

ROOT = Path(__file__).parents[2]
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
    asked = ["--sampler", "grid", "--reports", "50", "--train.steps", "4000", "--scale.workers", str(workers)]
    asked = arguments(tmp_path, shards, *asked, space='["model.mask_ratio"]\nvalues = [0.5, 0.75]\n', name="cut")
    with operations.cluster(tmp_path / "cluster", nodes=1, cpus=2) as state:
        environment = {**state.environment(), "RAY_ADDRESS": state.head}
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
