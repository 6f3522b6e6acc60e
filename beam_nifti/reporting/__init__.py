"""Pages for people: a dataset comes in, HTML goes out.

For the command line: `report`, the page about all records, and `view`, the page about one.
"""
