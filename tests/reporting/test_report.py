"""`beam-nifti report`: the numbers, the outliers and the page of datasets that were built for it."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from beam_nifti.cli import main as cli
from beam_nifti.cli import parser as options
from beam_nifti.config import Columns, RecordConfig, Sharding
from beam_nifti.inspection.record_checks import RecordSpec
from beam_nifti.record.dataset_info import read_info
from beam_nifti.record.example import decode_example, decode_tensor
from beam_nifti.reporting.appearance import look_at_record, unit_of
from beam_nifti.reporting.page import format_number
from beam_nifti.reporting.report import ReportSummary, write_report
from beam_nifti.reporting.summary import MAX_OUTLIERS
from beam_nifti.reporting.thumbnail import GRID
from tests.build_helpers import make_options
from tests.datasets import build_dataset, edit_record, info_of, records_of
from tests.images import write_cohort, write_image, write_manifest
from tests.peak import peak_mib

for module in ("jinja2", "matplotlib", "PIL"):
    pytest.importorskip(module)

NASTY = "\"><script>alert(1)</script><img src=x onerror=alert(2)></title>'--><!--\u2028x"
UPSIDE_DOWN = 7
ON_A_CLUSTER = ["--runner=PortableRunner", "--job_endpoint=:8099", "--environment_type=LOOPBACK"]


def head(seed: int) -> Any:
    """A lopsided thing in noise, with a bright top, int16 of shape (16, 18, 14) in RAS."""
    x, y, z = np.indices((16, 18, 14)) - np.array([8, 9, 7]).reshape(3, 1, 1, 1)
    inside = (x / 6) ** 2 + (y / 8) ** 2 + (z / 6) ** 2 < 1
    rng = np.random.default_rng(seed)
    return (inside * (300 + 40 * z + 15 * y) + rng.integers(0, 20, x.shape)).astype(np.int16)


def write_heads(folder: Path, count: int = 24) -> Path:
    """Heads of different orientations, one of them with an affine that turns it upside down."""
    rows = []
    for number in range(count):
        image = nib.Nifti1Image(head(number), np.diag([2.0, 2.0, 3.0, 1.0]))
        if number == UPSIDE_DOWN:
            image = nib.Nifti1Image(head(number)[:, :, ::-1], image.affine)
        if number % 3:
            code = ("LPS", "PIR")[number % 2]
            turns = nib.orientations.ornt_transform(
                nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(code)
            )
            image = image.as_reoriented(turns)
        path = folder / f"{number}.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, path)
        name = NASTY if number == 3 else f"sub-{number:02}"
        cells = {"participant_id": name, "path": path.name, "age": 20 + number, "sex": "FM"[number % 2]}
        rows.append(cells | {"split": "test" if number % 4 == 0 else "train"})
    rows.append({**rows[0], "participant_id": "<b>lost</b>", "path": "lost.nii"})
    return write_manifest(folder / "manifest.tsv", rows)


def write_study(folder: Path) -> Path:
    """Heads with masks of two labels, of a site with bright images, and with copies in both splits."""
    rows = []
    for number in range(14):
        voxels = np.roll(head(number), number % 5, 1).astype(np.int16)
        site = "bright" if number % 2 else "dark"
        write_image(folder / f"{number}.nii", voxels + 5000 * (site == "bright"))
        mask = (voxels > 300).astype(np.uint8) + (voxels > 500) * (number < 7)
        write_image(folder / f"{number}-mask.nii", mask.astype(np.uint8))
        files = {"path": f"{number}.nii", "mask": f"{number}-mask.nii"}
        rows.append({"participant_id": f"p{number:02}", **files, "site": site, "sex": "FFM"[number % 3]})
        rows[-1]["split"] = "test" if number >= 10 else "train"
    # The same voxels with another header, and reordered with the same positions in space.
    for like, name in ((3, "header"), (5, "turned")):
        for end in ("", "-mask"):
            image = nib.load(folder / f"{like}{end}.nii")
            if name == "header":
                image = nib.Nifti1Image(np.asarray(image.dataobj), np.diag([-3, 1, 1, 1]))
            else:
                image = image.as_reoriented(np.array([[0, -1], [1, -1], [2, 1]]))
            nib.save(image, folder / f"{name}{end}.nii")
        cells = {"participant_id": name, "path": f"{name}.nii", "mask": f"{name}-mask.nii"}
        rows.append({**rows[like], **cells, "split": "test" if name == "header" else "train"})
    return write_manifest(folder / "manifest.tsv", rows)


def report(output: Path, out: Path, *, num_pictures: int = 1000, workers: int = 1) -> ReportSummary:
    """Write a report in this process."""
    return write_report(
        str(output), info_of(output), str(out), make_options(workers), num_pictures=num_pictures
    )


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 24 heads, and a volume that failed."""
    folder = tmp_path_factory.mktemp("heads")
    manifest = write_heads(folder / "images")
    columns = Columns(label="age:float,sex:class")
    return build_dataset(
        manifest, folder / "dataset", columns=columns, allow_mixed_shapes=True, max_bad_fraction=0.5
    )


class Page(HTMLParser):
    """What a browser would see of a page.

    Attributes:
        text: its HTML.
        elements: names and attributes, in order.
        texts: of the elements, by name, together.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            self.texts[tag] = self.texts.get(tag, "") + data

    @property
    def volumes(self) -> list[dict[str, Any]]:
        """The data of the pictures."""
        start = self.texts["script"].index("{")
        data, _ = json.JSONDecoder().raw_decode(self.texts["script"][start:])
        found: list[dict[str, Any]] = data["volumes"]
        return found


@pytest.fixture(scope="module")
def page(heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of the heads."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    summary = report(heads, out)
    assert (summary.num_examples, summary.num_failures, summary.problems) == (24, 1, ())
    assert summary.num_bytes == out.stat().st_size
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    return Page(out)


def test_the_upside_down_head_comes_first(page: Page) -> None:
    by_score = sorted(page.volumes, key=lambda volume: -volume["score"])
    assert by_score[0]["id"] == f"sub-{UPSIDE_DOWN:02}"
    assert re.fullmatch(r"correlation .* MADs below the median", by_score[0]["reasons"][0])
    assert by_score[0]["score"] > 2 * by_score[1]["score"]
    heading = page.texts["h3"]
    assert heading.startswith(f"sub-{UPSIDE_DOWN:02}")


def test_totals_splits_labels_and_failures_are_there(page: Page) -> None:
    text = page.texts["body"]
    for expected in ("24", "test", "train", "16×18×14", "2×2×3", "LPS", "PIR", "lost.nii", "<b>lost</b>"):
        assert expected in text
    captions = page.texts["caption"]
    assert "Label sex" in captions
    assert "Label age" in page.texts["figcaption"]
    assert "fingerprint" in page.texts["dt"]


def test_skipped_rows_are_there(tmp_path: Path, page: Page) -> None:
    manifest = write_cohort(tmp_path / "cohort", 3)
    manifest.write_text(manifest.read_text().replace("\t2\t", "\tn/a\t"))
    columns = Columns(label="label", missing_label="skip")
    output = build_dataset(manifest, tmp_path / "dataset", columns=columns)
    assert report(output, tmp_path / "report.html").num_skipped == 1
    text = Page(tmp_path / "report.html").texts["body"]
    assert "No volume of the manifest failed." in text
    assert "1 row has no label and was skipped." in text
    assert "1 volume failed" in page.texts["body"]
    assert "skipped." not in page.texts["body"]


def test_a_missing_label_among_many(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 14)
    manifest.write_text(manifest.read_text().replace("\t2\t", "\tn/a\t"))
    columns = Columns(label="label:float", missing_label="nan")
    output = build_dataset(manifest, tmp_path / "dataset", columns=columns)
    report(output, tmp_path / "report.html")
    assert [volume["labels"] for volume in Page(tmp_path / "report.html").volumes].count([None]) == 1


def test_nothing_of_a_manifest_becomes_markup(page: Page) -> None:
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "volumes"}, {}]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert NASTY in {volume["id"] for volume in page.volumes}
    assert [attributes for tag, attributes in page.elements if tag == "b"] == [{"class": "good"}]
    sources = {
        value for _, attributes in page.elements for name, value in attributes.items() if name == "src"
    }
    assert all(source is not None and source.startswith("data:") for source in sources)


def test_the_page_loads_nothing(page: Page) -> None:
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not [a for tag, a in page.elements if tag == "link" or "style" in a]
    assert all((a["href"] or "").startswith("#") for _, a in page.elements if "href" in a)


def test_the_same_dataset_gives_the_same_page(heads: Path, page: Page, tmp_path: Path) -> None:
    report(heads, tmp_path / "folder" / "again.html", workers=2)
    assert (tmp_path / "folder" / "again.html").read_text() == page.text


def test_pictures_are_a_sample_and_the_outliers(heads: Path, tmp_path: Path) -> None:
    summary = report(heads, tmp_path / "few.html", num_pictures=4)
    volumes = Page(tmp_path / "few.html").volumes
    assert 4 <= len(volumes) <= 4 + summary.num_outliers
    assert f"sub-{UPSIDE_DOWN:02}" in {volume["id"] for volume in volumes}
    assert "A sample of" in (tmp_path / "few.html").read_text()


def test_ten_thousand_volumes_take_less_than_30_mb(heads: Path, page: Page, tmp_path: Path) -> None:
    """By what a picture adds to a page, which has at most as many as by default, and MAX_OUTLIERS."""
    without = report(heads, tmp_path / "few.html", num_pictures=0)
    assert len(Page(tmp_path / "few.html").volumes) == without.num_outliers
    of_one = (len(page.text.encode()) - without.num_bytes) / (len(page.volumes) - without.num_outliers)
    # Pictures have the same number of pixels whatever is on them; real heads take up to three times as much.
    most = options.make_parser().parse_args(["report", "dataset"]).pictures + MAX_OUTLIERS
    assert without.num_bytes + 3 * most * of_one < 30e6


@pytest.mark.parametrize(
    ("record", "unit"),
    [
        (RecordConfig(), "rescaled by minmax"),
        (RecordConfig(voxel_dtype="float16"), "rescaled by minmax"),
        (RecordConfig(voxel_dtype="bfloat16"), "rescaled by minmax"),
        (RecordConfig(voxel_dtype="uint8"), "rescaled by minmax"),
        (RecordConfig(voxel_dtype="native"), "in the images' units"),
        (RecordConfig(rescale="none"), "in the images' units"),
        (RecordConfig(rescale="zscore"), "rescaled by zscore"),
    ],
)
def test_numbers_are_those_of_numpy(record: RecordConfig, unit: str, tmp_path: Path) -> None:
    rows = [{"participant_id": "a", "path": "a.nii", "label": 1}]
    write_image(tmp_path / "a.nii", head(0), slope=-2.0, inter=100.0)
    output = build_dataset(write_manifest(tmp_path / "manifest.tsv", rows), tmp_path / "dataset", record)
    spec = RecordSpec(info_of(output))
    assert unit_of(spec) == unit
    ((cells, payload),) = records_of(output)
    row = look_at_record(payload, cells, spec)
    voxels = decode_tensor(decode_example(payload)["image_raw"]).astype(np.float64)  # type: ignore[arg-type]
    if record.voxel_dtype == "uint8":
        voxels /= 255
    if record.voxel_dtype == "native":
        voxels = 100 - 2 * voxels
    assert row["mean"] == pytest.approx(voxels.mean())
    assert row["std"] == pytest.approx(voxels.std())
    # All voxels of so small a volume are in the sample.
    np.testing.assert_allclose(row["quantiles"][[0, 16, 32]], np.quantile(voxels, [0, 0.5, 1]), rtol=1e-5)
    grid = np.frombuffer(row["grid"], np.uint8).astype(np.float64)
    assert (grid.min(), grid.max(), grid.size) == (0, 255, GRID**3)
    assert 0 < row["foreground"] < 1


def test_correlations_are_those_with_the_mean_of_all(heads: Path, page: Page) -> None:
    spec = RecordSpec(info_of(heads))
    grids = np.array(
        [
            np.frombuffer(look_at_record(payload, cells, spec)["grid"], np.uint8)
            for cells, payload in records_of(heads)
        ],
        np.float64,
    )
    standard = (grids - grids.mean(1, keepdims=True)) / grids.std(1, keepdims=True)
    expected = [np.corrcoef(grid, standard.mean(0))[0, 1] for grid in grids]
    found = [volume["numbers"]["correlation"] for volume in page.volumes]
    np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize(
    ("voxels", "record", "colour"),
    [
        (np.arange(240, dtype=np.int16).reshape(5, 4, 3, 4), RecordConfig(frames="all"), False),
        (np.arange(240, dtype=np.int16).reshape(5, 4, 3, 4), RecordConfig(frames="each"), False),
        (
            np.arange(180, dtype=np.uint8).view([("R", "u1"), ("G", "u1"), ("B", "u1")]).reshape(5, 4, 3),
            RecordConfig(voxel_dtype="native"),
            True,
        ),
        (np.arange(180, dtype=np.float32).reshape(5, 4, 3, 1, 3), RecordConfig(), False),
    ],
)
def test_frames_vectors_and_colours(voxels: Any, record: RecordConfig, colour: bool, tmp_path: Path) -> None:
    from PIL import Image

    fields = {"intent_code": 1007} if voxels.ndim == 5 else {}
    write_image(tmp_path / "a.nii", voxels, fields=fields)
    manifest = write_manifest(tmp_path / "manifest.tsv", [{"participant_id": "a", "path": "a.nii"}])
    output = build_dataset(manifest, tmp_path / "dataset", record)
    summary = report(output, tmp_path / "report.html")
    assert summary.num_examples == info_of(output).num_examples
    volumes = Page(tmp_path / "report.html").volumes
    assert "Too few volumes" in (tmp_path / "report.html").read_text()
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(volume["picture"]))).convert("RGB"), np.int16)
        for volume in volumes
    ]
    assert all((np.ptp(picture, axis=2).max() > 2) == colour for picture in pictures)


def test_channels(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.nii", head(2))
    rows = [{"participant_id": "s", "T1w": "a.nii", "T2w": "b.nii"}]
    manifest = write_manifest(tmp_path / "manifest.tsv", rows)
    output = build_dataset(manifest, tmp_path / "dataset", columns=Columns("T1w,T2w", None))
    assert report(output, tmp_path / "report.html").num_examples == 1


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of the study."""
    folder = tmp_path_factory.mktemp("study")
    columns, record = Columns("path", "sex:class", mask="mask"), RecordConfig(rescale="none")
    return build_dataset(write_study(folder / "images"), folder / "dataset", record, columns=columns)


@pytest.fixture(scope="module")
def by_site(study: Path) -> tuple[ReportSummary, Page]:
    out = study.parent / "report.html"
    summary = write_report(str(study), info_of(study), str(out), make_options(1), num_pictures=100, by="site")
    return summary, Page(out)


def test_masks_are_pictures_of_their_own(by_site: tuple[ReportSummary, Page]) -> None:
    from PIL import Image

    _, page = by_site
    for volume in page.volumes:
        slices, labels = (
            Image.open(io.BytesIO(base64.b64decode(volume[name]))) for name in ("picture", "overlay")
        )
        assert (slices.mode, slices.size) == ("RGB", labels.size)
        assert np.ptp(np.asarray(slices.convert("RGB"), np.int16), axis=2).max() <= 2
        assert np.asarray(labels)[..., 3].any()
        assert len(volume["overlay"]) < 4000
    (box,) = [attributes for _, attributes in page.elements if attributes.get("id") == "masks"]
    assert box["type"] == "checkbox"
    assert "checked" in box
    assert [
        attributes["class"] for _, attributes in page.elements if "swatch" in (attributes.get("class") or "")
    ] == [
        "swatch swatch-0",
        "swatch swatch-1",
    ]


def test_copies_are_found_by_voxels_whatever_the_header(by_site: tuple[ReportSummary, Page]) -> None:
    summary, page = by_site
    exact = {frozenset(copy.ids): copy for copy in summary.copies if copy.is_exact}
    assert {ids: copy.is_leak for ids, copy in exact.items()} == {
        frozenset(["p03", "header"]): True,
        frozenset(["p05", "turned"]): False,
    }
    assert summary.num_leaks == sum(copy.is_leak for copy in summary.copies)
    assert "of records in different splits" in page.texts["p"]
    assert "Sound." not in page.texts["b"]
    assert "Undamaged, with leaks." in page.texts["b"]
    is_nearly = any(copy.is_leak and not copy.is_exact for copy in summary.copies)
    assert ("nearly the same one" in page.texts["b"]) == is_nearly
    rows = page.texts["th"] + page.texts["td"]
    assert all(rows.count(name) for name in ("p03", "header", "p05", "turned"))


def test_balance_of_labels_and_masks(study: Path, by_site: tuple[ReportSummary, Page]) -> None:
    _, page = by_site
    tests = {"p10", "p11", "p12", "p13", "header"}
    sexes, having, voxels = Counter[Any](), Counter[Any](), Counter[Any]()
    for cells, payload in records_of(study):
        split = "test" if cells["example_id"] in tests else "train"
        sexes[split, cells["sex"]] += 1
        mask = decode_tensor(decode_example(payload)["mask_raw"])  # type: ignore[arg-type]
        for label in (1, 2):
            voxels[split, label] += int(np.count_nonzero(mask == label))
            having[split, label] += label in mask
    sizes = {"test": 5, "train": 11}
    for (split, _), count in sexes.items():
        assert f"{count} ({100 * count / sizes[split]:.1f} %)" in page.texts["td"]
    for (split, label), count in having.items():
        share = voxels[split, label] / (voxels[split, 1] + voxels[split, 2])
        of_records = f"{count} ({100 * count / sizes[split]:.1f} %)"
        assert f"{of_records}, {format_number(100 * share)} % of voxels" in page.texts["td"]
    assert 0 < having["train", 2] < 11


def test_groups_that_differ_are_noted(by_site: tuple[ReportSummary, Page]) -> None:
    _, page = by_site
    assert "By site" in page.texts["h2"]
    assert re.search(r"mean .* MADs above the median of the others", page.texts["td"])
    assert "bright" in page.texts["th"]


def test_a_column_that_no_index_has_is_refused(study: Path, run: Callable[..., str]) -> None:
    said = run("report", study, "--by", "sites", "--out", study.parent / "no.html", code=2)
    assert (
        "--by is 'sites', which is no column of the index with one value per record; did you mean 'site'?"
        in said
    )
    assert "choose one of:" in run(
        "report", study, "--by", "affine", "--out", study.parent / "no.html", code=2
    )
    assert not (study.parent / "no.html").exists()


def test_leaks_are_warnings(study: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["report", str(study), "--out", str(tmp_path / "r.html"), "--by", "site", "--quiet"]) == 0
    assert "header (test) and p03 (train) have the same voxels\n" in capsys.readouterr().err


def test_a_damaged_record_is_said_and_the_others_shown(cohort: Path, tmp_path: Path) -> None:
    output = build_dataset(cohort, tmp_path / "dataset")
    edit_record(output, 1, lambda payload: payload[:-1])
    summary = report(output, tmp_path / "report.html")
    assert summary.num_examples == 11
    (problem,) = summary.problems
    assert "record 1 (sub-0001)" in problem
    assert problem in Page(tmp_path / "report.html").texts["body"]


def test_a_dataset_without_one_readable_record(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", 1)
    output = build_dataset(manifest, tmp_path / "dataset", sharding=Sharding(num_shards=1))
    edit_record(output, 0, lambda payload: b"")
    assert report(output, tmp_path / "report.html").num_examples == 0
    assert "There are no volumes" in (tmp_path / "report.html").read_text()


def test_the_command(
    cohort: Path, tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = build_dataset(cohort, tmp_path / "dataset")
    monkeypatch.chdir(tmp_path)
    said = run("report", output, "--workers", 2)
    assert re.fullmatch(
        r"report   12 examples, \d+ outliers?, 0 volumes failed, 0 rows skipped, [\d.]+ [kM]B: report.html\n",
        said,
    )
    assert (tmp_path / "report.html").read_bytes().startswith(b"<!DOCTYPE html>")
    edit_record(output, 0, lambda payload: payload[:-1])
    assert "record 0" in run("report", output, "--workers", 1, "--out", "damaged.html", code=1)
    assert "Damaged." in (tmp_path / "damaged.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pictures", "-1"], "--pictures is -1; it must be at least 0"),
        (["--workers", "0"], "--workers is 0; it must be at least 1"),
        (["--out", ""], "--out is empty"),
        (["--picture", "3"], "unknown flag --picture"),
        (ON_A_CLUSTER, "--out is missing"),
        (
            [*ON_A_CLUSTER, "--template_location=gs://lab/t"],
            "--template_location is an Apache Beam flag that has no effect",
        ),
    ],
)
def test_what_it_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(tmp_path / "dataset"), *arguments]) == cli.USAGE
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_damaged_failures_are_told_before_anything_is_read(
    cohort: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    (cohort.parent / "sub-0003.nii.gz").unlink()
    output = build_dataset(cohort, tmp_path / "dataset", max_bad_fraction=0.5)
    (output / "failures.jsonl").write_text('{"row": 1')
    out = tmp_path / "report.html"
    assert "failures.jsonl: cannot be read" in run("report", output, "--out", out, code=1)
    assert not out.exists()


def test_a_page_on_an_object_store(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.object_store import MemoryFileSystem

    output = build_dataset(cohort, tmp_path / "dataset")
    files = [path for path in output.rglob("*") if path.is_file()]
    objects = {f"memory://lab/dataset/{path.relative_to(output)}": (path.read_bytes(), 0.0) for path in files}
    monkeypatch.setattr(MemoryFileSystem, "objects", dict(objects))
    dataset, page = "memory://lab/dataset", "memory://lab/report.html"
    write_report(dataset, read_info(dataset), page, make_options(), num_pictures=10)
    assert MemoryFileSystem.objects.keys() - objects == {page}
    report(output, tmp_path / "report.html", num_pictures=10)
    assert MemoryFileSystem.objects[page][0] == (tmp_path / "report.html").read_bytes()


SUMMARIZE = """
import sys
from beam_nifti.reporting.summary import summarize
from beam_nifti.reporting.sheets import write_sheets
from beam_nifti.reporting.thumbnail import GRID

folder, count = sys.argv[1], int(sys.argv[2])
row = {"example_id": "sub-0001", "participant_id": "sub-0001", "labels": ["1"], "shape": "91×109×91"}
row |= {"spacing": "2×2×2", "orientation": "RAS", "dtype": "int16", "extents": [182.0, 218.0, 182.0]}
row |= {"mean": 0.5, "std": 0.1, "foreground": 0.2, "quantiles": [0.1] * 33, "picture": bytes(4000)}
write_sheets(folder, 0, "train", (row | {"grid": bytes(range(256)) * (GRID**3 // 256)} for _ in range(count)))
assert len(summarize(folder, 10).pictures) == 10
"""


@pytest.mark.slow
def test_what_stays_of_a_record_is_a_row_of_numbers(tmp_path: Path) -> None:
    few, many = 512, 8704
    peaks = [peak_mib(SUMMARIZE, tmp_path / str(count), count) for count in (few, many)]
    # Its grid and its picture take 18 KB; that a process holds 30 MB more or less is the allocator's doing.
    assert (peaks[1] - peaks[0]) * 1024 / (many - few) < 9


def test_no_dataset_is_no_report(tmp_path: Path, run: Callable[..., str]) -> None:
    assert "no complete dataset here" in run("report", tmp_path / "nothing", code=1)


def test_without_the_extra_the_command_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found(name) if name != "jinja2" else None)
    assert cli.main(["report", "dataset"]) == cli.USAGE
    error = capsys.readouterr().err
    assert "not installed: jinja2;" in error
    assert "pip install 'beam-nifti[report]'" in error


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (0.5, "0.500"),
        (-0.00123456, "-0.00123"),
        (999.4, "999"),
        (12345.6, "12,346"),
        (2e9, "2.00e+09"),
    ],
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert format_number(number) == text
