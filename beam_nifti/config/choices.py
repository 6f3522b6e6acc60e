"""Options whose values are names."""

from __future__ import annotations

from beam_nifti.errors import UsageError


def choose(name: str, value: object, allowed: tuple[str, ...] | range) -> None:
    """Refuse a value that is not one of those allowed."""
    if value not in allowed:
        choices = ", ".join(str(a) for a in allowed)
        raise UsageError(f"{name} is {value!r}; choose one of: {choices}")
