"""What somebody sees of a job on a cluster: its log, and its gauges."""

import json
import re
import subprocess
import sys
import urllib.request

import psutil
import pytest

from cluster.processes import wait_until
from pipelines.training.exporting import metric_name
from tests.jobs import ROOT, job, submit

STEPS = 4000  # enough for Ray to collect the gauges meanwhile, which it does every 10 s
TINY = [
    "--config", "pipelines/recipes/digits.toml", "--probe.train", "", "--probe.test", "", "--log.pictures", "0",
    "--data.image-size", "16", "16", "--model.patch-size", "4", "--model.depth", "1", "--batch.global-size", "40",
    "--batch.micro-size", "20", "--train.steps", str(STEPS), "--log.every", "20", "--checkpoint.every-steps", "100",
    # On two CPUs, at what each claims by default.
    "--scale.workers", "2",
]  # fmt: skip
STEP = re.compile(rf"step +(\d+) of {STEPS}  loss ")
# The last two are Ray's, before our first; its raylet tells of the killed worker.
OURS = re.compile(
    r"$|step +\d+ of |run |continuing from |  |MLflow |picture |warning: |could not be read: |left out of "
    r"|this will take |about |that is days on CPUs: |note: "
    r"|worker \d is lost: |\(raylet\) A worker died|Running entrypoint |.* job_manager.py"
)
PORTS = """
import json, os, ray
ray.init(address=os.environ["HEAD_OF_TEST"], logging_level="ERROR", log_to_driver=False)
print(json.dumps([f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]))
"""


def gauges(address: str) -> dict[str, float]:
    """Our gauges of the run ``job`` at a node's metrics port, by name."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {
        line.partition("{")[0]: float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("ray_mae_") and 'run="job"' in line
    }


def status(environment: dict[str, str]) -> str:
    """What the job server says of the job."""
    request = urllib.request.Request(
        f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/job",
        headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["status"]


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_the_log_and_the_gauges_of_a_job(cluster, shards, tmp_path):
    where = ["--data.train", shards["train"], "--run.storage", str(tmp_path), "--run.name", "job"]
    command = ["pipelines/pretrain.py", *TINY, *where]
    submitted = submit(cluster, command, options=("--no-wait", "--submission-id", "job"))
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    spool = tmp_path / "job" / "metrics.jsonl"
    told = lambda: job(cluster, "logs", "job").stdout  # noqa: E731
    wait_until(lambda: spool.exists() and spool.read_text().count("train/loss") >= 3, 240, told)
    asked = subprocess.run(
        [sys.executable, "-c", PORTS], cwd=ROOT, env=cluster, capture_output=True, text=True, check=True
    )
    (address,) = json.loads(asked.stdout.splitlines()[-1])
    wait_until(lambda: "ray_mae_train_loss" in gauges(address), 30, told)
    shown = gauges(address)
    points = [json.loads(line) for line in spool.read_text().splitlines()]
    last = next(line["metrics"] for line in reversed(points) if "train/loss" in line.get("metrics", {}))
    assert {f"ray_{metric_name(name)}" for name in last} <= shown.keys()
    assert 0 < shown["ray_mae_samples_seen"] <= last["samples_seen"]

    workers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "RayTrainWorker" in " ".join(process.info["cmdline"] or ())
        and process.environ().get("RAY_AUTH_TOKEN") == cluster["RAY_AUTH_TOKEN"]
    ]
    assert workers
    wait_until(lambda: any((tmp_path / "job" / "checkpoints").glob("*/manifest.json")), 60, told)
    workers[-1].kill()
    # The command would take a core for two seconds each time.
    wait_until(lambda: status(cluster) == "SUCCEEDED", 240, told)

    # Without what the command itself says.
    log = "\n".join(line for line in told().splitlines() if " cli.py:" not in line)
    assert "\r" not in log
    assert "\x1b" not in log
    lines = log.splitlines()
    assert f"run 'job': 300 images, {STEPS:,} steps of 40 on 2 workers" in lines
    again = next(i for i, line in enumerate(lines) if line.startswith("continuing from the checkpoint of step"))
    for part in (lines[:again], lines[again:]):
        steps = [int(found[1]) for line in part if (found := STEP.match(line))]
        assert steps == list(range(steps[0], steps[-1] + 20, 20))
    assert steps[-1] == STEPS
    assert [line for line in lines if not OURS.match(line)] == []
