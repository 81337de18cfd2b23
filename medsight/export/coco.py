"""Regions as COCO annotations, once as run lengths and once as polygons."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medsight.files import write_json
from medsight.scans.scan import Scan

from .outlines import outlines
from .regions import FoundRegion, group_by_label, label_key


RLE_FILE = "coco-rle.json"
POLYGON_FILE = "coco-polygons.json"


def write_coco(scan: Scan, regions: Sequence[FoundRegion], folder: Path, name: str) -> None:
    """Writes `coco-rle.json` and `coco-polygons.json`, which say the same: tools take one form or the other.

    An image is a displayed slice that has regions (or the picture), an annotation a region that is not empty, its id
    the number of the region, a category a label. Both forms are exact; polygons join holes to the outline around them.
    Beyond COCO's own fields, images have `slice_index`, annotations `region_code` and `score`.

    Args:
        name: the `file_name` of the images.
    """
    from pycocotools.mask import encode, toBbox

    labels = group_by_label(regions)
    category_of = {label_key(label.name): label.number for label in labels}
    slices = sorted({region.slice_index for region in regions}) if scan.num_slices > 1 else [0]
    size = {"width": scan.width, "height": scan.height}
    content = {
        "images": [{"id": i + 1, "file_name": name, **size, "slice_index": i} for i in slices],
        "categories": [{"id": label.number, "name": label.name, "supercategory": ""} for label in labels],
    }
    rle, polygons = [], []
    for number, region in enumerate(regions, 1):
        if not region.mask.any():
            continue
        run_lengths = encode(np.asfortranarray(region.mask, dtype=np.uint8))
        annotation = {
            "id": number,
            "image_id": region.slice_index + 1,
            "category_id": category_of[label_key(region.label)],
            "area": int(region.mask.sum()),
            "bbox": [int(value) for value in toBbox(run_lengths)],
            "iscrowd": 0,
            "region_code": region.code,
            "score": region.score,
        }
        counts = {"size": list(run_lengths["size"]), "counts": run_lengths["counts"].decode("ascii")}
        rle.append({**annotation, "segmentation": counts})
        polygons.append({**annotation, "segmentation": [part.ravel().tolist() for part in outlines(region.mask)]})
    write_json(folder / RLE_FILE, {**content, "annotations": rle})
    write_json(folder / POLYGON_FILE, {**content, "annotations": polygons})
