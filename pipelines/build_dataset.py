"""Entry point of a build for runners and schedulers that start a Python file.

    python pipelines/build_dataset.py MANIFEST OUTPUT --runner=FlinkRunner --flink_master=localhost:8081

It is `beam-nifti build` under another name: the same arguments, the same exit codes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from beam_nifti.cli import main as cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run `beam-nifti build` with these arguments, and return its exit code."""
    return cli.main(["build", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
