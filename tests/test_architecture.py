"""Who may import whom: tune, cluster -> pipelines -> mae_core; in it: jobs -> training, data, tracking -> config."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("mae_core", "pipelines", "tune", "cluster", "benchmarks", "tests")
# What a room may not know: the method runs in a notebook, without a cluster and without a record.
FOREIGN = {"mae_core": ("ray", "mlflow", "webdataset")}
MAY_IMPORT = {
    "mae_core": {"mae_core"},
    "pipelines": {"mae_core", "pipelines"},
    "tune": {"mae_core", "pipelines", "tune"},
    "cluster": {"cluster", "pipelines"},
}
JOBS = ("make_shards", "check_shards", "pretrain", "transfer", "reconstruct", "compare", "estimate", "sync")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_rooms_import_only_what_lies_below(room):
    for path in modules(room):
        for name in imports(path):
            allowed = MAY_IMPORT[room]
            assert name.split(".")[0] not in set(ROOMS) - allowed, f"{path} imports {name}"
            assert not under(name, *FOREIGN.get(room, ())), f"{path} imports {name}"


def test_jobs_stand_on_top_of_pipelines():
    jobs = tuple(f"pipelines.{job}" for job in JOBS)
    for path in modules("pipelines"):
        for name in imports(path):
            assert not under(name, *jobs), f"{path} imports the job {name}"


def test_data_and_tracking_know_nothing_of_training():
    below = [*modules("pipelines/data"), *(ROOT / "pipelines" / f"{name}.py" for name in ("tracking", "spool"))]
    for path in below:
        for name in imports(path):
            assert not under(name, "pipelines.training"), f"{path} imports {name}"
    for name in imports(ROOT / "pipelines" / "config.py"):
        assert not under(name, "pipelines.data", "pipelines.training", "pipelines.tracking"), name


def test_the_plan_and_the_readers_know_no_ray():
    for module in ("plan", "layout", "readers", "shards", "lookup"):
        for name in imports(ROOT / "pipelines" / "data" / f"{module}.py"):
            assert not under(name, "ray"), f"{module} imports {name}"


def test_packages_list_every_room():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for room in MAY_IMPORT
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("room", ["pipelines", "tune", "cluster"])
def test_a_room_on_ray_sets_what_ray_reads_before_it_is_imported(room):
    # Else a first run on a machine without Ray's token file does not come up.
    told = "import sys, os, {}; print('ray' in sys.modules, 'RAY_AUTH_TOKEN' in os.environ)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"HOME": "/nowhere"}
    command = [sys.executable, "-c", told.format(room)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_what_does_not_compute_does_not_wait_for_pytorch():
    # It takes seconds to import, in each process: a command's, a task's, that of an execution's coordinator.
    modules = "compare, pipelines.make_shards, pipelines.check_shards, pipelines.sync, pipelines.data.source"
    told = f"import sys, pipelines.{modules}; print(*sys.modules.keys() & {{'torch', 'timm', 'mlflow'}})"
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
