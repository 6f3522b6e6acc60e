"""`beam-nifti card` describes a dataset for others: README.md for people, croissant.json for programs."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Final

from beam_nifti.errors import DatasetError, OutputError, UsageError
from beam_nifti.inspection.croissant import make_croissant
from beam_nifti.inspection.description import describe, format_description
from beam_nifti.record.dataset_files import CARD_FILE, CROISSANT_FILE, path_of
from beam_nifti.record.dataset_info import DatasetInfo, read_info
from beam_nifti.record.example import SCALING_FEATURES, split_kind, tensors_of
from beam_nifti.record.shard_index import read_shard_index
from beam_nifti.storage import paths as storage
from beam_nifti.support.strict_json import dump_json
from beam_nifti.support.wording import one_line, size_text

_SIZES: Final = {1e3: "n<1K", 1e4: "1K<n<10K", 1e5: "10K<n<100K", 1e6: "100K<n<1M", 1e7: "1M<n<10M"}
"""Hugging Face's names of numbers of examples below these."""

_ID: Final = re.compile(r"[\w.+-]+")  # an SPDX id of a license, not its URL or a name of several words
_ITEM: Final = re.compile(r"^(\d*)([-.])")  # an item of a list in Markdown
_FURTHER: Final = {"license": "License", "citeAs": "Please cite", "url": "More"}


def write_card(output: str, about: Mapping[str, str], *, overwrite: bool = False) -> list[str]:
    """Describe a complete dataset in two files beside its dataset_info.json.

    The same dataset and words give the same bytes, so files of an interrupted run are no obstacle.
    croissant.json is written last: if it is of the dataset's revision, which `verify` checks, README.md is,
    too.

    Args:
        output: folder or URL of the dataset.
        about: "name", "description", "license", "url", "citeAs"; all are optional.
        overwrite: replace existing files.

    Returns:
        The paths of the files.

    Raises:
        DatasetError: there is no complete dataset, or it is empty.
        OutputError: a file exists with different content, or cannot be written; none is written then.
        OSError: a file is a link that leads out of the dataset, or not regular.
        UsageError: a word is empty, or not printable text.
    """
    for key, words in about.items():
        if not words.strip() or not words.isprintable():
            raise UsageError(f"{key} is {words!r}; give printable text, or drop it")
    output = storage.absolute(output)
    info = read_info(output)
    if not info.shards:
        raise DatasetError(f"{output}: has no records to describe")
    about = {"name": output.rpartition("/")[2], **about}
    index = read_shard_index(output, info, info.shards[0])
    files = {
        path_of(output, CARD_FILE): make_card(output, info, about).encode(),
        path_of(output, CROISSANT_FILE): make_croissant(info, index.schema, about).encode(),
    }
    for path, content in files.items():
        storage.require_writable(path, "the file of the card")
        if not overwrite and storage.exists(path) and not storage.holds(path, content):
            raise OutputError(f"{path}: already exists; --overwrite replaces it")
    for path, content in files.items():
        storage.write(path, content, output)
    return list(files)


def make_card(output: str, info: DatasetInfo, about: Mapping[str, str]) -> str:
    """The content of README.md, with the header that Hugging Face's hub reads. `about` has a "name"."""
    name = about["name"]
    folder = output.rpartition("/")[2]
    header = {"pretty_name": name, "tags": ["nifti", "tfrecord"]}
    header |= _license(about["license"]) if "license" in about else {}
    sizes = [size for limit, size in _SIZES.items() if info.num_examples < limit]
    header |= {"size_categories": sizes[:1]} if sizes else {}
    # JSON is YAML, whatever a name holds.
    yaml = "".join(f"{key}: {dump_json(value, ensure_ascii=False)}\n" for key, value in header.items())
    paragraphs = [
        f"---\n{yaml}---",
        f"# {_as_text(name)}",
        *([_as_text(about["description"])] if "description" in about else []),
        "NIfTI volumes as TFRecords, written by beam-nifti. Contents:",
        textwrap.indent(_describe(output, info, folder), "    "),
        "`dataset_info.json` has all details, and `index/` has one row per record. Records are "
        "`tf.train.Example`s with these features; tensors are as `tf.io.serialize_tensor` writes them:",
        "\n".join(("| feature | dtype | shape |", "|---|---|---|", *_feature_rows(info))),
        "With TensorFlow:",
        f"```python\nfrom beam_nifti.reader import load_dataset\n\n"
        f"dataset = {info.loading_call(folder, shuffle=True)}\n```",
        "With PyTorch, or by number:",
        f"```python\nfrom beam_nifti.random_access import Dataset\n\n"
        f"records = Dataset({folder!r}, {info.first_split!r})\nelement = records[0]\n```",
        *(f"{title}: {_as_text(about[key])}" for key, title in _FURTHER.items() if key in about),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _license(words: str) -> dict[str, str]:
    """A license as in the hub: one of its lower-case ids, or the name or page of another license."""
    if _ID.fullmatch(words):
        return {"license": words.lower()}
    return {"license": "other", "license_link" if "://" in words else "license_name": words}


def _feature_rows(info: DatasetInfo) -> Iterator[str]:
    shape = info.shape or ()
    tensors = {name: (dtype, axes) for name, axes, dtype in tensors_of(shape, info.dtype, info.record_config)}
    is_native = info.config["voxel_dtype"] == "native"
    for name, of_feature in info.features.items():
        kind, size = split_kind(of_feature)
        if name in tensors:
            dtype, axes = tensors[name]
            row = name, f"tensor of {dtype}", size_text(axes) if shape else "varies"
        elif kind == "bytes":
            row = name, kind, ""
        else:
            row = name, "float32" if kind == "float" else kind, str(size or 1)
        if is_native or name not in SCALING_FEATURES:
            yield f"| {' | '.join(map(_as_text, row))} |"


def _describe(output: str, info: DatasetInfo, folder: str) -> str:
    """The text of `beam-nifti inspect`, without the folders of files on this machine."""
    description = describe(output, info) | {"path": folder}
    for name in ("manifest", "failures"):
        path = description[name]["path"]
        description[name] = {**description[name], "path": path and path.rpartition("/")[2]}
    return format_description(description)


def _as_text(words: str) -> str:
    """Words with the characters escaped that Markdown and HTML interpret."""
    plain = one_line(" ".join(words.split()))
    escaped = "".join(f"\\{c}" if c in "\\`*_{}[]()#+!|~$" else c for c in plain)
    escaped = _ITEM.sub(r"\1\\\2", escaped)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
