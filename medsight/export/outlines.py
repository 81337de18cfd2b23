"""Outlines of masks as closed polygons."""

import numpy as np


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Polygons that cover exactly the pixels of `mask`: those whose centre lies inside one of them.

    Vertices lie on the middles of pixel edges. A hole is joined to the outline around it by a cut of no width, walked
    both ways, as DICOM PS3.3 C.8.8.6 describes, so that a reader without a notion of holes shows it all the same.

    Args:
        mask: boolean (height, width).

    Returns:
        One (vertices, 2) array of x, y a connected part, the last vertex not repeating the first. (0, 0) is the outer
        corner of the first pixel and (0.5, 0.5) its centre, as in COCO.
    """
    import contourpy

    # The frame of background closes outlines that run along the border of the image.
    framed = np.pad(mask, 1).astype(np.uint8)
    parts = zip(*contourpy.contour_generator(z=framed, fill_type="OuterOffset").filled(0.5, 2), strict=True)
    polygons = []
    for points, offsets in parts:
        rings = [points[start : end - 1] - 0.5 for start, end in zip(offsets[:-1], offsets[1:], strict=True)]
        polygons.append(_corners(_join_holes(rings[0], rings[1:])))
    return polygons


def _join_holes(outer: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
    """One ring through all. Each hole's topmost vertex is cut through to the ring straight above.

    Up there the first thing met is the outer ring or a hole that begins higher and is joined already, and it has a
    vertex in this column, as every ring has in each column whose pixels it parts.
    """
    for hole in sorted(holes, key=lambda ring: ring[:, 1].min()):
        top = int(hole[:, 1].argmin())
        x, y = hole[top]
        above = np.flatnonzero((outer[:, 0] == x) & (outer[:, 1] < y))
        at = int(above[outer[above, 1].argmax()])
        detour = np.concatenate([np.roll(hole, -top, axis=0), hole[top : top + 1]])
        outer = np.concatenate([outer[: at + 1], detour, outer[at:]])
    return outer


def _corners(ring: np.ndarray) -> np.ndarray:
    """The vertices of a ring at which it does not just go straight on."""
    after, before = np.roll(ring, -1, axis=0) - ring, ring - np.roll(ring, 1, axis=0)
    turns = after[:, 0] * before[:, 1] != after[:, 1] * before[:, 0]
    returns = (after * before).sum(axis=1) < 0
    return ring[turns | returns]
