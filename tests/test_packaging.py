"""What Beam stages for workers: the sdist that setup.py makes."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import beam_nifti

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
    package = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "beam_nifti").rglob("*.*") if p.suffix != ".pyc"
    }
    assert package | {"setup.py", "pyproject.toml", "LICENSE"} <= names


def test_every_file_names_the_same_version() -> None:
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited == beam_nifti.__version__
    assert f"## [{cited}] - " in (ROOT / "CHANGELOG.md").read_text()
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "Dockerfile"]
    named = {tag for path in documents for tag in re.findall(r"beam-nifti:(\d[\w.]*\d)", path.read_text())}
    assert named == {cited}
