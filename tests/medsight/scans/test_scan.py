"""Scans: every kind of source, the right slices in the right orientation, and masks back in their place."""

import itertools
import logging
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medsight.scans import nifti
from medsight.scans.windows import WINDOWS, apply_window, percentile_window
from processing_medsight import MedSightImageProcessor, MedSightProcessor, open_scan
from tests.medsight.scans.scan_files import (
    STORED,
    ct_volume,
    dicom_bytes,
    dicom_dataset,
    nifti_bytes,
    npy_bytes,
    picture_bytes,
    shipped_dicoms,
    write_series,
)


nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

ORIENTATIONS = [
    np.array(list(zip(axes, flips, strict=True)))
    for axes in itertools.permutations(range(3))
    for flips in itertools.product([1, -1], repeat=3)
]
SPACING = np.diag([0.5, 1.5, 2.0, 1.0])  # right, front, up


def soft_tissue(values: np.ndarray) -> np.ndarray:
    return ((values.astype(float) + 160) / 400 * 255).clip(0, 255)


def shows(image: Image.Image, levels: np.ndarray) -> bool:
    """Whether a picture has these grey levels, rounded."""
    return bool(np.abs(np.asarray(image, dtype=float) - levels).max() <= 0.51)


def turned(volume: np.ndarray, orientation: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same body on a grid whose axes are others."""
    back = nibabel.orientations.inv_ornt_aff(orientation, volume.shape)
    return nibabel.apply_orientation(volume, orientation), affine @ back


# plane -> what a slice shows of a (right, anterior, superior) volume, and the axis that is cut through
PLANES = {
    "axial": (lambda volume, index: volume[::-1, ::-1, index].T, 2),
    "coronal": (lambda volume, index: volume[::-1, index, ::-1].T, 1),
    "sagittal": (lambda volume, index: volume[index, ::-1, ::-1].T, 0),
}


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("plane", [None, *PLANES])
@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=lambda o: str(o.tolist()))
def test_a_nifti_is_shown_and_masked_alike_on_all_48_grids(
    orientation: np.ndarray, plane: str | None, oblique: bool
) -> None:
    volume, affine = ct_volume(), SPACING.copy()
    if oblique:
        angle = 0.3
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        affine[:3, :3] = turn @ affine[:3, :3]
    voxels, own = turned(volume, orientation, affine)
    scan = open_scan(nifti_bytes(voxels, own), plane=plane)
    section, through = PLANES[plane or "axial"]
    across, down = (axis for axis in range(3) if axis != through)
    sizes, spacing = volume.shape, np.diag(SPACING)
    assert scan.plane == (plane or "axial")
    assert (scan.num_slices, scan.height, scan.width) == (sizes[through], sizes[down], sizes[across])
    assert np.allclose(scan.pixel_spacing, (spacing[down], spacing[across]))
    assert np.isclose(scan.slice_spacing, spacing[through])
    masks = {}
    for index in range(scan.num_slices):
        shown = section(volume, index)
        assert shows(scan.slice_image(index), soft_tissue(shown))
        masks[index] = shown > 0
    mask = scan.to_source(masks)
    assert mask.dtype == np.bool_ and np.array_equal(mask, voxels > 0)
    assert np.allclose(scan.affine, own)


@pytest.mark.parametrize(
    ("fields", "spacing", "through"),
    [
        ({"sform_code": 0}, (1.5, 0.5), 2),
        ({"sform_code": 0, "pixdim": [1, 0.5, np.nan, 2, 1, 1, 1, 1]}, None, 2),
        ({"sform_code": 0, "pixdim": [1, 0.5, 1.5, 0, 1, 1, 1, 1]}, (1.5, 0.5), None),
        ({"srow_x": np.nan}, (1.5, 0.5), 2),
    ],
)
def test_a_nifti_without_a_usable_affine_is_shown_as_it_is_stored_with_a_warning(
    fields: dict, spacing: tuple | None, through: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    volume = ct_volume()
    content = nifti_bytes(volume, SPACING)
    header = nibabel.Nifti1Header(content[:348], check=False)
    for field, value in fields.items():
        header[field] = value
    with caplog.at_level(logging.WARNING):
        scan = open_scan(header.binaryblock + content[348:], "upload")
    assert "upload has no usable affine" in caplog.text
    assert (scan.affine, scan.pixel_spacing, scan.slice_spacing) == (None, spacing, through)
    masks = {}
    for index in range(7):
        stored = PLANES["axial"][0](volume, index)
        assert shows(scan.slice_image(index), soft_tissue(stored))
        masks[index] = stored > 0
    assert np.array_equal(scan.to_source(masks), volume > 0)


@pytest.mark.parametrize("axis", range(3))
def test_the_window_of_a_nifti_is_found_on_all_planes(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nifti, "_SAMPLE", 64)
    volume = np.full((8, 8, 8), 100, np.int16)
    np.moveaxis(volume, axis, 0)[0] = -1000  # the air of one plane
    scan = open_scan(nifti_bytes(volume))
    assert shows(scan.slice_image(3), soft_tissue(volume[::-1, ::-1, 3].T))


@pytest.mark.parametrize("seed", range(5))
def test_a_series_is_sorted_by_position_whatever_its_files_are_called(seed: int, tmp_path: Path) -> None:
    volume = np.moveaxis(ct_volume(), 2, 0)
    names = [f"{i}.dcm" for i in np.random.default_rng(seed).permutation(len(volume))]
    write_series(tmp_path / "series", volume, names, PatientPosition="HFS")
    scan = open_scan(tmp_path / "series")
    assert [path.name for path in scan.files] == names
    assert (scan.num_slices, scan.height, scan.width) == volume.shape
    assert scan.pixel_spacing == (1.5, 0.5) and scan.slice_spacing == 2 and scan.modality == "CT"
    for index, stored in enumerate(volume):
        assert shows(scan.slice_image(index), soft_tissue(stored))
    assert np.array_equal(scan.to_source({i: stored > 0 for i, stored in enumerate(volume)}), volume > 0)
    # DICOM says left and back where the affine says right and front
    assert np.allclose(scan.affine @ [3, 2, 1, 1], [10 - 0.5, 20 - 2 * 1.5, 30 + 3 * 2, 1])
    headers = scan.dicom_datasets()
    assert [h.InstanceNumber for h in headers] == list(range(1, 8)) and not any("PixelData" in h for h in headers)


def test_a_series_against_the_normal_is_sorted_along_it(tmp_path: Path) -> None:
    volume = np.moveaxis(ct_volume(), 2, 0)
    sagittal = [0, 1, 0, 0, 0, -1]
    for i, pixels in enumerate(volume):
        dataset = dicom_dataset(
            pixels, ImageOrientationPatient=sagittal, ImagePositionPatient=[3.0 * i, 0, 0], PixelSpacing=[1, 1]
        )
        (tmp_path / f"{i}").write_bytes(dicom_bytes(dataset))
    scan = open_scan(tmp_path)
    assert [path.name for path in scan.files] == list("6543210")  # the normal goes to the right: -x
    assert scan.slice_spacing == 3 and np.allclose(scan.affine @ [1, 0, 0, 1], [-15, 0, 0, 1])


@pytest.mark.parametrize("kind", ["gap", "twice"])
def test_uneven_slices_have_no_spacing(kind: str, tmp_path: Path) -> None:
    volume = np.moveaxis(ct_volume(), 2, 0)
    write_series(tmp_path, volume, list("abcdefg"))
    if kind == "gap":
        (tmp_path / "c").unlink()
    else:
        dataset = pydicom.dcmread(tmp_path / "c")
        dataset.SOPInstanceUID = "1.2.3.4.5"
        (tmp_path / "h").write_bytes(dicom_bytes(dataset))
    scan = open_scan(tmp_path)
    assert scan.num_slices == (6 if kind == "gap" else 8) and scan.slice_spacing is None and scan.affine is None


def enhanced(volume: np.ndarray) -> "pydicom.Dataset":
    """An enhanced CT: spacing, rescaling and positions are in functional groups."""
    frames = []
    for i in range(len(volume)):
        frame, plane, values = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        plane.ImagePositionPatient = [0, 0, 4 * i]
        values.RescaleIntercept, values.RescaleSlope = -100 * i, 1
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [plane], [values]
        frames.append(frame)
    shared, measures, turn = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing, turn.ImageOrientationPatient = [2, 3], [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [turn]
    groups = {"PerFrameFunctionalGroupsSequence": frames, "SharedFunctionalGroupsSequence": [shared]}
    return dicom_dataset(volume, RescaleIntercept=None, RescaleSlope=None, **groups)


def test_frames_of_an_enhanced_file_have_their_own_scale_and_place() -> None:
    volume = np.moveaxis(ct_volume(), 2, 0)
    scan = open_scan(dicom_bytes(enhanced(volume)))
    assert scan.pixel_spacing == (2, 3) and scan.slice_spacing == 4 and scan.num_slices == 7
    for i, stored in enumerate(volume):
        assert shows(scan.slice_image(i), soft_tissue(stored.astype(int) - 100 * i))
    assert np.allclose(scan.affine @ [2, 1, 1, 1], [-3, -2, 8, 1])
    assert scan.to_source({3: np.ones((5, 6), bool)}).sum(axis=(1, 2)).tolist() == [0, 0, 0, 30, 0, 0, 0]


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"RescaleIntercept": -1024}, soft_tissue(STORED - 1024.0)),
        ({"RescaleIntercept": -1024, "BodyPartExamined": "HEAD"}, apply_window(STORED - 1024.0, WINDOWS["brain"])),
        ({"Modality": "DX", "WindowCenter": 2000.5, "WindowWidth": 4001}, STORED / 4000 * 255),
        (
            {"Modality": "DX", "WindowCenter": [2000.5, 1], "WindowWidth": [4001, 2]},
            STORED / 4000 * 255,
        ),
        (
            {
                "Modality": "DX",
                "WindowCenter": 2000.5,
                "WindowWidth": 4001,
                "PhotometricInterpretation": "MONOCHROME1",
            },
            255 - STORED / 4000 * 255,
        ),
        (
            {"Modality": "DX", "WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"},
            255 / (1 + np.exp(-4 * (STORED - 2000.0) / 1000)),
        ),
        ({"Modality": "MR", "WindowCenter": 1, "WindowWidth": 2}, apply_window(STORED, percentile_window(STORED))),
        ({"Modality": "CR", "WindowCenter": 7, "WindowWidth": 0}, apply_window(STORED, percentile_window(STORED))),
    ],
)
def test_a_frame_is_shown_by_what_its_header_says(elements: dict, expected: np.ndarray) -> None:
    shown = np.asarray(open_scan(dicom_bytes(dicom_dataset(STORED, **elements))).slice_image(0))
    assert np.abs(shown.astype(float) - expected).max() <= 1


def modality_table() -> "pydicom.Dataset":
    """Makes stored numbers of 8 bits four times as large."""
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [256, 0, 16], "US"
    table.add_new("LUTData", "US", list(range(0, 1024, 4)))
    return table


@pytest.mark.parametrize("modality", ["US", "CR", "OT"])
@pytest.mark.parametrize(
    ("elements", "factor"),
    [
        ({}, 1),
        ({"RescaleIntercept": 0, "RescaleSlope": 1}, 1),
        ({"RescaleIntercept": 0, "RescaleSlope": 2}, 2),
        ({"RescaleIntercept": 0, "RescaleSlope": 1, "PixelRepresentation": 1}, 1),
        ({"ModalityLUTSequence": [modality_table()]}, 4),
    ],
)
def test_8_bits_of_dicom_are_shown_as_they_are_unless_a_scale_or_a_sign_changes_them(
    elements: dict, factor: int, modality: str
) -> None:
    stored = np.arange(30, 70, dtype=np.uint8).reshape(5, 8)
    own = {"RescaleIntercept": None, "RescaleSlope": None, **elements}
    shown = np.asarray(open_scan(dicom_bytes(dicom_dataset(stored, Modality=modality, **own))).slice_image(0))
    as_they_are = factor == 1 and "PixelRepresentation" not in elements
    levels = stored * float(factor)
    assert np.array_equal(shown, stored if as_they_are else apply_window(levels, percentile_window(levels)))


def test_lookup_tables_are_applied() -> None:
    voi = pydicom.Dataset()
    voi.LUTDescriptor = [1024, 0, 16]
    voi.add_new("LUTData", "US", [64 * i for i in range(1024)])
    stored = np.arange(40, dtype=np.uint8).reshape(5, 8)
    dataset = dicom_dataset(stored, Modality="DX", RescaleIntercept=None, RescaleSlope=None)
    dataset.ModalityLUTSequence, dataset.VOILUTSequence = [modality_table()], [voi]
    shown = np.asarray(open_scan(dicom_bytes(dataset)).slice_image(0))
    assert np.abs(shown - stored.astype(float) * 4 * 64 / 65535 * 255).max() <= 1


def test_padding_is_black_and_does_not_count() -> None:
    stored = STORED.copy()
    stored[0] = 60000
    elements = {"Modality": "MR", "PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": 60000}
    shown = np.asarray(open_scan(dicom_bytes(dicom_dataset(stored, **elements))).slice_image(0))
    assert (shown[0] == 0).all() and shown[1, 0] == 255 and shown[-1, -1] == 0


@pytest.mark.parametrize(("window", "expected"), [((1000, 500), (750, 1250)), ("lung", (-1350, 150))])
def test_a_window_of_the_call_is_that_of_dicom_nifti_and_arrays(window: object, expected: tuple) -> None:
    values = np.arange(-1600, 2400, 100, dtype=np.int16).reshape(5, 8)
    low, high = expected
    shown = ((values - low) / (high - low) * 255).clip(0, 255).round()
    sources = {
        "dicom": dicom_bytes(dicom_dataset(values)),
        "nifti": nifti_bytes(values[::-1, ::-1].T[:, :, None]),
        "array": values,
        "tensor": torch.from_numpy(values),
        "picture": Image.fromarray(values.astype(np.int32)),
    }
    for name, source in sources.items():
        assert np.abs(np.asarray(open_scan(source).slice_image(0, window)) - shown).max() <= 1, name


@pytest.mark.parametrize(
    ("window", "message"),
    [("liver", "abdomen, lung, bone"), ((1, 0), "width above 0"), ((1, 2, 3), "centre, width"), (7, "centre, width")],
)
def test_a_window_that_makes_no_sense_is_refused(window: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_scan(nifti_bytes(ct_volume())).slice_image(0, window)


def test_a_window_is_refused_where_there_are_no_grey_levels_to_choose() -> None:
    for source in (picture_bytes("PNG"), picture_bytes("PNG", "L")):
        with pytest.raises(ValueError, match="no grey levels"):
            open_scan(source).slice_image(0, (1, 2))
    with pytest.raises(ValueError, match="is of CT, but bytes is MR"):
        open_scan(dicom_bytes(dicom_dataset(STORED, Modality="MR"))).slice_image(0, "lung")


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        ("middle", [3]),
        ("all", list(range(7))),
        ("largest-foreground", [4]),
        ("2-4", [2, 3, 4]),
        ("5", [5]),
        (2, [2]),
        (np.int64(2), [2]),
        (-1, [6]),
        ("-1", [6]),
        ("5,-7,5", [5, 0, 5]),
        ([6, 0], [6, 0]),
    ],
)
def test_slices_are_chosen(slices: object, expected: list[int]) -> None:
    volume = np.full((5, 6, 7), -1000, np.int16)
    volume[2:4, 2:4, 2:6] = 100
    volume[1:, 1:, 4] = 100
    assert open_scan(nifti_bytes(volume)).choose_slices(slices) == expected


@pytest.mark.parametrize(
    "slices", [7, -8, "7", "0-7", "4-2", "-8", "1,", "1,9", "last", "", "-", "1-", 1.0, True, [0, 9], None]
)
def test_slices_that_are_not_there_are_refused(slices: object) -> None:
    with pytest.raises(ValueError, match="slice"):
        open_scan(nifti_bytes(ct_volume())).choose_slices(slices)


@pytest.mark.parametrize(
    "mask", [np.ones((5, 6), bool), np.ones((6, 5), np.uint8), np.ones((1, 6, 5), bool)], ids=["shape", "type", "axes"]
)
def test_a_mask_of_another_size_or_type_is_refused(mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected 6 x 5 bool"):
        open_scan(nifti_bytes(ct_volume())).to_source({0: mask})
    with pytest.raises(ValueError, match="no slice 7"):
        open_scan(nifti_bytes(ct_volume())).to_source({7: np.ones((6, 5), bool)})


@pytest.mark.parametrize("kind", ["dicom", "nifti", "nifti.gz", "nifti-2", "png", "npy", "jpeg", "tiff"])
def test_a_kind_is_recognised_by_content_in_a_file_of_any_name_and_in_bytes(kind: str, tmp_path: Path) -> None:
    npy = BytesIO()
    np.save(npy, STORED)
    content = {
        "dicom": lambda: dicom_bytes(dicom_dataset(STORED)),
        "nifti": lambda: nifti_bytes(ct_volume()),
        "nifti.gz": lambda: nifti_bytes(ct_volume(), packed=True),
        "nifti-2": lambda: nifti_bytes(ct_volume(), second=True),
        "png": lambda: picture_bytes("PNG", "I;16"),
        "npy": npy.getvalue,
        "jpeg": lambda: picture_bytes("JPEG"),
        "tiff": lambda: picture_bytes("TIFF"),
    }[kind]()
    (tmp_path / "file.png").write_bytes(content)
    scans = [open_scan(tmp_path / "file.png"), open_scan(str(tmp_path / "file.png")), open_scan(content, "upload")]
    expected = "dicom" if kind == "dicom" else "nifti" if kind.startswith("nifti") else "image"
    assert {scan.kind for scan in scans} == {expected}
    shown = [np.asarray(scan.slice_image(0)) for scan in scans]
    assert np.array_equal(shown[0], shown[1]) and np.array_equal(shown[0], shown[2])
    assert scans[0].files == (tmp_path / "file.png",) and scans[2].files == () and scans[2].name == "upload"


def test_the_first_volume_of_several_is_used_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    volume = ct_volume()
    with caplog.at_level(logging.WARNING):
        scan = open_scan(nifti_bytes(np.stack([volume, volume[::-1]], axis=3)))
    assert [record.getMessage() for record in caplog.records if "volume" in record.getMessage()], caplog.text
    single = open_scan(nifti_bytes(volume))
    assert all(np.array_equal(scan.slice_image(i), single.slice_image(i)) for i in range(7))
    assert scan.to_source({}).shape == volume.shape


def test_colour_voxels_are_shown_in_colour() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    voxels = np.ascontiguousarray(colours).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    scan = open_scan(nifti_bytes(voxels))
    assert np.array_equal(np.asarray(scan.slice_image(2)), np.moveaxis(colours[::-1, ::-1, 2], 0, 1))


def test_voxels_that_are_not_finite_are_black() -> None:
    voxels = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    voxels[0, 0] = np.nan
    shown = np.asarray(open_scan(nifti_bytes(voxels)).slice_image(3))
    assert shown[-1, -1] == 0 and shown.max() == 255


class TestProcessor:
    """The processor takes what open_scan takes."""

    def test_every_source_gives_the_pixels_of_its_slice(self, tmp_path: Path) -> None:
        content = nifti_bytes(ct_volume())
        (tmp_path / "v.nii").write_bytes(content)
        scan = open_scan(content)
        fullest = scan.choose_slices("largest-foreground")[0]
        processor = MedSightImageProcessor(size=28)
        for source in (content, tmp_path / "v.nii", str(tmp_path / "v.nii")):
            for arguments, index, window in [
                ({}, 3, None),
                ({"slices": 1}, 1, None),
                ({"slices": "largest-foreground", "window": "lung"}, fullest, "lung"),
                ({"window": (0, 900)}, 3, (0, 900)),
            ]:
                expected = processor(scan.slice_image(index, window), return_tensors="pt")
                out = processor(source, return_tensors="pt", **arguments)
                assert torch.equal(out["pixel_values"], expected["pixel_values"])
                assert out["original_sizes"].tolist() == [[6, 5]]

    def test_several_slices_are_several_images(self, image: Image.Image) -> None:
        content = nifti_bytes(ct_volume())
        processor = MedSightImageProcessor(size=28)
        assert len(processor(content, slices="all")["pixel_values"]) == 7
        out = processor([image, content, image], slices="2-4")
        assert [tuple(size) for size in out["original_sizes"]] == [(30, 50), (6, 5), (6, 5), (6, 5), (30, 50)]
        assert len(MedSightImageProcessor(size=28, slices="all")(content)["pixel_values"]) == 7

    def test_text_and_chat_take_volumes(self, processor: MedSightProcessor, tmp_path: Path) -> None:
        content = dicom_bytes(dicom_dataset(np.moveaxis(ct_volume(), 2, 0)))
        (tmp_path / "v").write_bytes(content)
        scan = open_scan(content)
        place = "<|image_pad|>"
        expected = processor(text=f"a {place}", images=scan.slice_image(5, "bone"), return_tensors="pt")
        for kwargs in ({"slices": 5, "window": "bone"}, {"images_kwargs": {"slices": 5, "window": "bone"}}):
            out = processor(text=f"a {place}", images=tmp_path / "v", return_tensors="pt", **kwargs)
            assert torch.equal(out["pixel_values"], expected["pixel_values"])
        both = processor(text=f"{place}{place}", images=content, slices="0-1", return_tensors="pt")
        assert len(both["pixel_values"]) == 2
        for entry in ({"path": str(tmp_path / "v")}, {"image": tmp_path / "v"}, {"image": content}):
            parts = [{"type": "image", **entry}, {"type": "text", "text": "x"}]
            chat = processor.apply_chat_template(
                [{"role": "user", "content": parts}],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"slices": 5, "window": "bone"},
            )
            assert torch.equal(chat["pixel_values"], expected["pixel_values"])

    @pytest.mark.parametrize("kind", ["pillow", "grey", "array", "tensor", "stack", "path", "bytes", "npy"])
    def test_a_window_of_the_processor_leaves_pictures_of_8_bits_which_refuse_that_of_a_call(
        self, kind: str, image: Image.Image, tmp_path: Path
    ) -> None:
        pixels = np.asarray(image.convert("L") if kind == "grey" else image)
        image.save(tmp_path / "image.png")
        picture = {
            "pillow": image,
            "grey": pixels,
            "array": pixels,
            "tensor": torch.from_numpy(pixels.copy()),
            "stack": pixels[None],
            "path": tmp_path / "image.png",
            "bytes": (tmp_path / "image.png").read_bytes(),
            "npy": npy_bytes(pixels),
        }[kind]
        plain, own = MedSightImageProcessor(size=28), MedSightImageProcessor(size=28, window="lung")
        values = np.arange(-1600, 2400, 100, dtype=np.int16).reshape(5, 8)
        for wide in (values, Image.fromarray(values.astype(np.int32)), npy_bytes(values)):
            both = own([wide, picture], return_tensors="pt")["pixel_values"]
            shown = open_scan(values).slice_image(0, "lung")
            assert torch.equal(both, plain([shown, picture], return_tensors="pt")["pixel_values"])
            assert torch.equal(both[:1], plain(wide, window="lung", return_tensors="pt")["pixel_values"])
            for processor in (plain, own):
                with pytest.raises(ValueError, match="is of 8 bits or in colour: it has no grey levels"):
                    processor([wide, picture], window="lung")

    @pytest.mark.parametrize("kind", ["dicom", "nifti", "pages"])
    def test_a_window_of_the_processor_leaves_scans_in_colour(self, kind: str) -> None:
        colours = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
        voxels = np.ascontiguousarray(colours).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
        pages = [Image.fromarray(page) for page in colours]
        source = {
            "dicom": dicom_bytes(dicom_dataset(colours[0], Modality="US")),
            "nifti": nifti_bytes(voxels),
            "pages": picture_bytes("TIFF", save_all=True, append_images=pages, size=(7, 6)),
        }[kind]
        plain, own = MedSightImageProcessor(size=28), MedSightImageProcessor(size=28, window=(40, 400))
        expected = plain(source, return_tensors="pt")["pixel_values"]
        assert torch.equal(own(source, return_tensors="pt")["pixel_values"], expected)
        with pytest.raises(ValueError, match="colour"):
            own(source, window=(40, 400))


def test_training_images_are_made_as_scans_are_shown(shared_data: Path) -> None:
    """The CT images of the training data, slice by slice: same orientation, same window."""
    scan = open_scan(shared_data / "volumes/tcia_sts/sts002_CT.nii.gz")
    for number, index in ((25, 16), (26, 18), (27, 20)):
        trained = Image.open(shared_data / f"segmentation/tcia_sts/test/{number:04d}_CT_extremity.png").convert("L")
        assert np.abs(np.asarray(trained).astype(int) - np.asarray(scan.slice_image(index))).max() <= 1


def test_the_series_of_the_shared_data_lies_where_its_label_map_does(shared_data: Path) -> None:
    folder = shared_data / "volumes/totalsegmentator"
    series, labels = open_scan(folder / "example_ct_dicom"), nibabel.load(folder / "example_ct_dicom_seg.nii.gz")
    corner, far = np.array([0, 0, 0, 1]), np.array([series.num_slices - 1, 511, 511, 1])
    ends = np.sort([(series.affine @ corner)[:3], (series.affine @ far)[:3]], axis=0)
    shape = np.array(labels.shape) - 1
    own = np.sort([labels.affine[:3, 3], (labels.affine @ [*shape, 1])[:3]], axis=0)
    assert np.allclose(ends, own, atol=0.01)


@pytest.mark.parametrize("fragments", [1, 2])
def test_compressed_frames_without_a_table_are_looked_for_once(
    fragments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.new("L", (8, 5), level) for level in range(0, 240, 6)]
    photos = []
    for frame in frames:
        file = BytesIO()
        frame.save(file, "JPEG")
        photos.append(file.getvalue())
    dataset = dicom_dataset(np.zeros((len(frames), 5, 8), np.uint8), Modality="US")
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.PixelData = pydicom.encaps.encapsulate(photos, fragments_per_frame=fragments, has_bot=False)
    scan = open_scan(dicom_bytes(dataset))
    walked = 0
    parse, generate = pydicom.encaps.parse_fragments, pydicom.encaps.generate_fragments

    def counted_parse(*arguments: object, **options: object) -> tuple:
        nonlocal walked
        found = parse(*arguments, **options)
        walked += found[0]
        return found

    def counted_generate(*arguments: object, **options: object) -> Iterator[bytes]:
        nonlocal walked
        for fragment in generate(*arguments, **options):
            walked += 1
            yield fragment

    monkeypatch.setattr(pydicom.encaps, "parse_fragments", counted_parse)
    monkeypatch.setattr(pydicom.encaps, "generate_fragments", counted_generate)
    for index, frame in enumerate(frames):
        assert np.abs(np.asarray(scan.slice_image(index), dtype=int) - np.asarray(frame)).max() <= 1
    assert walked <= 4 * fragments * len(frames)


@pytest.mark.parametrize(
    "name", ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"]
)
def test_the_encodings_of_one_image_look_alike(name: str) -> None:
    paths = dict(shipped_dicoms())
    assert np.array_equal(open_scan(paths[name]).slice_image(0), open_scan(paths["MR_small_expb.dcm"]).slice_image(0))
