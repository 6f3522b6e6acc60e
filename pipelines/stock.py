"""This package's steps with Beam's own `WriteToTFRecord`, which docs/benchmarks.md measures.

Records cross a shuffle, their distribution over shards differs from run to run, and there is no index.
`minimal.py` has the writer of this package.

Usage: stock.py MANIFEST OUTPUT_PREFIX [--num_shards N] [Beam's flags]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.options.pipeline_options import PipelineOptions

from beam_nifti.transforms import EncodeExample, LoadVolume, ReadManifest, Rescale


def main(argv: Sequence[str] | None = None) -> None:
    """Build gzip TFRecords named `OUTPUT_PREFIX-SSSSS-of-NNNNN.tfrecord.gz`."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("manifest", help="table of images: .csv, .tsv, .jsonl or .parquet")
    parser.add_argument("output_prefix", help="folder and beginning of the shards' names")
    parser.add_argument("--num_shards", type=int, default=1)
    args, beam_flags = parser.parse_known_args(argv)

    with beam.Pipeline(options=PipelineOptions(beam_flags)) as pipeline:
        (
            pipeline
            | ReadManifest(args.manifest)  # VolumeRow
            | LoadVolume()  # Volume
            | Rescale()  # Volume
            | EncodeExample()  # Record
            | "Examples" >> beam.Map(lambda record: record.example)  # Example bytes
            | "WriteToTFRecord"
            >> beam.io.WriteToTFRecord(
                args.output_prefix,
                file_name_suffix=".tfrecord.gz",
                num_shards=args.num_shards,
                compression_type=CompressionTypes.GZIP,
            )
        )


if __name__ == "__main__":
    main()
