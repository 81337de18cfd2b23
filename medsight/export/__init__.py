"""Found regions as files that other tools open, as measures and as pictures.

```python
from pathlib import Path

import numpy as np

from medsight import open_scan
from medsight.export import FoundRegion, measure, write_masks

scan = open_scan(np.random.default_rng(0).integers(-1000, 1000, (9, 64, 48)))  # or a file, or a folder
mask = np.asarray(scan.slice_image(2, window=(40, 400))) > 150
regions = [FoundRegion(slice_index=2, mask=mask, label="liver", code="[C0_16]", score=0.9)]
write_masks(scan, regions, Path("answer"), formats=["png", "coco"])
print(measure(scan, regions).area_mm2)
```
"""

from .pictures import mosaic, overlay
from .regions import FoundRegion, Measures, measure
from .writing import FORMATS, check_formats, write_masks


__all__ = ["FORMATS", "FoundRegion", "Measures", "check_formats", "measure", "mosaic", "overlay", "write_masks"]
