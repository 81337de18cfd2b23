"""What is shown against SimpleITK, tifffile and the standard's own formulas: the same, or refused by name."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medsight.scans import open_scan
from medsight.scans.windows import Window, apply_window
from processing_medsight.image_loading_medsight import to_array
from tests.medsight.scans.scan_files import dicom_bytes, dicom_dataset, shipped_dicoms


pydicom = pytest.importorskip("pydicom")
sitk = pytest.importorskip("SimpleITK")
tifffile = pytest.importorskip("tifffile")

SIZE = (12, 16)
# Colours of 16 and 32 bits in RLE: pydicom has the red that is drawn there, SimpleITK a mixture of bytes.
NOT_SIMPLEITK = {f"SC_rgb_rle_{bits}bit{frames}.dcm" for bits in (16, 32) for frames in ("", "_2frame")}


def read_by_simpleitk(path: Path) -> tuple[np.ndarray | None, bool]:
    """(slices, rows, columns) or with channels; `None` where it cannot. And whether it is colour."""
    sitk.ProcessObject.GlobalWarningDisplayOff()
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError:
        return None, False
    pixels = sitk.GetArrayFromImage(image)
    in_colour = image.GetNumberOfComponentsPerPixel() > 1
    return pixels if pixels.ndim == 3 + in_colour else pixels[None], in_colour


def shown_pixels(source: Any, index: int = 0, window: Any = None) -> np.ndarray:
    """A slice on its own pixels, which true proportions may have been drawn out from."""
    scan = open_scan(source)
    scan.pixel_aspect = 1.0
    return np.asarray(scan.slice_image(index, window)).astype(int)


def test_every_image_that_pydicom_ships_is_shown_as_simpleitk_reads_it_or_refused() -> None:
    compared, differing = 0, []
    for name, path in shipped_dicoms():
        expected, in_colour = read_by_simpleitk(path)
        if expected is None or name in NOT_SIMPLEITK:
            continue
        try:
            scan = open_scan(path)
            scan.slice_image(0)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        if expected.shape[:3] != (scan.num_slices, scan.height, scan.width):
            continue  # a segmentation and the like
        header = scan.dicom_datasets()[0]
        inverted = header.PhotometricInterpretation == "MONOCHROME1"
        if inverted:  # SimpleITK turns the stored values round, before they are scaled
            slope, intercept = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
            expected = slope * (2**header.BitsStored - 1) + 2 * intercept - expected
        low, high = float(expected.min()), float(expected.max())
        window = ((low + high) / 2, high - low or 1)
        for index in {0, scan.num_slices - 1}:
            shown = shown_pixels(path, index, None if in_colour else window)
            if in_colour:
                wanted = expected[index].astype(int) >> 8 * (expected.itemsize - 1)
            else:
                wanted = apply_window(expected[index], Window(*window)).astype(int)
                wanted = 255 - wanted if inverted else wanted
            visible = shown != 0 if "PixelPaddingValue" in header else np.ones(shown.shape, bool)
            # Decoders of lossy pictures, and conversions of their colours, round differently.
            if np.abs(shown - wanted)[visible].max(initial=0) > (4 if in_colour else 1):
                differing.append((name, int(np.abs(shown - wanted).max())))
            compared += 1
    assert not differing, "\n".join(map(str, differing))
    assert compared > 60


GREY = [  # allocated, stored, high, signed
    *(
        (16, stored, high, signed)
        for stored in (10, 12, 15, 16)
        for high in range(stored - 1, 16)
        for signed in (0, 1)
    ),
    *((8, stored, high, signed) for stored in (6, 7, 8) for high in range(stored - 1, 8) for signed in (0, 1)),
    *((32, stored, stored - 1, signed) for stored in (20, 32) for signed in (0, 1)),
]
SCALES = ("none", "rescale", "table")
VIEWS = ("linear", "linear of width 1", "exact", "sigmoid", "table", "asked for")
ORDERS = ("little", "big", "implicit")
PHOTOMETRICS = ("MONOCHROME1", "MONOCHROME2")


def table_item(rng: np.random.Generator, span: tuple[int, int], order: str) -> tuple[Any, np.ndarray, int]:
    """An item with a lookup table, the values that it stands for over a span, and the depth that these fill."""
    depth, form = int(rng.choice([8, 10, 12, 16])), rng.choice(["words", "bytes", "too deep"])
    count = int(min(span[1] - span[0] + 1, rng.choice([256, 1000, 4096])))
    first = min(max(span[0], -(2**15)), 2**16 - 1)
    if form == "bytes":
        depth = 8
    entries = np.linspace(0, 2**depth - 1, count).round().astype(np.uint16)
    if rng.integers(2):
        entries = entries[::-1]
    content = entries.astype("u1").tobytes() if form == "bytes" else entries.astype("<u2").tobytes()
    content += b"\0" * (len(content) % 2)
    if order == "big":
        content = np.frombuffer(content, "<u2").astype(">u2").tobytes()
    item = pydicom.Dataset()
    item.ModalityLUTType = "US"
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [count, first, 16 if form == "too deep" else depth])
    item.add_new("LUTData", "OW", content)
    return item, lambda values: entries[(np.rint(values).astype(int) - first).clip(0, count - 1)].astype(int), depth


def looked_at(values: np.ndarray, centre: float, width: float, view: str) -> np.ndarray:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, to 0..255."""
    if view == "sigmoid":
        return 255 / (1 + np.exp(-4 * (values - centre) / width))
    if view.startswith("linear"):
        inside = ((values - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5) * 255
        above = values > centre - 0.5 + (width - 1) / 2
        return np.where(values <= centre - 0.5 - (width - 1) / 2, 0, np.where(above, 255, inside))
    return (((values - centre) / width + 0.5) * 255).clip(0, 255)


def grey_file(seed: int) -> tuple[bytes, np.ndarray, Any, dict]:
    """A DICOM file, what is to be shown of it, the window to ask for, and what it is like."""
    rng = np.random.default_rng(seed)
    allocated, stored, high, signed = GREY[seed % len(GREY)]
    scale, view, order, photometric = (str(rng.choice(kinds)) for kinds in (SCALES, VIEWS, ORDERS, PHOTOMETRICS))
    low, top = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if signed else (0, 2**stored - 1)
    values = rng.integers(low, top, SIZE, endpoint=True)
    lowest = high + 1 - stored
    words = (values % 2**stored << lowest) | rng.integers(0, 2**lowest, SIZE)  # what is unused may be anything
    endian = ">" if order == "big" else "<"
    dataset = dicom_dataset(np.zeros(SIZE, np.uint8), Modality="OT", RescaleSlope=None, RescaleIntercept=None)
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = GREY[seed % len(GREY)]
    dataset.PhotometricInterpretation = photometric
    dataset.PixelData = words.astype(f"{endian}u{allocated // 8}").tobytes()
    syntaxes = {
        "little": pydicom.uid.ExplicitVRLittleEndian,
        "big": pydicom.uid.ExplicitVRBigEndian,
        "implicit": pydicom.uid.ImplicitVRLittleEndian,
    }
    dataset.file_meta.TransferSyntaxUID = syntaxes[order]
    dataset["PixelData"].VR = "OW" if allocated > 8 or order == "implicit" else "OB"
    levels: Any = values.astype(float)
    if scale == "rescale":
        dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1024
        levels = levels * 2 - 1024
    elif scale == "table":
        item, look_up, _ = table_item(rng, (low, top), order)
        dataset.ModalityLUTSequence, levels = [item], look_up(values).astype(float)
    window: Any = "file"
    if view == "table":
        reach = int(levels.min()), int(levels.max())
        item, look_up, depth = table_item(rng, reach, order)
        dataset.VOILUTSequence, shown = [item], look_up(levels) / (2**depth - 1) * 255
    else:
        centre, width = (
            float(round(np.median(levels))),
            1.0 if "width 1" in view else float(round(np.ptp(levels) / 2 + 2)),
        )
        if view == "asked for":
            window = (centre, width)
        else:
            dataset.WindowCenter, dataset.WindowWidth = centre, width
            dataset.VOILUTFunction = {"exact": "LINEAR_EXACT", "sigmoid": "SIGMOID"}.get(view, "LINEAR")
        shown = looked_at(levels, centre, width, view)
    kind = {"stored": (allocated, stored, high, signed), "scale": scale, "view": view, "order": order}
    return dicom_bytes(dataset), 255 - shown if photometric == "MONOCHROME1" else shown, window, kind


def test_200_generated_grey_dicoms_are_shown_as_the_standard_says(tmp_path: Path) -> None:
    by_simpleitk = 0
    for seed in range(200):
        content, expected, window, kind = grey_file(seed)
        assert np.abs(shown_pixels(content, 0, window) - expected).max() <= 1.01, (seed, kind)
        allocated, stored, high, _ = kind["stored"]
        if kind["scale"] != "table" and high == stored - 1 and allocated <= 16 and b"MONOCHROME2" in content:
            (tmp_path / "file.dcm").write_bytes(content)
            values, _ = read_by_simpleitk(tmp_path / "file.dcm")
            if values is None:
                continue
            other = apply_window(values[0], Window(100, 4000)).astype(int)
            assert np.abs(other - shown_pixels(content, 0, (100, 4000))).max() <= 1, (seed, kind)
            by_simpleitk += 1
    assert by_simpleitk > 10


def palettes() -> Iterator[tuple[bytes, np.ndarray]]:
    """Files of PALETTE COLOR and their colours."""
    for seed, (count, form, order) in enumerate(
        itertools.product(
            (16, 256, 300, 4096, 2**16), ("bytes", "words of 8", "words of 16", "too deep"), ("little", "big")
        )
    ):
        rng = np.random.default_rng(seed)
        first = 0 if count == 2**16 else int(rng.integers(0, 50))
        places = rng.integers(0, min(2**16, first + count + 40), SIZE)
        depth = 16 if form == "words of 16" else 8
        colours = rng.integers(0, 2**depth, (count, 3))
        colours[0] = 2**depth - 1
        endian = ">" if order == "big" else "<"
        dataset = dicom_dataset(places.astype(np.uint16), Modality="US", RescaleSlope=None, RescaleIntercept=None)
        dataset.PhotometricInterpretation = "PALETTE COLOR"
        dataset.PixelData = places.astype(f"{endian}u2").tobytes()
        big = pydicom.uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = big if order == "big" else pydicom.uid.ExplicitVRLittleEndian
        for channel, name in enumerate(("Red", "Green", "Blue")):
            content = colours[:, channel].astype("u1" if form == "bytes" else "<u2").tobytes()
            if order == "big":
                content = np.frombuffer(content, "<u2").astype(">u2").tobytes()
            stated = [count % 2**16, first, 8 if form in ("bytes", "words of 8") else 16]
            dataset.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", stated)
            dataset.add_new(f"{name}PaletteColorLookupTableData", "OW", content)
        yield dicom_bytes(dataset), colours[(places - first).clip(0, count - 1)] >> (depth - 8)


def test_40_generated_palettes_are_shown_in_their_colours() -> None:
    for number, (content, expected) in enumerate(palettes()):
        assert np.abs(shown_pixels(content) - expected).max() <= 1, number


COLOURS = [
    (photometric, planes, allocated, stored, high, order)
    for photometric, planes, order in itertools.product(("RGB", "YBR_FULL"), (0, 1), ("little", "big"))
    for allocated, stored, high in ((8, 8, 7), (8, 6, 5), (8, 6, 7), (16, 16, 15), (16, 12, 11), (16, 12, 15))
]


@pytest.mark.parametrize(("photometric", "planes", "allocated", "stored", "high", "order"), COLOURS)
def test_colours_of_any_depth_and_order_of_planes_are_shown_or_refused(
    photometric: str, planes: int, allocated: int, stored: int, high: int, order: str
) -> None:
    pixels = np.random.default_rng(stored).integers(0, 2**stored, (*SIZE, 3))
    dataset = dicom_dataset(np.zeros((*SIZE, 3), np.uint8), Modality="US", RescaleSlope=None, RescaleIntercept=None)
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, stored, high
    dataset.PhotometricInterpretation, dataset.PlanarConfiguration = photometric, planes
    little, big = pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = big if order == "big" else little
    words = (np.moveaxis(pixels, 2, 0) if planes else pixels) << (high + 1 - stored)
    dataset.PixelData = words.astype(f"{'>' if order == 'big' else '<'}u{allocated // 8}").tobytes()
    dataset["PixelData"].VR = "OB" if allocated == 8 else "OW"
    if photometric == "YBR_FULL" and (stored, high) != (8, 7):
        with pytest.raises(ValueError, match="of a kind that is not read: YBR_FULL"):
            open_scan(dicom_bytes(dataset))
        return
    expected = pixels / (2**stored - 1) * 255
    if photometric == "YBR_FULL":
        y, blue, red = (pixels[:, :, channel] - (128 if channel else 0) for channel in range(3))
        rgb = (y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue)  # PS3.3 C.7.6.3.1.2
        expected = np.stack(rgb, axis=2).clip(0, 255)
    assert np.abs(shown_pixels(dicom_bytes(dataset)) - expected).max() <= 1.01


TIFFS = [
    {"dtype": dtype, "photometric": photometric, "planarconfig": planes, "byteorder": order, "compression": packed}
    for dtype, (photometric, planes), order, packed in itertools.product(
        ("bool", "u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"),
        (("minisblack", None), ("miniswhite", None), ("rgb", "contig"), ("rgb", "separate")),
        "<>",
        (None, "zlib"),
    )
]


def test_160_generated_tiffs_are_shown_as_their_arrays_are_or_refused(tmp_path: Path) -> None:
    path, read, differing = tmp_path / "file.tif", 0, []
    for seed, kind in enumerate(TIFFS):
        rng, dtype, photometric = np.random.default_rng(seed), np.dtype(kind["dtype"]), kind["photometric"]
        shape = SIZE if photometric != "rgb" else (*SIZE, 3) if kind["planarconfig"] == "contig" else (3, *SIZE)
        array = (
            rng.integers(0, 2, shape)
            if kind["dtype"] == "bool"
            else rng.normal(0, 500, shape).clip(
                *((np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.kind in "iu" else (-1e4, 1e4))
            )
        )
        array = array.astype(dtype)
        try:
            tifffile.imwrite(path, array, **{name: value for name, value in kind.items() if name != "dtype"})
        except (ValueError, RuntimeError):
            continue  # no such TIFF
        if not np.array_equal(tifffile.imread(path), array):
            continue  # tifffile packs no bits of colours
        if photometric == "miniswhite":
            array = ~array if dtype.kind in "bui" else -array
        expected = to_array(array, "array", convert_rgb=True, rescale=True).astype(int)
        try:
            shown = open_scan(path).slice_image(0)
        except ValueError as error:
            assert str(path) in str(error) and ("is not read" in str(error) or "needs" in str(error)), kind
            continue
        read += 1
        if np.abs(np.asarray(shown.convert("RGB")).astype(int) - expected).max() > 1:
            differing.append(kind)
        if (
            photometric != "rgb" and dtype.itemsize > 1 and array.max() < 2**31
        ):  # stacks are shown as their arrays are, too
            tifffile.imwrite(path, np.stack([array] * 3), photometric="minisblack", byteorder=kind["byteorder"])
            stack, same = open_scan(path), open_scan(np.stack([array] * 3), volume=True)
            assert stack.num_slices == 3
            pair = [np.asarray(each.slice_image(1, (3, 400))).astype(int) for each in (stack, same)]
            if np.abs(pair[0] - pair[1]).max() > 1:
                differing.append(("stack", kind))
    assert not differing, "\n".join(map(str, differing))
    assert read > 120


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_upright_by_path_by_bytes_and_opened(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)).save(
        tmp_path / "p", kind, exif=exif
    )
    from transformers.image_utils import load_image

    with Image.open(tmp_path / "p") as opened:
        expected = np.asarray(load_image(opened.copy() if kind == "PNG" else opened))
    with Image.open(tmp_path / "p") as opened:
        for source in (tmp_path / "p", (tmp_path / "p").read_bytes(), opened):
            assert np.array_equal(open_scan(source).slice_image(0), expected)
        assert np.array_equal(to_array(opened, "opened", convert_rgb=True, rescale=True), expected)
