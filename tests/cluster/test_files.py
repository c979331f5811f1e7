"""The files for other machines: what a schema, the project's own configuration and a reader can hold against them."""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from jsonschema.protocols import Validator

from pipelines.pretrain import read_config

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT.parent / "shared" / "schemas" / "rayjob-v1.json"
FIELDS = Path(__file__).with_name("rayjob_fields.toml")
MANIFEST = ROOT / "cluster" / "rayjob.yaml"
DOCKERFILE = ROOT / "cluster" / "Dockerfile"


def strict(schema: Any) -> Any:
    """A schema under which a field that it does not know is a mistake; metadata is Kubernetes' own business."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    # Where a field is called "properties", its value is a schema and no table of fields.
    fields = schema.get("properties")
    if isinstance(fields, dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return made


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return yaml.safe_load(MANIFEST.read_text())


@pytest.fixture(scope="module")
def check() -> Validator:
    if not SCHEMA.exists():
        pytest.skip(f"held against the names in {FIELDS.name} alone: KubeRay's whole schema is not at {SCHEMA}")
    return jsonschema.Draft202012Validator(strict(json.loads(SCHEMA.read_text())))


def named(value: Any, path: str = "") -> Iterator[tuple[str, set[str]]]:
    """Each object of a manifest: where it stands, and the names of its fields; the pods of all groups as one."""
    if isinstance(value, list):
        for one in value:
            yield from named(one, path)
    elif isinstance(value, dict):
        yield re.sub(r"^.*\.(headGroupSpec|workerGroupSpecs)\.template", "template", path), set(value)
        for key, below in value.items():
            yield from named(below, f"{path}.{key}" if path else key)


def unknown(manifest: dict[str, Any]) -> list[str]:
    """The fields of a manifest that the table of their names does not have."""
    table = tomllib.loads(FIELDS.read_text())
    return [
        f"{path}: {name}"
        for path, names in named(manifest)
        if table.get(path) != ["*"]
        for name in sorted(names - set(table.get(path, [])))
    ]


def test_the_manifest_has_no_field_without_a_name_in_the_table(manifest):
    assert unknown(manifest) == []


def test_the_table_of_names_is_the_schemas(manifest, check):
    """Where the schema is: the table has all names of each place, and no other."""
    table = {path: set(names) for path, names in tomllib.loads(FIELDS.read_text()).items()}

    def places(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, set[str]]]:
        if isinstance(value, list):
            for one in value:
                yield from places(one, schema["items"], path)
        elif isinstance(value, dict):
            fields = schema.get("properties") or {}
            place = re.sub(r"^.*\.(headGroupSpec|workerGroupSpecs)\.template", "template", path)
            yield place, set(fields) or {"*"}
            for key in value.keys() & fields.keys():
                yield from places(value[key], fields[key], f"{path}.{key}" if path else key)

    assert table == dict(places(manifest, check.schema))


def test_the_manifest_fits_the_schema(manifest, check):
    assert [f"{error.json_path}: {error.message}" for error in check.iter_errors(manifest)] == []


MISTAKES = [
    (("backofLimit",), 3),
    (("rayClusterSpec", "authOptions", "secret"), "mae-ray"),
    (("rayClusterSpec", "workerGroupSpecs", 0, "replica"), 4),
    (("rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "container"), []),
    (("rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limit"), {}),
]


def with_mistake(manifest: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = json.loads(json.dumps(manifest))
    place = changed["spec"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize(("path", "value"), MISTAKES)
def test_a_name_that_no_field_has_is_found(manifest, path, value):
    (found,) = unknown(with_mistake(manifest, path, value))
    assert found.endswith(f": {path[-1]}")


@pytest.mark.parametrize(("path", "value"), [*MISTAKES, (("backoffLimit",), "three")])
def test_a_mistake_in_the_manifest_is_found(manifest, check, path, value):
    assert list(check.iter_errors(with_mistake(manifest, path, value)))


def test_the_job_is_a_run_that_can_go_on(manifest):
    spec = manifest["spec"]
    program, module, name, *flags = shlex.split(spec["entrypoint"])
    assert (program, module, name) == ("python", "-m", "pipelines.pretrain")
    config = read_config(flags)
    # a retry is another cluster: it must find the run, and nothing of the first is on its disks
    assert spec["backoffLimit"] > 0
    assert config.run.name == manifest["metadata"]["name"]
    assert config.run.storage.startswith("s3://")
    assert config.data.train.startswith("s3://")

    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert config.scale.gpu
    assert config.scale.workers == workers["replicas"] * gpus
    assert (
        float(container["resources"]["limits"]["cpu"])
        >= (config.scale.cpus_per_worker or 1) + config.data.cpus_per_task
    )


def test_a_stopped_job_has_time_for_its_checkpoint(manifest):
    (head,) = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    told = {one["name"]: one["value"] for one in head["env"]}
    assert int(told["RAY_JOB_STOP_WAIT_TIME_S"]) == 60
    assert any("RAY_JOB_STOP_WAIT_TIME_S=60" in what for word, what in instructions() if word == "ENV")


def test_no_secret_stands_in_the_manifest(manifest):
    cluster = manifest["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["authOptions"]["secretName"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert not [one["name"] for one in container["env"] if re.search("TOKEN|KEY|SECRET", one["name"])]
            assert all("secretRef" in one for one in container["envFrom"])


def test_versions_agree(manifest):
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == pinned["ray"]


def instructions() -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_is_pinned_and_not_root():
    said = instructions()
    (base,) = [what for word, what in said if word == "FROM"]
    version = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-[a-z-]+", base)
    assert version, f"{base} is not one version"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = re.fullmatch(r">=(\d+)\.(\d+)", project["requires-python"])
    assert least
    assert tuple(map(int, version.groups())) >= tuple(map(int, least.groups()))

    assert said[-1] == ("USER", "1000:1000")
    installs = [what for word, what in said if word == "RUN" and "pip install" in what]
    assert installs
    assert all("-c constraints.txt" in what and "--no-cache-dir" in what for what in installs)


def test_what_the_image_copies_is_there_and_is_what_jobs_import():
    copied = [what.split()[:-1] for word, what in instructions() if word == "COPY"]
    names = [name for one in copied for name in one]
    assert all((ROOT / name).exists() for name in names)
    assert {"mae_core", "pipelines", "tune"} <= set(names)
    # dependencies before the code: a change of the code makes no new layer of 7 GB
    words = [f"{word} {what}" for word, what in instructions()]
    assert words.index("COPY mae_core mae_core") > next(i for i, one in enumerate(words) if "pip install" in one)


def test_the_images_list_of_dependencies_is_pyprojects(tmp_path):
    import subprocess
    import sys

    (line,) = [what for word, what in instructions() if "requirements.txt" in what]
    program = shlex.split(line.split(" > ")[0])
    assert program[:2] == ["python", "-c"]
    listed = subprocess.run([sys.executable, *program[1:]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert listed.splitlines() == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
