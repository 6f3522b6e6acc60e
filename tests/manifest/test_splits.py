"""Splits: nobody is in two, nobody moves when others come, and the shares hold."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_nifti.cli import main as cli
from beam_nifti.config import Columns, Splitting
from beam_nifti.errors import ManifestError, OutputError, UsageError
from beam_nifti.inspection.description import describe_dataset, format_description
from beam_nifti.inspection.verify import verify_dataset
from beam_nifti.manifest import read_manifest
from beam_nifti.manifest.splits import draw_splits
from beam_nifti.record.dataset_info import read_info
from tests.build_helpers import build
from tests.images import brain, write_image, write_manifest

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
PEOPLE = st.lists(st.sampled_from([f"sub-{i:02d}" for i in range(30)]), min_size=1, max_size=60)
SPLITTINGS = st.builds(
    Splitting,
    shares=st.sampled_from([SHARES, {"train": 0.5, "test": 0.5}, {"a": 0.25, "b": 0.7, "c": 0.05}]),
    seed=st.integers(-3, 3),
)


def draw(people: Sequence[str], splitting: Splitting, categories: Sequence[str] | None = None) -> list[str]:
    within = None if categories is None else pa.array(categories)
    return list(draw_splits(pa.array(people), splitting, within).to_pylist())


def point_of(text: str, seed: int) -> int:
    key = hashlib.sha256(f"split {seed}".encode()).digest()
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "big")


def split_at(point: int, shares: dict[str, float]) -> str:
    """What docs/manifest.md says, one participant at a time."""
    end = 0.0
    for name in sorted(shares):
        end += shares[name]
        if point < round(end * 2**64):
            return name
    return name


def category_of(person: str) -> str:
    return f"site-{int(person[4:]) % 3}"


@given(PEOPLE, SPLITTINGS)
def test_a_participant_goes_where_its_hash_says_whoever_else_is_there(
    people: list[str], splitting: Splitting
) -> None:
    shares = dict(splitting.shares)
    expected = [split_at(point_of(person, splitting.seed), shares) for person in people]
    assert draw(people, splitting) == expected


@given(PEOPLE, SPLITTINGS)
def test_the_participants_of_a_category_go_where_the_multiples_of_the_golden_ratio_are(
    people: list[str], splitting: Splitting
) -> None:
    expected, ranks = dict[str, str](), Counter[str]()
    for person in people:
        category = category_of(person)
        if person not in expected:
            step = ranks[category] * 0x9E3779B97F4A7C15
            point = (point_of(category, splitting.seed) + step) % 2**64
            expected[person] = split_at(point, dict(splitting.shares))
            ranks[category] += 1
    assert draw(people, splitting, list(map(category_of, people))) == [expected[p] for p in people]


@given(PEOPLE, PEOPLE, SPLITTINGS, st.booleans())
def test_rows_that_are_appended_move_nobody(
    people: list[str], later: list[str], splitting: Splitting, stratify: bool
) -> None:
    grown = people + later
    categories = list(map(category_of, grown)) if stratify else None
    before = draw(people, splitting, categories and categories[: len(people)])
    after = draw(grown, splitting, categories)
    assert after[: len(people)] == before
    where = dict(zip(grown, after, strict=True))
    assert after == [where[person] for person in grown]


@pytest.mark.parametrize("name", ["sub-{:05d}", "{}", "NDARINV{:08X}"])
def test_shares_are_within_five_standard_deviations(name: str) -> None:
    count = 20_000
    drawn = Counter(draw([name.format(i) for i in range(count)], Splitting(SHARES)))
    for split, share in SHARES.items():
        assert abs(drawn[split] - count * share) < 5 * (count * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("shares", [SHARES, {"a": 0.61, "b": 0.39}, {"a": 0.34, "b": 0.33, "c": 0.33}])
def test_shares_hold_in_every_category_however_many_are_in_it(shares: dict[str, float]) -> None:
    sizes = [1, 2, 5, 10, 50, 200, 1000] * 20
    categories = [f"site-{i}" for i, size in enumerate(sizes) for _ in range(size)]
    people = [f"sub-{i}" for i in range(len(categories))]
    drawn = Counter(zip(categories, draw(people, Splitting(shares), categories), strict=True))
    for i, size in enumerate(sizes):
        for split, share in shares.items():
            off = abs(drawn[f"site-{i}", split] - size * share)
            assert off < (2 if size <= 10 else 4), (size, split)
    small = Counter(split for (category, split) in drawn if sizes[int(category[5:])] == 1)
    assert set(small) == set(shares)  # those that are alone in their category do not all go to one split


def test_a_pattern_in_the_manifest_is_not_that_of_the_splits() -> None:
    people = [f"sub-{i:04d}" for i in range(1000)]
    drawn = draw(people, Splitting({"a": 0.5, "b": 0.5}), ["one site"] * len(people))
    for period in range(2, 12):  # such as patient and control in turn
        for start in range(period):
            found = drawn[start::period]
            assert abs(found.count("a") - len(found) / 2) <= 1 + period / 2


def test_another_seed_is_another_draw_and_the_order_of_shares_is_none() -> None:
    people = [f"sub-{i}" for i in range(100)]
    assert draw(people, Splitting(SHARES, seed=1)) != draw(people, Splitting(SHARES))
    assert draw(people, Splitting(dict(reversed(SHARES.items())))) == draw(people, Splitting(SHARES))


# What is refused


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--split", "train=0.8,test=0.3"], "sum to 1.1; they must sum to 1"),
        (["--split", "train=0.8,test=0.1999"], "must sum to 1"),
        (["--split", "train=1.5,test=-0.5"], "test a share of -0.5; it must be above 0"),
        (["--split", "train=1,test=0"], "test a share of 0.0"),
        (["--split", "train=nan,test=0.5"], "with its share, such as"),
        (["--split", "train=inf"], "sum to inf"),
        (["--split", "train=0.8,train=0.2"], "give each split once"),
        (["--split", "train=most,test=0.2"], "with its share, such as"),
        (["--split", "train,test"], "with its share, such as"),
        (["--split", ""], "--split is empty"),
        (["--split", "my-train=0.8,test=0.2"], "--split names 'my-train'"),
        (["--split", "=1"], "--split names ''"),
        (["--stratify", "site"], "--stratify requires --split"),
        (["--split-seed", "0"], "--split-seed requires --split"),
    ],
)
def test_shares_that_are_none(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", str(tmp_path / "m.tsv"), str(tmp_path / "out"), *flags]) == cli.USAGE
    assert says in capsys.readouterr().err


def test_shares_need_not_be_exact() -> None:
    Splitting({"a": 0.333333, "b": 0.333333, "c": 0.333333})
    with pytest.raises(UsageError, match="sum to"):
        Splitting({"a": 0.3333, "b": 0.3333, "c": 0.3333})


def read(
    folder: Path, columns: str, rows: Sequence[str], splitting: Splitting | None = None, **names: Any
) -> list[str]:
    """The splits of a manifest whose cells are single words."""
    table = [columns.split(), *(row.split(" ") for row in rows)]
    path = folder / "m.tsv"
    path.write_text("\n".join("\t".join([f"{i}.nii", *cells]) for i, cells in enumerate(table)) + "\n")
    path.write_text(path.read_text().replace("0.nii", "path", 1))
    return list(read_manifest(str(path), Columns(**names), splitting).splits.to_pylist())


def problems(*arguments: Any, **names: Any) -> tuple[str, ...]:
    with pytest.raises(ManifestError) as caught:
        read(*arguments, **names)
    return caught.value.problems


def test_a_participant_in_two_splits_is_a_leak(tmp_path: Path) -> None:
    columns = "participant_id session_id split"
    rows = ["sub-1 a train", "sub-2 a test", "sub-1 b test", "sub-2 b test", "sub-1 c train"]
    (problem,) = problems(tmp_path, columns, rows)
    assert problem.startswith("row 3: participant sub-1 is in split test, and in row 1 in train; give all")
    assert "rename that column" in problem
    assert len(read(tmp_path, columns.replace("participant_id", "scanner"), rows)) == 5


def test_many_leaks_are_told_up_to_the_limit(tmp_path: Path) -> None:
    rows = [f"sub-1 {i} {'train' if i == 0 else 'test'}" for i in range(50)]
    found = problems(tmp_path, "participant_id session_id split", rows)
    assert len(found) == 21
    assert found[-1] == "(and more)"


def test_rows_without_a_participant_leak_nothing(tmp_path: Path) -> None:
    rows = ["a  train", "b  test"]
    assert read(tmp_path, "name participant_id split", rows, id="name") == ["train", "test"]


def test_a_manifest_with_splits_is_not_split_again(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "participant_id split", ["sub-1 train"], Splitting({"train": 1}))
    assert "drop --split" in problem


def test_without_participants_every_example_is_drawn_by_its_id(tmp_path: Path) -> None:
    halves = Splitting({"a": 0.5, "b": 0.5})
    assert read(tmp_path, "name", list("pqrstuvw"), halves, id="name") == draw(list("pqrstuvw"), halves)


def test_draws_that_cannot_be_made(tmp_path: Path) -> None:
    halves = Splitting({"a": 0.5, "b": 0.5}, stratify="site")
    (problem,) = problems(tmp_path, "participant_id", ["sub-1"], halves)
    assert problem == "no column 'site'; the columns are: path, participant_id; choose one with --stratify"
    columns = "participant_id session_id site"
    (problem,) = problems(tmp_path, columns, ["sub-1 1 x", "sub-2 1 y", "sub-3 1 x", "sub-1 2 y"], halves)
    assert problem.startswith(
        "row 4: participant sub-1 has site 'y' here and 'x' in row 1; --stratify requires one value per"
    )
    found = problems(tmp_path, "name participant_id", ["a sub-1", "b "], Splitting({"a": 1}), id="name")
    assert [p[:30] for p in found] == ["row 2: empty participant_id; -"]
    (problem,) = problems(tmp_path, "participant_id", ["sub-1"], Splitting({"a": 0.5, "b": 0.5}))
    assert "no participant falls into split" in problem
    assert "another --split-seed" in problem
    for one, other in (("Train", "train"), ("fold1", "fold01")):
        found = problems(tmp_path, "participant_id", ["sub-1"], Splitting({one: 0.5, other: 0.5}))
        assert found[0].startswith(
            f"--split names {min(one, other)!r} and {max(one, other)!r}, which differ only"
        )


# Whole builds


def cohort(folder: Path, count: int) -> Path:
    """Two sessions of every participant, of two sites."""
    rows = [
        {
            "participant_id": f"sub-{i:02d}",
            "session_id": f"ses-{session}",
            "path": f"sub-{i:02d}_ses-{session}.nii",
            "site": "lyon" if i % 3 else "berlin",
        }
        for i in range(count)
        for session in (1, 2)
    ]
    for i, row in enumerate(rows):
        if not (folder / row["path"]).exists():
            write_image(folder / row["path"], brain(seed=i))
    return write_manifest(folder / "manifest.tsv", rows)


def test_a_split_build_is_verified_continued_and_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, output = cohort(tmp_path, 8), tmp_path / "out"
    splitting = Splitting({"train": 0.6, "test": 0.4}, 5, "site")
    build(manifest, output, splitting=splitting)
    info = read_info(str(output))
    assert Splitting(**info.config["splitting"]) == splitting
    sizes = {name: split.num_examples for name, split in info.splits.items()}
    assert sizes == read_manifest(str(manifest), splitting=splitting).split_sizes()
    assert verify_dataset(str(output), manifest=str(manifest)).problems == ()
    said = format_description(describe_dataset(str(output)))
    assert "  drawn       train 0.6, test 0.4, within each site, seed 5" in said.splitlines()
    assert build(manifest, output, splitting=splitting).read == frozenset()
    for other in (None, Splitting({"train": 0.6, "test": 0.4}, 6, "site"), Splitting(splitting.shares, 5)):
        with pytest.raises(OutputError, match=r"--(split|split-seed|stratify) was"):
            build(manifest, output, splitting=other)
    kept = build(cohort(tmp_path, 10), output, splitting=splitting)
    assert kept.summary.num_written == 20
    assert kept.counters["volumes-skipped"] == 16
    flags = ["--split", "train=0.6,test=0.4", "--split-seed=5", "--stratify=site"]
    assert cli.main(["build", str(manifest), str(output), "--dry-run", *flags]) == cli.SUCCESS
    counts = read_manifest(str(manifest), splitting=splitting).split_sizes()
    assert f"(test {counts['test']}, train {counts['train']})" in capsys.readouterr().out
