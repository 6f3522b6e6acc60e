"""A worker of a `MultiWorkerMirroredStrategy`: prints what it read. Run by `test_reader_hosts.py`."""

from __future__ import annotations

import json
import sys
from typing import Any

import tensorflow as tf

from beam_nifti.reader import load_dataset


def main(path: str) -> None:
    """Read with and without the batches that not every worker has, in steps that all take together."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()

    @tf.function
    def count_examples(labels: Any) -> Any:
        return strategy.reduce("SUM", strategy.run(tf.size, args=(labels,)), axis=None)

    read: dict[str, Any] = {}
    for name, drops in {"whole": True, "all": False}.items():

        def load(context: tf.distribute.InputContext, drops: bool = drops) -> tf.data.Dataset:
            size = context.get_per_replica_batch_size(2 * strategy.num_replicas_in_sync)
            options: dict[str, Any] = {"shuffle": True, "seed": 3, "drop_remainder": drops}
            return load_dataset(path, "train[:9]", size, shard=context, **options)

        read[name] = {"batches": [], "sizes": []}
        for _, labels in strategy.distribute_datasets_from_function(load):
            read[name]["sizes"].append(int(count_examples(labels)))
            (own,) = strategy.experimental_local_results(labels)
            read[name]["batches"].append(own.numpy().astype(int).tolist())
    print(json.dumps(read))


if __name__ == "__main__":
    main(sys.argv[1])
