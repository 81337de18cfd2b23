"""Found regions, the labels that they add up to, and their sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from medsight.scans.scan import Scan


MM3_PER_ML = 1000


@dataclass(frozen=True, eq=False)
class FoundRegion:
    """One region of one slice.

    ```python
    from pathlib import Path

    import numpy as np

    from medsight import open_scan
    from medsight.export import FoundRegion, measure, write_masks

    scan = open_scan(np.random.default_rng(0).integers(-1000, 1000, (9, 64, 48)))  # or a file, or a folder
    mask = np.asarray(scan.slice_image(2, window=(40, 400))) > 150
    regions = [FoundRegion(slice_index=2, mask=mask, label="liver", code="[C0_16]", score=0.9)]
    write_masks(scan, regions, Path("answer"), formats=["png", "coco"])
    assert measure(scan, regions).area_mm2 == [None]  # an array says nothing of millimetres
    ```

    Attributes:
        slice_index: the displayed slice it lies on, counted from 0; 0 for a picture.
        mask: boolean (height, width), on the slice's own pixels: one of the picture that is shown goes there by
            `Scan.to_grid`.
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

    @property
    def description(self) -> str:
        """Its name and its codes, for DICOM objects."""
        return f"{self.name}; region codes: {' '.join(self.codes)}"


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


@dataclass(frozen=True)
class Measures:
    """Sizes of regions, by `measure`.

    Attributes:
        area_mm2: of each region, in the order given; `None` where the scan does not give the pixel spacing.
        volume_ml: of each label, by name, over the slices that have regions of it: a volume of which only some slices
            were looked at is underestimated. `None` where the scan does not give the spacing of pixels and slices.
    """

    area_mm2: list[float | None]
    volume_ml: dict[str, float | None]


def measure(scan: Scan, regions: Sequence[FoundRegion]) -> Measures:
    """Areas in mm² and volumes in ml. Where regions of a label overlap on a slice, a pixel counts once in its volume.

    Raises:
        ValueError: a region does not fit the scan.
    """
    check_regions(scan, regions)
    pixel_mm2 = scan.pixel_mm2
    voxel_mm3 = None if pixel_mm2 is None or scan.slice_spacing is None else pixel_mm2 * scan.slice_spacing
    areas = [None if pixel_mm2 is None else int(region.mask.sum()) * pixel_mm2 for region in regions]
    volumes: dict[str, float | None] = {}
    for label in group_by_label(regions):
        voxels = sum(int(mask.sum()) for mask in label.masks.values())
        volumes[label.name] = None if voxel_mm3 is None else voxels * voxel_mm3 / MM3_PER_ML
    return Measures(areas, volumes)
