"""Files. Reads and writes bytes by path or URL.

For other folders: `paths`, which works with every store; `disk`, for features that only a local disk has;
and `signatures`, which recognizes kinds of files by their first bytes.
"""
