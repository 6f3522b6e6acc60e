"""The smallest pipeline: this package's steps, and Beam's own writer.

It shows that the steps stand alone, and is the column "stock Beam" of the benchmarks. It has no
resume, no index and no dead letters (a failing volume fails the pipeline), its voxels cross a
shuffle, and which record lands in which shard differs from run to run.

Usage: minimal.py MANIFEST OUTPUT_PREFIX [--num_shards N] [Beam's flags]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.options.pipeline_options import PipelineOptions

from beam_nifti.manifest import read_manifest
from beam_nifti.storage import paths as storage
from beam_nifti.transforms import EncodeExample, LoadVolume, Rescale


def main(argv: Sequence[str] | None = None) -> None:
    """Build gzip TFRecords named `OUTPUT_PREFIX-SSSSS-of-NNNNN.tfrecord.gz`."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("manifest", help="table of images: .csv, .tsv, .jsonl or .parquet")
    parser.add_argument("output_prefix", help="folder and beginning of the shards' names")
    parser.add_argument("--num_shards", type=int, default=1)
    args, beam_flags = parser.parse_known_args(argv)
    manifest = read_manifest(storage.absolute(args.manifest))

    with beam.Pipeline(options=PipelineOptions(beam_flags)) as pipeline:
        (
            pipeline
            | "Rows" >> beam.Create(manifest.rows(range(len(manifest))))  # VolumeRow
            | "LoadVolume" >> beam.ParDo(LoadVolume(manifest.folder))  # Volume
            | "Rescale" >> beam.ParDo(Rescale())  # Volume
            | "EncodeExample" >> beam.ParDo(EncodeExample())  # (IndexEntry, Example bytes)
            | "Examples" >> beam.Values()  # Example bytes
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
