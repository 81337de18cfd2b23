"""Grey levels of a scan (Hounsfield units, MR intensities, counts) to the 8 bits that a screen and the model take.

Named windows are of CT. `soft tissue` is what MedSIGHT's own CT images were made with (-160 to 240 HU); the others are
the usual ones of radiology.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """The part of the grey levels that is shown, as DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3 define it."""

    centre: float
    width: float
    function: str = "LINEAR_EXACT"


WINDOWS = {
    "abdomen": Window(50, 400),
    "lung": Window(-600, 1500),
    "bone": Window(400, 1800),
    "brain": Window(40, 80),
    "soft tissue": Window(40, 400),
}
FILE_WINDOW = "file"  # the one that a file states for itself
PERCENTILES = (1, 99)  # of the volume: what grey levels without a known scale are shown between
_SAMPLED_SLICES = 16  # that percentiles are taken from
_AIR = (-3100, -500)  # Hounsfield units of air, and of the padding around a scanner's field of view


def parse_window(window: str | Sequence[float]) -> Window:
    """A window by name, or by centre and width.

    Args:
        window: a key of `WINDOWS`, or (centre, width) in the scan's own grey levels.

    Raises:
        ValueError: for another name, not two numbers, or a width that is not above 0.
    """
    if isinstance(window, str) and window in WINDOWS:
        return WINDOWS[window]
    try:
        centre, width = (float(value) for value in window)
    except (TypeError, ValueError):
        names = ", ".join((*WINDOWS, FILE_WINDOW))
        raise ValueError(f"window={window!r}: expected one of {names}, or (centre, width)") from None
    if not (np.isfinite(centre) and np.isfinite(width) and width > 0):
        raise ValueError(f"window={window!r}: expected a finite centre and a width above 0")
    return Window(centre, width)


def is_file_window(window: str | Sequence[float] | None) -> bool:
    """Whether a caller asks for the window that the file states."""
    return isinstance(window, str) and window == FILE_WINDOW


def no_file_window(name: str) -> str:
    """The message for a file, or slice, that states none."""
    return (
        f'{name} states no window of its own, for window="{FILE_WINDOW}": give a name ({", ".join(WINDOWS)}) or '
        "(centre, width), or leave the window out"
    )


def sampled_slices(count: int) -> list[int]:
    """Which of `count` slices percentiles are taken from: 16 at most, evenly spread."""
    sampled = min(count, _SAMPLED_SLICES)
    return [i * count // sampled for i in range(sampled)]


def percentile_window(values: np.ndarray) -> Window:
    """The window between the 1st and 99th percentile of what is finite; of all of it where these coincide."""
    values = values[np.isfinite(values)]
    if not values.size:
        return Window(0, 1)
    low, high = np.percentile(values, PERCENTILES)
    if low == high:
        low, high = values.min(), values.max()
    return Window((float(low) + float(high)) / 2, max(float(high) - float(low), np.finfo(np.float32).tiny))


def looks_like_hounsfield(values: np.ndarray) -> bool:
    """Whether grey levels without a stated unit are those of a CT: air at about -1000, tissue above 0.

    A single level below all air is padding, and does not count.
    """
    values = values[np.isfinite(values)]
    below = values < _AIR[0]
    if below.all() or (values[below] != values.min()).any():
        return False
    values = values[~below]
    low, high = np.percentile(values, PERCENTILES)
    return bool(_AIR[0] <= low <= _AIR[1] and high > 0)


def apply_window(values: np.ndarray, window: Window) -> np.ndarray:
    """8-bit grey levels of any array: below the window 0, above it 255. NaN is 0."""
    centre, width, function = window
    values = values.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # a width of 1 is a threshold
        if function == "SIGMOID":
            shown = 1 / (1 + np.exp(-4 * (values - centre) / width))
        elif function == "LINEAR":
            shown = (values - (centre - 0.5)) / (width - 1) + 0.5
        else:
            shown = (values - centre) / width + 0.5
        return np.nan_to_num(shown * 255, nan=0).clip(0, 255).round().astype(np.uint8)
