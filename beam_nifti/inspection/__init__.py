"""Existing datasets. Input: a dataset. Output: its contents, its problems, or its conversion.

For other folders: the commands `verify`, `convert`, `description`, `diff`, `extract` and `card`; and
`shard_pass`, `record_checks` and `problems`, with which a report reads records.
"""
