"""What Beam stages for workers: the sdist that setup.py makes."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_sdist_holds_the_package(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--sdist",
        "--outdir",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    modules = {f"beam_nifti/{path.name}" for path in (ROOT / "beam_nifti").glob("*.py")}
    templates = {f"beam_nifti/templates/{path.name}" for path in (ROOT / "beam_nifti/templates").iterdir()}
    assert modules | templates | {"beam_nifti/py.typed", "setup.py", "pyproject.toml", "LICENSE"} <= names
