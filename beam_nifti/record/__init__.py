"""The format: a volume comes in, the bytes of its record and its row of the index go out, and back.

For other folders: `example`, `tfrecord`, `index`, `dataset_info`, `sharding` and `versions`.
"""
