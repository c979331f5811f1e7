"""What the documents say of the tests: every one that they name exists."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The log is of its day: it names what there was then.
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("*/*.md")} - {ROOT / "docs" / "log.md"})
CODE = sorted(path for room in ("mae_core", "pipelines", "tune", "cluster", "benchmarks", "tests")
              for path in (ROOT / room).rglob("*.py"))  # fmt: skip
_FILE = re.compile(r"(?<![\w/.*-])((?:[\w.-]+/)*test_\w+)\.py(?:::(test_\w+)(?:\[([^\]]*)\])?)?")
_ALONE = re.compile(r"(?<=`)(test_\w+)(?:\[[^\]]*\])?(?=`)")


@functools.cache
def functions() -> dict[str, dict[str, ast.FunctionDef]]:
    """The tests of each file, by its path from the root."""
    return {
        str(path.relative_to(ROOT)): {node.name: node for node in ast.walk(ast.parse(path.read_text()))
                                      if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
        for path in CODE if path.name.startswith("test_")
    }  # fmt: skip


def missing(text: str) -> Iterator[str]:
    """The tests, and the files of tests, that a text names and that are not there."""
    known = functions()
    for path, name, case in _FILE.findall(text):
        files = [file for file in known if f"/{file}".endswith(f"/{path}.py")]
        tests = {name: node for file in files for name, node in known[file].items()}
        decorators = [ast.unparse(one) for one in tests[name].decorator_list] if name in tests else []
        if not files or (name and name not in tests):
            yield f"{path}.py" + (f"::{name}" if name else "")
        elif case and not all(any(part in one for one in decorators) for part in case.split("-")):
            yield f"{path}.py::{name}[{case}]"
    every = {name for tests in known.values() for name in tests}
    files = {Path(file).stem for file in known}
    yield from (name for name in _ALONE.findall(text) if name not in every | files)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_that_a_document_names_exists(path):
    assert list(missing(path.read_text())) == []


def test_every_test_that_the_code_names_exists():
    others = (path for path in [*CODE, ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "pyproject.toml"]
              if path != Path(__file__))  # fmt: skip
    assert {str(path): found for path in others if (found := list(missing(path.read_text())))} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see `test_documents.py::test_every_test_that_a_document_names_exists`", []),
        ("`tests/test_documents.py`, tests/tune/test_space.py and test_space.py", []),
        ("`test_every_test_that_the_code_names_exists`, `test_space`", []),
        ("`test_lease.py::test_one_of_another_machine_is_watched[True]`", []),
        ("`test_documents.py::test_nothing`", ["test_documents.py::test_nothing"]),
        ("`test_space.py::test_every_test_that_the_code_names_exists`",
         ["test_space.py::test_every_test_that_the_code_names_exists"]),
        ("tests/pipelines/test_space.py", ["tests/pipelines/test_space.py"]),
        ("`test_nowhere`, test_nowhere.py", ["test_nowhere.py", "test_nowhere"]),
        ("`test_lease.py::test_one_of_another_machine_is_watched[maybe]`",
         ["test_lease.py::test_one_of_another_machine_is_watched[maybe]"]),
    ],
)  # fmt: skip
def test_what_is_not_there_is_found(text, found):
    assert list(missing(text)) == found
