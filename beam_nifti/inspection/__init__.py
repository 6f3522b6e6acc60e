"""Datasets that exist: one comes in, what is in it and what is wrong with it goes out.

For other folders: `verify`, `description`, `diff`, `extract` and `card`, which are commands, and
`shard_pass`, `record_checks` and `problems`, by which a report reads records.
"""
