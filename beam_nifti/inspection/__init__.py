"""Existing datasets. Input: a dataset. Output: its contents, its problems, or its conversion.

For other folders: the commands `verify`, `convert`, `description`, `diff`, `extract` and `card`;
`preparation` and `restoring`, which users import from `beam_nifti.inference`; and `shard_pass`,
`record_checks` and `problems`, with which a report reads records.
"""
