"""Which split a participant goes to: drawn by a keyed hash, so that it is the same on every machine."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import Splitting
from beam_nifti.manifest.image_names import HALF
from beam_nifti.storage import paths as storage

_POINTS: Final = 1 << 64
"""Every participant has a point below it, and a split takes its share of them."""

_GOLDEN_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
"""_POINTS divided by the golden ratio. The multiples of it, modulo _POINTS, are spread evenly however far one
counts, and keep in step with nothing that repeats in a manifest. Source: Knuth, The Art of Computer
Programming, volume 3, section 6.4."""

_BATCH: Final = 1 << 14
"""Names that are Python strings at a time."""


def draw_splits(
    participants: pa.Array, splitting: Splitting, categories: pa.Array | None = None
) -> pa.DictionaryArray:
    """Draw a split for every row; docs/manifest.md says which.

    Args:
        participants: a name a row; rows of one name get one split.
        splitting: names and shares of the splits, and the seed.
        categories: a text a row, the same for all rows of a participant; the shares are then held within
            each of them. None draws every participant on its own.
    """
    people = participants.dictionary_encode()
    of_row = people.indices.to_numpy()
    if categories is None:
        points = _hash_points(people.dictionary, splitting.seed)
    else:
        points = _spread_points(categories.take(pa.array(_first_rows(of_row))), splitting.seed)
    names = sorted(splitting.shares)
    ends = list(itertools.accumulate(splitting.shares[name] for name in names))[:-1]
    cuts = np.array([min(round(end * _POINTS), _POINTS - 1) for end in ends], np.uint64)
    drawn = np.searchsorted(cuts, points, side="right").astype(np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(drawn[of_row]), pa.array(names, pa.string()))


def find_disagreements(
    participants: pa.Array, values: pa.Array
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Find rows with another value than the first row of their participant; "" is nobody.

    Returns:
        Indices of the rows, ascending, and of the first rows of their participants.
    """
    people = participants.dictionary_encode()
    of_row = people.indices.to_numpy()
    first = _first_rows(of_row)[of_row]
    held = values.dictionary_encode().indices.to_numpy()
    nobody = people.dictionary.index("").as_py()
    rows = np.flatnonzero((held != held[first]) & (of_row != nobody))
    return rows, first[rows]


def find_shared_images(
    columns: Sequence[pa.ChunkedArray], splits: pa.Array, folder: str
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Find images that are in another split, too. Links are not followed.

    Args:
        columns: paths of images.
        splits: of each row; null for no split.
        folder: that relative paths start from.

    Returns:
        Column and row of each such image, and those at which it comes first.
    """
    if len(pc.unique(splits.drop_null())) < 2:
        return []
    # Paths of one image end alike: few are left of which the whole counts.
    encoded = pa.chunked_array(
        pc.replace_substring_regex(batch.column(0), r"(?s:^.*/)|(?i:\.(hdr|img))", "").dictionary_encode()
        for column in columns
        for batch in pa.table([column], ["path"]).to_batches(max_chunksize=_BATCH)
    )
    ends = encoded.unify_dictionaries().combine_chunks()
    held = pa.concat_arrays([splits] * len(columns))
    rows = np.flatnonzero(held.is_valid().to_numpy(zero_copy_only=False))
    numbers = held.drop_null().dictionary_encode().indices.to_numpy()
    codes = ends.indices.to_numpy()[rows]
    lowest, highest = np.full(len(ends.dictionary), len(numbers)), np.full(len(ends.dictionary), -1)
    np.minimum.at(lowest, codes, numbers)
    np.maximum.at(highest, codes, numbers)
    rows = rows[(lowest < highest)[codes]]
    paths = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
    keys = [_image_key(folder, path) for path in paths.take(pa.array(rows)).to_pylist()]
    again, first = find_disagreements(pa.array(keys, pa.string()), held.take(pa.array(rows)))
    places = [(int(i) // len(splits), int(i) % len(splits)) for i in rows]
    return [(places[i], places[j]) for i, j in zip(again, first, strict=True)]


def _image_key(folder: str, path: str) -> str:
    """What is equal for paths of one image; of a pair, for those of both files."""
    path = storage.join(folder, path)
    if match := HALF.fullmatch(path):
        path = f"{match['stem']}img{match['packed']}"
    return path if storage.is_remote(path) else os.path.normpath(path)


def _first_rows(of_row: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """The row at which each participant appears first; they are numbered in that order."""
    return np.unique(of_row, return_index=True)[1]


def _hash_points(names: pa.Array, seed: int) -> npt.NDArray[np.uint64]:
    key = hashlib.sha256(f"split {seed}".encode()).digest()
    points = (
        int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, key=key).digest())
        for start in range(0, len(names), _BATCH)
        for name in names.slice(start, _BATCH).to_pylist()
    )
    return np.fromiter(points, np.uint64, len(names))


def _spread_points(categories: pa.Array, seed: int) -> npt.NDArray[np.uint64]:
    """Points that are spread evenly within each category, from an origin that is its hash.

    Args:
        categories: of each participant, in the order in which they appear.
        seed: of the hash.
    """
    encoded = categories.dictionary_encode()
    codes = encoded.indices.to_numpy()
    sizes = np.bincount(codes)
    order = np.argsort(codes, kind="stable")
    ranks = np.empty(len(codes), np.uint64)
    ranks[order] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    origins = _hash_points(encoded.dictionary, seed)
    points: npt.NDArray[np.uint64] = origins[codes] + ranks * _GOLDEN_STEP  # overflows, as it should
    return points
