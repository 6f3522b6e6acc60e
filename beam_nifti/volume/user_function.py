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
        UsageError: the function cannot be imported here, or has no file.
    """
    return _find(name)[1]


def load_function(name: str, sha256: str | None = None) -> Function:
    """Import a function.

    Args:
        name: `package.module:function`.
        sha256: that its `source_sha256` must be; None takes any.

    Raises:
        UsageError: as `source_sha256`; or it is another one.
    """
    function, found = _find(name)
    if sha256 not in (None, found):
        raise UsageError(
            f"--preprocess {name}: the file that defines it differs from the one that the dataset is made "
            "with; give launcher and workers the same version, or build the dataset again"
        )
    return function


def name_of(function: object) -> str:
    """The name by which workers can import a function.

    Args:
        function: of a module, and at its top.

    Returns:
        `package.module:function`.

    Raises:
        UsageError: it has no such name, as lambdas, functions within others, methods and those of a script
            have none.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not callable(function) or not isinstance(module, str) or not isinstance(name, str):
        raise UsageError(
            f"--preprocess is {function!r}; give a function, or its name as package.module:function"
        )
    remedy = "define a function at the top of a module that the workers can import"
    if name.endswith("<lambda>"):
        raise UsageError(f"--preprocess is a lambda of {module}, which has no name to import it by; {remedy}")
    if module == "__main__":
        raise UsageError(f"--preprocess is {name} of __main__, which workers cannot import; {remedy}")
    if getattr(sys.modules.get(module), name, None) is not function:
        raise UsageError(
            f"--preprocess is {name} of {module}, which cannot be imported by that name; {remedy}"
        )
    return f"{module}:{name}"


@functools.cache  # so that the digest stays that of what this process has imported
def _find(name: str) -> tuple[Function, str]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except SystemExit as e:
        raise UsageError(
            f"--preprocess {name}: {module} calls sys.exit() when it is imported; put that under "
            'if __name__ == "__main__"'
        ) from e
    except Exception as e:  # a module may raise anything
        raise UsageError(
            f"--preprocess {name}: cannot be imported: {type(e).__name__}: {e}; install its package here "
            "and on the workers, or put its folder on PYTHONPATH"
        ) from e
    if not callable(function):
        raise UsageError(f"--preprocess {name}: is no function but a {type(function).__name__}")
    inner = inspect.unwrap(function)
    # Where a package only passes a function on, its file is that of the module that it comes from.
    defined_in = inner.__module__ if inspect.isfunction(inner) else module
    path = getattr(sys.modules[defined_in], "__file__", None)
    if path is None:
        raise UsageError(f"--preprocess {name}: {defined_in} has no file; define the function in a module")
    return function, hashlib.sha256(Path(path).read_bytes()).hexdigest()
