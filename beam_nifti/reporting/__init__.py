"""HTML pages. Input: a dataset. Output: a page.

For other folders: `report`, the page about all records, and `view`, the page about one.
"""
