"""DICOM series with segmentations and structure sets: what the export writes, other writers' files, and real ones."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsight.data.pictures import read_mask
from medsight.data.sources import Source, detect_layout, iterate, load_source
from medsight.export import FoundRegion, write_masks
from medsight.scans import open_scan
from medsight.scans.segmentations import inside_contour, with_holes
from tests.medsight.data.layouts.volume_files import check_fuzz, decoded, read
from tests.medsight.export.scans import write_multi_frame
from tests.medsight.scans.scan_files import shipped_dicoms, write_series


pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")
SIZE = (4, 9, 12)  # slices, rows, columns
STUDY = {
    "StudyInstanceUID": "1.2.9",
    "SeriesInstanceUID": "1.2.3",
    "FrameOfReferenceUID": "1.2.4",
    "BodyPartExamined": "ABDOMEN",
    "RescaleType": "HU",
}


def masks_of_structures() -> dict[str, np.ndarray]:
    """A liver with a hole and an island in it, a spleen that overlaps it, and a cyst of a pixel."""
    liver, spleen, cyst = np.zeros((3, *SIZE), bool)
    liver[:3, 1:8, 1:8] = True
    liver[1, 3:6, 3:6] = False
    liver[1, 4, 4] = True
    spleen[2, 5:, 6:] = True
    cyst[0, 0, 11] = True
    return {"liver": liver, "spleen": spleen, "cyst": cyst}


def write_images(folder: Path, **elements: object) -> Path:
    pixels = np.random.default_rng(0).integers(0, 2000, SIZE).astype(np.uint16)
    write_series(folder, pixels, [f"{name}.dcm" for name in "dacb"], **{**STUDY, **elements})
    return folder


def export(images: Path, folder: Path, kind: str) -> Path:
    scan = open_scan(images)
    regions = [
        FoundRegion(index, mask[index], name, "", None)
        for name, mask in masks_of_structures().items()
        for index in np.flatnonzero(mask.any(axis=(1, 2))).tolist()
    ]
    write_masks(scan, regions, folder, formats=[kind])
    return next(folder.glob("*.dcm"))


def with_highdicom(kind: str, **options: Any) -> Callable[[Path, Path], Path]:
    """A writer of a segmentation of the liver and the cyst, which do not overlap."""

    def write(images: Path, folder: Path) -> Path:
        headers = [pydicom.Dataset(header) for header in open_scan(images).dicom_datasets()]
        for header in headers:
            header.PatientBirthDate = header.PatientSex = header.AccessionNumber = header.StudyID = ""
            header.StudyDate = header.StudyTime = header.ReferringPhysicianName = ""
        shown = {name: mask for name, mask in masks_of_structures().items() if name != "spleen"}
        pixels = np.stack([*shown.values()], axis=-1)
        if kind == "FRACTIONAL":
            pixels = np.where(pixels, 0.6, 0.4)
        code = highdicom.sr.CodedConcept("123037004", "SCT", "Anatomical Structure")
        described = [
            highdicom.seg.SegmentDescription(number, name, code, code, "MANUAL")
            for number, name in enumerate(shown, 1)
        ]
        about = {"manufacturer": "x", "manufacturer_model_name": "x", "software_versions": "1"}
        uids = {"series_instance_uid": "1.2.77", "sop_instance_uid": "1.2.78", "device_serial_number": "1"}
        segmentation = highdicom.seg.Segmentation(
            headers, pixels, kind, described, series_number=9, instance_number=1, **uids, **about, **options
        )
        folder.mkdir(parents=True)
        segmentation.save_as(folder / "seg.dcm")
        return folder / "seg.dcm"

    return write


def source_of(root: Path, **settings: Any) -> Source:
    return Source.from_mapping({"layout": "dicom", "path": str(root), "unlabelled": 0, **settings})


def masks_again(source: Source, images: Path) -> dict[str, np.ndarray]:
    """The masks of rows on the grid of the series."""
    scan = open_scan(images)
    files = list(map(str, scan.files))
    found: dict[str, np.ndarray] = {}
    for row in read(source):
        index = files.index(row["image"]["path"])
        for target, mask in zip(row["targets"], row["masks"], strict=True):
            again = scan.to_source({index: read_mask(mask, scan.picture_size)})
            found[target] = found.get(target, np.zeros(SIZE, bool)) | again
    return found


WRITERS = {
    "seg": lambda images, folder: export(images, folder, "dicom-seg"),
    "rtstruct": lambda images, folder: export(images, folder, "rtstruct"),
    "binary": with_highdicom("BINARY", omit_empty_frames=False),
    "fractional": with_highdicom("FRACTIONAL", fractional_type="PROBABILITY"),
    "labelmap": with_highdicom("LABELMAP"),
}


def without_references(file: Path) -> None:
    """Takes out of a file what says which images it is of, but for their frame of reference."""
    dataset = pydicom.dcmread(file)
    for keyword in ("ReferencedSeriesSequence", "SourceImageSequence"):
        if keyword in dataset:
            delattr(dataset, keyword)
    for group in dataset.get("PerFrameFunctionalGroupsSequence", []):
        del group.DerivationImageSequence
    for region in dataset.get("ROIContourSequence", []):
        for contour in region.ContourSequence:
            del contour.ContourImageSequence
    for frame in dataset.get("ReferencedFrameOfReferenceSequence", []):
        del frame.RTReferencedStudySequence
    dataset.save_as(file)


@pytest.mark.parametrize("places", [("images", "labels"), ("a/b/images", "labels/x"), ("all", "all/in")])
@pytest.mark.parametrize("writer", WRITERS)
def test_masks_are_those_that_were_written(tmp_path: Path, writer: str, places: tuple[str, str]) -> None:
    root = tmp_path / "data"
    images, labels = (root / place for place in places)
    images.parent.mkdir(parents=True)
    write_images(images)
    WRITERS[writer](images, labels)
    written = masks_of_structures()
    if writer not in ("seg", "rtstruct"):
        del written["spleen"]
    found = masks_again(source_of(root), images)
    assert found.keys() == written.keys()
    assert all(np.array_equal(found[name], mask) for name, mask in written.items())
    assert detect_layout(root) == "dicom"


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "binary"])
def test_without_references_they_lie_at_their_place_in_the_patient(tmp_path: Path, writer: str) -> None:
    images = write_images(tmp_path / "images")
    file = WRITERS[writer](images, tmp_path / "labels")
    before = masks_again(source_of(tmp_path), images)
    without_references(file)
    after = masks_again(source_of(tmp_path), images)
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    write_images(tmp_path / "other", SeriesInstanceUID="1.2.99")
    [entry] = [entry for entry in iterate(source_of(tmp_path)) if "labels" in entry.place]
    assert "refers to none of the images here, and 2 series lie in its place" in str(entry.error)


def test_rows_say_what_the_headers_say_and_nothing_of_a_person(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    export(images, tmp_path / "labels", "dicom-seg")
    rows = read(source_of(tmp_path))
    scan = open_scan(images)
    for row in rows:
        facts = {name: row[name] for name in ("modality", "site", "orientation", "split", "dataset")}
        assert facts == {
            **{"modality": "CT", "site": "abdomen", "orientation": "LP", "split": "train", "dataset": tmp_path.name}
        }
        index = list(map(str, scan.files)).index(row["image"]["path"])
        assert decoded(row)["image"] == np.asarray(scan.slice_image(index)).tolist()
        assert all(spacing == pytest.approx((0.5, 0.5), rel=0.05) for spacing in row["spacing_mm"])
    [patient] = {row["patient"] for row in rows}
    assert len(patient) == 16 and "4711" not in patient and "Secret" not in str(rows)
    write_images(tmp_path / "more", SeriesInstanceUID="1.2.5", FrameOfReferenceUID="1.2.6", PatientID="Secret-1")
    export(tmp_path / "more", tmp_path / "more-labels", "rtstruct")
    assert len({row["patient"] for row in read(source_of(tmp_path))}) == 2
    assert {row["patient"] for row in read(source_of(tmp_path, patient="^(im|mo)"))} == {"im", "mo"}
    assert {row["site"] for row in read(source_of(tmp_path, site="liver"))} == {"liver"}
    assert load_source(source_of(tmp_path))["targets"] == [row["targets"] for row in read(source_of(tmp_path))]


def test_a_series_without_labels_is_said_and_labels_without_a_series_are_errors(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    file = export(images, tmp_path / "labels", "dicom-seg")
    write_images(tmp_path / "bare", SeriesInstanceUID="1.2.5", FrameOfReferenceUID="1.2.6")
    entries = [*iterate(source_of(tmp_path))]
    assert all(entry.error is None for entry in entries)
    [warning] = [warning for entry in entries for warning in entry.warnings]
    assert warning.endswith(f"no segmentation refers to 1 of its series ({tmp_path / 'bare'})")
    shutil.rmtree(images)
    first, second = [str(entry.error) for entry in iterate(source_of(tmp_path))]
    assert first == f"{file} refers to no image here, and no series lies in its frame of reference"
    assert "expected SEG or RTSTRUCT files" in second
    with pytest.raises(FileNotFoundError, match="no such folder of DICOM files"):
        read(source_of(tmp_path / "nowhere"))


def test_the_modality_of_a_source_makes_that_of_the_file_more_exact(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", Modality="MR", RescaleType=None)
    export(images, tmp_path / "labels", "rtstruct")
    named = {word: {row["modality"] for row in read(source_of(tmp_path, modality=word))} for word in (None, "MRI-T2")}
    assert named == {None: {"MRI"}, "MRI-T2": {"MRI-T2"}}
    with pytest.raises(ValueError, match="its modality is MRI by its own word, MR; the source says CT"):
        read(source_of(tmp_path, modality="CT"))
    assert [*iterate(source_of(tmp_path, where={"modality": "CT"}))] == []


def test_frames_of_one_file_are_slices(tmp_path: Path) -> None:
    write_multi_frame(tmp_path / "ct.dcm", np.ones(SIZE))
    shutil.rmtree(tmp_path / "ct")
    scan = open_scan(tmp_path / "ct.dcm")
    masks = np.random.default_rng(0).random((scan.num_slices, scan.height, scan.width)) > 0.7
    masks[3] = False
    regions = [FoundRegion(i, mask, "vessel", "", None) for i, mask in enumerate(masks) if mask.any()]
    write_masks(scan, regions, tmp_path / "out", formats=["dicom-seg"])
    rows = read(source_of(tmp_path, site="knee"))
    assert [int(row["image"]["path"].split()[-1]) for row in rows] == [i for i in range(len(masks)) if i != 3]
    for row in rows:
        index = int(row["image"]["path"].split()[-1])
        assert np.array_equal(scan.to_grid(read_mask(row["masks"][0], scan.picture_size)), masks[index])


def test_a_contour_off_the_slices_is_refused(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    file = export(images, tmp_path / "labels", "rtstruct")
    dataset = pydicom.dcmread(file)
    contour = dataset.ROIContourSequence[0].ContourSequence[0]
    contour.ContourData = [value + (0.5 if i % 3 == 2 else 0) for i, value in enumerate(contour.ContourData)]
    dataset.save_as(file)
    with pytest.raises(ValueError, match="rtstruct.dcm has a contour that lies on none of the slices of"):
        read(source_of(tmp_path))


@pytest.mark.parametrize(
    ("points", "inside"),
    [
        ([(0.5, 0.5), (3.5, 0.5), (3.5, 2.5), (0.5, 2.5)], (slice(1, 3), slice(1, 4))),
        ([(-9, -9), (9, -9), (9, 9), (-9, 9)], (slice(None), slice(None))),
        ([(1, 1), (1, 1), (1, 1)], (slice(0), slice(0))),
        ([(20, 20), (30, 20), (30, 30)], (slice(0), slice(0))),
    ],
)
def test_a_pixel_is_inside_by_its_centre(points: list[tuple[float, float]], inside: tuple[slice, slice]) -> None:
    expected = np.zeros((4, 5), bool)
    expected[inside] = True
    for turned in (points, points[::-1]):
        assert np.array_equal(inside_contour(np.array(turned, float), (4, 5)), expected)


def test_any_contour_has_the_pixels_whose_rays_cross_it_oddly() -> None:
    for seed in range(20):
        points = np.random.default_rng(seed).normal(10, 6, (7, 2))
        found = inside_contour(points, (20, 24))
        for row, column in np.ndindex(20, 24):
            sides = zip(points, np.roll(points, -1, axis=0), strict=True)
            over = [(x, y, u, v) for (x, y), (u, v) in sides if (y <= row) != (v <= row)]
            crossings = sum(x + (row - y) / (v - y) * (u - x) <= column for x, y, u, v in over)
            assert found[row, column] == crossings % 2


def test_what_lies_wholly_inside_is_a_hole() -> None:
    outer, inner, beside, across = np.zeros((4, 9, 9), bool)
    outer[1:7, 1:7], inner[2:4, 2:4], beside[8, 8], across[5:9, 5:9] = True, True, True, True
    assert np.array_equal(with_holes([inner, beside, outer, outer]), (outer & ~inner) | beside)
    assert np.array_equal(with_holes([outer, across]), outer | across)


@pytest.mark.parametrize("writer", ["seg", "rtstruct", "labelmap"])
def test_damaged_files_are_rows_or_named_errors(tmp_path: Path, writer: str) -> None:
    images = write_images(tmp_path / "data")
    WRITERS[writer](images, tmp_path / "data/labels")
    check_fuzz(source_of(tmp_path / "data"), tmp_path / "data", 40)


def test_a_real_structure_set_shows_what_its_label_map_shows(shared_data: Path, tmp_path: Path) -> None:
    """Its references name images that were replaced since: it is found by its frame of reference."""
    for name in ("sts002_MR_T1.nii.gz", "sts002_MR_T1_gtv.nii.gz"):
        (tmp_path / name).symlink_to(shared_data / "volumes/tcia_sts" / name)
    maps = Source.from_mapping({"layout": "nifti", "path": str(tmp_path), "modality": "MRI-T1", "site": "extremity"})
    dicom = source_of(shared_data / "volumes/tcia_sts_dicom", site="extremity", modality="MRI-T1")
    by_contour, by_map = ([row for row in read(source) if row["masks"]] for source in (dicom, maps))
    assert len(by_contour) == len(by_map) == 16
    for contoured, mapped in zip(by_contour, by_map, strict=True):
        assert decoded(contoured)["masks"] == decoded(mapped)["masks"]
        assert contoured["targets"] == ["GTV_Mass_MR_T1"] and contoured["orientation"] == "LP"


@pytest.mark.parametrize(
    ("file", "rows"),
    [
        ("seg_image_ct_binary", {"first segment": 3}),
        ("seg_image_ct_binary_fractional", {"first segment": 3}),
        ("seg_image_ct_true_fractional", {"first segment": 3}),
        ("seg_image_ct_binary_overlap", {"first segment": 4, "second segment": 4}),
    ],
)
def test_segmentations_that_highdicom_ships(
    shared_data: Path, tmp_path: Path, file: str, rows: dict[str, int]
) -> None:
    for name, path in shipped_dicoms():
        if name.startswith("dicomdirtests/77654033/CT2/"):
            shutil.copy(path, tmp_path / path.name)
    (tmp_path / "seg.dcm").symlink_to(shared_data / f"volumes/highdicom/{file}.dcm")
    found = read(source_of(tmp_path, site="chest"))
    assert {name: sum(name in row["targets"] for row in found) for name in rows} == rows
    assert {row["patient"] for row in found} != {"77654033"}


@pytest.mark.parametrize("file", ["seg_image_sm_control", "seg_image_sm_control_labelmap"])
def test_tiles_of_a_slide_are_slices(shared_data: Path, tmp_path: Path, file: str) -> None:
    for name in ("sm_image_control", file):
        (tmp_path / f"{name}.dcm").symlink_to(shared_data / f"volumes/highdicom/{name}.dcm")
    found = read(source_of(tmp_path, site="tissue"))
    assert len(found) == 20 and {row["modality"] for row in found} == {"pathology"}
