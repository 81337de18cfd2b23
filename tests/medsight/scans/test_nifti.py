"""NIfTI volumes: the right slices on any grid, masks back onto it, spacing and grey levels."""

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsight.checkpoint import shipped_checkpoint
from medsight.scans import open_scan
from tests.medsight.scans.scan_files import ct_volume, nifti_bytes, shows, soft_tissue


nibabel = pytest.importorskip("nibabel")

ORIENTATIONS = [
    np.array(list(zip(axes, flips, strict=True)))
    for axes in itertools.permutations(range(3))
    for flips in itertools.product([1, -1], repeat=3)
]
SPACING = np.diag([0.5, 1.5, 4.5, 1.0])  # right, front, up
# plane -> what a slice shows of a (right, anterior, superior) volume, and the axis that is cut through
PLANES = {
    "axial": (lambda volume, index: volume[::-1, ::-1, index].T, 2),
    "coronal": (lambda volume, index: volume[::-1, index, ::-1].T, 1),
    "sagittal": (lambda volume, index: volume[index, ::-1, ::-1].T, 0),
    "AI": (lambda volume, index: volume[index, :, ::-1].T, 0),  # front at the right, feet at the bottom
    "SR": (lambda volume, index: volume[:, index, :], 1),
}


def turned(volume: np.ndarray, orientation: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same body on a grid whose axes are others."""
    back = nibabel.orientations.inv_ornt_aff(orientation, volume.shape)
    return nibabel.apply_orientation(volume, orientation), affine @ back


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
    across, down = {"SR": (2, 0)}.get(plane or "", [axis for axis in range(3) if axis != through])
    sizes, spacing = volume.shape, np.diag(SPACING)
    assert scan.plane == {"AI": "sagittal", "SR": "coronal"}.get(plane or "axial", plane or "axial")
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
        ({"sform_code": 0}, (1.5, 0.5), 4.5),
        ({"sform_code": 0, "pixdim": [1, 0.5, np.nan, 2, 1, 1, 1, 1]}, None, 2),
        ({"sform_code": 0, "pixdim": [1, 0.5, 1.5, 0, 1, 1, 1, 1]}, (1.5, 0.5), None),
        ({"srow_x": np.nan}, (1.5, 0.5), 4.5),
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


@pytest.mark.parametrize(
    "fields",
    [
        {"sform_code": 0, "quatern_b": 0, "quatern_c": 0, "quatern_d": 1 + 5e-7},
        {"sform_code": 0, "quatern_b": 0.6, "quatern_c": 0, "quatern_d": 0.8000004},
        {"srow_x": 0, "quatern_b": 0, "quatern_c": 0, "quatern_d": 1},  # flat
        {"srow_z": np.inf, "quatern_b": 0, "quatern_c": 0, "quatern_d": 1},
    ],
)
def test_a_nifti_is_placed_by_its_qform_as_simpleitk_places_it(fields: dict, tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    content = nifti_bytes(ct_volume(), SPACING)
    header = nibabel.Nifti1Header(content[:348], check=False)
    for field, value in {"qform_code": 1, **fields}.items():
        header[field] = value
    (tmp_path / "file.nii").write_bytes(header.binaryblock + content[348:])
    scan = open_scan(tmp_path / "file.nii")
    header["sform_code"] = 0  # which SimpleITK would take, flat or not
    (tmp_path / "other.nii").write_bytes(header.binaryblock + content[348:])
    image = sitk.ReadImage(str(tmp_path / "other.nii"))
    to_ras = np.diag([-1, -1, 1]) @ np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
    assert np.allclose(scan.affine[:3, :3], to_ras, atol=1e-5)


@pytest.mark.parametrize("padding", [-1024, -2048, -8192, -32768])
@pytest.mark.parametrize("slope", [1, 0.5])
def test_padding_around_a_ct_does_not_hide_that_it_is_one(padding: int, slope: float) -> None:
    volume = np.kron(ct_volume(), np.ones((4, 4, 4), np.int16)).astype(float)
    volume[:3] = padding
    image = nibabel.Nifti1Image((volume / slope).clip(-(2**15), 2**15 - 1).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(slope, 0)
    assert shows(open_scan(image.to_bytes()).slice_image(8), soft_tissue(volume[::-1, ::-1, 8].T))


def test_levels_far_below_air_make_no_ct_of_what_is_none() -> None:
    volume = np.random.default_rng(0).integers(-20000, 20000, (20, 20, 20)).astype(np.int16)
    scan = open_scan(nifti_bytes(volume))
    assert len(np.unique(np.asarray(scan.slice_image(3)))) > 100


@pytest.mark.parametrize(("unit", "per_mm"), [("mm", 1), ("micron", 1000), ("meter", 0.001), ("unknown", 1)])
def test_spacing_is_in_millimetres_whatever_the_unit_of_a_nifti(unit: str, per_mm: float) -> None:
    image = nibabel.Nifti1Image(ct_volume(), np.diag([0.5 * per_mm, 1.5 * per_mm, 2 * per_mm, 1]))
    image.header.set_xyzt_units(unit)
    scan = open_scan(image.to_bytes())
    assert np.allclose(scan.pixel_spacing, (1.5, 0.5)) and np.isclose(scan.slice_spacing, 2)
    assert np.isclose(scan.pixel_mm2, 0.75)


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


def test_training_images_lie_as_the_shipped_model_says(shared_data: Path) -> None:
    orientations = json.loads((shipped_checkpoint() / "config.json").read_text("utf-8"))["group_orientations"]
    scan = open_scan(
        shared_data / "volumes/msd_hippocampus/images/hippocampus_001.nii.gz", plane=orientations["MRI brain"]
    )
    trained = Image.open(shared_data / "segmentation/msd_hippocampus/train/0001_MRI-T1_brain.png").convert("L")
    shown = scan.slice_image(17).resize(trained.size, Image.Resampling.BICUBIC)
    assert np.corrcoef(np.ravel(shown), np.ravel(trained))[0, 1] > 0.999
    assert orientations["CT extremity"] == open_scan(nifti_bytes(ct_volume())).orientation  # see below


def test_training_images_are_made_as_scans_are_shown(shared_data: Path) -> None:
    """The CT images of the training data, slice by slice: same orientation, same window."""
    scan = open_scan(shared_data / "volumes/tcia_sts/sts002_CT.nii.gz")
    for number, index in ((25, 16), (26, 18), (27, 20)):
        trained = Image.open(shared_data / f"segmentation/tcia_sts/test/{number:04d}_CT_extremity.png").convert("L")
        assert np.abs(np.asarray(trained).astype(int) - np.asarray(scan.slice_image(index))).max() <= 1
