"""tf.train.Example and TensorProto as bytes, without TensorFlow.

Byte-equal to TensorFlow's deterministic serialization. Source: docs/format.md, "Records".
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from beam_nifti.config import RecordConfig
from beam_nifti.errors import ShardError, VolumeError
from beam_nifti.volume.compression import Bytes
from beam_nifti.volume.rescale import Scaling, numpy_dtype
from beam_nifti.volume.target import TARGET_DTYPE

if TYPE_CHECKING:
    from beam_nifti.manifest.manifest import VolumeRow
    from beam_nifti.volume.volume import Volume

FEATURES: Final[Mapping[str, str]] = {
    "affine": "float[16]",
    "id": "bytes",
    "image_raw": "bytes",
    "intensity_max": "float",
    "intensity_min": "float",
    "label": "float",
    "scl_inter": "bytes",
    "scl_slope": "bytes",
    "zooms": "float[3]",
}
"""Every feature of a record and its kind.

`scl_*` are present only if native voxels need them: 8 bytes, a little-endian float64, as in NIfTI-2.
"""

RANGE_FEATURES: Final[Mapping[str, str]] = {"rescale_high": "bytes", "rescale_low": "bytes"}
"""Features of the intensities that became 0 and 1, if they are not the range: float64, like `scl_*`."""

SCALING_FEATURES: Final = ("scl_slope", "scl_inter")
"""Features of a header's scaling."""

MASK_FEATURE: Final = "mask_raw"
"""Feature of a mask: a tensor, like `image_raw`."""

TARGET_FEATURE: Final = "target_raw"
"""Feature of a target: a tensor of float32."""

TENSOR_FEATURES: Final[Mapping[str, str]] = {
    "image": "image_raw",
    "mask": MASK_FEATURE,
    "target": TARGET_FEATURE,
}
"""Those that hold a tensor, by what readers call it, in their order; others are called by their own names."""

TENSOR_DTYPES: Final[Mapping[str, int]] = {
    **{"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "int64": 9},
    **{"bfloat16": 14, "uint16": 17, "float16": 19, "uint32": 22, "uint64": 23},
}
"""Dtypes of tensors in records, with their numbers. Source: tensorflow/core/framework/types.proto"""

_LABEL_FEATURES: Final = {"float": "float", "class": "int64", "string": "bytes"}
"""Kind of the feature of a label, by the label's kind."""

MAX_EXAMPLE_BYTES: Final = 2**31 - 1 - 16
"""Largest Example. Lengths are int32 in protobuf, whose C++ parser refuses the last 16 values;
TensorFlow's parser crashes on messages of 2 GiB and more."""

_BESIDE_VOXELS: Final = 1 << 20
"""Most bytes of an Example besides voxels: its id, labels and affine."""

_MOST_FIELDS: Final = 1 << 16
"""Most fields of a message. Each takes a hundred times its bytes while it is parsed."""

_VARINT_BITS: Final = 64

Feature = memoryview | npt.NDArray[np.generic]
Features = Mapping[str, Feature]
"""Features of a record by name: bytes, or numbers of shape (n,)."""

Tensors = tuple[tuple[str, tuple[int, ...], str], ...]
"""Feature, shape and dtype of each tensor of a record."""

FeatureValue = bytes | npt.NDArray[np.float32] | npt.NDArray[np.int64] | tuple[Bytes, ...]

_DTYPE_OF_ENUM: Final = {number: name for name, number in TENSOR_DTYPES.items()}
_LENGTH_DELIMITED: Final = 2
_FIRST: Final = 1 << 3 | _LENGTH_DELIMITED
_SECOND: Final = 2 << 3 | _LENGTH_DELIMITED
"""Tags of a message's fields: the number of the field, and its wire type."""

_BYTES: Final = _FIRST
_FLOATS: Final = _SECOND
_INTEGERS: Final = 3 << 3 | _LENGTH_DELIMITED
"""Tags of the kinds of values of a Feature, which has one of them."""

_DTYPE: Final = 1 << 3
_CONTENT: Final = 4 << 3 | _LENGTH_DELIMITED
_AXIS_SIZE: Final = 1 << 3
"""Tags of a TensorProto, whose shape has the tag `_SECOND`, and of an axis."""


@dataclass(frozen=True, slots=True)
class ExamplePieces:
    """A serialized tf.train.Example of which nothing is copied.

    Attributes:
        pieces: its bytes, in order; among them the tensors' own memory.
        tensors: where the content of each tensor begins, its shape, and the bytes of one of its elements; in
            the order in which they stand.
    """

    pieces: tuple[Bytes, ...]
    tensors: tuple[tuple[int, tuple[int, ...], int], ...]

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces)

    def __reduce__(self) -> tuple[Any, ...]:
        return ExamplePieces, ((bytes(self),), self.tensors)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def tensors_of(shape: Sequence[int], dtype: str, record: RecordConfig) -> Tensors:
    """The feature, shape and dtype of each tensor of a record, in their order.

    Args:
        shape: shape of the voxels.
        dtype: dtype of the stored voxels.
        record: configuration of the record.
    """
    space = tuple(shape[:3])
    tensors = [("image_raw", tuple(shape), dtype)]
    if record.mask_dtype is not None:
        tensors.append((MASK_FEATURE, space + record.mask_axes, record.mask_dtype))
    if record.has_target:
        tensors.append((TARGET_FEATURE, space, TARGET_DTYPE))
    return tuple(tensors)


def largest_payload(tensors: Tensors) -> int:
    """The most bytes that an Example with these tensors can have."""
    num_bytes = sum(math.prod(shape) * numpy_dtype(dtype).itemsize for _, shape, dtype in tensors)
    return min(MAX_EXAMPLE_BYTES, num_bytes + _BESIDE_VOXELS)


def require_readable(num_bytes: int, arrays: Iterable[npt.NDArray[np.generic] | None]) -> None:
    """Refuse an Example that readers refuse for its size.

    Args:
        num_bytes: size of the Example.
        arrays: its tensors, as far as it has them.

    Raises:
        VolumeError: it is too large.
    """
    most = largest_payload(tuple(("", a.shape, a.dtype.name) for a in arrays if a is not None))
    if num_bytes > most:
        raise VolumeError(
            f"takes {num_bytes:,} bytes, more than the {most:,} that readers accept of a record of this shape"
            "; shorten its id, labels and other features"
        )


def _field(number: int, size: int) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(size)


def encode_tensor(voxels: npt.NDArray[np.generic]) -> tuple[bytes, memoryview]:
    """Serialize as `tf.io.serialize_tensor`, but in two pieces, so that the voxels are not copied.

    Args:
        voxels: C order, native byte order, any real dtype, bfloat16 included.
    """
    dims = b""
    for size in voxels.shape:
        dim = b"\x08" + _varint(size)
        dims += _field(2, len(dim)) + dim
    content = memoryview(voxels.reshape(-1).view(np.uint8))
    head = b"\x08" + _varint(TENSOR_DTYPES[voxels.dtype.name]) + _field(2, len(dims)) + dims
    return head + _field(4, len(content)), content


def encode_example(features: Mapping[str, FeatureValue]) -> bytes:
    """Serialize a tf.train.Example.

    Args:
        features: values by name: bytes, a tuple of pieces of one bytes value, or float32 or int64 of shape
            (n,).

    Returns:
        The bytes of `Example.SerializeToString(deterministic=True)`.

    Raises:
        VolumeError: it would be larger than protobuf can read.
    """
    return b"".join(_pieces(features))


def _pieces(features: Mapping[str, FeatureValue]) -> list[Bytes]:
    """The pieces of a serialized Example; those of a value are not copied.

    Raises:
        VolumeError: as `encode_example`.
    """
    pieces = list[Bytes]()
    for name in sorted(features, key=_sort_key):
        pieces += _entry(name, features[name])
    pieces.insert(0, _field(1, sum(map(len, pieces))))
    if (size := sum(map(len, pieces))) > MAX_EXAMPLE_BYTES:
        raise VolumeError(
            f"the record takes {size:,} bytes, more than protobuf can read ({MAX_EXAMPLE_BYTES:,}); "
            "crop or resample the image, or give it a shorter id"
        )
    return pieces


def _entry(name: str, value: FeatureValue) -> list[Bytes]:
    """The pieces of one feature in the map of an Example."""
    body: tuple[Bytes, ...]
    if isinstance(value, np.ndarray):
        is_integer = value.dtype.kind == "i"
        packed = _pack_integers(value) if is_integer else value.astype("<f4").tobytes()
        body = (_field(1, len(packed)), packed) if packed else ()
        kind = 3 if is_integer else 2
    else:
        content = (value,) if isinstance(value, bytes) else value
        body = (_field(1, sum(map(len, content))), *content)
        kind = 1
    inner = sum(map(len, body))
    feature_head = _field(kind, inner)
    key = name.encode()
    entry_head = _field(1, len(key)) + key + _field(2, len(feature_head) + inner)
    return [_field(1, len(entry_head) + len(feature_head) + inner), entry_head, feature_head, *body]


def _sort_key(name: str) -> bytes:
    """Sort as protobuf's Python does: a name follows those that begin with it."""
    return name.encode() + b"\xff"


def _pack_integers(numbers: npt.NDArray[np.generic]) -> bytes:
    return b"".join(map(_varint, numbers.astype(np.uint64).tolist()))  # two's complement


def feature_kinds(record: RecordConfig) -> dict[str, str]:
    """Every feature that a record of a configuration can have and its kind, by name."""
    kinds = {**FEATURES, **(RANGE_FEATURES if record.has_range else {})}
    if record.channels is not None:
        kinds |= dict.fromkeys(("intensity_min", "intensity_max"), f"float[{record.num_channels}]")
    if record.mask_dtype is not None:
        kinds[MASK_FEATURE] = "bytes"
    if record.has_target:
        kinds[TARGET_FEATURE] = "bytes"
    kinds |= {label_feature(c.name): _LABEL_FEATURES[c.kind or ""] for c in record.labels or ()}
    return dict(sorted(kinds.items()))


def split_kind(kind: str) -> tuple[str, int | None]:
    """The type and the number of values of a feature, by its kind.

    >>> split_kind("float[16]"), split_kind("int64")
    (('float', 16), ('int64', None))
    """
    name, _, size = kind.rstrip("]").partition("[")
    return name, int(size) if size else None


def label_feature(name: str) -> str:
    """The feature of a column of labels."""
    return f"label/{name}"


def label_values(row: VolumeRow) -> dict[str, FeatureValue]:
    """The features with the labels of a row."""
    features: dict[str, FeatureValue] = {"label": _floats(np.nan if row.label is None else row.label)}
    for name, label in row.labels:
        if isinstance(label, str):
            features[label_feature(name)] = label.encode()
        else:
            number = np.array([label], np.int64) if isinstance(label, int) else _floats(label)
            features[label_feature(name)] = number
    return features


def _floats(*values: float) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # the index keeps the numbers in full
        return np.array(values, np.float64).astype(np.float32)


def encode_volume(volume: Volume) -> ExamplePieces:
    """The record of one rescaled volume, whose voxels are not copied.

    Args:
        volume: volume whose voxels are measured, and are as they will be stored.

    Raises:
        VolumeError: as `encode_example`.
    """
    row, intensities = volume.row, volume.intensities
    features: dict[str, FeatureValue] = {
        "id": row.example_id.encode(),
        "affine": _floats(*volume.affine.ravel()),
        "zooms": _floats(*volume.zooms),
        "intensity_min": _floats(*(i.min for i in intensities)),
        "intensity_max": _floats(*(i.max for i in intensities)),
        **label_values(row),
    }
    if not volume.scaling.is_identity:
        features["scl_slope"] = struct.pack("<d", volume.scaling.slope)
        features["scl_inter"] = struct.pack("<d", volume.scaling.inter)
    if volume.rescale_ranges:
        doubles = struct.Struct(f"<{len(volume.rescale_ranges)}d")
        features["rescale_low"] = doubles.pack(*(e.low for e in volume.rescale_ranges))
        features["rescale_high"] = doubles.pack(*(e.high for e in volume.rescale_ranges))
    arrays = {"image_raw": volume.voxels, MASK_FEATURE: volume.mask, TARGET_FEATURE: volume.target}
    features |= {name: encode_tensor(array) for name, array in arrays.items() if array is not None}
    try:
        pieces = _pieces(features)
        require_readable(sum(map(len, pieces)), arrays.values())
    except VolumeError as e:
        raise VolumeError(f"{row.path}: {e}") from e
    tensors, offset = list[tuple[int, tuple[int, ...], int]](), 0
    contents = {id(features[name][1]): array for name, array in arrays.items() if array is not None}
    for piece in pieces:
        if (array := contents.get(id(piece))) is not None:
            tensors.append((offset, array.shape, array.itemsize))
        offset += len(piece)
    return ExamplePieces(tuple(pieces), tuple(tensors))


def decode_doubles(feature: Feature) -> list[float]:
    """The float64 values in a feature of bytes, such as `rescale_low`; at least one.

    Raises:
        ShardError: it has none.
    """
    if not isinstance(feature, memoryview) or not feature or len(feature) % 8:
        raise ShardError("a feature that should hold float64 does not")
    numbers: list[float] = np.frombuffer(feature, "<f8").tolist()
    return numbers


def scaling_of(features: Features) -> Scaling:
    """The scaling that a record has for native voxels; `NO_SCALING` if it has none."""
    said = {name.removeprefix("scl_"): features[name] for name in SCALING_FEATURES if name in features}
    return Scaling(**{name: decode_doubles(feature)[0] for name, feature in said.items()})


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift >= _VARINT_BITS:
            raise ShardError("not an Example: a number of more than 64 bits")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message, each with its tag: the number of the field, and its wire type."""
    at = count = 0
    while at < len(data):
        count += 1
        if count > _MOST_FIELDS:
            raise ShardError(f"not an Example: a message of more than {_MOST_FIELDS} fields")
        tag, at = (data[at], at + 1) if data[at] < 0x80 else _read_varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _read_varint(data, at)
            yield tag, value
            continue
        if wire != _LENGTH_DELIMITED:
            raise ShardError(f"not an Example: wire type {wire}")
        size, at = (data[at], at + 1) if data[at] < 0x80 else _read_varint(data, at)
        if at + size > len(data):
            raise ShardError("not an Example: a field reaches past the end")
        yield tag, data[at : at + size]
        at += size


def _messages(data: memoryview, tag: int) -> Iterator[memoryview]:
    """The values of a message that has fields of one tag only."""
    for found, value in _fields(data):
        if found != tag or isinstance(value, int):
            raise ShardError(f"not an Example: field {found >> 3} instead of field {tag >> 3}")
        yield value


def _parts(data: memoryview, tags: Collection[int]) -> dict[int, Any]:
    """The fields of a message by their tags.

    A message that has a field twice is refused, because parsers differ in which they use.
    """
    parts: dict[int, Any] = {}
    for tag, value in _fields(data):
        if tag in parts or tag not in tags:
            what = "occurs twice" if tag in parts else "is unknown"
            raise ShardError(f"not an Example: field {tag >> 3} of a message {what}")
        parts[tag] = value
    return parts


def _decode_feature(data: memoryview) -> Feature:
    kinds = _parts(data, (_BYTES, _FLOATS, _INTEGERS))
    if len(kinds) != 1:
        raise ShardError(f"holds {len(kinds)} kinds of values instead of 1")
    [(kind, content)] = kinds.items()
    if kind == _BYTES:
        items = list(_messages(content, _FIRST))
        if len(items) != 1:
            raise ShardError(f"holds {len(items)} values of bytes instead of 1")
        return items[0]
    packed = _parts(content, (_FIRST,)).get(_FIRST, memoryview(b""))
    if kind == _FLOATS:
        return np.frombuffer(bytes(packed), "<f4")
    return np.array(list(_integers(packed)), np.uint64).astype(np.int64)


def _integers(packed: memoryview) -> Iterator[int]:
    if len(packed) > 2 * _MOST_FIELDS:
        raise ShardError(f"not an Example: a list of integers of {len(packed)} bytes")
    at = 0
    while at < len(packed):
        number, at = _read_varint(packed, at)
        yield number


def decode_example(data: bytes | memoryview) -> dict[str, Feature]:
    """Parse a tf.train.Example whose features each have one bytes value, floats, or integers, without a copy.

    Raises:
        ShardError: the bytes are not such an Example, or other parsers may read them differently.
    """
    features: dict[str, Feature] = {}
    try:
        body = _parts(memoryview(data), (_FIRST,)).get(_FIRST, memoryview(b""))
        for entry in _messages(body, _FIRST):
            parts = _parts(entry, (_FIRST, _SECOND))
            name = bytes(parts[_FIRST]).decode()
            if name in features:
                raise ShardError(f"not an Example: feature {name!r} occurs twice")
            try:
                features[name] = _decode_feature(parts[_SECOND])
            except ShardError as e:
                raise ShardError(f"feature {name!r}: {e}") from e
    except (IndexError, KeyError, OverflowError, UnicodeDecodeError, ValueError, struct.error) as e:
        raise ShardError(f"not an Example: {e}") from e
    return features


def decode_tensor(data: bytes | memoryview) -> npt.NDArray[np.generic]:
    """Parse as `tf.io.parse_tensor`: a read-only array in C order, not a copy.

    Raises:
        ShardError: the bytes are not a TensorProto with contiguous content.
    """
    try:
        parts = _parts(memoryview(data), (_DTYPE, _SECOND, _CONTENT))
        sizes = _messages(parts.get(_SECOND, memoryview(b"")), _SECOND)
        shape = [_parts(size, (_AXIS_SIZE,)).get(_AXIS_SIZE, 0) for size in sizes]
        number = parts[_DTYPE]
        if number not in _DTYPE_OF_ENUM:
            raise ShardError(f"not a tensor of {', '.join(TENSOR_DTYPES)}")
        dtype = numpy_dtype(_DTYPE_OF_ENUM[number]).newbyteorder("<")
        return np.frombuffer(parts.get(_CONTENT, b""), dtype).reshape(shape)
    except (IndexError, KeyError, OverflowError, TypeError, ValueError) as e:
        raise ShardError(f"not a tensor: {e}") from e
