"""A shim: Beam workers install the package from this file (`--setup_file=./setup.py`).

Beam's launcher only takes a setup.py, and makes the workers' source archive with the setuptools
that it finds in its own environment. So the metadata is in pyproject.toml, in the words that
setuptools has understood since version 61. The licence stands here because no spelling of it in
pyproject.toml suits both the old releases (a table) and the new ones (a string).
"""

from setuptools import setup

setup(license="Apache-2.0")
