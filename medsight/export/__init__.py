"""Found regions as files that other tools open, as measures and as pictures.

from medsight.export import FoundRegion, measure, mosaic, write_masks
from medsight import open_scan

scan = open_scan("series-folder")
regions = [FoundRegion(slice_index=12, mask=mask, label="liver", code="[C0_16]", score=0.9)]
write_masks(scan, regions, Path("answer"), formats=["png", "nifti", "dicom-seg"])
"""

from .measures import Measures, measure
from .pictures import mosaic, overlay
from .regions import FoundRegion
from .writing import FORMATS, check_formats, write_masks


__all__ = ["FORMATS", "FoundRegion", "Measures", "check_formats", "measure", "mosaic", "overlay", "write_masks"]
