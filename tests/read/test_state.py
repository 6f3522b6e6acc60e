"""Going on from a state after an interruption."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_nifti.errors import DatasetError, UsageError
from tests.build_helpers import build
from tests.images import write_cohort

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
tf = pytest.importorskip("tensorflow")

from beam_nifti.reader import load_dataset, state_after  # noqa: E402

pytestmark = pytest.mark.tf

COUNT = 23
ORDER: dict[str, Any] = {"batch_size": 4, "shuffle": True, "seed": 1}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    manifest = write_cohort(folder / "cohort", COUNT, shape=(2, 2, 2), split=["train"] * 11 + ["test"])
    build(manifest, folder / "out", num_shards=2)
    return folder / "out"


def rows(elements: Any) -> list[list[int]]:
    """Which records each element has."""
    return [e["row"].numpy().reshape(-1).tolist() for e in elements]


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_rest_is_that_of_the_uninterrupted_run(dataset: Path, data: st.DataObject) -> None:
    num_hosts = data.draw(st.integers(1, 4), "hosts")
    order: dict[str, Any] = {
        "split": data.draw(st.sampled_from(["train", "train+test", "test+train[3:]"]), "split")
        if data.draw(st.booleans(), "whole")
        else f"train[:{data.draw(st.integers(1, 21), 'count')}]",
        "batch_size": data.draw(st.none() | st.integers(1, 9), "batch"),
        "shard": (data.draw(st.integers(0, num_hosts - 1), "host"), num_hosts),
        "where": data.draw(st.sampled_from([None, "label < 15"]), "where"),
    }
    if data.draw(st.booleans(), "shuffle"):
        order |= {"shuffle": True, "seed": data.draw(st.integers(0, 2**64 - 1), "seed")}
    if order["batch_size"]:
        order["drop_remainder"] = data.draw(st.booleans(), "drop")
    options: dict[str, Any] = {"as_dict": True, "columns": ["row"], **order}
    epochs = data.draw(st.integers(1, 3), "epochs")
    whole = rows(load_dataset(dataset, repeat=epochs, **options))
    step = data.draw(st.integers(0, len(whole)), "step")
    state = json.loads(json.dumps(state_after(step, dataset, **order)))
    assert state["steps_per_epoch"] * epochs == len(whole)
    assert rows(load_dataset(dataset, repeat=epochs, start_state=state, **options)) == whole[step:]
    endless = load_dataset(dataset, repeat=True, start_state=state, **options)
    assert rows(endless.take(len(whole) - step)) == whole[step:]


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_iterations_after_a_whole_epoch_are_the_next_epochs(dataset: Path, data: st.DataObject) -> None:
    num_hosts = data.draw(st.integers(1, 3), "hosts")
    order: dict[str, Any] = {
        "batch_size": data.draw(st.integers(1, 9), "batch"),
        "drop_remainder": data.draw(st.booleans(), "drop"),
        "shard": (data.draw(st.integers(0, num_hosts - 1), "host"), num_hosts),
        "seed": 3,
        **data.draw(
            st.sampled_from(
                [
                    {"shuffle": True},
                    {"shuffle": True, "patch": (1, 1, 1)},
                    {"patch": (1, 1, 1)},
                    {"seed": None},
                ]
            ),
            "kind",
        ),
    }
    options: dict[str, Any] = {"as_dict": True, "columns": ["image", "row"], **order}

    def read(elements: Any) -> list[tuple[list[int], bytes]]:
        """Rows and voxels, so that patches count."""
        return [(e["row"].numpy().tolist(), e["image"].numpy().tobytes()) for e in elements]

    uninterrupted = load_dataset(dataset, "test", **options)
    epochs = [read(uninterrupted) for _ in range(3)]
    state = state_after(0, dataset, "test", **order)
    steps = state["steps_per_epoch"]
    done = data.draw(st.integers(0, 2), "done")
    start = data.draw(
        st.sampled_from([{"start": done * steps}, {"start_state": state | {"step": done * steps}}])
    )
    resumed = load_dataset(dataset, "test", **options, **start)
    assert len(resumed) == steps
    assert [read(resumed) for _ in epochs[done:]] == epochs[done:]


def fit(elements: Any) -> list[int]:
    """How many elements Keras takes in each of three epochs."""
    network = tf.keras.Sequential([tf.keras.layers.Flatten(), tf.keras.layers.Dense(1)])
    network.compile("sgd", "mse")
    counts = [0]

    class Count(tf.keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            counts.append(int(network.optimizer.iterations))

    network.fit(elements, epochs=3, verbose=0, shuffle=False, callbacks=[Count()])
    return [after - before for before, after in itertools.pairwise(counts)]


def test_keras_takes_whole_epochs_after_a_state(dataset: Path) -> None:
    """It takes the length of the first epoch for that of all."""
    state = state_after(6, dataset, **ORDER)
    assert fit(load_dataset(dataset, start_state=state, **ORDER)) == [6, 6, 6]
    rest = load_dataset(dataset, start_state=state_after(7, dataset, **ORDER), repeat=2, **ORDER)
    assert len(rest) == 5
    with pytest.raises(
        tf.errors.OpError,
        match="start_state is at step 7, so this dataset is the rest of a run and can be iterated once; open",
    ):
        fit(rest)


def test_the_rest_of_a_run_is_not_iterated_again(dataset: Path) -> None:
    rest = load_dataset(dataset, batch_size=4, start=2, repeat=2)
    assert len(rows(rest.map(lambda _, y: {"row": y}))) == len(rest) == 10
    with pytest.raises(tf.errors.OpError, match="start is 2, so this dataset is the rest of a run"):
        rows(rest)


def test_only_the_step_changes_while_a_run_lasts(dataset: Path) -> None:
    assert state_after(0, dataset, **ORDER) | {"step": 7} == state_after(7, dataset, **ORDER)


def test_a_training_goes_on_with_what_it_has_not_seen(dataset: Path) -> None:
    """It has consumed as many batches as the optimizer says, whatever was read ahead."""

    class Interrupt(tf.keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if int(self.model.optimizer.iterations) == 8:
                raise KeyboardInterrupt

    def make() -> Any:
        tf.keras.utils.set_random_seed(1)
        layers = [tf.keras.Input((2, 2, 2, 1)), tf.keras.layers.Flatten(), tf.keras.layers.Dense(1)]
        network = tf.keras.Sequential(layers)
        network.compile(optimizer=tf.keras.optimizers.SGD(1e-3), loss="mse")
        return network

    def weights(network: Any) -> list[list[float]]:
        return [w.tolist() for w in network.get_weights()]

    whole, interrupted = make(), make()
    quiet: dict[str, Any] = {"verbose": 0, "shuffle": False}
    whole.fit(load_dataset(dataset, repeat=True, **ORDER), steps_per_epoch=14, **quiet)
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit(
            load_dataset(dataset, repeat=True, **ORDER),
            steps_per_epoch=14,
            callbacks=[Interrupt()],
            **quiet,
        )
    assert weights(interrupted) != weights(whole)
    state = state_after(int(interrupted.optimizer.iterations), dataset, **ORDER)
    rest = load_dataset(dataset, repeat=True, start_state=state, **ORDER)
    interrupted.fit(rest, steps_per_epoch=6, **quiet)
    assert weights(interrupted) == weights(whole)


def test_what_does_not_change_the_order_may_be_another(dataset: Path, tmp_path: Path) -> None:
    """Another place, more epochs, another part of the examples."""
    whole = [list(x) for x in rows(load_dataset(dataset, as_dict=True, columns=["row"], repeat=3, **ORDER))]
    copy = shutil.copytree(dataset, tmp_path / "copy")
    resumed = load_dataset(
        copy, start_state=state_after(4, dataset, **ORDER), repeat=3, as_dict=True, columns=["row"], **ORDER
    )
    assert rows(resumed) == whole[4:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "start_state is of a run with batch_size 4, but this one has 3; give the arg"),
        ({"seed": 2}, "with seed 1, but this one has 2"),
        ({"shuffle": False, "seed": None}, "with shuffle True, but this one has False; give the arguments"),
        ({"shuffle": False, "patch": (1, 1, 1)}, "with shuffle True, but this one has False"),
        ({"drop_remainder": True}, "with drop_remainder False, but this one has True"),
        ({"shard": (0, 2)}, r"with shard \[0, 1\], but this one has \[0, 2\]"),
        ({"split": "test"}, "with split 'train', but this one has 'test'"),
        ({"where": "label > 1"}, "with where None, but this one has 'label > 1'"),
        ({"start": 1}, "start_state and start cannot be combined"),
        ({"on_error": "skip"}, "start_state and on_error='skip', which does not count every batch, cannot"),
        ({"engine": "sequential"}, "start_state requires the index"),
        ({"seed": None}, "start_state requires an order that is known beforehand; give a seed"),
        ({"start_state": {"step": 4}}, "start_state has no version; give the result of state_after of this"),
        ({"start_state": "4"}, "start_state is '4'; give the result of state_after"),
        (
            {"repeat": False},
            "start_state is at step 4, within an epoch of 6 elements, .* or repeat=1 to read",
        ),
        (
            {"start_state": None, "start": 31, "repeat": False},
            "start is 31, within an .*=True, or repeat=6 to",
        ),
    ],
)
def test_states_that_do_not_fit(dataset: Path, change: dict[str, Any], message: str) -> None:
    options = {"start_state": state_after(4, dataset, **ORDER), "repeat": True, **ORDER, **change}
    with pytest.raises(UsageError, match=message):
        load_dataset(dataset, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "start_state is of another version, or has other keys; give the result"),
        ({"epoch": 2}, "start_state is of another version, or has other keys; give the result"),
        ({"step": 7.0}, r"the step of start_state is 7\.0; give a whole number"),
        ({"step": -1}, "the step of start_state is -1; give how many elements were consumed"),
        (None, "start_state has no step; give the result of state_after"),
    ],
)
def test_states_that_are_incomplete_or_changed(
    dataset: Path, change: dict[str, Any] | None, message: str
) -> None:
    state = state_after(4, dataset, **ORDER) | (change or {})
    if change is None:
        del state["step"]
    with pytest.raises(UsageError, match=message):
        load_dataset(dataset, start_state=state, repeat=True, **ORDER)


def test_a_state_beyond_the_epochs(dataset: Path) -> None:
    state = state_after(99, dataset, **ORDER)
    message = "start_state is at step 99, but there are 6 elements in all epochs; raise repeat"
    with pytest.raises(UsageError, match=message):
        load_dataset(dataset, start_state=state, repeat=1, **ORDER)
    with pytest.raises(UsageError, match="step is -1; give how many elements were consumed"):
        state_after(-1, dataset, **ORDER)
    with pytest.raises(UsageError, match="state_after requires an order that is known beforehand"):
        state_after(1, dataset, shuffle=True)


def test_a_dataset_that_was_built_again(dataset: Path, tmp_path: Path) -> None:
    state = state_after(1, dataset)
    manifest = write_cohort(tmp_path / "cohort", COUNT, shape=(2, 2, 2), split=["train"] * 11 + ["test"])
    build(manifest, tmp_path / "out", num_shards=2)  # of images of another date, to the same records
    resumed = load_dataset(tmp_path / "out", start_state=state, repeat=1, as_dict=True, columns=["row"])
    assert len(rows(resumed)) == 21
    shutil.rmtree(tmp_path / "out")
    build(manifest, tmp_path / "out", num_shards=2, rescale="none")
    with pytest.raises(DatasetError, match=r"out: its records are not those of start_state: .*rebuilt"):
        load_dataset(tmp_path / "out", start_state=state)
