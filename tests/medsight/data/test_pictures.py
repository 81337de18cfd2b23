"""Images and masks are decoded wholly, or refused with the name of their file."""

import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter

from medsight.data.pictures import EmptyMaskError, MaskSizeError, MaskValuesError, decode_mask, read_mask, read_picture
from processing_medsight.image_loading_medsight import to_array


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


GREY = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))


def both(path: Path) -> tuple[dict, dict]:
    """A picture by its path and by its bytes."""
    return {"path": str(path), "bytes": None}, {"path": None, "bytes": path.read_bytes()}


def test_a_16_bit_scan_stays_16_bit() -> None:
    scan = Image.fromarray(np.full((6, 8), 40_000, dtype=np.uint16))
    assert np.asarray(read_picture({"bytes": encoded(scan)})).max() == 40_000


def test_a_turned_picture_is_the_same_upright_by_path_and_by_bytes(tmp_path: Path) -> None:
    pixels = np.asarray(GREY)
    upright = {1: pixels, 5: pixels.T, 6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).T, 8: np.rot90(pixels)}
    for orientation, expected in upright.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        GREY.save(tmp_path / "turned.tiff", tiffinfo={274: orientation})
        GREY.save(tmp_path / "turned.png", exif=exif)
        for entry in (*both(tmp_path / "turned.tiff"), *both(tmp_path / "turned.png")):
            assert np.array_equal(np.asarray(read_picture(entry)), expected), orientation


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int32, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_a_mask_is_what_its_tiff_stores_whichever_end_is_white(dtype: type, photometric: str, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    inside = np.zeros((6, 8), bool)
    inside[2:4, 3:5] = True
    tifffile.imwrite(tmp_path / "mask.tiff", inside.astype(dtype), photometric=photometric)
    for entry in both(tmp_path / "mask.tiff"):
        assert np.array_equal(read_mask(entry, (8, 6)), inside)
        shown = to_array(read_picture(entry), "picture", convert_rgb=False, rescale=True)[:, :, 0]
        assert (shown[2, 3] > shown[0, 0]) == (photometric == "minisblack")


def test_a_fax_of_a_mask_means_what_it_shows() -> None:
    fax = encoded(Image.fromarray(DISC), "TIFF", compression="group4", tiffinfo={262: 0})
    assert np.array_equal(read_mask({"bytes": fax}, (96, 80)), DISC)


ROWS, COLUMNS = np.mgrid[:80, :96]
DISC = (ROWS - 40) ** 2 + (COLUMNS - 50) ** 2 < 25**2
WHITE = Image.fromarray(DISC.astype(np.uint8) * 255)
JPEG = encoded(WHITE, "JPEG")
BLURRED = {
    "JPEG": JPEG,
    "coloured JPEG": encoded(WHITE.convert("RGB"), "JPEG"),
    "WebP": encoded(WHITE, "WEBP"),
    "JPEG 2000": encoded(WHITE, "JPEG2000", quality_layers=[20]),
    "JPEG in TIFF": encoded(WHITE, "TIFF", compression="jpeg"),
    "PNG of a JPEG": encoded(Image.open(BytesIO(JPEG))),
    "smoothed": encoded(WHITE.filter(ImageFilter.GaussianBlur(1))),
    "smoothed 16-bit": encoded(Image.fromarray(np.asarray(WHITE.filter(ImageFilter.BoxBlur(2))) * np.uint16(256))),
    "smoothed floats": encoded(Image.fromarray(gaussian_filter(DISC.astype(np.float32), 1)), "TIFF"),
    "soft alpha": encoded(Image.merge("LA", (WHITE, WHITE.filter(ImageFilter.GaussianBlur(1))))),
}


@pytest.mark.parametrize("content", BLURRED.values(), ids=BLURRED.keys())
def test_a_blurred_mask_keeps_its_size_and_is_said_to_be_blurred(content: bytes) -> None:
    mask, blurred = decode_mask({"path": None, "bytes": content}, (96, 80))
    assert blurred and np.count_nonzero(mask != DISC) < 0.01 * DISC.sum()


LABELS = DISC + (DISC & (COLUMNS > 60)).astype(np.uint8)
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], dtype=np.uint8)[LABELS]
LINES = np.where(ROWS % 10 == 3, 1, np.where(COLUMNS % 10 == 3, 2, 0)).astype(np.uint8)
SEVERAL = {
    "ids": ("0, 1, 2", encoded(Image.fromarray(LABELS))),
    "16-bit ids": ("0, 300, 600", encoded(Image.fromarray(LABELS * np.uint16(300)))),
    "spread ids": ("0, 127, 254", encoded(Image.fromarray(LABELS * np.uint8(127)))),
    "a label for what to ignore": ("0, 1, 255", encoded(Image.fromarray(np.array([0, 1, 255], np.uint8)[LABELS]))),
    "fine lines": ("0, 1, 2", encoded(Image.fromarray(LINES))),
    "lossless WebP": ("0, 1, 2", encoded(Image.fromarray(LABELS).convert("RGB"), "WEBP", lossless=True)),
    "JPEG 2000": ("0, 1, 2", encoded(Image.fromarray(LABELS), "JPEG2000")),
    "colours": ("(0, 0, 0), (0, 255, 0), (255, 0, 0)", encoded(Image.fromarray(COLOURS))),
    "colours of a palette": ("(255, 0, 0)", encoded(Image.fromarray(COLOURS).quantize(), "GIF")),
    "colours in JPEG": ("(0, 255, 0)", encoded(Image.fromarray(COLOURS), "JPEG")),
    "many objects": ("72: 0, 1, 2", encoded(Image.fromarray((ROWS // 10 * 9 + COLUMNS // 11).astype(np.uint8)))),
    "a photograph": ("got ", encoded(Image.fromarray(np.uint8(ROWS * 2 + COLUMNS % 7)))),
    "two pages": ("2 pages", encoded(WHITE, "TIFF", save_all=True, append_images=[WHITE])),
}


@pytest.mark.parametrize(("shown", "content"), SEVERAL.values(), ids=SEVERAL.keys())
def test_a_mask_of_several_structures_is_refused_with_its_values(shown: str, content: bytes) -> None:
    with pytest.raises(MaskValuesError, match=rf"labels\.png: .*{re.escape(shown)}.*`target` in a manifest"):
        read_mask({"path": "labels.png", "bytes": content}, (96, 80))


BAD = {
    "truncated": encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)))[:900],
    "NaN": encoded(Image.fromarray(np.array([[0.5, np.nan]], dtype=np.float32)), "TIFF"),
    "infinite": encoded(Image.fromarray(np.array([[0.5, np.inf]], dtype=np.float32)), "TIFF"),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("embedded", [False, True], ids=["file", "bytes"])
def test_a_bad_image_is_refused_by_name(tmp_path: Path, content: bytes, embedded: bool) -> None:
    path = tmp_path / "scan-17.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"scan-17\.png"):
        read_picture({"path": str(path), "bytes": content if embedded else None})


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    missing = tmp_path / ("x" * 80)  # as long as a base64 image might be
    with pytest.raises(FileNotFoundError, match="x{80}"):
        read_mask({"path": str(missing), "bytes": None}, (8, 6))
    with pytest.raises(ValueError, match="neither"):
        read_picture({"path": None, "bytes": None})


def test_everything_but_zero_is_inside_whatever_a_mask_is_stored_as() -> None:
    inside = np.zeros((6, 8), dtype=bool)
    inside[1:3, 2:7] = True
    palette = Image.fromarray(1 - inside.astype(np.uint8))  # the first entry is the one inside
    palette.putpalette([255, 255, 255, 0, 0, 0])
    stored = {
        "1-bit": Image.fromarray(inside),
        "0 and 255": Image.fromarray(inside.astype(np.uint8) * 255),
        "0 and 1": Image.fromarray(inside.astype(np.uint8)),
        "16-bit": Image.fromarray(inside.astype(np.uint16)),
        "RGB": Image.fromarray(np.stack([inside * np.uint8(9), inside * 0, inside * 0], -1).astype(np.uint8)),
        "palette": palette,
    }
    for kind, image in stored.items():
        mask = read_mask({"path": kind, "bytes": encoded(image)}, (8, 6))
        assert mask.dtype == np.bool_ and np.array_equal(mask, inside), kind


def test_a_mask_of_another_size_and_an_empty_one_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "liver.png"
    Image.fromarray(np.zeros((6, 8), dtype=bool)).save(path)
    with pytest.raises(EmptyMaskError, match=r"liver\.png.*empty"):
        read_mask({"path": path}, (8, 6))
    with pytest.raises(MaskSizeError, match=r"liver\.png.*8x6.*6x8"):
        read_mask({"path": path}, (6, 8))
