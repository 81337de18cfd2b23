"""DICOM SEG and RTSTRUCT, read back by pydicom alone, by highdicom, and by a rule of this test's own."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image

from medsight.export import FoundRegion, check_formats, write_masks
from medsight.export.dicom_source import replaced_uid
from medsight.scans import Scan, open_scan

from .scans import (
    BRIGHT,
    SECRET_DATE,
    SENTINEL,
    bright_regions,
    bright_volume,
    fill,
    write_dicom_series,
    write_multi_frame,
)


hd = pytest.importorskip("highdicom")


def read_series(folder: Path) -> dict[str, pydicom.Dataset]:
    datasets = [pydicom.dcmread(file) for file in folder.iterdir()]
    return {dataset.SOPInstanceUID: dataset for dataset in datasets}


def segment_planes(segmentation: pydicom.Dataset, number: int) -> dict[str, np.ndarray]:
    """The planes of a segment by the source instance that each refers to."""
    frames = np.reshape(segmentation.pixel_array, (-1, segmentation.Rows, segmentation.Columns))
    (shared,) = segmentation.SharedFunctionalGroupsSequence
    planes: dict[str, np.ndarray] = {}
    for frame, groups in zip(frames, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        (segment,) = groups.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence
        if segment.ReferencedSegmentNumber == number:
            (source,) = groups.DerivationImageSequence[0].SourceImageSequence
            assert source.ReferencedSOPInstanceUID not in planes
            planes[source.ReferencedSOPInstanceUID] = frame.astype(bool)
    return planes


def structure_planes(
    structures: pydicom.Dataset, sources: dict[str, pydicom.Dataset], number: int = 1
) -> dict[str, np.ndarray]:
    """The pixels inside the contours of a ROI, by source instance; by DICOM's equation C.7.6.2.1-1, inverted."""
    polygons: dict[str, list[np.ndarray]] = {}
    (roi,) = (item for item in structures.ROIContourSequence if item.ReferencedROINumber == number)
    for contour in roi.ContourSequence:
        assert contour.ContourGeometricType == "CLOSED_PLANAR"
        uid = contour.ContourImageSequence[0].ReferencedSOPInstanceUID
        source = sources[uid]
        points = np.array(contour.ContourData, dtype=float).reshape(-1, 3) - np.array(
            source.ImagePositionPatient, float
        )
        assert len(points) == contour.NumberOfContourPoints
        across, down = np.array(source.ImageOrientationPatient, dtype=float).reshape(2, 3)
        assert abs(points @ np.cross(across, down)).max() < 1e-4
        row_mm, column_mm = map(float, source.PixelSpacing)
        polygons.setdefault(uid, []).append(np.stack([points @ across / column_mm, points @ down / row_mm], 1) + 0.5)
    return {uid: fill(parts, sources[uid].Rows, sources[uid].Columns) for uid, parts in polygons.items()}


def assert_bright(planes: dict[str, np.ndarray], sources: dict[str, pydicom.Dataset], level: float) -> None:
    seen = 0
    for uid, source in sources.items():
        values = pydicom.pixels.apply_rescale(source.pixel_array, source)
        plane = planes.get(uid, np.zeros(values.shape, dtype=bool))
        # Values within one of the level may fall on either side of it: displaying rounds.
        assert not ((plane != (values > level)) & (abs(values - level) > 1)).any()
        seen += int(plane.sum())
    assert planes.keys() <= sources.keys() and seen > 0


def test_a_real_series_is_masked_where_it_is_bright(volumes: Path, tmp_path: Path) -> None:
    folder, level = volumes / "tcia_sts_dicom/image", 400
    scan = open_scan(folder)
    write_masks(scan, bright_regions(scan, level, every=4), tmp_path / "out", ["dicom-seg", "rtstruct"])
    wanted = {scan.dicom_datasets()[index].SOPInstanceUID for index in range(0, scan.num_slices, 4)}
    sources = {uid: dataset for uid, dataset in read_series(folder).items() if uid in wanted}
    assert_bright(segment_planes(pydicom.dcmread(tmp_path / "out" / "segmentation.dcm"), 1), sources, level)
    assert_bright(structure_planes(pydicom.dcmread(tmp_path / "out" / "rtstruct.dcm"), sources), sources, level)


@pytest.mark.parametrize("deidentify", [False, True])
def test_a_series_that_was_emptied_of_its_uids_is_refused(volumes: Path, tmp_path: Path, deidentify: bool) -> None:
    scan = open_scan(volumes / "totalsegmentator/example_ct_dicom")
    with pytest.raises(ValueError, match="its files lack SOPClassUID, SOPInstanceUID, StudyInstanceUID"):
        write_masks(scan, bright_regions(scan, 200, every=9), tmp_path / "out", ["dicom-seg"], deidentify=deidentify)


def test_highdicom_reads_overlapping_segments_where_they_were(series: Path, tmp_path: Path) -> None:
    scan = open_scan(series)
    masks = bright_volume((scan.num_slices, scan.height, scan.width), seed=3)
    whole = np.ones((scan.height, scan.width), dtype=bool)
    regions = [FoundRegion(i, mask, "Left kidney", "[C0_1]", 0.9) for i, mask in enumerate(masks)]
    regions += [FoundRegion(i, whole, "malignant breast tumor", f"[C1_{i}]", None) for i in (2, 4)]
    write_masks(scan, regions, tmp_path / "out", ["dicom-seg"])
    segmentation = hd.seg.segread(tmp_path / "out" / "segmentation.dcm")
    assert segmentation.SegmentsOverlap == "YES" and segmentation.SegmentationType == "BINARY"
    uids = [dataset.SOPInstanceUID for dataset in scan.dicom_datasets()]
    pixels = segmentation.get_pixels_by_source_instance(uids[1:])
    # A displayed slice may be turned: to_source says how it lies in the file.
    assert np.array_equal(pixels[..., 0] > 0, scan.to_source(dict(enumerate(masks)))[1:])
    assert [int(plane.sum()) for plane in pixels[..., 1]] == [whole.sum() if i in (2, 4) else 0 for i in range(1, 6)]

    kidney, tumor = segmentation.SegmentSequence
    assert (kidney.SegmentLabel, tumor.SegmentLabel) == ("Left kidney", "malignant breast tumor")
    (kind,) = kidney.SegmentedPropertyTypeCodeSequence
    assert (kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning) == ("64033007", "SCT", "Kidney")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == "7771000"
    assert tumor.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
    assert tumor.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Neoplasm"
    assert "[C1_2] [C1_4]" in tumor.SegmentDescription
    for segment in (kidney, tumor):
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, segment.SegmentAlgorithmType) == ("MedSIGHT", "AUTOMATIC")


def test_one_image_without_a_place_in_the_patient(tmp_path: Path) -> None:
    """A radiograph gets a DICOM SEG; an RTSTRUCT needs coordinates, and is refused with nothing written."""
    (file,) = write_dicom_series(tmp_path / "series", bright_volume((2, 20, 24))[1:])
    dataset = pydicom.dcmread(file)
    for keyword in ("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness"):
        del dataset[keyword]
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.ComputedRadiographyImageStorage
    dataset.Modality = "CR"
    dataset.save_as(file)
    scan = open_scan(file)
    write_masks(scan, bright_regions(scan), tmp_path / "out", ["dicom-seg"])
    written = pydicom.dcmread(tmp_path / "out" / "segmentation.dcm")
    assert np.array_equal(written.pixel_array.reshape(20, 24) > 0, dataset.pixel_array > BRIGHT / 2)
    with pytest.raises(ValueError, match="Frame of Reference"):
        write_masks(scan, bright_regions(scan), tmp_path / "refused", ["png", "rtstruct"])
    assert not (tmp_path / "refused").exists()


def test_multi_frame_sources_are_referred_to_by_frame(tmp_path: Path) -> None:
    write_multi_frame(tmp_path / "source.dcm", bright_volume((5, 24, 20)))
    source = pydicom.dcmread(tmp_path / "source.dcm")
    scan = open_scan(tmp_path / "source.dcm")
    write_masks(scan, bright_regions(scan), tmp_path / "out", ["dicom-seg", "rtstruct"], deidentify=True)
    expected = source.pixel_array > BRIGHT / 2

    segmentation = pydicom.dcmread(tmp_path / "out" / "segmentation.dcm")
    planes = np.zeros_like(expected)
    pixels = np.reshape(segmentation.pixel_array, (-1, source.Rows, source.Columns))
    for frame, groups in zip(pixels, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        reference = groups.DerivationImageSequence[0].SourceImageSequence[0]
        assert reference.ReferencedSOPInstanceUID == replaced_uid(source.SOPInstanceUID)
        number = reference.ReferencedFrameNumber
        place = source.PerFrameFunctionalGroupsSequence[number - 1].PlanePositionSequence[0].ImagePositionPatient
        assert list(groups.PlanePositionSequence[0].ImagePositionPatient) == pytest.approx(list(place))
        planes[number - 1] = frame > 0
    assert np.array_equal(planes, expected)

    # The frames of the source as images of their own, for the reader of contours.
    (shared,) = source.SharedFunctionalGroupsSequence
    frames = {}
    for number, groups in enumerate(source.PerFrameFunctionalGroupsSequence, 1):
        frames[str(number)] = image = pydicom.Dataset()
        image.Rows, image.Columns = source.Rows, source.Columns
        image.update(shared.PixelMeasuresSequence[0])
        image.update(shared.PlaneOrientationSequence[0])
        image.update(groups.PlanePositionSequence[0])
    structures = pydicom.dcmread(tmp_path / "out" / "rtstruct.dcm")
    for contour in structures.ROIContourSequence[0].ContourSequence:
        (reference,) = contour.ContourImageSequence
        reference.ReferencedSOPInstanceUID = str(reference.ReferencedFrameNumber)
    drawn = structure_planes(structures, frames)
    for number in range(1, len(expected) + 1):
        assert np.array_equal(drawn.get(str(number), np.zeros_like(expected[0])), expected[number - 1])


def test_every_dicom_image_is_written_or_refused(
    volumes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of pydicom's and highdicom's files some have neither UIDs nor a place; what is written holds the same pixels."""
    files = sorted((Path(pydicom.data.__file__).parent / "test_files").glob("*.dcm"))
    written = refused = 0
    for number, file in enumerate([*files, *sorted((volumes / "highdicom").glob("*.dcm"))]):
        try:
            scan = open_scan(file)
        except ValueError:
            continue
        mask = np.zeros((scan.height, scan.width), dtype=bool)
        mask[scan.height // 4 : scan.height // 2, scan.width // 4 :] = True
        found = [FoundRegion(scan.num_slices // 2, mask, "liver", "[C0_0]", 0.5)]
        for deidentify in (False, True):
            out = tmp_path / f"{number}-{deidentify}"
            try:
                write_masks(scan, found, out, ["dicom-seg"], deidentify)
            except ValueError as error:
                assert scan.name in str(error) and not out.exists()
                refused += 1
                continue
            segmentation = pydicom.dcmread(out / "segmentation.dcm")
            assert segmentation.NumberOfFrames == 1
            assert np.array_equal(segmentation.pixel_array.reshape(mask.shape) > 0, mask)
            written += 1
    assert written > 100 and refused < written / 4
    assert not [record for record in caplog.records if record.name.startswith(("pydicom", "highdicom"))]


@pytest.mark.parametrize("kind", ["series", "frames"])
def test_slices_at_one_position_are_refused_as_a_segmentation_before_anything_is_asked(
    kind: str, tmp_path: Path
) -> None:
    bright = bright_volume((6, 24, 20), seed=1)  # slices 1 to 5 have regions
    files = write_dicom_series(tmp_path / "series", bright)
    for index, file in enumerate(files):  # two positions, three times each
        dataset = pydicom.dcmread(file)
        dataset.ImagePositionPatient = [0, 0, 50 * (index // 3)]
        dataset.InstanceNumber = index
        dataset.save_as(file)
    if kind == "frames":
        write_multi_frame(tmp_path / "frames.dcm", bright)
        dataset = pydicom.dcmread(tmp_path / "frames.dcm")
        for groups in dataset.PerFrameFunctionalGroupsSequence:
            groups.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 0]
        dataset.save_as(tmp_path / "frames.dcm")
    scan = open_scan(tmp_path / ("series" if kind == "series" else "frames.dcm"))
    check_formats(scan, ["png", "coco", "rtstruct"])
    for asked in (None, [0, 1], [0, 4]):
        if kind == "series" and asked == [0, 4]:
            check_formats(scan, ["dicom-seg"], asked)  # at different positions
            continue
        with pytest.raises(ValueError, match="several slices at one position"):
            check_formats(scan, ["png", "dicom-seg"], asked)
    regions = bright_regions(scan)
    with pytest.raises(ValueError, match="several slices at one position"):
        write_masks(scan, regions, tmp_path / "out", ["png", "dicom-seg"])
    assert write_masks(scan, regions, tmp_path / "out", ["png"])
    if kind == "series":
        apart = [region for region in regions if region.slice_index in (1, 4)]
        assert write_masks(scan, apart, tmp_path / "apart", ["png", "dicom-seg"])


def test_a_missing_package_is_named(series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = open_scan(series)
    missing = {"dicom-seg": "highdicom", "coco": "pycocotools", "rtstruct": "contourpy", "nifti": "nibabel"}
    for format, package in missing.items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ValueError, match=rf'{package} is missing; .*: pip install "medsight\[medical\]"'):
                write_masks(scan, bright_regions(scan), tmp_path / "out", [format])


@pytest.mark.parametrize("deidentify", [False, True])
def test_who_the_patient_is(series: Path, tmp_path: Path, deidentify: bool) -> None:
    scan = open_scan(series)
    sources = read_series(series)
    formats = ["png", "coco", "nifti", "dicom-seg", "rtstruct"]
    write_masks(scan, bright_regions(scan), tmp_path / "out", formats, deidentify=deidentify)
    first = next(iter(sources.values()))
    uids = [first.StudyInstanceUID, first.SeriesInstanceUID, first.FrameOfReferenceUID, *sources]
    secrets = [secret.encode() for secret in (SENTINEL, SECRET_DATE, *uids)]
    contents = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    leaks = {name for name, content in contents.items() if any(secret in content for secret in secrets)}
    assert leaks == (set() if deidentify else {"segmentation.dcm", "rtstruct.dcm"})
    written = [pydicom.dcmread(tmp_path / "out" / name) for name in ("segmentation.dcm", "rtstruct.dcm")]
    for dataset in written:
        assert not any(tag.is_private for tag in dataset.keys())
        if deidentify:
            assert dataset.PatientName == dataset.PatientID == dataset.StudyDate == dataset.PatientBirthDate == ""
            assert dataset.PatientIdentityRemoved == "YES"
            assert dataset.StudyInstanceUID == replaced_uid(first.StudyInstanceUID) != first.StudyInstanceUID
            assert dataset.FrameOfReferenceUID == replaced_uid(first.FrameOfReferenceUID)
        else:
            assert (dataset.PatientName, dataset.PatientID) == (first.PatientName, first.PatientID)
            assert dataset.StudyInstanceUID == first.StudyInstanceUID
    if deidentify:
        sources = {replaced_uid(uid): dataset for uid, dataset in sources.items()}
    assert_bright(segment_planes(written[0], 1), sources, BRIGHT / 2)
    assert_bright(structure_planes(written[1], sources), sources, BRIGHT / 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"PatientSex": "UNKNOWN"},
        {"PatientName": "Müller^Jürgen", "SpecificCharacterSet": "ISO_IR 100"},
        {"PatientName": "Yamada^Tarou=山田^太郎", "SpecificCharacterSet": ["", "ISO 2022 IR 87"]},
        {"AccessionNumber": None, "StudyID": None, "PatientBirthDate": None},
    ],
)
def test_headers_as_hospitals_write_them(changes: dict[str, Any], tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "series", bright_volume((3, 16, 16)), **changes)
    scan = open_scan(tmp_path / "series")
    regions = bright_regions(scan, label="肝臓 \\ with a name of more than the 64 characters that DICOM takes, é")
    write_masks(scan, regions, tmp_path / "out", ["dicom-seg", "rtstruct"])
    for name in ("segmentation.dcm", "rtstruct.dcm"):
        dataset = pydicom.dcmread(tmp_path / "out" / name)
        if "PatientName" in changes:
            assert str(dataset.PatientName) == changes["PatientName"]
        items = dataset.get("SegmentSequence") or dataset.StructureSetROISequence
        label = items[0].get("SegmentLabel") or items[0].ROIName
        assert label.startswith("肝臓") and len(label) <= 64 and "\\" not in label


@pytest.mark.parametrize("scan", ["nifti", "picture", "array", "pages"], indirect=True)
@pytest.mark.parametrize("format", ["nifti", "dicom-seg", "rtstruct"])
def test_a_format_that_a_scan_cannot_be_written_in_is_refused_with_nothing_written(
    scan: Scan, format: str, tmp_path: Path
) -> None:
    if scan.kind == format:
        return
    message = "needs an evenly spaced voxel grid with a place .*" if format == "nifti" else "is not DICOM, .*"
    with pytest.raises(ValueError, match=f"{message} use png or coco$"):
        write_masks(scan, bright_regions(scan), tmp_path / "out", ["png", format])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("masks", [0, 1])
def test_without_a_region_there_is_no_dicom_object_and_no_annotation(masks: int, series: Path, tmp_path: Path) -> None:
    scan = open_scan(series)
    empty = FoundRegion(0, np.zeros((scan.height, scan.width), dtype=bool), "liver", "[C0_0]", None)
    write_masks(scan, [empty] * masks, tmp_path / "out", ["png", "coco", "nifti", "dicom-seg", "rtstruct"])
    names = {"labels.nii.gz", "regions.json", "coco-rle.json", "coco-polygons.json", *["mask-01.png"][:masks]}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    content = json.loads((tmp_path / "out" / "regions.json").read_text("utf-8"))
    coco = json.loads((tmp_path / "out" / "coco-rle.json").read_text("utf-8"))
    assert content["left_out"] == {"dicom-seg": "no region was found", "rtstruct": "no region was found"}
    assert [region["area_px"] for region in content["regions"]] == [0] * masks
    assert coco["annotations"] == [] and len(coco["categories"]) == masks


def test_a_failure_leaves_nothing_and_a_file_is_never_replaced(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = open_scan(series)
    out = tmp_path / "out"
    out.mkdir()
    (out / "answer.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_masks(scan, bright_regions(scan), out, ["coco", "png"])
    assert [file.name for file in out.iterdir()] == ["answer.json"]
    write_masks(scan, bright_regions(scan), out, ["dicom-seg"])
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert before.keys() == {"answer.json", "segmentation.dcm", "regions.json"}
    with pytest.raises(FileExistsError, match="segmentation.dcm|regions.json"):
        write_masks(scan, bright_regions(scan), out, ["png", "dicom-seg"])
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert {file.name for file in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slice_index": 99}, "slice 99 is not in"),
        ({"slice_index": -1}, "slice -1 is not in"),
        ({"mask": np.ones((3, 3), dtype=bool)}, r"got bool of shape \(3, 3\)"),
        ({"mask": np.ones((40, 32))}, "expected a boolean mask"),
        ({"label": " "}, "label is empty"),
    ],
)
def test_a_region_that_does_not_fit_is_named(
    change: dict[str, Any], message: str, series: Path, tmp_path: Path
) -> None:
    scan = open_scan(series)
    fields = {"slice_index": 0, "mask": np.ones((scan.height, scan.width), bool), "label": "a", "code": "[C0_0]"}
    with pytest.raises(ValueError, match=f"region 1: .*{message}"):
        write_masks(scan, [FoundRegion(**(fields | {"score": 0.5} | change))], tmp_path / "out", ["png"])
    with pytest.raises(ValueError, match="format 'jpeg': expected some of png"):
        write_masks(scan, [], tmp_path / "out", ["jpeg"])
