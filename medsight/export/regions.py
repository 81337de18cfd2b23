"""Found regions, and the labels that they add up to."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from medsight.scans.scan import Scan


@dataclass(frozen=True, eq=False)
class FoundRegion:
    """One region of one slice.

    Attributes:
        slice_index: the displayed slice it lies on, counted from 0; 0 for a picture.
        mask: boolean (height, width), as the slice is displayed.
        label: what it shows: the phrase of the answer, or the group.
        code: its region code, as `[C0_16]`.
        score: the model's confidence in the mask, in [0, 1]; `None` where it gave none.
    """

    slice_index: int
    mask: np.ndarray
    label: str
    code: str
    score: float | None


@dataclass(eq=False)
class Label:
    """All regions of one label: a value of the label map, a segment of the DICOM SEG, a ROI of the RTSTRUCT.

    Attributes:
        number: counted from 1, in the order in which the labels are first found.
        name: the label of the first of its regions.
        codes: the region codes of its regions, each once.
        masks: for each slice, the union of its regions, boolean (height, width).
    """

    number: int
    name: str
    codes: list[str] = field(default_factory=list)
    masks: dict[int, np.ndarray] = field(default_factory=dict)


def check_regions(scan: Scan, regions: Sequence[FoundRegion]) -> None:
    """Raises ValueError where a region is not on the scan, not boolean, not of its size, or has no label."""
    for number, region in enumerate(regions, 1):
        if not 0 <= region.slice_index < scan.num_slices:
            raise ValueError(
                f"region {number}: slice {region.slice_index} is not in {scan.name}, which has {scan.num_slices}"
            )
        if region.mask.dtype != bool or region.mask.shape != (scan.height, scan.width):
            raise ValueError(
                f"region {number}: expected a boolean mask of {scan.width} x {scan.height} pixels, as the slices of "
                f"{scan.name} have, got {region.mask.dtype} of shape {region.mask.shape}"
            )
        if not region.label.strip():
            raise ValueError(f"region {number}: its label is empty; give the phrase, the group or the code")


def label_key(label: str) -> str:
    """A key by which labels are compared: neither case nor spaces make a difference."""
    return " ".join(label.split()).casefold()


def group_by_label(regions: Sequence[FoundRegion]) -> list[Label]:
    """The labels of `regions`, in the order in which they are first found."""
    labels: dict[str, Label] = {}
    for region in regions:
        name = " ".join(region.label.split())
        label = labels.setdefault(label_key(name), Label(len(labels) + 1, name))
        if region.code not in label.codes:
            label.codes.append(region.code)
        seen = label.masks.get(region.slice_index)
        label.masks[region.slice_index] = region.mask if seen is None else seen | region.mask
    return list(labels.values())
