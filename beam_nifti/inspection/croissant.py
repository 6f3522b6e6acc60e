"""Croissant metadata of a dataset, which search engines and hubs read.

Source: docs.mlcommons.org/croissant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote

import pyarrow as pa

from beam_nifti.record.dataset_files import CROISSANT_FILE
from beam_nifti.record.dataset_info import DatasetInfo
from beam_nifti.support.strict_json import dump_json, load_json

_TERMS: Final = (
    *("citeAs", "column", "extract", "field", "fileProperty", "fileObject", "fileSet", "format", "includes"),
    *("isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex"),
    *("repeated", "replace", "samplingRate", "separator", "source", "subField", "transform"),
)
_CONTEXT: Final = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "equivalentProperty": "cr:equivalentProperty",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    **{term: f"cr:{term}" for term in _TERMS},
}
"""The context that the specification requires in every file."""

_RECORDS, _INDEXES = "records", "indexes"
_SPLIT_OF_INDEX: Final = r"index/(.+)-\d+-of-\d+(?:-r\d+)?\.parquet$"


def check_croissant(text: bytes, info: DatasetInfo) -> Iterator[str]:
    """Report a croissant.json that is not of this dataset: after a build, files have other checksums."""
    try:
        facts = load_json(text, is_modest=True)
        version, files = facts["version"], facts["distribution"]
        found = {file["contentUrl"]: file["sha256"] for file in files if "sha256" in file}
    except (ValueError, LookupError, TypeError, AttributeError):
        version, found = None, {}
    wanted = {s.name: s.sha256 for s in info.shards} | {s.index: s.index_sha256 for s in info.shards}
    if version != _version(info) or found != wanted:
        yield (
            f"{CROISSANT_FILE}: is not of revision {info.revision} of this dataset; run `beam-nifti card` "
            "with --overwrite, or delete it"
        )


def _version(info: DatasetInfo) -> str:
    """The dataset's revision in the form that the specification requires."""
    return f"{info.revision}.0.0"


def make_croissant(info: DatasetInfo, index: pa.Schema, about: Mapping[str, str]) -> str:
    """The content of croissant.json: every file with its sha256, and the columns of the index.

    The record set describes the index, which any reader of Parquet can load. Croissant cannot describe the
    format of the shards. `about` has the keys of `write_card`.
    """
    indexes = [shard.index for shard in info.shards]
    split = _described("split", pa.string(), {"fileProperty": "fullpath"})
    split["source"]["transform"] = {"regex": _SPLIT_OF_INDEX}
    facts = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        **about,
        "version": _version(info),
        "distribution": [
            *(_file(s.name, s.sha256, "application/x-tfrecord", s.num_bytes) for s in info.shards),
            *(_file(s.index, s.index_sha256, "application/x-parquet") for s in info.shards),
            {
                "@type": "cr:FileSet",
                "@id": _INDEXES,
                "name": _INDEXES,
                "description": "A table beside each shard, with one row per record.",
                "encodingFormat": "application/x-parquet",
                "includes": indexes,
            },
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": _RECORDS,
                "name": _RECORDS,
                "description": "What is known of each record besides its voxels.",
                "field": [split, *map(_field, index)],
            }
        ],
    }
    return dump_json(facts, indent=2, ensure_ascii=False) + "\n"


def _file(path: str, sha256: str, encoding: str, num_bytes: int | None = None) -> dict[str, Any]:
    size = {} if num_bytes is None else {"contentSize": f"{num_bytes} B"}
    return {
        "@type": "cr:FileObject",
        "@id": path,
        "name": path,
        "contentUrl": path,
        "encodingFormat": encoding,
        **size,
        "sha256": sha256,
    }


def _field(column: pa.Field) -> dict[str, Any]:
    is_list = pa.types.is_list(column.type)
    extract = {"column": column.name}
    return {
        **_described(column.name, column.type.value_type if is_list else column.type, extract),
        **({"repeated": True} if is_list else {}),
    }


def _described(name: str, kind: pa.DataType, extract: Mapping[str, str]) -> dict[str, Any]:
    if pa.types.is_integer(kind):
        data_type = "sc:Integer"
    else:
        data_type = "sc:Float" if pa.types.is_floating(kind) else "sc:Text"
    return {
        "@type": "cr:Field",
        "@id": f"{_RECORDS}/{quote(name)}",
        "name": name,
        "dataType": data_type,
        "source": {"fileSet": {"@id": _INDEXES}, "extract": dict(extract)},
    }
