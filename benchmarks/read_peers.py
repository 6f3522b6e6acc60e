"""Measure what reading a volume costs from the formats of other libraries; print a Markdown table.

The volumes and the figures are those of read.py. All but the .nii.gz hold float32 voxels in [0, 1], as a
dataset does, each in its library's usual way: ArrayRecord one volume per record with its own compression,
Mosaic Streaming and Hugging Face datasets without any, .npy as it is and behind zstd. What is mapped
into memory is copied, as training would. Grain reads with two threads, the others with one. Libraries that
are not installed are named and skipped. To install all of them, run

    uv pip install '.[grain,test]' datasets mosaicml-streaming

in an environment of its own: pip does not finish resolving these requirements. PyTorch's CUDA libraries,
which Mosaic Streaming loads, take 5 GB, and the temporary folder as much.

Usage: read_peers.py [--repeat N] [--cohort-dir DIR]
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from read import COUNT, IMAGES, MAKERS, Images, Maker, Way, compare, random_access

SHAPE = (91, 109, 91)
ZSTD_LEVEL = 3
THREADS = 2
AHEAD = 4


def examples(manifest: Path) -> Iterator[tuple[np.ndarray, float]]:
    """Volumes and labels."""
    with manifest.open(newline="") as file:
        labels = [float(row["label"]) for row in csv.DictReader(file, delimiter="\t")]
    images = Images(manifest.parent)
    return ((images[i], labels[i]) for i in range(COUNT))


def pack(volume: np.ndarray, label: float) -> bytes:
    return np.float32(label).tobytes() + volume.tobytes()


def unpack(record: bytes) -> tuple[np.ndarray, np.float32]:
    numbers = np.frombuffer(record, np.float32)
    return numbers[1:].reshape(SHAPE).copy(), numbers[0]


class Files(Sequence[Any]):
    """Files of one volume each.

    Args:
        folder: folder of the files.
        read: reads one of them.
    """

    def __init__(self, folder: Path, read: Callable[[Path], Any]) -> None:
        self._paths, self._read = sorted(folder.iterdir()), read

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: Any) -> Any:
        return self._read(self._paths[number])


def make_npy(manifest: Path, folder: Path) -> None:
    folder.mkdir()
    for number, (volume, _) in enumerate(examples(manifest)):
        np.save(folder / f"{number:05d}.npy", volume)


def make_zstd(manifest: Path, folder: Path) -> None:
    import zstandard

    folder.mkdir()
    packer = zstandard.ZstdCompressor(ZSTD_LEVEL)
    for number, (volume, label) in enumerate(examples(manifest)):
        (folder / f"{number:05d}.zst").write_bytes(packer.compress(pack(volume, label)))


def read_zstd(folder: Path) -> Any:
    import zstandard

    unpacker = zstandard.ZstdDecompressor()
    return Files(folder, lambda path: unpack(unpacker.decompress(path.read_bytes())))


def make_array_record(manifest: Path, folder: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir()
    writer = ArrayRecordWriter(str(folder / "all.array_record"), "group_size:1")
    for volume, label in examples(manifest):
        writer.write(pack(volume, label))
    writer.close()


class Grain:
    """A data source that Grain reads.

    Args:
        source: the data source.
        decode: converts a record to an element.
    """

    def __init__(self, source: Any, decode: Callable[[Any], Any]) -> None:
        import grain

        self._dataset = grain.MapDataset.source(source).map(decode)
        self._options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> Any:
        return self._dataset[number]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._dataset.to_iter_dataset(self._options))


def read_array_record(folder: Path) -> Any:
    import grain

    return Grain(grain.sources.ArrayRecordDataSource(sorted(map(str, folder.iterdir()))), unpack)


def find_grain(manifest: Path, folder: Path) -> None:
    """The dataset of gzip records once more, if Grain is installed."""
    importlib.import_module("grain")
    folder.symlink_to(folder.with_name("gzip"))


def read_by_grain(folder: Path) -> Any:
    return Grain(random_access(folder), lambda element: element)


def make_mosaic(manifest: Path, folder: Path) -> None:
    from streaming import MDSWriter

    columns = {"image": f"ndarray:float32:{','.join(map(str, SHAPE))}", "label": "float32"}
    with MDSWriter(out=str(folder), columns=columns, size_limit="1gb") as writer:
        for volume, label in examples(manifest):
            writer.write({"image": volume, "label": np.float32(label)})


def read_mosaic(folder: Path) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(local=str(folder), shuffle=False, batch_size=1)


def make_hugging_face(manifest: Path, folder: Path) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Array3D(SHAPE, "float32"), "label": datasets.Value("float32")}
    )
    found = datasets.Dataset.from_generator(
        lambda: ({"image": volume, "label": label} for volume, label in examples(manifest)),
        features=features,
        cache_dir=f"{folder}.cache",
        writer_batch_size=10,
    )
    found.save_to_disk(folder)


def read_hugging_face(folder: Path) -> Any:
    import datasets

    return datasets.load_from_disk(folder).with_format("numpy")


PEERS: dict[str, Maker] = MAKERS | {
    "grain": find_grain,
    "array_record": make_array_record,
    "mosaic": make_mosaic,
    "hugging_face": make_hugging_face,
    "zstd": make_zstd,
    "npy": make_npy,
}
WAYS: dict[str, Way] = {
    "`.nii.gz` with nibabel": (IMAGES, Images),
    "`random_access.Dataset`, gzip": ("gzip", random_access),
    "`random_access.Dataset`, gzip, by Grain": ("grain", read_by_grain),
    "`random_access.Dataset`, gzip, native": ("native", random_access),
    "`random_access.Dataset`, uncompressed": ("none", random_access),
    "ArrayRecord by Grain": ("array_record", read_array_record),
    "`.npy` behind zstd": ("zstd", read_zstd),
    "`.npy`, mapped": ("npy", lambda folder: Files(folder, lambda p: np.array(np.load(p, mmap_mode="r")))),
    "Mosaic Streaming": ("mosaic", read_mosaic),
    "Hugging Face datasets": ("hugging_face", read_hugging_face),
}

if __name__ == "__main__":
    compare(WAYS, PEERS, "of nibabel")
