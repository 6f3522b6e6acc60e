"""The user's own function of --preprocess: found by its name, and told apart by its source."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beam_nifti.errors import UsageError

Function = Callable[..., Any]


def source_sha256(name: str) -> str:
    """sha256, in hex, of the file that defines a function: it decides the bytes of records.

    What that file imports does not count.

    Args:
        name: `package.module:function`.

    Raises:
        UsageError: as `load_function`; or the function has no file.
    """
    function = inspect.unwrap(_import(name))
    # Where a package only passes it on, the file is that of the module it comes from.
    module = function.__module__ if inspect.isfunction(function) else name.partition(":")[0]
    path = getattr(sys.modules[module], "__file__", None)
    if path is None:
        raise UsageError(f"--preprocess {name}: {module} has no file; define the function in a module")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@functools.cache
def load_function(name: str, sha256: str | None = None) -> Function:
    """Import a function.

    Args:
        name: `package.module:function`.
        sha256: that `source_sha256` must give; None takes any.

    Raises:
        UsageError: it cannot be imported here, or is another one.
    """
    function = _import(name)
    if sha256 is not None and source_sha256(name) != sha256:
        raise UsageError(
            f"--preprocess {name}: the file that defines it differs from the one that the dataset is made "
            "with; give launcher and workers the same version, or build the dataset again"
        )
    return function


def _import(name: str) -> Function:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as e:  # a module may raise anything
        raise UsageError(
            f"--preprocess {name}: cannot be imported: {type(e).__name__}: {e}; install its package here "
            "and on the workers, or put its folder on PYTHONPATH"
        ) from e
    if not callable(function):
        raise UsageError(f"--preprocess {name}: is no function but a {type(function).__name__}")
    return function  # type: ignore[no-any-return]
