"""Areas and volumes of found regions, where the scan says how large a pixel is."""

from collections.abc import Sequence
from dataclasses import dataclass

from medsight.scans.scan import Scan

from .regions import FoundRegion, check_regions, group_by_label


MM3_PER_ML = 1000


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
