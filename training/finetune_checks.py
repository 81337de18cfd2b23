"""What images with masks promise nothing for, found before anything is trained on them."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from medsight.data.check import check
from medsight.data.pictures import read_mask, read_picture
from medsight.data.sources import Source, load_source
from medsight.text import first_few


LEAST_IMAGES = 10  # of a structure, to learn it from
FULL = 0.99  # share of an image from which a mask says nothing
LEAST_SIDED = 5  # images with a structure of one side, to say on which side it lies
MIXED = 0.1  # share of them on the other side, from which they are mirrored
_SIDE = re.compile(r"\b(left|right)\b", flags=re.IGNORECASE)


def problems_of(source: Source) -> list[str]:
    """What stands against training on a source: what `medsight data check` finds, and what is too little or senseless.

    Raises:
        OSError, ValueError: as `check` and `load_source`.
    """
    whole = Source.from_mapping({**source.to_mapping(), "split": None})
    found = [f"{finding.kind}: {finding.message}" for finding in check([whole], progress=False).problems]
    return found or [*_of_rows(load_source(source))]


def _of_rows(rows: Any) -> Iterator[str]:
    images, patients = Counter[str](), set[tuple[str, str]]()
    full, masks = Counter[str](), Counter[str]()
    sides: dict[str, list[bool]] = defaultdict(list)  # structure with a side -> whether it lies left of the middle
    for row in rows:
        images.update({*row["targets"]})
        patients.add((row["dataset"], row["patient"]))
        size = read_picture(row["image"]).size
        for target, entry in zip(row["targets"], row["masks"], strict=True):
            mask = read_mask(entry, size)
            masks[target] += 1
            full[target] += mask.mean() > FULL
            if _SIDE.search(target):
                sides[target].append(float(np.nonzero(mask)[1].mean() + 0.5) < size[0] / 2)
    few = sorted(name for name, count in images.items() if count < LEAST_IMAGES)
    if few:
        counts = ", ".join(f"{name} ({images[name]})" for name in few)
        yield f"fewer than {LEAST_IMAGES} training images show {counts}: add some, or leave the structure out"
    if len(patients) == 1 and len(rows) > 1:
        yield f"all {len(rows):,} training images are of one patient: nothing tells whether another one's would do"
    senseless = sorted(name for name, count in full.items() if count == masks[name])
    if senseless:
        yield f"every mask fills its image: {first_few(senseless)}; is outside stored as inside?"
    for name, lie in sorted(sides.items()):
        other = min(sum(lie), len(lie) - sum(lie)) / len(lie)
        if len(lie) >= LEAST_SIDED and other > MIXED:
            yield (
                f"{name!r} lies on the left of the picture in {sum(lie)} of {len(lie)} images: some are mirrored, so "
                "left and right cannot be learnt; turn them alike, or leave the side out of the name (rename)"
            )
