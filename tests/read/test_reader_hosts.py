"""Several hosts that share an epoch, as processes of their own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.build_helpers import build
from tests.images import write_cohort

COUNT = 11


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    build(write_cohort(folder / "cohort", COUNT, shape=(2, 2, 2)), folder / "out", num_shards=3)
    return folder / "out"


def free_addresses(count: int) -> list[str]:
    """Of this machine, for servers that are to be started."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [f"localhost:{each.getsockname()[1]}" for each in sockets]


def outputs(commands: list[list[str]], environments: list[dict[str, str]]) -> list[Any]:
    """What some processes, which run at the same time, print as JSON at last."""
    started = [
        subprocess.Popen(
            command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command, env in zip(commands, environments, strict=True)
    ]
    try:
        ended = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(printed.splitlines()[-1]) for printed, _ in ended]


READ = """
import json, sys
from beam_nifti.read.order import Order
from beam_nifti.random_access import Dataset

path, host = sys.argv[1], int(sys.argv[2])
records = Dataset(path, columns=["id"])
epochs = {}
for num_hosts in range(host + 1, 9):
    order = Order(len(records), 2, seed=5, host=host, num_hosts=num_hosts)
    steps = [order.batch(step) for step in range(2 * order.num_steps)]
    epochs[num_hosts] = [[e["id"] for batch in half for e in records[batch]] for half in
                         (steps[: order.num_steps], steps[order.num_steps :])]
print(json.dumps(epochs))
"""


def test_processes_read_every_record_once_an_epoch(dataset: Path) -> None:
    """Each of eight is a host of every number of hosts from 1 to 8 that has such a host."""
    commands = [[sys.executable, "-c", READ, str(dataset), str(host)] for host in range(8)]
    hosts = outputs(commands, [{}] * 8)
    for num_hosts in range(1, 9):
        epochs = [
            sorted(itertools.chain(*(hosts[host][str(num_hosts)][epoch] for host in range(num_hosts))))
            for epoch in range(2)
        ]
        assert epochs == [[f"sub-{i:04d}" for i in range(COUNT)]] * 2
    assert hosts[0]["1"][0] != hosts[0]["1"][1]


@pytest.mark.tf
@pytest.mark.slow
def test_workers_of_a_strategy_take_every_step_together(dataset: Path) -> None:
    pytest.importorskip("tensorflow")
    cluster = {"worker": free_addresses(2)}
    environments = [
        {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}})}
        for i in range(2)
    ]
    command = [sys.executable, "-m", "tests.multi_worker", str(dataset)]
    one, other = outputs([command] * 2, environments)
    assert [len(batch) for batch in one["whole"]["batches"] + other["whole"]["batches"]] == [2] * 4
    assert one["whole"]["sizes"] == other["whole"]["sizes"] == [4, 4]
    # Five records and four: in the last step one worker has an empty batch.
    assert [len(batch) for batch in one["all"]["batches"]] == [2, 2, 1]
    assert [len(batch) for batch in other["all"]["batches"]] == [2, 2, 0]
    assert one["all"]["sizes"] == other["all"]["sizes"] == [4, 4, 1]
    assert sorted(itertools.chain(*one["all"]["batches"], *other["all"]["batches"])) == list(range(9))
