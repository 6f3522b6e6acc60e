"""The smallest pipeline: the steps of this package, to which others can be added.

Usage: minimal.py MANIFEST OUTPUT [Beam's flags]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from beam_nifti.transforms import EncodeExample, LoadVolume, ReadManifest, Rescale, WriteToTFRecord


def main(argv: Sequence[str] | None = None) -> None:
    """Write the volumes of a manifest as a dataset."""
    manifest, output, *flags = sys.argv[1:] if argv is None else argv
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
        volumes = pipeline | ReadManifest(manifest) | LoadVolume()  # Volume
        (
            volumes
            | Rescale("zscore")  # Volume
            | EncodeExample()  # Record
            | WriteToTFRecord(output, examples_per_shard=100)
        )


if __name__ == "__main__":
    main()
