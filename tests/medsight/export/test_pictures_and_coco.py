"""PNG and COCO: the same pixels, by readers that share nothing with the writers; measures and pictures."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from medsight.export import FoundRegion, measure, mosaic, overlay, write_masks
from medsight.export.drawing import PALETTE
from medsight.export.outlines import outlines
from medsight.scans import Scan, open_scan

from .scans import bright_regions, bright_volume, fill, write_nifti_volume


all_kinds = pytest.mark.parametrize("scan", ["series", "nifti", "picture", "array", "pages"], indirect=True)


@all_kinds
def test_png_and_coco_hold_the_same_pixels(scan: Scan, tmp_path: Path) -> None:
    regions = bright_regions(scan)
    files = write_masks(scan, regions, tmp_path / "out", ["png", "coco"])
    assert all(file.is_file() for file in files) and len(files) == len(regions) + 3
    by_form = {form: COCO(tmp_path / "out" / f"coco-{form}.json") for form in ("rle", "polygons")}
    for number, region in enumerate(regions, 1):
        with Image.open(tmp_path / "out" / f"mask-{number:02d}.png") as opened:
            assert set(np.unique(opened)) <= {0, 255} and opened.mode == "L"
            assert np.array_equal(np.asarray(opened) > 0, region.mask)
        if not region.mask.any():
            assert number not in by_form["rle"].anns and number not in by_form["polygons"].anns
            continue
        parts = [np.reshape(part, (-1, 2)) for part in by_form["polygons"].anns[number]["segmentation"]]
        assert np.array_equal(fill(parts, *region.mask.shape), region.mask)
        for coco in by_form.values():
            annotation = coco.anns[number]
            assert np.array_equal(coco.annToMask(annotation), region.mask)
            assert annotation["area"] == region.mask.sum() and annotation["region_code"] == region.code
            assert coco.imgs[annotation["image_id"]]["slice_index"] == region.slice_index
            assert coco.cats[annotation["category_id"]]["name"] == "bright"
            x, y, width, height = annotation["bbox"]
            outside = region.mask.copy()
            outside[y : y + height, x : x + width] = False
            assert not outside.any()


@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 0.7, 0.98, 1.0])
def test_outlines_cover_exactly_the_mask(density: float) -> None:
    """Noise has every hard case: single pixels, touching corners, holes in holes, borders."""
    from pycocotools.mask import decode, frPyObjects, merge

    rng = np.random.default_rng(0)
    for _ in range(20):
        height, width = rng.integers(1, 30, size=2)
        mask = rng.random((height, width)) < density
        parts = outlines(mask)
        assert np.array_equal(fill(parts, height, width), mask)
        if parts:
            encoded = frPyObjects([part.ravel().tolist() for part in parts], int(height), int(width))
            assert np.array_equal(decode(merge(encoded)), mask)


def test_sizes_follow_from_the_spacing(series: Path, tmp_path: Path) -> None:
    scan = open_scan(series)
    regions = bright_regions(scan)
    twice = [*regions, FoundRegion(2, regions[2].mask, " BRIGHT ", "[C1_1]", None)]
    measures = measure(scan, twice)
    assert measures.area_mm2 == pytest.approx([region.mask.sum() * 0.75 * 0.5 for region in twice])
    voxels = sum(region.mask.sum() for region in regions)
    assert measures.volume_ml == {"bright": pytest.approx(voxels * 0.75 * 0.5 * 2.5 / 1000)}
    write_masks(scan, twice, tmp_path / "out", [])
    content = json.loads((tmp_path / "out" / "regions.json").read_text("utf-8"))
    assert [region["area_mm2"] for region in content["regions"]] == pytest.approx(measures.area_mm2)
    assert content["labels"][0]["volume_ml"] == pytest.approx(measures.volume_ml["bright"])
    assert content["scan"]["plane"] is None
    picture = open_scan(np.zeros((9, 6), np.uint8))
    unknown = measure(picture, bright_regions(picture))
    assert unknown.area_mm2 == [None] and unknown.volume_ml == {"bright": None}


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_sheared_grid_is_as_large_as_its_determinant(plane: str) -> None:
    """As of a CT with a tilted gantry, in each plane."""
    affine = np.array([[2.0, 0, 0, 0], [0, 2, 1.5, 0], [0, 0.5, 4, 0], [0, 0, 0, 1]])
    voxels = np.ones((5, 6, 7), dtype=np.int16)
    scan = open_scan(nibabel.Nifti1Image(voxels, affine).to_bytes(), plane=plane)
    mask = np.ones((scan.height, scan.width), dtype=bool)
    measures = measure(scan, [FoundRegion(index, mask, "all", "[C0_0]", None) for index in range(scan.num_slices)])
    assert measures.volume_ml["all"] == pytest.approx(voxels.size * abs(np.linalg.det(affine)) / 1000)
    first, second = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}[plane]
    pixel = np.linalg.norm(np.cross(affine[:3, first], affine[:3, second]))
    assert measures.area_mm2[0] == pytest.approx(mask.size * pixel)


@all_kinds
def test_pictures_show_each_label_in_its_colour(scan: Scan) -> None:
    regions = bright_regions(scan)
    sheet = mosaic(scan, regions)
    drawn = overlay(scan.slice_image(regions[-1].slice_index), regions[-1:])
    for image in (sheet, drawn):
        colors = {color for _, color in image.getcolors(1 << 24) or []}
        assert image.mode == "RGB" and PALETTE[0] in colors and PALETTE[1] not in colors
    assert max(sheet.size) <= 2048 + 200


def test_a_long_volume_is_thinned_out_in_its_mosaic(tmp_path: Path) -> None:
    write_nifti_volume(tmp_path / "long.nii", bright_volume((12, 14, 90)))
    scan = open_scan(tmp_path / "long.nii")
    mask = np.ones((scan.height, scan.width), dtype=bool)
    few = mosaic(scan, [FoundRegion(index, mask, "a", "[C0_0]", 1.0) for index in range(0, scan.num_slices, 9)])
    many = mosaic(scan, [FoundRegion(index, mask, "a", "[C0_0]", 1.0) for index in range(scan.num_slices)])
    assert many.height > few.height and max(many.size) <= 2048 + 200
    assert mosaic(scan, []).size[0] > 0
