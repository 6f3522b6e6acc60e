"""The format. Converts a volume to the bytes of its record and its row of the index, and back.

For other folders: `example`, `tfrecord`, `index`, `dataset_info`, `sharding` and `versions`.
"""
