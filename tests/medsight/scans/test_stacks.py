"""Arrays and TIFFs of several slices: what is a volume and what a picture, its grey levels, masks on its own grid."""

import itertools
import logging
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medsight.scans import open_scan, stack
from medsight.scans.windows import Window, apply_window, percentile_window
from processing_medsight.image_loading_medsight import to_array
from tests.medsight.scans.scan_files import nifti_bytes, npy_bytes, tiff_bytes


RNG = np.random.default_rng(0)
VOLUME = RNG.integers(-1000, 2000, (7, 9, 6)).astype(np.int16)
DTYPES = ("int16", "uint16", "int32", "uint32", "int64", "float16", "float32", "float64", ">i2", ">f4")
PAGES = [Image.fromarray(RNG.integers(0, 256, (9, 6, 3), dtype=np.uint8)) for _ in range(5)]


SIZES = (1, 2, 3, 4, 5, 9)


@pytest.mark.parametrize("kind", ["array", "by columns", "tensor", "path", "bytes"])
@pytest.mark.parametrize("volume", [False, True])
def test_the_last_axis_and_the_first_hold_channels_or_else_slices(kind: str, volume: bool, tmp_path: Path) -> None:
    """What can be a picture is one, bit by bit, unless its first axis is said to hold slices."""
    for first, last in itertools.product(SIZES, SIZES):
        array = RNG.integers(0, 256, (first, 8, last)).astype(np.int32)
        (tmp_path / "array.npy").write_bytes(npy_bytes(array))
        source = {
            "array": array,
            "by columns": npy_bytes(np.asfortranarray(array)),
            "tensor": torch.from_numpy(array),
            "path": tmp_path / "array.npy",
            "bytes": npy_bytes(array),
        }[kind]
        scan = open_scan(source, volume=volume)
        if last in (1, 2, 3, 4) or (first in (1, 2, 3, 4) and not volume):
            assert (scan.kind, scan.num_slices) == ("image", 1)
            expected = to_array(array, "x", convert_rgb=True, rescale=True)
            assert np.array_equal(np.asarray(scan.slice_image(0).convert("RGB")), expected)
        else:
            assert (scan.kind, scan.num_slices, scan.height, scan.width) == ("array", first, 8, last)
            assert np.array_equal(scan.slice_image(0, (128, 256)), apply_window(array[0], Window(128, 256)))


@pytest.mark.parametrize("shape", [(64, 48, 5), (16, 16, 5), (12, 40, 5), (64, 64, 20)])
def test_an_array_whose_last_axis_is_short_is_a_volume_only_where_the_caller_says_so(shape: tuple) -> None:
    array = RNG.integers(0, 999, shape)
    for source in (array, npy_bytes(array), torch.from_numpy(array)):
        with pytest.raises(ValueError, match=rf"^upload: .*{shape[2]} channels, or .*moveaxis.*volume=True"):
            open_scan(source, "upload")
        assert open_scan(source, volume=True).num_slices == shape[0]
        assert open_scan(np.moveaxis(array, -1, 0)).num_slices == shape[2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_grey_levels_of_any_type_are_shown_by_percentiles_of_the_volume_or_a_window(dtype: str) -> None:
    array = (VOLUME.clip(0) if "u" in dtype else VOLUME).astype(dtype)
    scan = open_scan(array)
    whole = percentile_window(array.astype(np.float64))
    for index in range(7):
        assert np.array_equal(scan.slice_image(index), apply_window(array[index], whole))
        assert np.array_equal(scan.slice_image(index, (100, 500)), apply_window(array[index], Window(100, 500)))


def test_8_bits_are_shown_as_they_are_or_with_a_window() -> None:
    array = RNG.integers(0, 256, (7, 9, 6), dtype=np.uint8)
    scan = open_scan(array)
    assert np.array_equal(scan.slice_image(3), array[3])
    assert np.array_equal(scan.slice_image(3, (100, 50)), open_scan(array.astype(np.int16)).slice_image(3, (100, 50)))
    assert np.array_equal(open_scan(array > 99).slice_image(3), (array[3] > 99) * np.uint8(255))


@pytest.mark.parametrize("kind", ["array", "nifti"])
def test_values_that_are_not_finite_are_black_and_do_not_count(kind: str) -> None:
    array = VOLUME.astype(np.float32)
    array[2, 0] = np.nan
    for values, brightest in ((array, 255), (np.full((7, 9, 6), np.nan), 0)):
        source = values if kind == "array" else nifti_bytes(values.T[::-1, ::-1])
        shown = np.asarray(open_scan(source).slice_image(2))
        assert (shown[0] == 0).all() and shown.max() == brightest


SOURCES = {"array": VOLUME, "npy": npy_bytes(VOLUME), "tiff": tiff_bytes(PAGES)}


@pytest.mark.parametrize("kind", list(SOURCES))
def test_masks_go_back_onto_the_own_grid(kind: str) -> None:
    scan = open_scan(SOURCES[kind])
    grid = RNG.random((scan.num_slices, 9, 6)) > 0.5
    assert np.array_equal(scan.to_source({i: grid[i] for i in range(scan.num_slices)}), grid)
    one = scan.to_source({2: grid[2]})
    assert np.array_equal(one[2], grid[2]) and one.sum() == grid[2].sum()
    assert scan.affine is None and scan.pixel_spacing is None and scan.slice_spacing is None and scan.plane is None


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
@pytest.mark.parametrize("compression", [None, "tiff_deflate", "tiff_lzw"])
def test_pages_of_a_tiff_are_slices(mode: str, compression: str | None, tmp_path: Path) -> None:
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        pages = [Image.fromarray(page.clip(0).astype(kind)) for page in VOLUME]
        values = np.stack([np.asarray(page) for page in pages])
        expected = [apply_window(page, percentile_window(values)) for page in values]
    else:
        pages = [page.convert(mode) for page in PAGES]
        expected = [to_array(page, "page", convert_rgb=True, rescale=True) for page in pages]
    content = tiff_bytes(pages, compression=compression)
    (tmp_path / "pages.tif").write_bytes(content)
    for source in (content, tmp_path / "pages.tif"):
        scan = open_scan(source)
        assert (scan.kind, scan.num_slices, scan.height, scan.width) == ("image", len(pages), 9, 6)
        for index in (*reversed(range(len(pages))), 2, 0):  # in any order
            shown = np.asarray(scan.slice_image(index).convert("RGB" if expected[0].ndim == 3 else "L"))
            assert np.array_equal(shown, expected[index]), index
    if mode in ("L", "I;16", "I", "F"):
        assert np.asarray(scan.slice_image(1, (100, 50))).max() == 255
    else:
        with pytest.raises(ValueError, match="in colour"):
            scan.slice_image(1, (100, 50))


@pytest.mark.parametrize("compression", [None, "tiff_deflate"])
@pytest.mark.parametrize("pages", [1, 5])
def test_16_bits_of_a_tiff_whose_0_is_white_are_inverted_once(pages: int, compression: str | None) -> None:
    values = VOLUME[:pages].clip(0).astype(np.uint16)
    tags = {274: 3}  # to be turned upside down
    black = tiff_bytes([Image.fromarray(page) for page in values], tiffinfo=tags)
    inverted = [Image.fromarray(65535 - page) for page in values]
    white = tiff_bytes(inverted, tiffinfo={**tags, 262: 0}, compression=compression)
    mask = np.arange(54).reshape(9, 6) > 20
    scan, expected = open_scan(white), open_scan(black)
    for window in (None, (500, 900), None):
        for index in (*range(pages), 0):
            assert np.array_equal(scan.slice_image(index, window), expected.slice_image(index, window))
    assert np.array_equal(scan.to_source({0: mask}), expected.to_source({0: mask}))
    with Image.open(BytesIO(white)) as held, Image.open(BytesIO(black)) as other:
        for window in (None, (500, 900), None):
            assert np.array_equal(open_scan(held).slice_image(0, window), open_scan(other).slice_image(0, window))


def test_turned_pages_are_shown_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    scan = open_scan(tiff_bytes(PAGES, exif=exif))
    for index in (4, 1, 1, 0):
        shown = np.asarray(scan.slice_image(index))
        assert shown.shape[:2] == (scan.height, scan.width) == (6, 9)
        assert np.array_equal(shown, np.rot90(np.asarray(PAGES[index]), -1))


@pytest.mark.parametrize(
    ("kind", "second"),
    [("TIFF", Image.new("RGB", (3, 4))), ("TIFF", Image.new("L", (6, 9))), ("PNG", PAGES[1])],
    ids=["sizes", "modes", "moving picture"],
)
def test_what_is_no_volume_shows_its_first_frame_with_a_warning(
    kind: str, second: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    file = BytesIO()
    PAGES[0].save(file, kind, save_all=True, append_images=[second])
    with caplog.at_level(logging.WARNING):
        scan = open_scan(file.getvalue(), "upload")
    assert scan.num_slices == 1 and np.array_equal(scan.slice_image(0), np.asarray(PAGES[0]))
    assert "upload holds 2 frames: only the first is used" in caplog.text


def test_a_damaged_page_is_named() -> None:
    content = bytearray(tiff_bytes(PAGES, compression="tiff_deflate"))
    with Image.open(BytesIO(bytes(content))) as opened:
        opened.seek(3)
        at = opened.tag_v2[273][0]
    content[at : at + 20] = bytes(20)
    scan = open_scan(bytes(content), "upload")
    scan.slice_image(2)
    with pytest.raises(ValueError, match="upload, page 3"):
        scan.slice_image(3)
    scan.slice_image(4)
    with pytest.raises(ValueError, match="upload"):
        open_scan(tiff_bytes(PAGES)[:-30], "upload").slice_image(4)


@pytest.mark.parametrize("kind", list(SOURCES))
def test_what_is_too_large_is_refused_before_it_is_shown(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "MAX_VOXELS", 100)
    with pytest.raises(ValueError, match=r"slices of 9 x 6 pixels: at most .* 100 in all"):
        open_scan(SOURCES[kind])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((7, 0, 9)), "no pixels"),
        (np.zeros((0, 9, 9)), "no pixels"),
        (np.zeros((9, 9, 0)), "no pixels"),
        (VOLUME.astype(complex), "expected numbers"),
        (npy_bytes(VOLUME.astype(complex)), "array of numbers"),
        (npy_bytes(np.array([{"a": 1}] * 300).reshape(5, 6, 10)), "array of numbers"),
    ],
)
@pytest.mark.parametrize("volume", [False, True])
def test_numbers_alone_make_a_volume(source: object, message: str, volume: bool) -> None:
    with pytest.raises(ValueError, match=message):
        open_scan(source, volume=volume)


def test_a_plane_is_of_nifti_alone() -> None:
    for source in (*SOURCES.values(), PAGES[0]):
        for plane in ("axial", "coronal"):
            with pytest.raises(ValueError, match="is for NIfTI volumes"):
                open_scan(source, plane=plane)
    with pytest.raises(ValueError, match="expected one of axial, coronal, sagittal"):
        open_scan(VOLUME, plane="oblique")
