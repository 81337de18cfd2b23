"""Found regions as files that other tools open, as measures and as pictures.

```python
from pathlib import Path

import numpy as np

from medsight import open_scan
from medsight.export import FoundRegion, measure, write_masks

scan = open_scan("series")  # the folder of a DICOM series
mask = scan.slice_image(2).point(lambda level: level > 150, mode="1")
regions = [FoundRegion(slice_index=2, mask=np.asarray(mask), label="liver", code="[C0_16]", score=0.9)]
write_masks(scan, regions, Path("answer"), formats=["png", "nifti", "dicom-seg"])
print(measure(scan, regions).volume_ml)
```
"""

from .measures import Measures, measure
from .pictures import mosaic, overlay
from .regions import FoundRegion
from .writing import FORMATS, check_formats, write_masks


__all__ = ["FORMATS", "FoundRegion", "Measures", "check_formats", "measure", "mosaic", "overlay", "write_masks"]
