"""Images and masks are decoded wholly, or refused with the name of their file."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsight.data.pictures import EmptyMaskError, MaskSizeError, read_mask, read_picture
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


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.float64])
@pytest.mark.parametrize("photometric", ["minisblack", "rgb"])
def test_a_mask_of_many_bits_has_all_that_is_not_black(dtype: type, photometric: str, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.zeros((6, 8, 3), dtype)
    values[2:4, 3:5], values[5, 5] = 1, 65535 if dtype is np.uint16 else 2**32 - 1  # a label of 1 beside the largest
    values = values if photometric == "rgb" else values[:, :, 0]
    tifffile.imwrite(tmp_path / "mask.tiff", values, photometric=photometric)
    for entry in both(tmp_path / "mask.tiff"):
        assert np.array_equal(read_mask(entry, (8, 6)), np.atleast_3d(values).any(axis=2))


@pytest.mark.parametrize(
    "kind", [{"format": "JPEG"}, {"format": "WEBP"}, {"format": "JPEG2000", "quality_layers": [20]}]
)
def test_a_lossy_mask_does_not_grow_by_its_noise(kind: dict) -> None:
    rows, columns = np.mgrid[:80, :96]
    inside = (rows - 40) ** 2 + (columns - 50) ** 2 < 25**2
    for image in (Image.fromarray(inside), Image.fromarray(inside * np.uint8(255)).convert("RGB")):
        content = encoded(image.convert("L") if image.mode == "1" else image, **kind)
        assert np.count_nonzero(np.asarray(Image.open(BytesIO(content)))) > 1.1 * inside.sum()  # there is noise
        read = read_mask({"bytes": content}, (96, 80))
        assert np.count_nonzero(read != inside) < 0.01 * inside.sum()


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
