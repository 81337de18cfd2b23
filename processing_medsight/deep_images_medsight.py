"""Pictures of more than 8 bits that Pillow cuts to 8, misreads, or does not open: their samples as the file has them.

Colours of 16 bits in PNG, PPM and TIFF are read by Pillow all the same, a byte at a time; other TIFFs by tifffile.
"""

from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps


_BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _PLANES, _EXTRA, _FORMAT = 258, 259, 262, 274, 284, 338, 339  # tags
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_UNSIGNED, _SIGNED = 1, 2
_MOST_PACKED, _FREE_BYTES = 256, 2**26  # times that a page may be packed, if it is not small when unpacked
_PREMULTIPLIED, _ALPHA = 1, 2  # kinds of an extra sample
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda samples: samples[:, ::-1],
    3: lambda samples: samples[::-1, ::-1],
    4: lambda samples: samples[::-1],
    5: lambda samples: samples.swapaxes(0, 1),
    6: lambda samples: np.rot90(samples, -1),
    7: lambda samples: np.rot90(samples, 2).swapaxes(0, 1),
    8: np.rot90,
}


def pillow_reads(opened: Image.Image) -> bool:
    """Whether Pillow gives the samples of an opened picture as they are, or `deep_colours` has them from it."""
    tags = getattr(opened, "tag_v2", None)
    if tags is None:
        return True
    bits, kinds = tags.get(_BITS, (1,)), tags.get(_FORMAT, (1,))
    if max(bits) <= 8:
        return _SIGNED not in kinds
    photometric = tags.get(_PHOTOMETRIC)
    if len(bits) > 1:
        plain = tags.get(_PLANES, 1) == 1 and tags.get(_EXTRA) != (_PREMULTIPLIED,)
        return photometric == _RGB and plain and kinds[0] == _UNSIGNED
    if kinds[0] == _UNSIGNED:
        return bits[0] == 16
    # Packed ones are in the machine's own order, which Pillow turns round.
    turned = tags.get(_COMPRESSION, 1) != 1 and tags.prefix == b"MM"
    return bits[0] in (16, 32) and photometric == _BLACK_IS_ZERO and not turned


def deep_colours(opened: Any) -> np.ndarray | None:
    """(height, width, channels) uint16 of an opened picture that has colours, or grey and alpha, of 16 bits.

    `None` for any other, and where the pixels were decoded already. Raises whatever Pillow does.
    """
    tile: Any = opened.tile[0] if isinstance(opened, ImageFile.ImageFile) and opened.tile else None
    if tile is None or opened.mode not in ("RGB", "RGBA"):
        return None
    if tile[0] in ("ppm", "ppm_plain") or opened.format == "PPM":
        return _portable(opened, tile) if opened.mode == "RGB" else None
    raw = tile[3] if isinstance(tile[3], str) else tile[3][0]
    kind, _, order = raw.partition(";")
    if kind == "LA" and order == "16B":  # Pillow has no grey and alpha of 16 bits: four bytes of a pixel, read as RGBA
        both = _loaded(opened, tile, "RGBA").astype(np.uint16)
        return both[:, :, ::2] << 8 | both[:, :, 1::2]
    if kind not in ("RGB", "RGBA", "RGBX") or not order.startswith("16"):
        return None
    other = f"{kind};16{'L' if order == '16B' else 'B'}"
    low = _loaded(opened, tile, other).astype(np.uint16)
    high = _loaded(opened, tile, raw).astype(np.uint16)
    return high << 8 | low


def jpeg_2000_bits(opened: Any) -> int:
    """Bits of a sample of an opened JPEG 2000; 0 where it does not say."""
    here = opened.fp.tell()
    opened.fp.seek(0)
    head = opened.fp.read(4096)
    opened.fp.seek(here)
    at = head.find(b"\xff\x4f\xff\x51") + 42  # the depth of the first component, in the marker of the size
    return (head[at] & 127) + 1 if 42 <= at < len(head) else 0


def _loaded(opened: Any, tile: Any, raw: str) -> np.ndarray:
    """The bytes that a raw mode picks of the pixels, from the file behind an opened picture, turned upright."""
    again: Any = Image.open(opened.fp)
    again.seek(opened.tell())
    again.tile = [(*again.tile[0][:3], raw if isinstance(tile[3], str) else (raw, *tile[3][1:]))]
    return np.asarray(ImageOps.exif_transpose(again))


def _portable(opened: Any, tile: Any) -> np.ndarray | None:
    """Colours of a PPM of more than 8 bits."""
    place, fp = tile[2], opened.fp
    fp.seek(0)
    head = fp.read(place)
    largest = int(head.split()[-1])
    if largest < 256:
        return None
    count = 3 * opened.width * opened.height
    content = fp.read()
    values = np.array(content.split(), np.uint16) if head[:2] == b"P3" else np.frombuffer(content, ">u2", count)
    return values[:count].reshape(opened.height, opened.width, 3).astype(np.uint16)


class _RefusedError(ValueError):
    """An error whose message is ours."""


class DeepTiff:
    """A TIFF whose pages tifffile reads; what it has in common with a picture that Pillow opened is called alike.

    Raises:
        ValueError: it is damaged, or tifffile is not installed.
    """

    format = "TIFF"

    def __init__(self, file: BinaryIO, name: str) -> None:
        try:
            import tifffile
        except ImportError:
            raise ValueError(
                f"{name} is a TIFF of a kind that Pillow does not read, and needs tifffile: pip install tifffile"
            ) from None
        self.name, self._file = name, file
        try:
            self._pages: Any = tifffile.TiffFile(file).pages
            self.n_frames = len(self._pages)
            self.seek(0)
        except Exception as error:
            raise ValueError(f"{name} is a damaged or truncated TIFF ({error})") from error

    def __enter__(self) -> "DeepTiff":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def seek(self, page: int) -> None:
        self._page = self._pages[page]
        self.height, self.width = self._page.imagelength, self._page.imagewidth
        self.size, self.mode = (self.width, self.height), f"{self._page.samplesperpixel} {self._page.dtype}"

    def samples(self, stored: bool) -> np.ndarray:
        """(height, width), or (height, width, channels) of colours, and alpha where there is one, turned upright.

        Args:
            stored: whether a page whose 0 is white is to be left as it is, not inverted.

        Raises:
            ValueError: it is damaged, or of a kind or compression that is not read.
        """
        try:
            return self._samples(stored)
        except _RefusedError:
            raise
        except Exception as error:
            if "imagecodecs" in str(error):
                raise ValueError(
                    f"{self.name} is a TIFF whose compression needs imagecodecs: pip install imagecodecs ({error})"
                ) from None
            raise ValueError(f"{self.name} is damaged or truncated: it cannot be decoded ({error})") from error

    def _samples(self, stored: bool) -> np.ndarray:
        page, photometric, extra = self._page, self._page.photometric, tuple(map(int, self._page.extrasamples))
        colours = page.samplesperpixel - len(extra)
        read = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3}.get(photometric) == colours and len(extra) < 2
        # Beside colours, another channel is left out: they lie on black already, or it does not say what it is.
        if (
            not (read and (colours == 3 or extra in ((), (_ALPHA,))))
            or page.imagedepth > 1
            or page.dtype.kind not in "biuf"
        ):
            raise _RefusedError(
                f"{self.name} is a TIFF of a kind that is not read: {page.samplesperpixel} samples of {page.dtype}, "
                f"photometric interpretation {getattr(photometric, 'name', photometric)}. Save it in grey or RGB"
            )
        held, claimed = self._file.seek(0, 2), page.size * page.dtype.itemsize
        if claimed > max(_FREE_BYTES, _MOST_PACKED * held):
            raise _RefusedError(f"{self.name} claims {claimed:,} bytes of pixels, and is a file of {held:,}")
        ends = [at + size for at, size in zip(page.dataoffsets, page.databytecounts, strict=True)]
        if not ends or not all(page.databytecounts) or max(ends) > held:
            raise _RefusedError(f"{self.name} is damaged or truncated: some of its pixels are not there")
        samples: np.ndarray = page.asarray()
        if samples.ndim == 3:
            if page.planarconfig == 2:
                samples = np.moveaxis(samples, 0, 2)
            samples = samples[:, :, : colours + (extra == (_ALPHA,))]
        if photometric == _WHITE_IS_ZERO and not stored:
            grey = samples[..., :1] if samples.ndim == 3 else samples
            grey[...] = white_is_zero(grey, int(page.bitspersample))
        turn = page.tags.get(_ORIENTATION)
        return _UPRIGHT.get(turn.value if turn else 1, lambda same: same)(samples)


def white_is_zero(samples: np.ndarray, bits: int) -> np.ndarray:
    """Samples of which the lowest is white as samples of which it is black."""
    if samples.dtype.kind == "u":
        return (2**bits - 1 - samples.astype(np.uint64)).astype(samples.dtype)
    return ~samples if samples.dtype.kind in "bi" else 1 - samples
