"""The options that change a volume between loading and rescaling."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from beam_nifti.config.choices import choose
from beam_nifti.errors import UsageError
from beam_nifti.support.calls import format_call, parse_call, split_call
from beam_nifti.support.rules import parse_rule, spell_rule

PREPARATIONS: Final = (
    *("nonfinite", "preprocess", "orientation", "reference", "spacing", "resize", "resize_longest"),
    *("interpolation", "mask_interpolation", "antialias", "separate_z"),
    *("crop_foreground", "shape"),
)
"""Fields of RecordConfig for the preparation of a volume, in the order in which they apply."""

NONFINITE: Final = ("error", "zero", "min", "value:V")
"""What becomes of NaN and infinite voxels; V is in the image's units."""

RESAMPLINGS: Final = ("align", "reference", "spacing", "resize", "resize_longest")
"""Fields of RecordConfig that resample a volume."""

_RESPACINGS: Final = ("spacing", "resize", "resize_longest")

RESAMPLING_DETAILS: Final[Mapping[str, tuple[str, ...]]] = {
    "interpolation": RESAMPLINGS,
    "mask_interpolation": RESAMPLINGS,
    "antialias": RESAMPLINGS,
    "separate_z": _RESPACINGS,
}
"""Fields of RecordConfig that state how a volume is resampled, and those of which each requires one."""

EXCLUSIVE: Final = (
    *(("spacing", "resize"), ("resize", "resize_longest"), ("reference", "spacing")),
    *(("reference", "resize"), ("reference", "resize_longest"), ("orientation", "reference")),
)
"""Pairs of options that cannot be combined."""

INTERPOLATIONS: Final = ("linear", "nearest", "cubic")
MASK_INTERPOLATIONS: Final = ("nearest", "linear")
ALIGNMENTS: Final = ("never", "first")
SEPARATE_Z: Final = ("never", "auto")
"""Values of these fields; the first is the default."""

ORIENTATIONS: Final = frozenset(
    "".join(letters)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*axes)
)
"""Codes of the 48 orientations: the direction in which each of the three indices increases, as in nibabel."""


@dataclass(frozen=True)
class ReferenceGrid:
    """The voxel grid that all volumes are brought to.

    Attributes:
        shape: (X, Y, Z).
        affine: 16 numbers, row by row: voxel indices to millimetres in RAS+.
    """

    shape: tuple[int, int, int]
    affine: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse other grids than those of images."""
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "affine", tuple(map(float, self.affine)))
        check_shape("--reference", self.shape)
        if len(self.affine) != 16 or self.affine[12:] != (0, 0, 0, 1) or not self._has_volume():
            raise UsageError(
                f"--reference has the affine {list(self.affine)}; give an image whose affine is finite and "
                "not singular"
            )

    def _has_volume(self) -> bool:
        a, b, c = (self.affine[axis:12:4] for axis in range(3))  # the edges of a voxel
        sizes = math.prod(math.hypot(*edge) for edge in (a, b, c))
        normal = (b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0])
        volume = abs(math.fsum(map(operator.mul, a, normal)))
        return all(map(math.isfinite, self.affine)) and 0 < sizes < math.inf and volume > _SINGULAR * sizes

    def __str__(self) -> str:
        sizes = (math.hypot(*self.affine[axis:12:4]) for axis in range(3))
        return f"{'×'.join(map(str, self.shape))} voxels of {'×'.join(f'{n:.4g}' for n in sizes)} mm"


_SINGULAR: Final = 1e-4
"""Smallest volume of a voxel relative to that of a box with its edges."""

_LEAST_SPACING: Final = 1e-6
"""A nanometre, in mm. Quotients of smaller sizes overflow."""

_SHOWN_LENGTH: Final = 60
"""Characters of a text to show in an error. The text may come from a dataset."""


def check_steps(steps: tuple[str, ...], digests: tuple[str, ...]) -> None:
    """Refuse functions of `preprocess` that no spelling names, or that have too many or too few digests."""
    for step in steps:  # which is not parsed, as it may come from a dataset
        with _naming_step(step):
            split_call(step)
    if len(digests) not in (0, len(steps)):
        raise UsageError(
            f"--preprocess has {len(steps)} functions, but {len(digests)} digests of their files"
        )


def spell_nonfinite(rule: str) -> str | None:
    """Give what becomes of NaN and infinite voxels its one spelling; None if they are an error.

    >>> spell_nonfinite("value:-1024.0"), spell_nonfinite("value:0"), spell_nonfinite("error")
    ('value:-1024', 'zero', None)
    """
    method, numbers = parse_rule("--nonfinite", rule, NONFINITE)
    if method == "error":
        return None
    return "zero" if numbers == (0.0,) else spell_rule(method, numbers)


def check_orientation(code: str) -> None:
    """Refuse what is no code of an orientation."""
    if code not in ORIENTATIONS:
        raise UsageError(
            f"--orientation is {code!r}; write native, or three letters, one of each pair R/L, A/P and S/I, "
            "such as RAS or LPS"
        )


def check_spacing(spacing: tuple[float, ...]) -> None:
    """Refuse what is not three sizes of voxels in mm."""
    if not (len(spacing) == 3 and all(_LEAST_SPACING <= n < math.inf for n in spacing)):
        raise UsageError(
            f"--spacing is {_joined(spacing)}; give three sizes in mm, from {_LEAST_SPACING:g}, such as 1,1,1"
        )


def check_shape(flag: str, shape: tuple[int, ...]) -> None:
    """Refuse what is not three numbers of voxels."""
    if not (len(shape) == 3 and all(n >= 1 for n in shape)):
        raise UsageError(f"{flag} is {_joined(shape)}; give three numbers of voxels, such as 160,192,160")


def check_resampling(given: Mapping[str, Any]) -> None:
    """Refuse ways to resample that are unknown, or have no effect.

    Args:
        given: values of PREPARATIONS and `align`; None means not given.
    """
    for name, choices in (
        ("interpolation", INTERPOLATIONS),
        ("mask_interpolation", MASK_INTERPOLATIONS),
        ("separate_z", SEPARATE_Z),
        ("align", ALIGNMENTS),
    ):
        if given[name] is not None:
            choose(_flag(name), given[name], choices)
    given = {name: None if value is False or value == "never" else value for name, value in given.items()}
    for name, needed in RESAMPLING_DETAILS.items():
        if given[name] is not None and all(given[other] is None for other in needed):
            raise UsageError(
                f"{_flag(name)} has no effect without {_any_of(needed)}; give one of them, or drop it"
            )
    if given["antialias"] and given["interpolation"] == "nearest":
        raise UsageError(
            "--antialias smooths images before they are interpolated, but --interpolation nearest keeps "
            "their voxels; drop one of them"
        )
    is_nearest = given["interpolation"] == "nearest" and given["mask_interpolation"] in (None, "nearest")
    if given["separate_z"] is not None and is_nearest:
        raise UsageError(
            "--separate-z auto has no effect with --interpolation nearest, by which all axes are resampled; "
            "drop it"
        )
    for name, other in EXCLUSIVE:
        if None not in (given[name], given[other]):
            raise UsageError(
                f"{_flag(name)} and {_flag(other)} both decide the positions of voxels; drop one of them"
            )
    size = given["resize_longest"]
    if size is not None and size < 1:
        raise UsageError(f"--resize-longest is {size}; give a number of voxels, such as 128")
    for name, shape in (
        ("reference", given["reference"] and given["reference"].shape),
        ("resize", given["resize"]),
        ("resize_longest", (size, size, size)),
    ):
        is_same = given[name] is not None and shape == given["shape"]
        if is_same and given["crop_foreground"] is None:
            raise UsageError(
                f"--shape has no effect after {_flag(name)}, which gives that shape; drop --shape"
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _any_of(names: Sequence[str]) -> str:
    flags = [_flag(name) for name in names]
    return " or ".join([", ".join(flags[:-1]), flags[-1]] if flags[1:] else flags)


@contextlib.contextmanager
def _naming_step(step: str) -> Iterator[None]:
    """Refuse, as an option, what is no call."""
    try:
        yield
    except ValueError as e:
        shown = step if len(step) <= _SHOWN_LENGTH else f"{step[:_SHOWN_LENGTH]}…"
        raise UsageError(
            f"--preprocess is {shown!r}; write it as package.module:function, or with literals as "
            "arguments, such as package.module:function(threshold=3)"
        ) from e


def spell_steps(given: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """Give the functions of `RecordConfig.preprocess` their canonical spelling.

    Raises:
        UsageError: an entry does not name a function, or has arguments that are not literals.
    """
    steps = list[str]()
    for step in all_of(given):
        with _naming_step(step):
            steps.append(format_call(*parse_call(step)))
    return one_or_more(steps)


def all_of(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Give one or more values as a tuple."""
    return (given,) if isinstance(given, str) else tuple(given or ())


def one_or_more(given: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """Give a single value as itself, and none as None."""
    found = all_of(given)
    return found[0] if len(found) == 1 else found or None


def _joined(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{n:g}" for n in numbers)
