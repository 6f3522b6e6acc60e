"""Shards, their names and the order of rows, against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.config import SPLIT_PATTERN, RecordConfig, Sharding
from beam_nifti.pipeline.plan import default_sharding, record_bytes
from beam_nifti.record.sharding import ShardName, count_shards, order_rows, shard_ranges

SPLITS = st.from_regex(SPLIT_PATTERN, fullmatch=True)
NAMES = st.builds(
    ShardName,
    split=SPLITS,
    index=st.integers(0, 10**7),
    total=st.integers(0, 10**7),
    compressed=st.booleans(),
    revision=st.integers(0, 10**4),
)


@given(NAMES)
def test_a_name_parses_back_to_itself(name: ShardName) -> None:
    assert ShardName.parse(str(name)) == name
    assert ShardName.parse(f"{name.stem}.tfrecord") == ShardName(
        name.split, name.index, name.total, False, name.revision
    )


@given(NAMES, NAMES)
def test_different_shards_have_different_names_and_indexes(a: ShardName, b: ShardName) -> None:
    assert (str(a) == str(b)) == (a == b)
    assert (a.index_file == b.index_file) == (a.stem == b.stem)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "train.tfrecord.gz",
        "train-0-of-1.tfrecord.gz",
        "train-00000-of-00001.tfrecord.gz.tmp",
        "train-00000-of-00001.tfrecord.bz2",
        "-00000-of-00001.tfrecord",
        "a/train-00000-of-00001.tfrecord",
        "train-00000-of-00001.tfrecord\n",
        "train-00000-of-00001-r.tfrecord",
        "train--0001-of-00001.tfrecord",
    ],
)
def test_other_names_are_no_shards(text: str) -> None:
    assert ShardName.parse(text) is None


@given(st.text(max_size=40))
def test_any_text_parses_to_its_own_name_or_to_none(text: str) -> None:
    name = ShardName.parse(text)
    assert name is None or ShardName.parse(str(name)) == name


@given(num_rows=st.integers(0, 300), size=st.integers(1, 320))
def test_examples_per_shard_cuts_like_counting(num_rows: int, size: int) -> None:
    shards: list[list[int]] = []
    for position in range(num_rows):
        if not shards or len(shards[-1]) == size:
            shards.append([])
        shards[-1].append(position)
    assert [list(r) for r in shard_ranges(num_rows, Sharding(examples_per_shard=size))] == shards


@given(num_rows=st.integers(0, 300), total=st.integers(1, 320))
def test_num_shards_cuts_evenly(num_rows: int, total: int) -> None:
    ranges = shard_ranges(num_rows, Sharding(num_shards=total))
    assert [p for r in ranges for p in r] == list(range(num_rows))
    assert len(ranges) == min(total, num_rows)
    sizes = {len(r) for r in ranges}
    assert not sizes or (min(sizes) >= 1 and max(sizes) - min(sizes) <= 1)


def test_appended_rows_leave_full_shards_alone() -> None:
    before = shard_ranges(25, Sharding(examples_per_shard=10))
    after = shard_ranges(47, Sharding(examples_per_shard=10))
    assert after[:2] == before[:2]


IDS = st.lists(st.text(max_size=8), unique=True, max_size=40)


@given(ids=IDS, seed=st.none() | st.integers(), permutation=st.randoms(use_true_random=False))
def test_a_seeded_order_does_not_depend_on_where_rows_stand(
    ids: list[str], seed: int | None, permutation: object
) -> None:
    order = order_rows(ids, seed)
    assert sorted(order) == list(range(len(ids)))
    if seed is None:
        assert order == list(range(len(ids)))
        return
    moved = list(ids)
    permutation.shuffle(moved)  # type: ignore[attr-defined]
    assert [moved[i] for i in order_rows(moved, seed)] == [ids[i] for i in order]


def test_seeds_give_orders_of_their_own() -> None:
    ids = [f"sub-{i:03d}" for i in range(100)]
    orders = {tuple(order_rows(ids, seed)) for seed in range(-10, 40)}
    assert len(orders) == 50


def test_a_seeded_order_is_the_same_on_every_machine() -> None:
    ids = [f"sub-{i}" for i in range(8)]
    assert order_rows(ids, 42) == [0, 3, 6, 2, 7, 1, 5, 4]


def test_a_seed_may_have_any_number_of_digits() -> None:
    assert sorted(order_rows(["a", "b"], 10**100)) == [0, 1]


def test_a_record_of_a_smaller_dtype_is_expected_to_be_smaller() -> None:
    def expected(dtype: str, itemsize: int, compression: str = "gzip") -> float:
        return record_bytes(1_000_000, itemsize, RecordConfig(voxel_dtype=dtype, compression=compression))

    for itemsize in (1, 2, 4, 8):
        packed = [expected(dtype, itemsize) for dtype in ("uint8", "bfloat16", "float16", "float32")]
        assert packed == sorted(packed)
        plain = [expected(d, itemsize, "none") for d in ("uint8", "bfloat16", "float16", "float32", "native")]
        assert [round(n / 1e6) for n in plain] == [1, 2, 2, 4, itemsize]
        assert all(p <= n for p, n in zip(packed, plain, strict=False))
    # As it was before there were other dtypes.
    assert expected("float32", 2) == pytest.approx(1_440_400)
    assert expected("native", 1) == pytest.approx(800_400)
    assert default_sharding(91 * 109 * 91, 2, RecordConfig()).examples_per_shard == 155


def test_the_longest_name_fits_a_file_system() -> None:
    """With what a temporary file has at its end."""
    assert SPLIT_PATTERN.fullmatch("s" * 128)
    assert not SPLIT_PATTERN.fullmatch("s" * 129)
    name = ShardName("s" * 128, 10**9 - 1, 10**9 - 1, True, 10**9 - 1)
    assert len(f"{name}.{'0' * 32}.tmp") <= 255
    assert ShardName.parse(str(name)) == name


@pytest.mark.parametrize("name", ["train-٠٠٠٠٠-of-٠٠٠٠١.tfrecord", f"train-{'0' * 5000}-of-00001.tfrecord"])
def test_digits_are_few_and_of_ascii(name: str) -> None:
    assert ShardName.parse(name) is None


@pytest.mark.parametrize("sharding", [Sharding(1), Sharding(3), Sharding(10), Sharding(num_shards=4)])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 7])
def test_shards_are_counted_as_they_are_cut(sharding: Sharding, num_frames: int) -> None:
    for num_rows in range(25):
        cut = shard_ranges(num_rows, sharding, num_frames)
        assert count_shards(num_rows, sharding, num_frames) == len(cut)
