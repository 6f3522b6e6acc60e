"""Splits: those of the table, or drawn by a keyed hash, the same on every machine."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_nifti.config import SPLIT_PATTERN, Splitting
from beam_nifti.manifest.image_names import HALF
from beam_nifti.manifest.lookalikes import LIKENESS, find_lookalikes, fold
from beam_nifti.manifest.tables import BATCH_ROWS, Problems, strings
from beam_nifti.storage import paths as storage

_Rows = npt.NDArray[np.intp]

DEFAULT_SPLIT: Final = "train"

_POINTS: Final = 1 << 64  # every participant has a point below it, and a split takes its share of them
_GOLDEN_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
"""_POINTS divided by the golden ratio. The multiples of it, modulo _POINTS, are spread evenly however far one
counts, and keep in step with nothing that repeats in a manifest. Source: Knuth, The Art of Computer
Programming, volume 3, section 6.4."""


def read_splits(table: pa.Table, people: pa.Array | None, problems: Problems) -> pa.Array:
    """The splits of a manifest; DEFAULT_SPLIT if it has none.

    `people` has the names of the participants, if any.
    """
    if "split" not in table.column_names:
        return pa.array([DEFAULT_SPLIT]).take(pa.array(np.zeros(table.num_rows, np.int64)))
    splits = table["split"].combine_chunks()
    bad = {s for s in pc.unique(splits).to_pylist() if not SPLIT_PATTERN.fullmatch(s)}
    for i, text in enumerate(splits.to_pylist() if bad else ()):
        if text in bad:
            problems.add(
                f"row {i + 1}: split is {problems.shown(text)}; use up to 128 letters, digits, '_' and '.', "
                "a letter or digit first, such as train"
            )
    for i, other in find_lookalikes(splits):
        problems.add(
            f"row {i + 1}: split is {problems.shown(splits[i].as_py())}, and "
            f"{problems.shown(splits[other].as_py())} in row {other + 1}; give them one spelling"
        )
    if people is not None:
        shown = table["participant_id"].combine_chunks()
        for i, first in zip(*_find_disagreements(fold(people), splits), strict=True):
            elsewhere = f"in row {first + 1}"
            if people[i].as_py() != people[first].as_py():
                elsewhere = f"{shown[first]} {elsewhere}, probably the same participant, is"
            problems.add(
                f"row {i + 1}: participant {shown[i]} is in split {problems.plain(splits[i])}, and "
                f"{elsewhere} in {problems.plain(splits[first])}; give all rows of a participant one split; "
                "if participant_id does not identify persons, rename that column"
            )
    return splits


def draw_from_table(table: pa.Table, ids: pa.Array, splitting: Splitting, problems: Problems) -> pa.Array:
    """Draw the split of every row of a manifest by participant, or by id.

    Skipped rows are drawn too, so that no split changes when their labels are filled in.
    """
    names = sorted(splitting.shares)
    for at, other in find_lookalikes(pa.array(names, pa.string())):
        problems.add(f"--split names {names[other]!r} and {names[at]!r}, which differ {LIKENESS}; rename one")
    participants, categories = ids, None
    if "participant_id" in table.column_names:
        participants = table["participant_id"].combine_chunks()
        nobody = pc.equal(participants, "").to_numpy(zero_copy_only=False)
        for i in np.flatnonzero(nobody):
            why = problems.offer("--split", "--split requires one in every row", "fill it in")
            problems.add(f"row {i + 1}: empty participant_id; {why}")
    if splitting.stratify is not None:
        categories = table[splitting.stratify].combine_chunks()
        for i, first in zip(*_find_disagreements(participants, categories), strict=True):
            problems.add(
                f"row {i + 1}: participant {participants[i]} has {splitting.stratify} "
                f"{problems.shown(categories[i].as_py())} here and "
                f"{problems.shown(categories[first].as_py())} in row {first + 1}; "
                + problems.offer("--stratify", "--stratify requires one value per participant", "correct one")
            )
    return draw_splits(participants, splitting, categories).cast(pa.string())


def refuse_empty_splits(splits: pa.Array, splitting: Splitting, problems: Problems) -> None:
    """Refuse a draw that leaves a split without a row."""
    for name in sorted(splitting.shares.keys() - set(pc.unique(splits).to_pylist())):
        remedy = "give it a larger share, or draw again with another --split-seed"
        instead = "the draw is that of the dataset: keep its participants, or build another dataset"
        problems.add(
            f"no participant falls into split {name} with a share of {splitting.shares[name]:g}; "
            + problems.offer("--split-seed", remedy, instead)
        )


def draw_splits(
    participants: pa.Array, splitting: Splitting, categories: pa.Array | None = None
) -> pa.DictionaryArray:
    """Draw a split for every row; docs/manifest.md specifies the draw.

    Rows of one participant get one split. With categories, one text per participant, the shares hold within
    each category; without, every participant is drawn independently.
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


def _find_disagreements(participants: pa.Array, values: pa.Array) -> tuple[_Rows, _Rows]:
    """Rows, ascending, with another value than the first row of their participant, and those first rows."""
    people = participants.dictionary_encode()
    of_row = people.indices.to_numpy()
    first = _first_rows(of_row)[of_row]
    held = values.dictionary_encode().indices.to_numpy()
    nobody = people.dictionary.index("").as_py()  # "" is nobody
    rows = np.flatnonzero((held != held[first]) & (of_row != nobody))
    return rows, first[rows]


def refuse_shared_images(
    paths: Mapping[str, pa.ChunkedArray], shown: pa.Table, splits: pa.Array, problems: Problems
) -> None:
    """Refuse images whose paths, by column, are in several splits. Links are not followed."""
    if len(pc.unique(splits.drop_null())) < 2:
        return
    # Paths of one image end alike: few are left of which the whole counts.
    encoded = pa.chunked_array(
        pc.replace_substring_regex(batch.column(0), r"(?s:^.*/)|(?i:\.(hdr|img))", "").dictionary_encode()
        for column in paths.values()
        for batch in pa.table([column], ["path"]).to_batches(max_chunksize=BATCH_ROWS)
    )
    ends = encoded.unify_dictionaries().combine_chunks()
    held = pa.concat_arrays([splits] * len(paths))
    rows = np.flatnonzero(held.is_valid().to_numpy(zero_copy_only=False))
    numbers = held.drop_null().dictionary_encode().indices.to_numpy()
    codes = ends.indices.to_numpy()[rows]
    lowest, highest = np.full(len(ends.dictionary), len(numbers)), np.full(len(ends.dictionary), -1)
    np.minimum.at(lowest, codes, numbers)
    np.maximum.at(highest, codes, numbers)
    rows = rows[(lowest < highest)[codes]]
    files = pa.chunked_array([chunk for column in paths.values() for chunk in column.chunks], pa.string())
    folder = storage.absolute(storage.dirname(problems.path) or ".")
    keys = [_image_key(folder, path) for path in files.take(pa.array(rows)).to_pylist()]
    again, first = _find_disagreements(pa.array(keys, pa.string()), held.take(pa.array(rows)))
    names = list(paths)
    for i, other in zip(rows[again].tolist(), rows[first].tolist(), strict=True):
        column, row = divmod(i, len(splits))
        before = other % len(splits)
        problems.add(
            f"row {row + 1}: image {shown[names[column]][row]} is in split {problems.plain(splits[row])} "
            f"and, in row {before + 1}, in {problems.plain(splits[before])}; keep one of the rows, or give "
            "both one split"
        )


def _image_key(folder: str, path: str) -> str:
    """A text that is equal for all paths of one image, and for both files of a pair."""
    path = storage.join(folder, path)
    if match := HALF.fullmatch(path):
        path = f"{match['stem']}img{match['compressed']}"
    return path if storage.is_remote(path) else os.path.normpath(path)


def _first_rows(of_row: npt.NDArray[Any]) -> _Rows:
    """The row at which each participant appears first; they are numbered in that order."""
    return np.unique(of_row, return_index=True)[1]


def _hash_points(names: pa.Array, seed: int) -> npt.NDArray[np.uint64]:
    key = hashlib.sha256(f"split {seed}".encode()).digest()
    points = (
        int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, key=key).digest())
        for name in strings(names)
    )
    return np.fromiter(points, np.uint64, len(names))


def _spread_points(categories: pa.Array, seed: int) -> npt.NDArray[np.uint64]:
    """Points that are spread evenly within each category, starting at its hash."""
    encoded = categories.dictionary_encode()
    codes = encoded.indices.to_numpy()
    sizes = np.bincount(codes)
    order = np.argsort(codes, kind="stable")
    ranks = np.empty(len(codes), np.uint64)
    ranks[order] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    origins = _hash_points(encoded.dictionary, seed)
    points: npt.NDArray[np.uint64] = origins[codes] + ranks * _GOLDEN_STEP  # overflows, as it should
    return points
