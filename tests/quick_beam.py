"""Beam as it is, but for two things that it works out again for every step of every pipeline.

It reads the signatures of all methods of a DoFn several times a step, and makes a parser of the command line
for each look at an option, 170 times a build. Both always give the same. Remembered, a build of six small
images takes 0.27 s instead of 0.61 s of CPU time, and the tests make hundreds.
"""

from __future__ import annotations

import argparse
import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms import core

_Signature = tuple[list[str], list[Any]]


@functools.cache
def install() -> None:
    """Let Beam remember both in this process."""
    read_signature: Callable[[Any], _Signature] = core.get_function_args_defaults
    parse = PipelineOptions.__init__
    signatures = WeakKeyDictionary[Any, _Signature]()
    parsed = dict[tuple[type, tuple[str, ...]], argparse.Namespace]()

    def get_function_args_defaults(function: Any) -> _Signature:
        method = getattr(function, "__func__", None)
        if method is None:
            return read_signature(function)
        if method not in signatures:
            signatures[method] = read_signature(function)
        names, defaults = signatures[method]
        return [*names], [*defaults]

    def init(self: Any, flags: Sequence[str] | None = None, **overrides: Any) -> None:
        if flags is None or isinstance(flags, str) or overrides:
            parse(self, flags, **overrides)
            return
        key = type(self), tuple(flags)
        if key not in parsed:
            parse(self, flags)
            parsed[key] = copy.deepcopy(self._visible_options)
            return
        logging.basicConfig()
        self._flags = flags
        self._visible_options = copy.deepcopy(parsed[key])
        self._all_options = dict(vars(self._visible_options))

    core.get_function_args_defaults = get_function_args_defaults
    PipelineOptions.__init__ = init
