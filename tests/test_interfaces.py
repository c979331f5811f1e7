"""What is used of other libraries: each is declared, and what is private of them is listed here and exists.

The ranges of ``pyproject.toml`` end where nobody has looked whether it still does.
"""

import ast
import functools
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from ray._raylet import GlobalStateAccessor  # pyright: ignore[reportAttributeAccessIssue]  # of a compiled module
from ray.core.generated import common_pb2, gcs_pb2

from tests.test_architecture import ROOMS, ROOT, imports, modules

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALLED = ("mae_core", "pipelines", "tune", "cluster")
# Declared and imported nowhere: commands, a plugin of pytest, and what runs in a process of its own.
COMMANDS = {"ruff", "basedpyright", "pytest-timeout", "pytest-xdist", "moto"}
PRIVATE = (
    # A dashboard would say the same, which a Ray of our own does not start.
    "ray._private.state.state._connect_and_get_accessor",
    "ray._private.internal_api.node_stats",
    "ray.init._system_config",
    "ray.init._temp_dir",
    # PyTorch has no public name of these settings, of this error, of oneDNN's product, and of an old file's format.
    "torch._dynamo.exc.BackendCompilerFailed",
    "torch._functorch.config.ban_recompute_long_fusible_chains",
    "torch._functorch.config.ban_recompute_materialized_backward",
    "torch._functorch.config.ban_recompute_used_far_apart",
    "torch._functorch.config.patch",
    "torch._inductor.config.cpp.threads",
    "torch.ops.mkldnn._linear_pointwise",
    "torch.save._use_new_zipfile_serialization",
    "torch.utils._python_dispatch.TorchDispatchMode",
)
"""The private interfaces that are used here; arguments stand behind their function."""


def name_of(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found, requirement
    return found[0].lower()


RUNTIME = {name_of(one): one for one in PROJECT["dependencies"]}
EXTRAS = {name_of(one): one for extra in PROJECT["optional-dependencies"].values() for one in extra}


@functools.cache
def foreign(room: str) -> set[str]:
    """The distributions that a room imports."""
    tops = {name.split(".")[0] for path in modules(room) for name in imports(path)}
    known = packages_distributions()
    found: set[str] = set()
    for top in tops - set(ROOMS) - set(sys.stdlib_module_names):
        names = {one.lower() for one in known[top]}
        # mlflow comes in three distributions, one of which has its name.
        found |= names if len(names) == 1 else {top}
    return found


def test_what_is_imported_is_declared():
    for room in INSTALLED:
        assert foreign(room) <= RUNTIME.keys(), f"{room} imports what pyproject.toml does not declare"
    for room in ("benchmarks", "tests"):
        assert foreign(room) <= RUNTIME.keys() | EXTRAS.keys()


def test_what_is_declared_is_used():
    assert RUNTIME.keys() - set.union(*map(foreign, INSTALLED)) == set()
    own = {PROJECT["name"]}
    assert EXTRAS.keys() - set.union(*map(foreign, ROOMS)) - COMMANDS - own == set()


def private_names(path: Path) -> Iterator[str]:
    """What a file uses of other libraries whose name, or the name of a module above it, begins with an underscore."""
    tree = ast.parse(path.read_text())
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := _dotted(node, bound)):
            yield name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and (name := _dotted(node.func, bound)):
            yield from (f"{name}.{keyword.arg}" for keyword in node.keywords if keyword.arg)


def _dotted(node: ast.expr, bound: dict[str, str]) -> str:
    """The full name of an attribute of what was imported; empty of anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([bound[node.id], *reversed(parts)]) if isinstance(node, ast.Name) and node.id in bound else ""


def is_private(name: str) -> bool:
    top, *rest = name.split(".")
    ours = top in ROOMS or top in sys.stdlib_module_names
    return not ours and any(part.startswith("_") and not part.startswith("__") for part in rest)


def test_what_is_private_of_other_libraries_is_listed_here():
    files = [path for room in ROOMS for path in modules(room) if path != Path(__file__)]
    found = {name for path in files for name in private_names(path) if is_private(name)}
    # A module is imported for what is used of it.
    assert [name for name in sorted(found) if not any(f"{one}.".startswith(f"{name}.") for one in PRIVATE)] == []
    assert [name for name in PRIVATE if name not in found] == [], "listed, and no more used"


def _below(place: Any, name: str) -> Any:
    """What has a name in a module: something of it, or a module below it."""
    if not hasattr(place, name):
        importlib.import_module(f"{place.__name__}.{name}")
    return getattr(place, name)


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_interface_exists(name):
    *path, last = name.split(".")
    place = functools.reduce(_below, path[1:], importlib.import_module(path[0]))
    assert hasattr(place, last) or last in (place.__doc__ or "") or last in inspect.signature(place).parameters
    # What the range promises ends with the versions that were looked at.
    assert "<" in RUNTIME[path[0]]


def test_what_is_read_of_rays_dead_workers_exists():
    assert callable(GlobalStateAccessor.get_worker_table)
    fields = {field.name for field in gcs_pb2.WorkerTableData.DESCRIPTOR.fields}  # type: ignore[attr-defined]
    assert {"worker_address", "exit_type", "exit_detail"} <= fields
    assert common_pb2.WorkerExitType.Value("NODE_OUT_OF_MEMORY")  # type: ignore[attr-defined]


def test_the_pinned_versions_lie_within_the_ranges():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pinned = {name.lower(): version for name, version in pinned.items()}

    def number(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))

    for name, requirement in (RUNTIME | EXTRAS).items():
        if name == PROJECT["name"]:
            continue
        for sign, version in re.findall(r"(>=|<)([\d.]+)", requirement):
            assert (number(pinned[name]) >= number(version)) == (sign == ">="), f"{requirement}: {pinned[name]}"
