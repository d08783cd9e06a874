"""Folders import one way: tests, examples, notebooks and benchmarks import workloads/, and not each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = {"depthwise_jax", "workloads"}
TESTS = ("tests", "tests_tpu", "tests_gpu")
# Beside a folder's own modules, those that it may import; tests also import what they test.
ALLOWED = {
    "depthwise_jax": set(),
    "workloads": {"depthwise_jax"},
    "examples": SHARED,
    "notebooks": SHARED,
    "benchmarks": SHARED,
    "tests": {*SHARED, "examples"},
    "tests_tpu": {*SHARED, "benchmarks"},
    "tests_gpu": {*SHARED, "benchmarks"},
}


def imported(source: str) -> Iterator[str]:
    """The modules that a source imports anywhere in it, and what it takes from them, by full names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_every_folder_of_the_repository_has_its_line() -> None:
    assert {path.parent.name for path in ROOT.glob("*/*.py")} == set(ALLOWED)


@pytest.mark.parametrize("folder", ALLOWED)
def test_folders_import_one_way(folder: str) -> None:
    forbidden = ALLOWED.keys() - ALLOWED[folder] - {folder}
    for path in modules(folder):
        for name in imported(path.read_text()):
            assert name.split(".")[0] not in forbidden, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("folder", TESTS)
def test_no_test_imports_another(folder: str) -> None:
    for path in modules(folder):
        for name in imported(path.read_text()):
            module = name.split(".")
            assert not (module[0] in TESTS and module[1].startswith("test_")), (
                path,
                name,
            )


def test_imports_are_found() -> None:
    source = "import a.b, c\ndef f():\n    from d.e import g\nfrom . import h\n"
    assert list(imported(source)) == ["a.b", "c", "d.e.g"]
