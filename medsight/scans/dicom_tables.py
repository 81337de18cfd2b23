"""Lookup tables of a DICOM header: palettes, and the modality's and VOI's (PS3.3 C.7.6.3.1.5, C.11.1.1, C.11.2.1.1).

Writers disagree with the standard on how deep entries are and whether the first value has a sign. Both are told from
what is there: the depth by the lengths and by what the entries fill, the sign by what can be looked up.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .dicom_file import RefusedError
from .dicom_header import numbers_of


class Table(NamedTuple):
    """What values from `first` on become; those outside become the first and the last entry.

    Attributes:
        first: the value that the first entry is of.
        entries: (n,) or, of a palette, (n, 3) integers.
        depth: bits that an entry can fill.
    """

    first: int
    entries: np.ndarray
    depth: int

    def look_up(self, values: np.ndarray) -> np.ndarray:
        places = np.rint(values).astype(np.int64) - self.first
        return self.entries[places.clip(0, len(self.entries) - 1)]

    def to_eight_bits(self, values: np.ndarray) -> np.ndarray:
        return (self.look_up(values) >> (self.depth - 8)).astype(np.uint8)


def read_table(item: Any, little_endian: bool, span: tuple[float, float], name: str) -> Table:
    """The table of an item of a Modality or VOI LUT Sequence.

    Args:
        item: what holds LUT Descriptor and LUT Data.
        little_endian: the order of bytes in the file.
        span: the lowest and highest value that can be looked up.
        name: what to call the file in an error.

    Raises:
        RefusedError: a descriptor of other than three numbers, or fewer data than it states.
    """
    return _joined([_entries(item, "LUT", little_endian, name)], span)


def read_palette(header: Any, little_endian: bool, span: tuple[float, float], name: str) -> Table:
    """The three tables of a palette as one of (n, 3) entries; arguments and errors as of `read_table`."""
    colours = ("Red", "Green", "Blue")
    tables = [_entries(header, f"{colour}PaletteColorLookupTable", little_endian, name) for colour in colours]
    if len({len(table) for _, _, table in tables}) > 1:
        raise RefusedError(f"{name} has a damaged palette: its red, green and blue tables differ in length")
    return _joined(tables, span)


def _joined(tables: Sequence[tuple[int, int, np.ndarray]], span: tuple[float, float]) -> Table:
    first, depth = tables[0][0], max(depth for _, depth, _ in tables)
    entries = np.stack([table for _, _, table in tables], axis=1)
    filled = max(8, int(entries.max()).bit_length())
    if entries.dtype != np.uint8 and (filled > depth or filled <= depth - 2):  # too deep, or never above a quarter
        depth = filled
    # One that is written as unsigned, or as signed, may be meant as the other: the one that the values can reach.
    reach = {
        meant: min(span[1], meant + len(entries) - 1) - max(span[0], meant)
        for meant in (first, first - 2**16, first + 2**16)
    }
    first = max(reach, key=lambda meant: reach[meant])
    return Table(first, entries if len(tables) > 1 else entries[:, 0], depth)


def _entries(item: Any, prefix: str, little_endian: bool, name: str) -> tuple[int, int, np.ndarray]:
    """The first value, the depth that is stated, and the entries: uint8 where each is a byte, else uint16."""
    descriptor, element = numbers_of(item.get(f"{prefix}Descriptor"), 3), f"{prefix}Data"
    if descriptor is None or element not in item:
        raise RefusedError(
            f"{name} has a damaged lookup table: no {prefix}Descriptor of three numbers, or no {element}"
        )
    count, first, depth = (int(number) for number in descriptor)
    count = count % 2**16 or 2**16
    data = item[element].value
    if not isinstance(data, bytes):
        data = (np.atleast_1d(np.asarray(data, np.int64)) % 2**16).astype("<u2").tobytes()
    elif not little_endian and item[element].VR == "OW":
        data = np.frombuffer(data[: len(data) // 2 * 2], ">u2").astype("<u2").tobytes()
    if len(data) in (count, count + 1) and len(data) < 2 * count:
        return first, 8, np.frombuffer(data, np.uint8, count)
    if len(data) < 2 * count:
        raise RefusedError(f"{name} has a damaged lookup table: {element} should have {count:,} entries")
    return first, depth if 8 <= depth <= 16 else 16, np.frombuffer(data, "<u2", count)
