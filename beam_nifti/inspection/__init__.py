"""Existing datasets. Input: a dataset. Output: its contents and its problems.

For other folders: the commands `verify`, `description`, `diff`, `extract` and `card`; and `shard_pass`,
`record_checks` and `problems`, with which a report reads records.
"""
