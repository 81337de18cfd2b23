"""Writes the image of `make demo`: a real fluorescence micrograph of cell nuclei that the package mahotas ships."""

import shutil
import sys
from pathlib import Path


def write_demo_image(path: str | Path) -> Path:
    """Copies the micrograph (by the authors of mahotas, MIT licence), which nothing here was trained on, to `path`."""
    from mahotas.demos import image_path

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(image_path("nuclear.png"), path))


if __name__ == "__main__":
    print(f"A real fluorescence micrograph of cell nuclei, from the package mahotas: {write_demo_image(sys.argv[1])}")
