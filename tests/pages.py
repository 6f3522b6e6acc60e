"""Runs the documents: the code blocks of a page, in their order, in a folder with small images of its own.

`bash`, `console` and `python` blocks are run. A `console` block shows what its commands print; `…` stands for
anything, alone on a line for any lines. A comment right above a block says what else is to be known:

    <!-- file: PATH -->        the block is the content of this file
    <!-- output -->            the block is what the block before it prints
    <!-- exit code: N -->      how the last command of the block ends, where that is not 0
    <!-- torch -->             run where this library, one of LIBRARIES, is installed
    <!-- not run: REASON -->   not run; Python is compiled, and arguments of beam-nifti are parsed

and comments of the whole page:

    <!-- starts with: NAME -->     what lies in the page's folder: one of STARTS; else "dataset"
    <!-- no block is run: REASON -->
"""

from __future__ import annotations

import ast
import contextlib
import csv
import dataclasses
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from beam_nifti.cli import main as cli
from beam_nifti.cli import parser as options
from beam_nifti.errors import BeamNiftiError
from tests.build_helpers import build_config, check_config
from tests.images import brain, write_image, write_manifest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("**/*.md")))

LIBRARIES = (
    "tensorflow",
    "keras",
    "medicai",
    "torch",
    "monai",
    "torchio",
    "lightning",
    "jax",
    "flax",
    "grain",
)
"""What a block may ask for."""

CODE = ("bash", "console", "python")
_MARK = re.compile("|".join(["", "output", *LIBRARIES, r"(file|not run|exit code): \S.*"]))
_SHOWN = ("", "text", "json", "toml", "yaml", "dockerfile")
_OURS = ("scripts/", "benchmarks/", "examples/", "pipelines/", "tests/")

_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]+) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S
)
_PAGE_MARK = re.compile(r"^<!-- (starts with|no block is run): ([^\n]+) -->$", re.M)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        place: path of the page and number of the line.
        language: after the fence.
        text: between the fences, without their indentation.
        mark: of the comment right above it; "" without one.
    """

    place: str
    language: str
    text: str
    mark: str

    @property
    def is_run(self) -> bool:
        return self.language in CODE and not self.mark.startswith(("file: ", "not run: "))


def read_blocks(page: Path) -> list[Block]:
    """The blocks of a page, in their order; of a page of which none is run, each with that mark."""
    content = page.read_text()
    name = os.path.relpath(page, ROOT)
    reason = dict(_PAGE_MARK.findall(content)).get("no block is run")
    found = []
    for m in _FENCE.finditer(content):
        place = f"{name}:{content.count(chr(10), 0, m.start('text'))}"
        text = re.sub(f"^{m['indent']}", "", m["text"], flags=re.M)
        mark = m["mark"] or (f"not run: {reason}" if reason and m["language"] in CODE else "")
        found.append(Block(place, m["language"], text, mark))
    return found


def read_notebook(path: Path) -> list[Block]:
    """The cells of code of a notebook, in their order: Python, or commands of a shell after !.

    Raises:
        AssertionError: a cell has stored outputs, or has both.
    """
    found = []
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            place, text = f"{os.path.relpath(path, ROOT)}:{number}", "".join(cell["source"])
            assert not cell["outputs"], f"{place}: stored outputs"
            assert cell["execution_count"] is None, place
            is_shell = [line.startswith("!") for line in text.splitlines()]
            assert all(is_shell) or not any(is_shell), place
            text = re.sub("^!", "", text, flags=re.M) if is_shell[0] else text
            found.append(Block(place, "bash" if is_shell[0] else "python", text, ""))
    return found


def run_blocks(blocks: Iterable[Block]) -> tuple[dict[str, Any], list[str]]:
    """Run blocks in the working folder; the names that Python has then, and what each block prints."""
    names: dict[str, Any] = {}
    return names, [_run(block, names) for block in blocks]


def start_of(page: Path) -> str:
    """What the page starts with, one of STARTS."""
    return dict(_PAGE_MARK.findall(page.read_text())).get("starts with", "dataset")


def libraries_of(page: Path) -> set[str]:
    """What the blocks of the page ask for."""
    return {block.mark for block in read_blocks(page)} & set(LIBRARIES)


def run_page(page: Path) -> None:
    """Run a page's blocks in the working folder.

    Raises:
        AssertionError: a block that does not do what the page shows, with its place.
    """
    names: dict[str, Any] = {}
    output: str | None = None
    for block in read_blocks(page):
        if block.mark.startswith("file: "):
            path = Path(block.mark.removeprefix("file: "))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.mark == "output":
            if output is not None:
                compare(output, block.text, block.place)
        elif block.is_run:
            is_there = block.mark not in LIBRARIES or importlib.util.find_spec(block.mark)
            output = _run(block, names) if is_there else None


def _run(block: Block, names: dict[str, Any]) -> str:
    """Run a block; what it prints."""
    if block.language == "python":
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(block.text, block.place, "exec"), names)
        return output.getvalue()
    code = int(block.mark.removeprefix("exit code: ")) if block.mark.startswith("exit code: ") else 0
    if block.language == "bash":
        return _run_commands(block.text, code, block.place)
    shown = list(_shown_commands(block.text))
    for number, (command, expected) in enumerate(shown, 1):
        printed = _run_commands(command, code if number == len(shown) else 0, block.place)
        compare(printed, expected, block.place)
    return ""


def _shown_commands(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console, each with what it prints."""
    for shown in re.finditer(r"^\$ ((?:[^\n]*\\\n)*[^\n]*\n)((?:(?!\$ )[^\n]*\n)*)", text, re.M):
        yield shown[1], shown[2]


def _run_commands(text: str, code: int, place: str) -> str:
    """Run commands of a shell, those that are ours alone in this process; what a terminal would show."""
    lines = _lines(text)
    if all(_is_plain(line) for line in lines):
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(shown):
            ended = [cli.main(shlex.split(line, comments=True)[1:]) for line in lines]
        printed = shown.getvalue()
        assert ended == [*[0] * (len(lines) - 1), code], f"{place}: exit codes {ended}\n{printed}"
        return printed
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == code, f"{place}: exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def _lines(text: str) -> list[str]:
    """Lines that a shell would run one after the other."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def _is_plain(line: str) -> bool:
    """Whether a line is a command of ours that asks nothing of a shell."""
    unquoted = re.sub(r"'[^']*'|\"[^\"$`]*\"|#.*", "", line)
    return _is_ours(shlex.split(line, comments=True)) and not re.search(r"[$`|&;<>*?~]", unquoted)


def _is_ours(words: list[str]) -> bool:
    return Path(words[0]).name == "beam-nifti"


def compare(printed: str, shown: str, place: str) -> None:
    """Hold what was printed to what a page shows, where `…` stands for anything."""
    pattern = "".join(
        r"(?:.*\n)*" if line.strip() == "…" else re.escape(line.rstrip()).replace("…", ".*") + r" *\n"
        for line in shown.strip().splitlines()
    )
    assert re.fullmatch(pattern, printed.strip() + "\n"), f"{place} shows\n{shown}\nbut this is\n{printed}"


def check_block(block: Block) -> None:
    """Hold a block that is not run to what can be known without running it.

    Raises:
        AssertionError: a mark or a language that is none; arguments that our parser refuses; a file of the
            repository that is not there.
        SyntaxError: of Python.
    """
    assert block.language in (*CODE, *_SHOWN), f"{block.place}: {block.language} is neither run nor shown"
    assert _MARK.fullmatch(block.mark), f"{block.place}: <!-- {block.mark} --> is no mark"
    assert block.language in CODE or not block.text.startswith("$ "), f"{block.place}: is a console"
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language in ("bash", "console"):
        commands = (
            [c for c, _ in _shown_commands(block.text)] if block.language == "console" else [block.text]
        )
        for line in (line for command in commands for line in _lines(command)):
            _check_command(shlex.split(line, comments=True), block.place)


def _check_command(words: list[str], place: str) -> None:
    missing = [w for w in words if w.startswith(_OURS) and not (ROOT / w).exists()]
    assert not missing, f"{place}: {missing} are not there"
    if not _is_ours(words):
        return
    try:
        given, _ = options.parse(words[1:])
        files = given.command in ("build", "check") and (given.config, given.like, given.rescale_stats)
        if files and not any(files):
            (build_config if given.command == "build" else check_config)(given)
    except (SystemExit, BeamNiftiError) as e:
        raise AssertionError(f"{place}: {shlex.join(words)}: {e}") from e


# What pages start with


def _start_with_cohort(folder: Path) -> None:
    """The README's manifest with its images, a BIDS study, and a folder of scans."""
    (manifest,) = (b for b in read_blocks(README) if b.mark == "file: cohort/manifest.tsv")
    for number, row in enumerate(csv.DictReader(manifest.text.splitlines(), delimiter="\t")):
        write_image(folder / "cohort" / row["path"], brain(seed=number))
    (folder / "cohort/manifest.tsv").write_text(manifest.text)
    for acquisition in ("hires", "lowres"):
        write_image(folder / f"study/sub-01/anat/sub-01_acq-{acquisition}_T2w.nii.gz")
    people = []
    for number in range(1, 13):
        name = f"sub-{number:02d}"
        write_image(folder / f"study/{name}/anat/{name}_T1w.nii.gz", brain(seed=number))
        frames = np.stack([brain((4, 4, 3), seed=100 * number + t) for t in range(3)], axis=-1)
        write_image(folder / f"study/{name}/func/{name}_task-rest_bold.nii.gz", frames)
        age = "n/a" if number == 12 else 40 + number
        people.append({"participant_id": name, "age": age, "sex": "FM"[number % 2]})
        write_image(folder / f"scans/{name}/{name}_T1w.nii.gz", brain(seed=number))
    write_manifest(folder / "study/participants.tsv", people)


def _start_with_readme(folder: Path) -> None:
    """The same, and the manifest of the images of scripts/demo."""
    _start_with_cohort(folder)
    command = [sys.executable, ROOT / "scripts/demo_images.py", folder / "demo/manifest.tsv"]
    subprocess.run(command, check=True, capture_output=True)


def _start_with_dataset(folder: Path) -> None:
    """The same, and the dataset of the README's manifest."""
    _start_with_cohort(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(
            [
                "build",
                str(folder / "cohort/manifest.tsv"),
                str(folder / "cohort/dataset"),
                "--quiet",
                "--workers=1",
            ]
        )
    assert code == 0


def _start_with_columns(folder: Path) -> None:
    """The same cohort with more columns: several images, masks and labels, and no splits."""
    _start_with_cohort(folder)
    rows: list[Mapping[str, object]] = []
    for number in range(40):
        name = f"sub-{number:02d}"
        paths = {"path": f"{name}.nii.gz", "T1w": f"{name}.nii.gz"}
        paths |= {kind: f"{name}_{kind}.nii.gz" for kind in ("T2w", "FLAIR", "lesion")}
        for seed, path in enumerate(paths.values()):
            voxels = brain(seed=10 * number + seed)
            write_image(folder / "cohort" / path, voxels // 600 if "lesion" in path else voxels)
        labels = {"label": number, "age": 40 + number, "sex": "FM"[number % 2], "subtype": "a"}
        rows.append({"participant_id": name, **paths, **labels, "site": "berlin"})
    write_manifest(folder / "cohort/manifest.tsv", rows)


def _start_with_ct(folder: Path) -> None:
    """CT with masks of organs, in the folders of the Medical Segmentation Decathlon."""
    rng = np.random.default_rng(0)
    for number in range(6):
        hounsfield = rng.integers(-1000, 1000, (8, 8, 6)).astype(np.int16)
        write_image(folder / f"liver/imagesTr/liver_{number}.nii.gz", hounsfield)
        labels = rng.integers(0, 3, hounsfield.shape).astype(np.uint8)
        write_image(folder / f"liver/labelsTr/liver_{number}.nii.gz", labels)


STARTS: Mapping[str, Callable[[Path], None]] = {
    "cohort": _start_with_cohort,
    "readme": _start_with_readme,
    "dataset": _start_with_dataset,
    "columns": _start_with_columns,
    "ct": _start_with_ct,
}
