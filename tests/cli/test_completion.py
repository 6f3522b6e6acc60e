"""Completion, as a shell does it with the script that is printed."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from beam_nifti.cli import main as cli


@pytest.fixture
def complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], set[str]]:
    """What bash offers after these words, in a folder with files: `complete(["build", "--res"])`."""
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort.tsv").write_text("")
    assert cli.main(["--print-completion", "bash"]) == cli.SUCCESS
    script = capsys.readouterr().out

    def run(words: Sequence[str]) -> set[str]:
        line = ["beam-nifti", *words]
        # What bash itself does when the tab key is pressed.
        program = f"""{script}
            COMP_WORDS=({shlex.join(line)}) COMP_CWORD={len(words)}
            spec=$(complete -p beam-nifti) function=${{spec#* -F }}
            "${{function%% *}}" beam-nifti {shlex.quote(words[-1])} {shlex.quote(line[-2])}
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        done = subprocess.run(
            ["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return set(map(str.strip, done.stdout.splitlines())) - {""}

    return run


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ver"], {"verify"}),
        (["manifest", ""], {"bids", "glob", "msd", "table"}),
        (["build", "--resc"], {"--rescale", "--rescale-within", "--rescale-split", "--rescale-stats"}),
        (["build", "--compression", ""], {"gzip", "none"}),
        (["build", "coh"], {"cohort", "cohort.tsv"}),
        (["build", "cohort.tsv", "coh"], {"cohort"}),
        (["verify", "coh"], {"cohort"}),
        (["verify", "cohort", "--manifest", "coh"], {"cohort", "cohort.tsv"}),
        (["--log-format", "j"], {"json"}),
    ],
)
def test_bash_completes(
    complete: Callable[[Sequence[str]], set[str]], words: Sequence[str], offered: set[str]
) -> None:
    assert {word.rstrip("/") for word in complete(words)} == offered


@pytest.mark.parametrize(("shell", "offers"), [("zsh", "--rescale-within"), ("tcsh", "verify")])
def test_other_shells_take_their_script(
    shell: str, offers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--print-completion", shell]) == cli.SUCCESS
    script = capsys.readouterr().out
    assert offers in script
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([program, "-n", tmp_path / "script"], check=True, capture_output=True)


def test_a_shell_that_is_unknown_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--print-completion", "ed"]) == cli.USAGE
    assert "bash" in capsys.readouterr().err
