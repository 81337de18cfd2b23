"""Found regions as files that other tools open, as measures and as pictures: see [`FoundRegion`]."""

from .pictures import mosaic, overlay
from .regions import FoundRegion, measure
from .writing import FORMATS, check_formats, write_masks


__all__ = ["FORMATS", "FoundRegion", "check_formats", "measure", "mosaic", "overlay", "write_masks"]
