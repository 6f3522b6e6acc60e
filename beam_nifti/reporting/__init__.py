"""HTML pages. Input: a dataset. Output: a page.

For the command line: `report`, the page about all records, and `view`, the page about one.
"""
