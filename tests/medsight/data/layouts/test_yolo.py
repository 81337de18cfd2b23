"""YOLO's polygons: read as their copy in BiomedParse's layout, with the names and splits of data.yaml."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsight.data.registry import Source
from medsight.data.sources import detect_layout
from medsight.export.outlines import outlines
from tests.medsight.data.layouts.picture_sets import (
    NAMES,
    ORIGIN,
    SIZE,
    contents,
    errors,
    examples,
    fuzz,
    save,
    write_biomedparse,
)


CLASSES = list(NAMES.values())


def write(root: Path, layout: str = "{kind}/{split}/{name}", names: bool = True) -> Path:
    for each in examples():
        save(root / layout.format(kind="images", split=each.split, name=f"{each.stem}.png"), each.pixels)
        lines = []
        for name, mask in each.masks():
            (outline,) = outlines(mask)
            shares = (outline / SIZE).ravel().tolist()
            lines.append(" ".join(map(str, [CLASSES.index(name), *shares])))
        text = root / layout.format(kind="labels", split=each.split, name=f"{each.stem}.txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        if lines:
            text.write_text("\n".join(lines) + "\n")
    if names:
        (root / "data.yaml").write_text(f"path: ../datasets/x\nnames: {CLASSES}\nnc: {len(CLASSES)}\n")
    return root


def source_of(root: Path, **settings: Any) -> Source:
    return Source.from_mapping(
        {"layout": "yolo", "path": str(root), "split": None, "patient": r"^(p\d)_", **ORIGIN, **settings}
    )


@pytest.mark.parametrize("layout", ["{kind}/{split}/{name}", "{split}/{kind}/{name}"])
def test_it_is_read_as_its_copy_in_biomedparse(tmp_path: Path, layout: str) -> None:
    root = write(tmp_path / "yolo", layout)
    expected = contents(write_biomedparse(tmp_path / "biomedparse"))
    assert contents(source_of(root)) == expected
    assert contents(source_of(root, split="test")) == {"p3_06": expected["p3_06"]}
    assert detect_layout(root) == "yolo"


def test_splits_may_stand_in_data_yaml(tmp_path: Path) -> None:
    root = write(tmp_path / "yolo", "{kind}/of {split}/{name}".replace("of ", "part_"))
    (root / "images/part_train").rename(root / "images/a")
    (root / "images/part_test").rename(root / "images/b")
    (root / "labels/part_train").rename(root / "labels/a")
    (root / "labels/part_test").rename(root / "labels/b")
    (root / "data.yaml").write_text(f"train: ../images/a\ntest: [images/b]\nnames: {dict(enumerate(CLASSES))}\n")
    assert contents(source_of(root)) == contents(write_biomedparse(tmp_path / "biomedparse"))


def test_names_stand_in_a_text_file_or_in_the_source(tmp_path: Path) -> None:
    root = write(tmp_path / "yolo", names=False)
    with pytest.raises(ValueError, match=r"data.yaml: no such file, .*names: \[NAME, ...\]"):
        errors(source_of(root))
    assert not errors(source_of(root, names=CLASSES))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    assert contents(source_of(root)) == contents(source_of(root, names=CLASSES))
    with pytest.raises(ValueError, match="data names: expected the names of classes"):
        source_of(root, names="liver")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2 0.2", "line 1: a box (class and 4 numbers), which is no mask: export polygons"),
        ("7 0.1 0.1 0.5 0.1 0.5 0.5", "line 1: expected the number of a class, one of [0, 1, 2], got '7'"),
        ("0 0.1 0.1 0.5 x 0.5 0.5", "line 1: expected CLASS x y x y ..."),
        ("0 0.1 0.1 0.5 0.1 0.5", "line 1: expected CLASS x y x y ..."),
        ("0 1 2 9 9 7 7", "line 1: a point of a polygon lies far outside"),
    ],
)
def test_a_line_that_is_no_polygon_is_named(tmp_path: Path, line: str, message: str) -> None:
    root = write(tmp_path / "yolo")
    (root / "labels/test/p3_06.txt").write_text(line)
    (found,) = errors(source_of(root))
    assert "p3_06.txt" in found and message in found


def test_labels_without_an_image_are_named(tmp_path: Path) -> None:
    root = write(tmp_path / "yolo")
    (root / "labels/test/extra.txt").write_text("")
    assert "extra.txt: labels without an image" in errors(source_of(root))[0]


def test_a_damaged_file_is_rows_or_named_errors(tmp_path: Path) -> None:
    root = write(tmp_path / "yolo")
    save(root / "images/train/more.png", np.zeros((5, 5), np.uint8))
    files = [root / "data.yaml", *sorted(root.rglob("*.txt")), root / "images/train/more.png"]
    assert fuzz(lambda: source_of(root, patient=None), files) == {"rows", "errors"}
