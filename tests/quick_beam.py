"""Beam as it is, but for what it works out again for every step of a pipeline, and the clock of its steps.

It reads the signatures of all methods of a DoFn several times a step, their types, and the source of each
function; it makes a parser of the command line for each look at an option, 170 times a build; and it
compresses the same pickles in every build. All of these always give the same. It notes where in the code each
type was stated. For each bundle it also starts a thread that samples how long each step takes, and at the end
waits for that thread to wake. Without all this, a build of twelve small images takes half of the CPU time,
and the tests make hundreds.
"""

from __future__ import annotations

import argparse
import bz2
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from apache_beam.internal import cloudpickle_pickler
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.worker import statesampler
from apache_beam.transforms import core, userstate
from apache_beam.typehints.decorators import IOTypeHints

_Signature = tuple[list[str], list[Any]]
_Specs = tuple[set[Any], set[Any]]

_SMALL = 1 << 14
"""Bytes of a pickle that is kept: of a step, not of elements."""


@functools.cache
def install() -> None:
    """Let Beam remember all this in this process, and sample no times."""
    _remember_signatures()
    _remember_specs()
    _remember_returns()
    _remember_options()
    _remember_types()
    _remember_pickles()
    statesampler.StateSampler.start = _start_without_thread
    statesampler.StateSampler.stop = _stop_without_thread


def _remember_signatures() -> None:
    read_signature: Callable[[Any], _Signature] = core.get_function_args_defaults
    signatures = WeakKeyDictionary[Any, _Signature]()

    def get_function_args_defaults(function: Any) -> _Signature:
        method = getattr(function, "__func__", None)
        if method is None:
            return read_signature(function)
        if method not in signatures:
            signatures[method] = read_signature(function)
        names, defaults = signatures[method]
        return [*names], [*defaults]

    core.get_function_args_defaults = get_function_args_defaults


def _remember_specs() -> None:
    """State and timers of a DoFn are parameters of its methods: its class's, but where it wraps another's."""
    read_specs: Callable[[Any], _Specs] = userstate.get_dofn_specs
    specs = WeakKeyDictionary[type, _Specs]()

    def get_dofn_specs(dofn: Any) -> _Specs:
        if isinstance(vars(dofn).get("process"), MethodType):
            return read_specs(dofn)
        if type(dofn) not in specs:
            specs[type(dofn)] = read_specs(dofn)
        states, timers = specs[type(dofn)]
        return {*states}, {*timers}

    userstate.get_dofn_specs = get_dofn_specs


def _remember_returns() -> None:
    mixes: Callable[[Any], bool] = core._check_fn_use_yield_and_return
    found = WeakKeyDictionary[CodeType, bool]()

    def check_fn_use_yield_and_return(function: Any) -> bool:
        code = getattr(function, "__code__", None)
        if code is None:
            return mixes(function)
        if code not in found:
            found[code] = mixes(function)
        return found[code]

    core._check_fn_use_yield_and_return = check_fn_use_yield_and_return


def _remember_types() -> None:
    read_types: Callable[[Any], IOTypeHints | None] = IOTypeHints.from_callable
    found = WeakKeyDictionary[Any, dict[bool, IOTypeHints | None]]()

    def from_callable(function: Any) -> IOTypeHints | None:
        if not isinstance(function, FunctionType | MethodType):
            return read_types(function)
        is_method = isinstance(function, MethodType)
        of_function = found.setdefault(function.__func__ if is_method else function, {})
        if is_method not in of_function:
            of_function[is_method] = read_types(function)
        return of_function[is_method]

    IOTypeHints.from_callable = staticmethod(from_callable)
    IOTypeHints._make_origin = staticmethod(lambda *_, **__: [])


def _remember_pickles() -> None:
    compress, decompress = (functools.lru_cache(1000)(f) for f in (bz2.compress, bz2.decompress))
    cloudpickle_pickler.bz2 = SimpleNamespace(
        compress=lambda data, compresslevel: (compress if len(data) < _SMALL else bz2.compress)(data),
        decompress=lambda data: (decompress if len(data) < _SMALL else bz2.decompress)(data),
    )


def _remember_options() -> None:
    parse = PipelineOptions.__init__
    parsed = dict[tuple[type, tuple[str, ...]], argparse.Namespace]()

    def init(self: Any, flags: Sequence[str] | None = None, **overrides: Any) -> None:
        if flags is None or isinstance(flags, str) or overrides:
            parse(self, flags, **overrides)
            return
        key = type(self), tuple(flags)
        if key not in parsed:
            parse(self, flags)
            parsed[key] = _copy_of(self._visible_options)
            return
        logging.basicConfig()
        self._flags = flags
        self._visible_options = _copy_of(parsed[key])
        self._all_options = dict(vars(self._visible_options))

    PipelineOptions.__init__ = init
    read_all = PipelineOptions.get_all_options
    found = dict[str, dict[str, Any]]()

    def get_all_options(self: Any, *arguments: Any, **named: Any) -> dict[str, Any]:
        if arguments or named.keys() - {"drop_default", "retain_unknown_options"}:
            return read_all(self, *arguments, **named)
        key = repr((type(self), self._flags, self._all_options, named))
        if key not in found:
            found[key] = read_all(self, **named)
        return dict(found[key])

    PipelineOptions.get_all_options = get_all_options


def _copy_of(options: argparse.Namespace) -> argparse.Namespace:
    """Options are plain values, and lists and dictionaries of them."""
    return argparse.Namespace(
        **{k: v.copy() if isinstance(v, list | dict) else v for k, v in vars(options).items()}
    )


def _start_without_thread(self: Any) -> None:
    self.tracked_thread = threading.current_thread()
    statesampler.set_current_tracker(self)
    self.started = True


def _stop_without_thread(self: Any) -> None:
    statesampler.set_current_tracker(None)
    self.finished = True
