"""From a file, a Pillow image of any mode or an array of any type to 8-bit pixels, or to an error with a name."""

import base64
import builtins
import functools
import io
import struct
import sys
import threading
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from processing_medsight import load_image
from processing_medsight.image_loading_medsight import MAX_IMAGE_PIXELS, to_array
from processing_medsight.image_processing_medsight import MedSightImageProcessor
from tests.medsight.scans.scan_files import picture_bytes, png_claiming


RAMP = np.arange(0, 252, 4, dtype=np.uint8).reshape(7, 9)
COLOUR = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=2)


def rgb(image: object, rescale: bool = True, **kwargs: object) -> np.ndarray:
    return to_array(image, "image 0", convert_rgb=True, rescale=rescale, **kwargs)


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[:, :, None], 3, axis=2)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_colour_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(COLOUR).convert(mode)
    assert rgb(image).shape == (7, 9, 3)
    assert np.abs(rgb(image).astype(int) - np.asarray(image.convert("RGB")).astype(int)).max() == 0


def test_one_bit_and_eight_bit_grey_and_a_constant_scan() -> None:
    bits = RAMP > 100
    assert (rgb(Image.fromarray(bits)) == grey(bits * np.uint8(255))).all()
    assert (rgb(Image.fromarray(RAMP)) == grey(RAMP)).all()
    assert (rgb(np.full((3, 9), 5000, np.uint16)) == 0).all()


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "key colour", "array RGBA", "array LA"])
def test_alpha_is_composited_on_black(kind: str) -> None:
    alpha = np.zeros_like(RAMP)
    alpha[:, 4:] = 255
    shown = (alpha > 0)[:, :, None]
    colour = grey(RAMP) if "LA" in kind else COLOUR
    pixels = np.dstack([RAMP if "LA" in kind else COLOUR, alpha])
    image = pixels if "array" in kind else Image.fromarray(pixels)
    if kind == "palette":
        image = Image.fromarray(np.where(alpha > 0, np.uint8(2), np.uint8(1))).convert("P")
        image.putpalette([9, 9, 9, 200, 100, 50, 10, 20, 30])
        image.info["transparency"], colour = 1, (10, 20, 30)
    elif kind == "key colour":
        image = Image.fromarray(np.where(shown, np.uint8(77), np.uint8(250)).repeat(3, axis=2))
        image.info["transparency"], colour = (250, 250, 250), 77
    assert (rgb(image) == np.where(shown, colour, 0)).all()


def test_half_opaque_is_half_as_bright() -> None:
    for alpha, dtype in ((128, np.uint8), (32896, np.uint16)):
        pixels = np.full((9, 7, 4), alpha, dtype)
        pixels[:, :, :3] = 200
        assert np.abs(rgb(pixels).astype(int) - 100).max() <= 1


@pytest.mark.parametrize(("low", "high"), [(0, 65535), (0, 4095), (1000, 5000), (0, 300), (60000, 65535)])
@pytest.mark.parametrize("kind", ["pillow", "array", "tensor", "file"])
def test_a_16_bit_scan_is_stretched_not_clipped(kind: str, low: int, high: int, tmp_path: Path) -> None:
    scan = np.linspace(low, high, 63).round().astype(np.uint16).reshape(7, 9)
    expected = grey(((scan.astype(float) - low) * 255 / (high - low)).round().astype(np.uint8))
    if kind == "file":
        Image.fromarray(scan).save(tmp_path / "scan.png")
        image = load_image(tmp_path / "scan.png")
        assert image.mode in ("I;16", "I")
    else:
        image = {"pillow": Image.fromarray, "array": np.array, "tensor": torch.from_numpy}[kind](scan)
    assert np.abs(rgb(image).astype(int) - expected).max() <= 1
    assert rgb(image).min() == 0 and rgb(image).max() == 255


def png_of_16_bits(pixels: np.ndarray, interlaced: bool = False) -> bytes:
    """(height, width, channels) uint16, which Pillow cannot write; each row filtered by its left neighbours."""
    height, width, channels = pixels.shape
    passes = [(0, 0, 1, 1)]
    if interlaced:  # first row and column, and steps down and across, of Adam7
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    lines = b""
    for top, left, down, across in passes:
        for row in pixels[top::down, left::across]:
            raw = np.frombuffer(row.astype(">u2").tobytes(), np.uint8)
            if raw.size:
                lines += b"\1" + (raw - np.concatenate([np.zeros(2 * channels, np.uint8), raw])[: raw.size]).tobytes()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, interlaced)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def tiff_of_16_bits(pixels: np.ndarray, **options: object) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    file, separate = io.BytesIO(), options.get("planarconfig") == "separate"
    tifffile.imwrite(file, np.moveaxis(pixels, 2, 0) if separate else pixels, photometric="rgb", **options)
    return file.getvalue()


DEEP = {
    "png": png_of_16_bits,
    "interlaced png": functools.partial(png_of_16_bits, interlaced=True),
    "ppm": lambda pixels: b"P6\n%d %d\n65535\n" % pixels.shape[1::-1] + pixels.astype(">u2").tobytes(),
    "ppm of 12 bits": lambda pixels: b"P6 %d %d 4095\n" % pixels.shape[1::-1] + pixels.astype(">u2").tobytes(),
    "plain ppm": lambda pixels: b"P3 %d %d 4095\n" % pixels.shape[1::-1] + b" ".join(b"%d" % v for v in pixels.flat),
    **{
        f"tiff {order} {planes} {packed}": functools.partial(
            tiff_of_16_bits, byteorder=order, planarconfig=planes, compression=packed
        )
        for order in "<>"
        for planes in ("contig", "separate")
        for packed in (None, "zlib")
    },
}


@pytest.mark.parametrize(
    ("kind", "channels"),
    [(kind, 3) for kind in DEEP]
    + [(kind, 4) for kind in DEEP if "ppm" not in kind]
    + [("png", 2), ("interlaced png", 2)],
)
def test_colours_of_16_bits_are_read_with_all_their_bits(kind: str, channels: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (7, 9, channels)).astype(np.uint16)
    if channels in (2, 4):
        pixels[:, :, -1] = 65535
    content = DEEP[kind](pixels)
    (tmp_path / "file").write_bytes(content)
    expected = rgb(pixels)
    assert expected.max() == 255
    assert (rgb(load_image(content)) == expected).all()
    with Image.open(io.BytesIO(content)) as memory, Image.open(tmp_path / "file") as file:
        for opened in (memory, file):
            if "separate" in kind:  # which Pillow misreads
                with pytest.raises(ValueError, match="image 0 is a TIFF .*hand over its path"):
                    rgb(opened)
            else:
                assert (rgb(opened) == expected).all()


def test_a_tiff_that_pillow_misreads_is_refused_where_tifffile_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    content = tiff_of_16_bits(np.zeros((7, 9, 3), np.uint16), planarconfig="separate")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match="^upload is a TIFF .* pip install tifffile$"):
        load_image(content, "upload")


def test_a_jpeg_2000_of_deep_colours_is_refused_by_name_and_others_are_read() -> None:
    assert load_image(picture_bytes("JPEG2000")).mode == "RGB" and load_image(picture_bytes("JPEG2000", "I;16"))
    content = bytearray(picture_bytes("JPEG2000", irreversible=False))
    at = content.index(b"\xff\x4f\xff\x51") + 42
    content[at], content[at + 3], content[at + 6] = 15, 15, 15
    with pytest.raises(ValueError, match="upload is a JPEG 2000 in colours of more than 8 bits"):
        load_image(bytes(content), "upload")


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "int64", "uint32", "float16", "float32", "float64"])
def test_8_bit_values_in_a_wider_type_stay_as_they_are(dtype: str) -> None:
    assert (rgb(COLOUR.astype(dtype)) == COLOUR).all()
    assert (rgb(RAMP.astype(dtype)) == grey(RAMP)).all()


def test_floats_between_0_and_1_are_multiplied_by_255_and_others_left_alone_where_nothing_is_rescaled() -> None:
    assert (rgb(COLOUR / 255) == COLOUR).all()
    assert (rgb(torch.from_numpy(COLOUR / 255).permute(2, 0, 1).bfloat16()).astype(int) - COLOUR).__abs__().max() <= 1
    pixels = np.random.default_rng(0).normal(size=(5, 6, 3))
    assert np.allclose(rgb(pixels, rescale=False), pixels, atol=1e-6)


def test_hounsfield_units_are_stretched_from_the_lowest_to_the_highest() -> None:
    scan = np.linspace(-1024, 3071, 63).reshape(7, 9)
    for image in (scan, scan.astype(np.int16), *(Image.fromarray(scan.astype(kind)) for kind in ("i4", "f4"))):
        pixels = rgb(image)
        assert pixels.min() == 0 and pixels.max() == 255 and (np.diff(pixels[:, :, 0].ravel().astype(int)) >= 0).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_first_and_last(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, channels), dtype=np.uint8)
    assert (rgb(pixels) == rgb(np.moveaxis(pixels, 2, 0))).all()
    assert (rgb(pixels) == rgb(torch.from_numpy(pixels))).all()
    ambiguous = np.random.default_rng(0).integers(0, 256, (3, 9, 3), dtype=np.uint8)
    assert (rgb(ambiguous, channels_last=True) == ambiguous).all()
    assert (rgb(ambiguous) == np.moveaxis(ambiguous, 0, 2)).all()


def test_paths_bytes_and_base64_name_the_same_image_which_is_turned_upright(tmp_path: Path) -> None:
    path, exif = tmp_path / "image.png", Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter to be upright
    Image.fromarray(COLOUR).save(path, exif=exif)
    text = base64.b64encode(path.read_bytes()).decode()
    for source in (path, str(path), path.read_bytes(), text, f"data:image/png;base64,{text}"):
        assert (np.asarray(load_image(source)) == np.rot90(COLOUR, -1)).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "MPO", "PNG"])
def test_of_several_frames_the_first_is_used_and_the_file_does_not_stay_open(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    path = tmp_path / f"two.{kind}"
    frames[0].save(path, kind, save_all=True, append_images=frames[1:])
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB"))
        assert opened.n_frames == 2
    files, opens = [], builtins.open
    monkeypatch.setattr(builtins, "open", lambda *given, **named: files.append(opens(*given, **named)) or files[-1])
    image = load_image(path)
    assert files and all(file.closed for file in files)
    assert (image.filename, image.format) == (str(path), kind) and (rgb(image) == expected).all()
    assert (f"{path} holds 2 frames: only the first is used" in caplog.text) == (kind != "MPO")


GOOD, PHOTO = (picture_bytes(kind, size=(64, 64)) for kind in ("PNG", "JPEG"))
BAD = {
    "empty.png": (b"", "empty"),
    "text.png": (b"this is no image", "not an image"),
    "cut.png": (GOOD[: len(GOOD) // 2], "truncated"),
    "cut.jpg": (PHOTO[: len(PHOTO) // 2], "truncated"),
    "header.png": (GOOD[:20], "image"),
    "flipped.png": (GOOD[:100] + b"\xff" * 50 + GOOD[150:], "damaged"),
    "giant.png": (png_claiming(30_000, 30_000), "pixels"),
    "flat.png": (png_claiming(0, 10), "image"),
    "missing.png": (None, "no such file"),
    f"{'x' * 100}.png": (b"no image", "not an image"),  # a long path is named whole
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path, (content, message) = tmp_path / name, BAD[name]
    if content is not None:
        path.write_bytes(content)
    for source in (path, str(path)):
        with pytest.raises(ValueError, match=message) as error:
            load_image(source)
        assert str(path) in str(error.value)
        with pytest.raises(ValueError, match=name):
            MedSightImageProcessor(size=28)([Image.new("RGB", (8, 8)), source], return_tensors="pt")


@pytest.mark.parametrize("name", ["cut.png", "giant.png"])
def test_a_lazily_opened_bad_image_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / name).write_bytes(BAD[name][0])
    with Image.open(tmp_path / name) as image:
        if name == "giant.png":
            monkeypatch.setattr(type(image), "load", lambda *_: pytest.fail("pixels of a giant were decoded"))
        with pytest.raises(ValueError, match=f"image 1.*{name}"):
            MedSightImageProcessor(size=28)([Image.new("L", (4, 4)), image])


def test_the_limit_of_size_holds_for_arrays_too() -> None:
    side = 30_000
    giant = np.broadcast_to(np.uint8(0), (side, side, 3))
    with pytest.raises(ValueError, match=rf"image 0 has 30,000 x 30,000 pixels.*{MAX_IMAGE_PIXELS:,}"):
        MedSightImageProcessor(size=28)(giant)
    with pytest.raises(ValueError, match="30,000 x 30,000"):
        MedSightImageProcessor(size=28)(np.broadcast_to(np.uint8(0), (side, side)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), "image 1 has no pixels"),
        (Image.new("RGB", (0, 5)), "image 1 has no pixels"),
        (np.full((4, 5), np.nan), "image 1.*NaN"),
        (np.full((4, 5, 3), np.inf, np.float32), "image 1.*infinite"),
        (np.zeros((9, 5, 7, 8)), "image 1.*channels"),
        (np.zeros((2, 9, 5, 7, 8)), "image 1.*2 or 3 axes"),
        (np.zeros((4, 5, 3), complex), "image 1.*complex"),
        (None, "image 1.*NoneType"),
        (17, "image 1.*int"),
    ],
)
def test_a_bad_image_is_refused_by_its_place_in_the_batch(image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MedSightImageProcessor(size=28)([Image.new("RGB", (8, 8)), image], return_tensors="pt")


def test_an_address_gives_a_picture_or_is_refused_where_it_has_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the server is on this machine
    Image.fromarray(COLOUR).save(tmp_path / "scan.png")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/scan.png"
        assert np.array_equal(np.asarray(load_image(address)), COLOUR)
        with pytest.raises(ValueError, match=r"gone\.png cannot be fetched .*404"):
            load_image(address.replace("scan", "gone"))
        monkeypatch.setattr("processing_medsight.image_loading_medsight.MAX_DOWNLOAD", 50)
        with pytest.raises(ValueError, match="scan.png cannot be fetched .it has more than 50 bytes"):
            load_image(address)
        server.shutdown()
    with pytest.raises(ValueError, match=r"scan\.png cannot be fetched"):  # nobody listens any more
        MedSightImageProcessor(size=28)([np.zeros((9, 9), dtype=np.uint8), address])
