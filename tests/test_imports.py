"""Who imports what: the direction of imports, and what stays unloaded."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {path.stem: path for path in (ROOT / "beam_nifti").glob("*.py") if path.stem[0] != "_"}
PIPELINES = {path.stem: path for path in (ROOT / "pipelines").glob("*.py")}

ONLY_IMPORTERS = {
    "nibabel": {"formats", "geometry", "grid", "nifti_writer", "view"},
    "scipy": {"prepare"},
    "matplotlib": {"figures"},
    "jinja2": {"templates"},
    "nilearn": {"view"},
    "PIL": {"thumbnail"},
    "tensorflow": {"reader", "reader_columns", "reader_graph", "reader_indexed", "reader_layouts"},
    "apache_beam": {
        "coders",
        "transforms",
        "storage",
        "object_store",
        "s3",
        "gcs",
        "local_runner",
        "build",
        "check",
        "report",
        "engines",
        "beam_flags",
    },
}
LAZY_IMPORTERS = {
    "scipy": {"prepare"},
    "matplotlib": {"figures"},
    "jinja2": {"templates"},
    "nilearn": {"view"},
    "PIL": {"thumbnail"},
    "apache_beam": {"storage", "object_store", "s3", "gcs", "local_runner", "build", "engines", "beam_flags"},
}
"""Modules that import the package only inside functions."""


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """The dotted names that a module imports when it runs, not only for types.

    Args:
        path: of the module.
        lazy: whether to count what functions import when they are called.
    """

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.FunctionDef) and not lazy:
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            else:
                yield from walk(child)

    return set(walk(ast.parse(path.read_text())))


def siblings(path: Path) -> set[str]:
    """The modules of the package that a module imports."""
    names = (name.split(".") for name in imports(path))
    return {name[1] for name in names if name[0] == "beam_nifti" and len(name) > 1} & set(MODULES)


LAYERS = (ROOT / "ARCHITECTURE.md").read_text().partition("```\ncli\n")[2].partition("```")[0]
"""From high to low; a module imports only from lines below its own."""

LEVEL = {name: -i for i, line in enumerate(("cli\n" + LAYERS).splitlines()) for name in line.split()}


def test_every_module_has_a_layer() -> None:
    assert set(LEVEL) == set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str) -> None:
    upward = {other for other in siblings(MODULES[name]) if LEVEL[other] >= LEVEL[name]}
    assert not upward


def test_the_reader_of_the_graph_imports_the_format_and_readers_only() -> None:
    format_only = {"tfrecord", "example", "dataset_info", "storage", "errors"}
    assert siblings(MODULES["reader_graph"]) <= format_only | {"random_access", "reader_columns"}


@pytest.mark.parametrize("package", sorted(ONLY_IMPORTERS))
def test_heavy_packages_have_few_importers(package: str) -> None:
    def importers(*, lazy: bool) -> set[str]:
        return {
            name
            for name, path in MODULES.items()
            if any(found.split(".")[0] == package for found in imports(path, lazy=lazy))
        }

    assert importers(lazy=True) == ONLY_IMPORTERS[package]
    assert importers(lazy=False) == ONLY_IMPORTERS[package] - LAZY_IMPORTERS.get(package, set())


def test_only_the_command_line_is_below_the_entry_point() -> None:
    assert siblings(PIPELINES["build_dataset"]) == {"cli"}
    assert "tensorflow" not in {name.split(".")[0] for p in PIPELINES.values() for name in imports(p)}


def loaded_by(module: str) -> set[str]:
    """The packages that a fresh interpreter has loaded after importing a module."""
    script = f"import {module}, json, sys; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.split(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("beam_nifti", {"apache_beam", "tensorflow", "numpy", "pyarrow", "nibabel"}),
        ("beam_nifti.cli", {"apache_beam", "tensorflow", "numpy", "pyarrow", "nibabel"}),
        ("beam_nifti.inspection", {"apache_beam", "tensorflow", "nibabel"}),
        ("beam_nifti.diff", {"apache_beam", "tensorflow", "nibabel"}),
        ("beam_nifti.verify", {"apache_beam", "tensorflow"}),
        ("beam_nifti.extract", {"apache_beam", "tensorflow"}),
        ("beam_nifti.build", {"apache_beam", "tensorflow"}),
        ("beam_nifti.transforms", {"tensorflow"}),
        ("beam_nifti.reader", {"apache_beam", "nibabel"}),
        ("beam_nifti.random_access", {"apache_beam", "tensorflow", "nibabel", "scipy"}),
    ],
)
def test_what_stays_unloaded(module: str, absent: set[str]) -> None:
    if module == "beam_nifti.reader" and not importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is not installed")
    loaded = loaded_by(module)
    assert "beam_nifti" in loaded
    assert not loaded & absent
