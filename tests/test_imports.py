"""Who imports what, and what stays unloaded. `.importlinter` has the direction of imports."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "beam_nifti"
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
PIPELINES = {path.stem: path for path in (ROOT / "pipelines").glob("*.py")}

ONLY_IMPORTERS = {
    "nibabel": {
        "volume.align",
        "volume.formats",
        "volume.geometry",
        "volume.grid",
        "volume.nifti_writer",
        "reporting.view",
    },
    "scipy": {"volume.align", "volume.resample", "volume.restoring"},
    "matplotlib": {"reporting.figures"},
    "jinja2": {"reporting.templates"},
    "nilearn": {"reporting.view"},
    "PIL": {"reporting.thumbnail"},
    "tensorflow": {
        "read.reader",
        "read.request",
        "read.columns",
        "read.sequential",
        "read.indexed",
        "read.layouts",
    },
    "apache_beam": {
        "pipeline.coders",
        "pipeline.composable",
        "pipeline.launch",
        "pipeline.steps",
        "pipeline.transforms",
        "storage.beam_files",
        "storage.stores",
        "pipeline.write",
        "storage.s3",
        "storage.gcs",
        "pipeline.local_runner",
        "pipeline.build",
        "pipeline.check",
        "reporting.report",
        "pipeline.runners",
        "pipeline.analyze",
        "pipeline.beam_flags",
    },
}
LAZY_IMPORTERS = {
    "scipy": {"volume.align", "volume.resample", "volume.restoring"},
    "matplotlib": {"reporting.figures"},
    "jinja2": {"reporting.templates"},
    "nilearn": {"reporting.view"},
    "PIL": {"reporting.thumbnail"},
    "apache_beam": {
        "storage.beam_files",
        "storage.stores",
        "storage.s3",
        "storage.gcs",
        "pipeline.local_runner",
        "pipeline.build",
        "pipeline.launch",
        "pipeline.runners",
        "pipeline.beam_flags",
    },
}
"""Modules that import the package only inside functions."""


@functools.cache
def imports(path: Path, *, lazy: bool = True) -> frozenset[str]:
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

    return frozenset(walk(ast.parse(path.read_text())))


def siblings(path: Path) -> set[str]:
    """The modules of the package that a module imports."""
    names = {name.removeprefix("beam_nifti.") for name in imports(path) if name.startswith("beam_nifti.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in names}


def test_the_reader_of_the_graph_imports_the_format_and_readers_only() -> None:
    """So it reads what this package writes, without what writes it."""
    low = {"storage.paths", "errors", "read.opening", "read.columns", "read.request"}
    format_only = {"record.tfrecord", "record.example", "record.dataset_files", "record.dataset_info"}
    assert siblings(MODULES["read.sequential"]) <= format_only | low


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "",
            "analyze build check verify inspect diff extract report Percentile Window TooManyFailures "
            "LoadVolume",
        ),
        ("reader", "load_dataset get_batched_dataset state_after"),
        ("random_access", "Dataset"),
        ("inference", "Preparation PreparedVolume restore"),
        (
            "transforms",
            "BuildDataset EncodeExample LoadVolume Preprocess ReadManifest Record Rescale WriteToTFRecord",
        ),
        ("volume", "Scaling Volume load_volume rescale_volume"),
        ("manifest", "Manifest VolumeRow read_manifest"),
        ("config", "BuildConfig RecordConfig"),
        ("errors", "BeamNiftiError ManifestError UsageError VolumeError"),
    ],
)
def test_users_import_from_the_front(module: str, names: str) -> None:
    front = pytest.importorskip(f"beam_nifti.{module}".rstrip("."), exc_type=ImportError)
    assert [name for name in names.split() if not hasattr(front, name)] == []
    with pytest.raises(ImportError, match="no_such_name"):
        exec(f"from {front.__name__} import no_such_name")


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
    assert siblings(PIPELINES["build_dataset"]) == {"cli.main"}
    assert "tensorflow" not in {name.split(".")[0] for p in PIPELINES.values() for name in imports(p)}


def loaded_by(modules: str) -> set[str]:
    """The packages that a fresh interpreter has loaded after importing some modules."""
    script = f"import {modules}, json, sys; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {name.split(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "beam_nifti, beam_nifti.api, beam_nifti.cli.main, beam_nifti.manifest, beam_nifti.volume",
            {"apache_beam", "tensorflow", "numpy", "pyarrow", "nibabel"},
        ),
        ("beam_nifti.volume.rescale", {"apache_beam", "tensorflow", "pyarrow", "nibabel"}),
        (
            "beam_nifti.inspection.description, beam_nifti.inspection.diff, beam_nifti.random_access",
            {"apache_beam", "tensorflow", "nibabel", "scipy"},
        ),
        (
            "beam_nifti.inference, beam_nifti.inspection.extract, beam_nifti.inspection.verify, "
            "beam_nifti.pipeline.build",
            {"apache_beam", "tensorflow"},
        ),
        ("beam_nifti.transforms", {"tensorflow"}),
    ],
)
def test_what_stays_unloaded(modules: str, absent: set[str]) -> None:
    loaded = loaded_by(modules)
    assert "beam_nifti" in loaded
    assert not loaded & absent
