"""Records drawn by weight: as often as expected, the same everywhere, and in another epoch others."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import beam_nifti as bn
from beam_nifti.errors import UsageError
from beam_nifti.read.drawing import Drawing, Weighed
from tests.images import brain, write_image, write_manifest

SEXES = "FFFFFFFFFMMU"
COUNT = len(SEXES)
PINNED = [3, 4, 0, 5, 1, 0, 3, 1, 2, 2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of two frequent values and a rare one, with weights; the last one has no weight."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = []
    for n, sex in enumerate(SEXES):
        write_image(folder / f"{n}.nii", brain((5, 4, 3), seed=n))
        weight = "n/a" if n == COUNT - 1 else (0, 1, "2.5e0")[n % 3]
        rows.append({"participant_id": f"s{n:02d}", "path": f"{n}.nii", "sex": sex, "w": weight, "label": n})
    bn.build(write_manifest(folder / "m.csv", rows), folder / "out", num_shards=2, progress=False)
    return folder / "out"


WEIGHTS = st.lists(
    st.sampled_from([0.0, 1e-300, 0.1, 1 / 3, 1.0, 7.0, 1e300]), min_size=1, max_size=40
).filter(any)
SEEDS = st.integers(0, 2**64 - 1)


@given(WEIGHTS, SEEDS, st.integers(0, 1000))
def test_each_is_drawn_as_often_as_expected(weights: list[float], seed: int, epoch: int) -> None:
    drawn = Drawing(weights="w").weigh(pa.chunked_array([weights])).draw(seed, epoch)
    counts = np.bincount(drawn, minlength=len(weights))
    expected = len(weights) * np.array(weights) / max(weights) / math.fsum(np.array(weights) / max(weights))
    assert len(drawn) == len(weights)
    assert (np.abs(counts - expected) < 1 + 1e-9).all()
    assert not counts[np.array(weights) == 0].any()


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=60), SEEDS)
def test_values_are_equally_likely(values: list[str], seed: int) -> None:
    drawn = Drawing(balance="sex").weigh(pa.chunked_array([values])).draw(seed, 0)
    counts, names = Counter(values[n] for n in drawn), sorted(set(values))
    assert all(abs(counts[name] - len(values) / len(names)) < 1 + 1e-9 for name in names)
    of_record = np.bincount(drawn, minlength=len(values))
    for name in names:
        of_class = of_record[np.array(values) == name]
        assert of_class.max() - of_class.min() <= 2


def test_another_epoch_draws_others_and_none_is_preferred() -> None:
    weighed = Weighed(np.zeros(10, np.int64), np.repeat([1.0, 0.25], 5))
    draws = [np.bincount(weighed.draw(1, epoch), minlength=10) for epoch in range(400)]
    assert len({tuple(counts) for counts in draws}) > 50
    mean: npt.NDArray[np.float64] = np.mean(draws, 0)
    assert np.allclose(mean, np.repeat([1.6, 0.4], 5), atol=0.1)
    assert np.array_equal(weighed.draw(1, 7), weighed.draw(1, 7))
    # The same numbers on every machine, in every version.
    assert weighed.draw(3, 2).tolist() == PINNED


def test_records_are_drawn(dataset: Path) -> None:
    records = bn.Dataset(dataset, columns=["id", "image"], channels_first=True)
    drawn = records.draw(balance="sex", seed=5, epoch=1)
    assert Counter(SEXES[int(i[1:])] for i in drawn.ids) == {"F": 4, "M": 4, "U": 4}
    assert drawn.ids != records.draw(balance="sex", seed=5).ids != records.draw(balance="sex", seed=6).ids
    assert pickle.loads(pickle.dumps(drawn)).ids == drawn.ids
    for name, record in zip(drawn.ids, drawn, strict=True):
        assert record["id"] == name
        assert np.array_equal(record["image"], records.by_id(name)["image"])
    known = bn.Dataset(dataset, where="w >= 0")
    counts = Counter(known.draw(weights="w", seed=1).ids)
    for n in range(COUNT - 1):
        assert abs(counts[f"s{n:02d}"] - 11 * (0, 1, 2.5)[n % 3] / 11.5) < 1
    assert set(bn.Dataset(dataset, where="label < 3").draw(weights="label", seed=0).ids) == {"s01", "s02"}


def test_what_cannot_be_drawn_is_refused(dataset: Path) -> None:
    records = bn.Dataset(dataset)
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "balance and weights are missing; give one of them"),
        ({"balance": "sex", "weights": "w"}, "are two ways to draw records; drop one of them"),
        ({"balance": ["sex"]}, "give the name of a column of the index"),
        ({"balance": "age"}, "the index has no column 'age'"),
        ({"balance": "shape"}, "a column of lists"),
        ({"weights": "sex"}, "weights is 'sex', which has the value 'F'; give finite numbers of at least 0"),
        ({"weights": "w"}, "weights is 'w', which 1 of 12 records do not have; select the others by where"),
        ({"balance": "sex", "seed": -1}, "seed is -1; it must be at least 0"),
        ({"balance": "sex", "epoch": 0.5}, "epoch is 0.5; give a whole number"),
    ]
    for options, message in refused:
        with pytest.raises(UsageError, match=message):
            records.draw(**{"seed": 1, **options})
    with pytest.raises(UsageError, match="weights is 'label', which is 0 in all records"):
        records[:1].draw(weights="label", seed=1)
    with pytest.raises(UsageError, match="there are no records to draw; select others"):
        records[:0].draw(balance="sex", seed=1)


def test_names_of_records_are_answered_with_those_of_the_index(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii")
    manifest = write_manifest(tmp_path / "m.tsv", [{"path": "a.nii", "sex": "F", "row": "x"}])
    bn.build(manifest, tmp_path / "out", label_column="sex:class,row:class", progress=False)
    records = bn.Dataset(tmp_path / "out")
    for name, meant in (("id", "example_id"), ("label/sex", "sex"), ("label/row", "manifest_row")):
        with pytest.raises(UsageError, match=f"no column '{name}'; its name there is '{meant}'"):
            records.index([name])
        assert records.index([meant]).num_rows == 1
    assert records.draw(balance="sex", seed=1).ids == ["a.nii"]


@pytest.mark.tf
def test_tensorflow_draws_the_same_and_continues(dataset: Path) -> None:
    from beam_nifti.reader import load_dataset, state_after

    options: dict[str, Any] = {
        "balance": "sex",
        "shuffle": True,
        "seed": 5,
        "as_dict": True,
        "columns": ["id", "label"],
    }

    def ids(**more: Any) -> list[bytes]:
        return [i for e in load_dataset(dataset, **options, **more) for i in np.atleast_1d(e["id"].numpy())]

    whole = ids(repeat=3, batch_size=5)
    records = bn.Dataset(dataset)
    for epoch in range(3):
        drawn = records.draw(balance="sex", seed=5, epoch=epoch).ids
        assert Counter(i.decode() for i in whole[epoch * COUNT : (epoch + 1) * COUNT]) == Counter(drawn)
    run = {name: options[name] for name in ("balance", "shuffle", "seed")}
    state = state_after(4, dataset, batch_size=5, **run)
    assert (state["balance"], state["weights"]) == ("sex", None)
    assert ids(repeat=3, batch_size=5, start_state=state) == whole[COUNT + 5 :]
    with pytest.raises(UsageError, match="start_state is of a run with balance 'sex', but this one has None"):
        load_dataset(dataset, batch_size=5, shuffle=True, seed=5, start_state=state, repeat=3)
    hosts = [ids(shard=(host, 2)) for host in range(2)]
    assert Counter(hosts[0] + hosts[1]) == Counter(whole[:COUNT])
    plain = {n: v for n, v in state_after(1, dataset).items() if n not in ("balance", "weights")}
    assert (
        len(list(load_dataset(dataset, start_state=plain, repeat=1))) == COUNT - 1
    )  # as an earlier version wrote it


@pytest.mark.tf
def test_patches_of_drawn_records_differ_each_time(dataset: Path) -> None:
    from beam_nifti.reader import load_dataset

    records = bn.Dataset(dataset, columns=["id", "image", "affine"])
    patches = bn.Patches((2, 2, 2), per_volume=2)
    expected = bn.PatchDataset(records.draw(balance="sex", seed=5), patches, seed=5)
    read = load_dataset(
        dataset, shuffle=True, seed=5, balance="sex", patches=patches, as_dict=True, columns=["id", "affine"]
    )
    found = Counter((e["id"].numpy().decode(), e["affine"].numpy().tobytes()) for e in read)
    assert found == Counter((e["id"], e["affine"].tobytes()) for e in expected)
    assert Counter(SEXES[int(name[1:])] for name, _ in found.elements()) == {"F": 8, "M": 8, "U": 8}
    assert len({affine for name, affine in found if name == "s11"}) > 3  # the only one with U


@pytest.mark.tf
def test_a_draw_without_a_shuffle_or_an_index_is_refused(dataset: Path) -> None:
    from beam_nifti.reader import load_dataset, state_after

    with pytest.raises(UsageError, match="balance is 'sex', which draws at random; add shuffle=True"):
        load_dataset(dataset, balance="sex")
    with pytest.raises(
        UsageError, match="state_after requires an order that is known beforehand; give a seed"
    ):
        state_after(1, dataset, weights="label", shuffle=True)
    with pytest.raises(UsageError, match="weights requires the index, but engine is 'sequential'"):
        load_dataset(dataset, weights="label", shuffle=True, engine="sequential")
    with pytest.raises(
        UsageError, match=r"balance requires a dataset_info\.json, but layout='plain' has none"
    ):
        load_dataset("*.gz", balance="sex", shuffle=True, layout="plain")
