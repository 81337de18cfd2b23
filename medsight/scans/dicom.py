"""DICOM images: one file of one or several frames, or the files of a series, sorted along the normal of the slices.

Frames are shown as they are stored, which is how DICOM means them to be looked at. Whatever pydicom says about a file
may quote what the file says about a person: no message of its own is passed on.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.utils import logging

from . import dicom_header, windows
from .dicom_file import RefusedError, guarded, read_header, read_whole
from .dicom_pixels import stored_pixels
from .dicom_tables import Table, read_palette, read_table
from .file_kinds import recognise
from .scan import Scan


logger = logging.get_logger(__name__)

MAX_SERIES_FILES = 2**14
_BY_PERCENTILES = ("MR", "PT", "NM")  # grey levels without a scale that windows of files agree on
_HEAD = ("HEAD", "BRAIN")
_SCALES = ("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence")
_UNDECODED = "it is damaged: its pixels cannot be decoded"
_SECONDARY_CAPTURES = "1.2.840.10008.5.1.4.1.1.7"


class DicomScan(Scan):
    """The frames of one file, or the instances of a series; see [`open_scan`]."""

    kind = "dicom"

    def __init__(self, sources: Sequence[Path | bytes], name: str) -> None:
        super().__init__(name)
        names = [os.path.join(name, source.name) if isinstance(source, Path) else name for source in sources]
        if len(sources) == 1:
            names = [name]
        headers = [read_header(*entry) for entry in zip(sources, names, strict=True)]
        with guarded(name, "its header is damaged"):
            order = _series_order(headers, names, name) if len(sources) > 1 else [0]
            self._headers = [headers[i] for i in order]
            self._sources = [sources[i] for i in order]
            self._names = [names[i] for i in order]
            self.files = tuple(source for source in self._sources if isinstance(source, Path))
            first = self._headers[0]
            self.num_slices = len(headers) if len(headers) > 1 else dicom_header.number_of_frames(first)
            self.height, self.width = int(first.Rows), int(first.Columns)
            self.modality = dicom_header.code_of(first.get("Modality"))
            self._colour = (
                int(first.get("SamplesPerPixel") or 1) == 3 or dicom_header.photometric_of(first) == "PALETTE COLOR"
            )
            self._place()
        self._decoded: tuple[int, Any] | None = None
        self._levels: windows.Window | None = None

    def dicom_datasets(self) -> list[Any]:
        return list(self._headers)

    @property
    def is_wide(self) -> bool:
        return not self._colour

    @property
    def has_window(self) -> bool:
        with guarded(self.name, "its header is damaged"):
            voi = dicom_header.voi_of(*self._header(0))
            return not self._colour and bool(voi.get("VOILUTSequence") or dicom_header.window_of(voi))

    def _slice(self, index: int, window: str | Sequence[float] | None) -> Image.Image:
        by_file = windows.is_file_window(window)
        chosen = None if window is None or by_file else windows.parse_window(window)
        if self._colour and window is not None:
            raise ValueError(f"{self.name} is in colour: it has no grey levels for a window to choose")
        if isinstance(window, str) and not by_file and self.modality not in (None, "CT"):
            raise ValueError(f"window={window!r} is of CT, but {self.name} is {self.modality}: give centre and width")
        with guarded(self._slice_name(index), _UNDECODED):
            if self._colour:
                return Image.fromarray(self._colour_pixels(index))
            values, padding = self._grey_values(index)
            shown: np.ndarray | None
            if chosen is not None:
                shown = windows.apply_window(values, chosen)
            elif window is None:
                shown = self._shown_by_default(index, values)
            elif (shown := self._shown_by_file(index, values)) is None:
                raise RefusedError(windows.no_file_window(self._slice_name(index)))
            if dicom_header.photometric_of(self._headers[0]) == "MONOCHROME1":
                shown = 255 - shown
            shown[padding] = 0
            return Image.fromarray(shown)

    def _slice_name(self, index: int) -> str:
        if len(self._sources) > 1:
            return self._names[index]
        return self.name if self.num_slices == 1 else f"{self.name}, frame {index}"

    def _header(self, index: int) -> tuple[Any, int]:
        """The header behind a slice, and the slice's frame in that file."""
        return (self._headers[index], 0) if len(self._headers) > 1 else (self._headers[0], index)

    def _place(self) -> None:
        """Spacing and affine, from the positions that the headers state."""
        frames = [self._header(index) for index in range(self.num_slices)]
        self._draw_out([dicom_header.aspect_of(*frame) for frame in frames])
        spacings = [dicom_header.spacing_of(*frame) for frame in frames]
        known = [spacing for spacing in spacings if spacing is not None]
        if len(known) == len(spacings) and (np.ptp(known, axis=0) <= dicom_header.TOLERANCE * np.min(known)).all():
            self.pixel_spacing = known[0]
        turns = [dicom_header.directions_of(*frame) for frame in frames]
        placed = [dicom_header.position_of(*frame) for frame in frames]
        if any(value is None for value in (*turns, *placed)):
            return
        directions, positions = turns[0], np.array(placed)
        if directions is None or np.abs(np.array(turns) - directions).max() > dicom_header.TOLERANCE:
            return
        measures = dicom_header.measures_of(*self._header(0))
        normal = np.cross(*directions)
        if self.num_slices == 1:
            step = dicom_header.number_of(measures.get("SpacingBetweenSlices") or measures.get("SliceThickness"))
            self.slice_spacing = abs(step or 0) or None
            through = normal * (self.slice_spacing or 1)
        else:
            through = (positions[-1] - positions[0]) / (self.num_slices - 1)
            even = positions[0] + np.arange(self.num_slices)[:, None] * through
            distance = float(np.linalg.norm(through))
            if not distance or np.abs(positions - even).max() > dicom_header.TOLERANCE * distance * 5:
                logger.warning(f"{self.name}: its slices are not evenly spaced, so no volume can be measured")
                return
            self.slice_spacing = abs(float(through @ normal)) or None
        if self.pixel_spacing is None:
            return
        affine = np.eye(4)
        affine[:3, 0] = through
        affine[:3, 1] = directions[1] * self.pixel_spacing[0]
        affine[:3, 2] = directions[0] * self.pixel_spacing[1]
        affine[:3, 3] = positions[0]
        self.affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM's axes go to the left and to the back

    def _stored(self, index: int) -> np.ndarray:
        file, frame = (index, 0) if len(self._sources) > 1 else (0, index)
        decoded = self._decoded  # another thread may put another file there
        if decoded is None or decoded[0] != file:
            decoded = self._decoded = file, read_whole(self._sources[file], self._slice_name(index))
        return stored_pixels(decoded[1], frame, self._slice_name(index))

    def _colour_pixels(self, index: int) -> np.ndarray:
        from pydicom.pixels import apply_color_lut

        header, pixels = self._headers[0], self._stored(index)
        bits = int(header.BitsStored)
        if dicom_header.photometric_of(header) != "PALETTE COLOR":
            return (pixels >> (bits - 8) if bits > 8 else (pixels * (255 / (2**bits - 1))).round()).astype(np.uint8)
        if "SegmentedRedPaletteColorLookupTableData" not in header:
            span = dicom_header.stored_range(header)
            return read_palette(header, header.original_encoding[1], span, self.name).to_eight_bits(pixels)
        entries, _, depth = header.RedPaletteColorLookupTableDescriptor
        if depth == 8 and not 0 < entries <= 2**8:  # pydicom would count them in 8 bits
            raise RefusedError(f"{self.name} has a palette of a kind that is not read: {entries} entries in segments")
        shown = apply_color_lut(pixels, header)[..., :3]
        return (shown >> (8 * shown.itemsize - 8)).astype(np.uint8)

    def _grey_values(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(Rows, Columns) in the modality's own grey levels, and where there is nothing but padding."""
        header, _ = self._header(index)
        stored = self._stored(index)
        padding = np.zeros(stored.shape, dtype=bool)
        if (value := dicom_header.number_of(header.get("PixelPaddingValue"))) is not None:
            limit = dicom_header.number_of(header.get("PixelPaddingRangeLimit"))
            # The sign of either is as often written wrong as right.
            below = 2**15 if header.get("PixelRepresentation") else 0
            ends = [(end + below) % 2**16 - below for end in (value, value if limit is None else limit)]
            padding = (stored >= min(ends)) & (stored <= max(ends))
        scale = self._modality_scale(index)
        if isinstance(scale, Table):
            return scale.look_up(stored), padding
        slope, intercept = scale
        return stored * slope + intercept, padding

    def _modality_scale(self, index: int) -> Table | tuple[float, float]:
        """The modality lookup table of a slice, or its slope and intercept."""
        header, frame = self._header(index)
        group = dicom_header.group_of(header, frame, "PixelValueTransformationSequence")
        holder = next((part for part in (group, header) if any(key in part for key in _SCALES)), header)
        if holder.get("ModalityLUTSequence"):
            span, little = dicom_header.stored_range(header), header.original_encoding[1]
            return read_table(holder.ModalityLUTSequence[0], little, span, self._slice_name(index))
        stated = [holder.get(key) for key in ("RescaleSlope", "RescaleIntercept")]
        slope, intercept = (
            float(missing) if value is None else dicom_header.number_of(value)
            for value, missing in zip(stated, (1, 0), strict=True)
        )
        if slope is None or intercept is None or not slope:
            raise RefusedError(
                f"{self._slice_name(index)} has a damaged header: a rescale slope or intercept of no use"
            )
        return slope, intercept

    def _shown_by_file(self, index: int, values: np.ndarray) -> np.ndarray | None:
        """By the VOI lookup table of the file, or else its first window; `None` where it states neither."""
        header, frame = self._header(index)
        voi = dicom_header.voi_of(header, frame)
        if voi.get("VOILUTSequence"):
            scale = self._modality_scale(index)
            if isinstance(scale, Table):
                span = float(scale.entries.min()), float(scale.entries.max())
            else:
                low, high = (end * scale[0] + scale[1] for end in dicom_header.stored_range(header))
                span = min(low, high), max(low, high)
            table = read_table(voi.VOILUTSequence[0], header.original_encoding[1], span, self._slice_name(index))
            return table.to_eight_bits(values)
        window = dicom_header.window_of(voi)
        return None if window is None else windows.apply_window(values, window)

    def _in_hounsfield_units(self, index: int) -> bool:
        """Whether a CT says so: by the type of its rescale, or, where it has none, as an image of a scanner does."""
        header, frame = self._header(index)
        group = dicom_header.group_of(header, frame, "PixelValueTransformationSequence")
        kind = dicom_header.code_of(group.get("RescaleType") or header.get("RescaleType"))
        if self.modality != "CT" or not any("RescaleIntercept" in part for part in (group, header)):
            return False
        return kind.startswith("HU") if kind else not str(header.get("SOPClassUID")).startswith(_SECONDARY_CAPTURES)

    def _shown_by_default(self, index: int, values: np.ndarray) -> np.ndarray:
        header, scale = self._header(index)[0], self._modality_scale(index)
        if self._in_hounsfield_units(index):
            head = dicom_header.code_of(header.get("BodyPartExamined")) in _HEAD
            return windows.apply_window(values, windows.WINDOWS["brain" if head else "soft tissue"])
        if self.modality not in _BY_PERCENTILES:
            if (shown := self._shown_by_file(index, values)) is not None:
                return shown
            changed = isinstance(scale, Table) or scale != (1, 0) or header.get("PixelRepresentation")
            if int(header.get("BitsStored") or 16) <= 8 and not changed:
                top = 2 ** int(header.BitsStored) - 1
                return windows.apply_window(values, windows.Window(top / 2, top))
        if self._levels is None:
            sampled = (self._grey_values(i) for i in windows.sampled_slices(self.num_slices))
            self._levels = windows.percentile_window(np.concatenate([levels[~hidden] for levels, hidden in sampled]))
        return windows.apply_window(values, self._levels)


def series_files(folder: Path, name: str) -> list[Path]:
    """The DICOM files of a folder (not of the folders in it), by name.

    Raises:
        ValueError: if it holds none, or more than `MAX_SERIES_FILES` files.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if len(files) > MAX_SERIES_FILES:
        raise ValueError(f"{name} holds {len(files):,} files: a series of at most {MAX_SERIES_FILES:,} is read")
    found = []
    for path in files:
        try:
            if path.name != "DICOMDIR" and recognise(path, str(path)) == "dicom":
                found.append(path)
        except ValueError:
            pass  # an archive, or an empty file: no part of the series
    if not found:
        raise ValueError(f"{name} is a folder without a DICOM file: name a file, or the folder of one DICOM series")
    if len(found) < len(files):
        logger.warning(f"{name}: {len(files) - len(found)} of {len(files)} files are not DICOM and were left out")
    return found


def _series_order(headers: Sequence[Any], names: Sequence[str], name: str) -> list[int]:
    """The order of the instances of the one series, or a reason why they are no series."""
    series = Counter(str(header.get("SeriesInstanceUID")) for header in headers)
    if len(series) > 1:
        raise RefusedError(
            f"{name} holds {len(series)} series ({len(headers)} images): name the folder of one of them"
        )
    first = headers[0]
    seen: dict[str, str] = {}
    expected = dicom_header.directions_of(first, 0)
    for header, file in zip(headers, names, strict=True):
        if dicom_header.number_of_frames(header) > 1:
            raise RefusedError(f"{name} holds several files, {file} among them with several frames: name one file")
        for key in ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "Modality"):
            if header.get(key) != first.get(key):
                raise RefusedError(f"{file} differs from {names[0]} in {key}: they are no one volume")
        turn = dicom_header.directions_of(header, 0)
        if (turn is None) != (expected is None) or (
            turn is not None and np.abs(turn - expected).max() > dicom_header.TOLERANCE
        ):
            raise RefusedError(f"{file} lies in another direction than {names[0]}: they are no one volume")
        instance = str(header.get("SOPInstanceUID") or file)
        if seen.setdefault(instance, file) != file:
            raise RefusedError(f"{file} and {seen[instance]} are the same image: keep one of them")
    positions = [dicom_header.position_of(header, 0) for header in headers]
    numbers = [dicom_header.number_of(header.get("InstanceNumber")) or 0.0 for header in headers]
    along = [0.0] * len(headers)
    if expected is not None and all(position is not None for position in positions):
        along = [round(float(position @ np.cross(*expected)), 3) for position in positions]
    return sorted(range(len(headers)), key=lambda i: (along[i], numbers[i], names[i]))
