"""Build sharded TFRecord datasets from NIfTI volumes with Apache Beam."""

__version__ = "0.1.0"
