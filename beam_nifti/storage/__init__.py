"""Files: a path or URL comes in, bytes go out, and back.

For other folders: `paths`, which reaches every store, `disk`, for what only a local disk has, and
`signatures`, which tells kinds of files by their first bytes.
"""
