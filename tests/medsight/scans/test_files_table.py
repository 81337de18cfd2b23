"""Every DICOM that pydicom ships and every volume of the shared data: read, or refused with a reason.

The outcome stands in docs/files.md, which is held to it here; `MEDSIGHT_UPDATE_DOCS=1 pytest PATH_OF_THIS_FILE` writes
it anew.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from medsight.scans import open_scan
from tests.medsight.scans.scan_files import shipped_dicoms


pydicom = pytest.importorskip("pydicom")
for needed in ("nibabel", "libjpeg", "openjpeg"):
    pytest.importorskip(needed)

PAGE = Path(__file__).resolve().parents[3] / "docs/files.md"


def outcome(path: Path, name: str) -> str:
    """What comes of a file or folder: its kind and size after all of it was decoded, or the reason of its refusal."""
    try:
        scan = open_scan(path, name)
        for index in range(scan.num_slices):
            image = scan.slice_image(index)
            assert image.size == scan.picture_size and image.mode in ("L", "RGB")
    except ValueError as error:
        reason = re.sub(r"^\W+", "", str(error).replace(str(path), name).replace(name, "", 1))
        assert reason and "/" not in reason.split()[0], error
        return f"refused: {reason}"
    mask = np.ones((scan.height, scan.width), dtype=bool)
    assert scan.to_source({scan.num_slices - 1: mask}).sum() == mask.sum()
    colour = "colour" if image.mode == "RGB" else "grey"
    size = (
        f"{scan.height} x {scan.width}"
        if scan.num_slices == 1
        else f"{scan.num_slices} slices of {scan.height} x {scan.width}"
    )
    return f"{scan.modality or 'image' if scan.kind == 'dicom' else scan.kind}, {size}, {colour}"


def of_pydicom() -> Iterator[tuple[str, Path]]:
    """The files one by one; of its example of a medium the folders, and images in those that are no series."""
    folders: dict[Path, list[tuple[str, Path]]] = {}
    for name, path in shipped_dicoms():
        if name.startswith("dicomdirtests/") and not path.name.startswith("DICOMDIR"):
            folders.setdefault(path.parent, []).append((name, path))
        else:
            yield name, path
    for folder, files in folders.items():
        name = files[0][0].rpartition("/")[0]
        yield name, folder
        if outcome(folder, name).startswith("refused") and not outcome(files[0][1], files[0][0]).startswith("refused"):
            yield from files


def of_the_shared_data(folder: Path) -> Iterator[tuple[str, Path]]:
    """The volumes one by one, DICOM series as folders."""
    series = {folder / "totalsegmentator/example_ct_dicom", folder / "tcia_sts_dicom/image"}
    for path in sorted(series):
        yield path.relative_to(folder).as_posix(), path
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.parent not in series and path.suffix not in (".json", ".md"):
            yield path.relative_to(folder).as_posix(), path


def table(files: Iterator[tuple[str, Path]]) -> str:
    rows = [f"| `{name}` | {outcome(path, name)} |" for name, path in files]
    return "\n".join(["| file | what comes of it |", "|---|---|", *rows])


@pytest.mark.parametrize("source", ["pydicom", "shared data"])
def test_the_table_in_the_docs_says_what_comes_of_every_file(source: str, request: pytest.FixtureRequest) -> None:
    if source == "pydicom":
        if not pydicom.__version__.startswith("3.0."):
            pytest.skip(f"the table is of the files of pydicom 3.0, this is {pydicom.__version__}")
        current = table(of_pydicom())
    else:
        current = table(of_the_shared_data(request.getfixturevalue("shared_data") / "volumes"))
    begin, end = f"<!-- {source}: begin -->\n\n", f"\n\n<!-- {source}: end -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    written, after = rest.split(end)
    if os.environ.get("MEDSIGHT_UPDATE_DOCS"):
        PAGE.write_text(before + begin + current + end + after, encoding="utf-8")
        return
    assert written == current, "docs/files.md is out of date: run this test with MEDSIGHT_UPDATE_DOCS=1"
