"""Datasets as tf.data pipelines. See docs/reading.md."""

from beam_nifti.read.reader import get_batched_dataset, load_dataset, state_after

__all__ = ["get_batched_dataset", "load_dataset", "state_after"]
