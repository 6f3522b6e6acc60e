"""Exit codes, by cause: temporary failures are distinguished from those that need a correction.

docs/monitoring.md lists the causes.
"""

from __future__ import annotations

import builtins
import errno
import re
import socket
import sys
from dataclasses import dataclass
from typing import Any, Final, cast

from beam_nifti.errors import (
    BeamNiftiError,
    EngineError,
    ManifestChangedError,
    ManifestError,
    OutputBusyError,
    OutputError,
    PartsChangedError,
    UsageError,
)

SUCCESS: Final = 0
FAILED: Final = 1
USAGE: Final = 2
TEMPORARY: Final = 75  # EX_TEMPFAIL of sysexits.h: a retry may succeed
INTERRUPTED: Final = 130
TERMINATED: Final = 143  # 128 + SIGTERM
CUT_SHORT: Final = 141  # 128 + SIGPIPE, as of `git log` whose reader has ended

_PASSING_ERRNOS: Final = frozenset(
    getattr(errno, name, None)  # not every system has all of them
    for name in (
        *("ENOSPC", "EDQUOT", "ENOMEM", "EMFILE", "ENFILE", "ENOBUFS", "ENOLCK", "EAGAIN", "EINTR", "EBUSY"),
        *("EIO", "EREMOTEIO", "ESTALE", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
        *("ENETRESET", "ETXTBSY", "EDEADLK", "ETIMEDOUT"),
    )
) - {None}
"""Resources that run out, devices, servers and networks that fail. Of the rest, such as missing rights and
folders that are not there, the system gives the same answer until somebody changes something."""

_PASSING: Final = (
    OutputBusyError,
    ManifestChangedError,
    PartsChangedError,
    ConnectionError,
    TimeoutError,
    socket.gaierror,  # a resolver that is down and a name that does not exist are told apart by nobody
    InterruptedError,
    BlockingIOError,
    MemoryError,
)
_REFUSED: Final = (UsageError, ManifestError, OutputError, OSError, ImportError)
_BUGS: Final = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, NameError),
    *(NotImplementedError, RecursionError, SyntaxError, TypeError, ValueError),
)
"""What a program raises for a fault of its own, which is still there at the next attempt."""

_PASSING_STATUS: Final = frozenset([408, 409, 425, 429])
_REFUSING_GRPC: Final = frozenset(
    [
        *("INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "FAILED_PRECONDITION"),
        *("OUT_OF_RANGE", "UNIMPLEMENTED", "UNAUTHENTICATED"),
    ]
)

_FRAME = re.compile(r'\s*File ".*", line \d+, in ')
_ERROR = re.compile(r"(?P<name>\w+(?:\.\w+)*)(?=:|$| \[while running)")
_STEP = re.compile(r" \[while running '[^']*'\]")  # what Beam puts behind a message
_ERRNO = re.compile(r"\[Errno (\d+)")
_DIRECT_CAUSE: Final = "The above exception was the direct cause of the following exception:"
_END_OF_ERROR = re.compile(r"\s+at [\w.$]+\(|Traceback |Caused by: ")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a failed command ends: its exit code, and the reason to print.

    If `is_explained`, the reason is complete, and a traceback would add nothing.
    """

    code: int
    reason: str
    is_explained: bool


def exit_code(error: BaseException) -> int:
    """The exit code of a command that fails with this error.

    An error about a dataset or a manifest may be caused by a store that keeps failing.
    """
    if isinstance(error, EngineError):
        return error.exit_code
    number = error.errno if isinstance(error, OSError) else None
    code = _code_of(type(error), number)
    if (
        isinstance(error, BeamNiftiError)
        and isinstance(error.__cause__, OSError)
        and may_pass(error.__cause__)
    ):
        return TEMPORARY
    return code


def may_pass(error: BaseException) -> bool:
    """Whether a later attempt may succeed although nobody changed anything."""
    return exit_code(error) == TEMPORARY


def reason_of(error: OSError) -> str:
    """The text of a system error, without its number."""
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def engine_outcome(error: Exception) -> Outcome | None:
    """How a command ends whose pipeline failed; None if no engine raised the error.

    Runners return a worker's exception as the text of a RuntimeError. If the text has tracebacks, the last
    one ends with the relevant exception.
    """
    if (outcome := _of_service(error)) is not None:
        return outcome
    is_of_beam = type(error).__module__.startswith("apache_beam.runners.")
    if not (is_of_beam or isinstance(error, RuntimeError)) or isinstance(error, _BUGS):
        return None
    text = str(error).strip()
    *causes, raised = (_last_error(part) for part in text.split(_DIRECT_CAUSE))
    raised = raised or text  # a step's exception by itself, or the engine's own words
    kind, code = _named_error(raised)
    if kind is Exception:
        raised = raised.rpartition("\n")[2]
    raised = _STEP.sub("", raised)
    if issubclass(kind, BeamNiftiError):
        raised = raised.partition(": ")[2]  # without the class
        of_cause = (_named_error(cause) for cause in causes if cause)
        if any(issubclass(cause, OSError) and number == TEMPORARY for cause, number in of_cause):
            code = TEMPORARY
    return Outcome(code, raised, issubclass(kind, (BeamNiftiError, OSError, MemoryError)))


def _code_of(kind: type[BaseException], number: int | None) -> int:
    if issubclass(kind, _PASSING) or (issubclass(kind, OSError) and number in _PASSING_ERRNOS):
        return TEMPORARY
    if issubclass(kind, _REFUSED):
        return USAGE
    return FAILED if issubclass(kind, (BeamNiftiError, *_BUGS)) else TEMPORARY


def _last_error(text: str) -> str:
    """Class and message of the exception at the end of a text's last traceback; "" without one."""
    lines = text.splitlines()
    frame = max((i for i, line in enumerate(lines) if _FRAME.match(line)), default=len(lines))
    start = next((i for i in range(frame, len(lines)) if lines[i][:1].strip()), len(lines))
    stop = next((i for i in range(start, len(lines)) if _END_OF_ERROR.match(lines[i])), len(lines))
    # In a RuntimeError Beam puts what it cannot make again with its own message.
    return "\n".join(lines[start:stop]).strip().removeprefix("RuntimeError: ")


def _named_error(text: str) -> tuple[type[BaseException], int]:
    """The class that the last lines of a traceback name, if it is loaded here, and its exit code."""
    found = _ERROR.match(text)
    module, _, name = found["name"].rpartition(".") if found else ("", "", "")
    kind = getattr(sys.modules.get(module) if module else builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        return Exception, TEMPORARY
    number = _ERRNO.search(text)
    return kind, _code_of(kind, int(number[1]) if number else None)


def _of_service(error: Exception) -> Outcome | None:
    """How a command ends if a job service refuses a request, by gRPC or HTTP, or does not answer."""
    if type(error).__module__.partition(".")[0] == "grpc":
        if not callable(code := getattr(error, "code", None)):
            return Outcome(TEMPORARY, "the job server does not answer", is_explained=True)
        status, details = code().name, cast(Any, error).details()
        is_refused = status in _REFUSING_GRPC
        return Outcome(USAGE if is_refused else TEMPORARY, f"the job server: {status}, {details}", True)
    http = getattr(error, "status_code", None) or getattr(error, "code", None)
    if isinstance(http, int) and http >= 400 and not isinstance(error, OSError):
        is_refused = http < 500 and http not in _PASSING_STATUS
        return Outcome(USAGE if is_refused else TEMPORARY, f"the job service: {error}", is_explained=True)
    return None
