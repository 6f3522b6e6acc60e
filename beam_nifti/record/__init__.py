"""The format. Converts a volume to the bytes of its record and its row of the index, and back.

For other folders: `example`, `tfrecord`, `tiles`, `index`, `shard_index`, `dataset_info`, `dataset_files`,
`index_checks`, `agreement`, `sharding`, `totals`, `versions` and `withdrawals`.
"""
