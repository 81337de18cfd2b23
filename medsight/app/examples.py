"""Images to try: drawn here, or real ones that installed packages carry. None is copied into this project."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class Example:
    """An image to try: what its button says, a question that suits it, and what gives the content of its file."""

    title: str
    prompt: str
    load: Callable[[], bytes]


def examples() -> list[Example]:
    """The examples that can be had here: those of packages that are not installed are left out."""
    needed = {
        "mahotas": Example("Cell nuclei", "Segment the nucleus.", _nuclei),
        "pydicom": Example("CT slice (DICOM)", "What is in this image?", _ct_slice),
        "nibabel": Example("Heart volume (NIfTI, drawn)", "Segment the left ventricle.", draw_heart_volume),
    }
    return [example for package, example in needed.items() if find_spec(package)]


def draw_heart_volume() -> bytes:
    """A NIfTI volume like a short-axis MRI of a heart: 12 slices of 128 x 128, 1.6 x 1.6 x 8 mm."""
    import nibabel

    side, slices = 128, 12
    y, x = np.mgrid[:side, :side].astype(np.float32)
    noise = np.random.default_rng(0)
    volume = np.zeros((side, side, slices), dtype=np.int16)
    seen = np.hypot(x - 64, y - 64) < 60
    wall = (np.abs((x - 64) + (y - 50) + 46) < 7) | (np.hypot(x - 100, y - 92) < 15)
    lung = np.hypot((x - 88) / 30, (y - 42) / 26) < 1
    for index in range(slices):
        shrink = np.sqrt(1 - ((index - 4) / 9) ** 2)  # towards the apex
        from_left = np.hypot(x - 63, y - 60)
        blood = from_left < 12.5 * shrink
        muscle = (from_left < 17 * shrink) & ~blood
        right = (np.hypot((x - 47) / 12, (y - 52) / 22) < shrink) & ~muscle & ~blood
        tissue = np.where(wall, 200, np.where(lung, 8, np.where(y > 78, 48, 30)))
        tissue = np.where(right, 105, np.where(muscle, 28, np.where(blood, 110, tissue)))
        picture = ndimage.gaussian_filter(tissue.astype(np.float32), 1) + noise.normal(0, 3, (side, side))
        # Voxel axes run to the left and to the back of the patient: what is drawn is what a viewer shows.
        volume[:, :, index] = (picture * seen).clip(0).T.astype(np.int16)
    image = nibabel.Nifti1Image(volume, np.diag([-1.6, -1.6, 8.0, 1.0]))
    image.header.set_xyzt_units("mm")
    return image.to_bytes()


def _nuclei() -> bytes:
    from mahotas.demos import image_path

    return Path(image_path("nuclear.png")).read_bytes()


def _ct_slice() -> bytes:
    from pydicom.data import get_testdata_file

    return Path(str(get_testdata_file("CT_small.dcm", download=False))).read_bytes()
