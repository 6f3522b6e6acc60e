"""The user's own functions of --preprocess, imported by name and identified by the sha256 of their source."""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from beam_nifti.config import RecordConfig
from beam_nifti.errors import UsageError
from beam_nifti.support.calls import format_call, parse_call

Function = Callable[..., Any]

_MISSING: Final = object()


def source_sha256(step: str) -> str:
    """sha256, in hex, of the file that defines a function, which decides the bytes of records."""
    load_function(step)
    return _find(parse_call(step)[0])[1]


def load_function(step: str, sha256: str | None = None) -> Function:
    """Import a function, `package.module:function` with or without arguments, of this sha256, if given.

    Returns:
        A function of a volume, which gets copies of the arguments each time.

    Raises:
        UsageError: it cannot be imported, has no file, does not take the arguments, or its source differs.
    """
    name, arguments = parse_call(step)
    function, found = _find(name)
    if sha256 not in (None, found):
        raise UsageError(
            f"--preprocess {name}: the file that defines it differs from the one of this dataset; use "
            "the same version on launcher and workers, or build the dataset again with --overwrite"
        )
    try:
        inspect.signature(function).bind(None, **arguments)
    except TypeError as e:
        raise UsageError(f"--preprocess {step}: {e}; give arguments that the function takes") from e
    except ValueError:  # a function of C may have no signature
        pass
    return (lambda volume: function(volume, **copy.deepcopy(arguments))) if arguments else function


def load_functions(record: RecordConfig) -> list[tuple[str, Function]]:
    """Import all functions of a configuration, in their order, each with its text."""
    return [(step, load_function(step, sha256)) for step, sha256 in record.steps]


def name_of(function: object) -> str:
    """The text by which workers can import a function, with its arguments.

    Args:
        function: a function at the top of a module, or a `functools.partial` of one with named arguments.

    Raises:
        UsageError: workers cannot import it, or an argument has no name or is not a literal.
    """
    if isinstance(function, functools.partial):
        inner = name_of(function.func)
        if function.args:
            raise UsageError(
                f"--preprocess is {inner} with arguments {function.args} that have no names; give them as "
                "keywords of functools.partial"
            )
        return call_of(inner, function.keywords)
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


def call_of(name: str, arguments: Mapping[str, Any]) -> str:
    """The text of a function with arguments."""
    try:
        return format_call(name, arguments)
    except ValueError as e:
        raise UsageError(f"--preprocess {name}: {e}") from e


@functools.cache  # so that the digest stays that of what this process has imported
def _find(name: str) -> tuple[Function, str]:
    module, _, attribute = name.partition(":")
    try:
        imported = importlib.import_module(module)
        function = getattr(imported, attribute, _MISSING)
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
    if function is _MISSING:
        close = difflib.get_close_matches(attribute, [n for n, f in vars(imported).items() if callable(f)], 1)
        hint = f"did you mean {close[0]}?" if close else "correct the name of the function"
        raise UsageError(f"--preprocess {name}: {module} has no function {attribute!r}; {hint}")
    if not callable(function):
        raise UsageError(f"--preprocess {name}: is of type {type(function).__name__}; give a function")
    inner = inspect.unwrap(function)
    # Where a package only passes a function on, its file is that of the module that it comes from.
    defined_in = inner.__module__ if inspect.isfunction(inner) else module
    path = getattr(sys.modules[defined_in], "__file__", None)
    if path is None:
        raise UsageError(f"--preprocess {name}: {defined_in} has no file; define the function in a module")
    return function, hashlib.sha256(Path(path).read_bytes()).hexdigest()
