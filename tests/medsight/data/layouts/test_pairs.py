"""Folders of images and masks: read as their copy in BiomedParse's layout, however they are called and nested."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medsight.data.records import UntoldError
from medsight.data.registry import Source
from medsight.data.sources import detect_layout, fitting_layouts, iterate, load_source
from tests.medsight.data.layouts.picture_sets import (
    NAMES,
    ORIGIN,
    Example,
    contents,
    errors,
    examples,
    fuzz,
    save,
    write_biomedparse,
)


COLOURS = {0: (0, 0, 0), 1: (255, 0, 0), 2: (0, 255, 0), 3: (0, 16, 255)}


def source_of(root: Path, **settings: Any) -> Source:
    return Source.from_mapping(
        {"layout": "pairs", "path": str(root), "split": None, "patient": r"^(p\d)_", **ORIGIN, **settings}
    )


def by_folder(image: str, mask: str) -> Callable[[Path], None]:
    """A mask file a structure, at paths of such forms."""

    def write(root: Path) -> None:
        for each in examples():
            known = {"split": each.split, "stem": each.stem}
            save(root / image.format(**known), each.pixels)
            for name, inside in each.masks():
                save(root / mask.format(**known, name=name, under=name.replace(" ", "_")), inside)

    return write


def label_maps(image: str, mask: str, encode: Callable[[Example], np.ndarray]) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for each in examples():
            save(root / image.format(split=each.split, stem=each.stem), each.pixels)
            save(root / mask.format(split=each.split, stem=each.stem), encode(each))

    return write


def palette(root: Path) -> None:
    for each in examples():
        save(root / "JPEGImages" / each.split / f"{each.stem}.png", each.pixels)
        picture = Image.fromarray(each.labels, "P")
        picture.putpalette([channel for value in range(4) for channel in COLOURS[value]])
        path = root / "SegmentationClass" / each.split / f"{each.stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


FOLDERS = {
    "a folder a class below": by_folder("images/{split}/{stem}.png", "masks/{split}/{under}/{stem}.png"),
    "a folder a class above": by_folder("{split}/images/{stem}.png", "{split}/masks/{name}/{stem}.png"),
    "folders of no other name": by_folder("{split}/images/{stem}.png", "{split}/{under}/{stem}.png"),
    "the class in a folder's name": by_folder("{split}_images/{stem}.png", "{split}_{under}_masks/{stem}.png"),
    "the class in a file's name": by_folder("{split}/imgs/{stem}.png", "{split}/labels/{stem}_{under}.png"),
    "one folder": by_folder("{split}/{stem}.png", "{split}/{stem}_{under}_mask.png"),
    "numbered": by_folder("{split}/images/{stem}.png", "{split}/GroundTruth/{stem}_{under}_segmentation_1.bmp"),
}


def plain(each: Example) -> np.ndarray:
    return each.labels


def deep(each: Example) -> np.ndarray:
    return 300 * each.labels.astype(np.uint16)


def coloured(each: Example) -> np.ndarray:
    return np.array(list(COLOURS.values()), np.uint8)[each.labels]


MAPS = {
    "numbers": (label_maps("images/{split}/{stem}.png", "labels/{split}/{stem}.png", plain), NAMES),
    "16 bits": (
        label_maps("{split}/Images/{stem}.tif", "{split}/LabelMaps/{stem}_label.tif", deep),
        {300 * value: name for value, name in NAMES.items()},
    ),
    "names first": (
        label_maps("{split}/{stem}.png", "{split}_mask/{stem}.png", plain),
        {name: value for value, name in NAMES.items()},
    ),
    "colours": (
        label_maps("{split}/image/{stem}.png", "{split}/gt/{stem}_gt.png", coloured),
        {"#ff0000": "liver", "0,255,0": "left kidney", "#0010FF": "liver tumor", "#000000": "background"},
    ),
    "a palette": (palette, NAMES),
    "a palette's colours": (palette, {"#ff0000": "liver", "#00ff00": "left kidney", "#0010ff": "liver tumor"}),
}


@pytest.mark.parametrize("form", FOLDERS)
def test_masks_of_one_structure_are_read_as_their_copy_in_biomedparse(tmp_path: Path, form: str) -> None:
    FOLDERS[form](tmp_path / "pairs")
    expected = contents(write_biomedparse(tmp_path / "biomedparse"))
    assert contents(source_of(tmp_path / "pairs")) == expected
    assert contents(source_of(tmp_path / "pairs", split="test")) == {"p3_06": expected["p3_06"]}
    assert "pairs" in fitting_layouts(tmp_path / "pairs")
    files = [mask["path"] for entry in iterate(source_of(tmp_path / "pairs")) for mask in entry.checked()["masks"]]
    assert all(Path(file).is_file() for file in files)


@pytest.mark.parametrize("form", MAPS)
def test_label_maps_are_read_as_their_copy_in_biomedparse(tmp_path: Path, form: str) -> None:
    write, names = MAPS[form]
    write(tmp_path / "pairs")
    expected = contents(write_biomedparse(tmp_path / "biomedparse"))
    source = source_of(tmp_path / "pairs", names=names)
    assert contents(source) == expected
    assert len(load_source(source)) == 7  # its masks go through the library's own files
    assert Source.from_mapping(source.to_mapping()) == source


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.yaml", "1: liver\n2: left kidney\n3: liver tumor\n"),
        ("names.json", '{"names": {"liver": 1, "left kidney": 2, "liver tumor": 3}}'),
        ("names.txt", "1 liver\n2: left kidney\n3,liver tumor\n"),
        ("classes.txt", "background\nliver\nleft kidney\nliver tumor\n"),
    ],
)
def test_names_may_stand_in_a_file(tmp_path: Path, file: str, text: str) -> None:
    MAPS["numbers"][0](tmp_path / "pairs")
    (tmp_path / "pairs" / file).write_text(text)
    assert contents(source_of(tmp_path / "pairs", names=file)) == contents(write_biomedparse(tmp_path / "biomedparse"))
    (tmp_path / "pairs" / file).write_text("liver\nspleen")
    with pytest.raises(ValueError, match=f"{file}: expected a value and a name"):
        errors(source_of(tmp_path / "pairs", names=file))


@pytest.fixture
def polyps(tmp_path: Path) -> Path:
    """Masks of one structure that nothing names, one of them empty."""
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 9), dtype=np.uint8)
        mask = np.zeros((8, 9), bool)
        mask[2:5, 3:6] = number > 0
        save(tmp_path / "kvasir/images" / f"{number}.jpg", pixels)
        save(tmp_path / "kvasir/masks" / f"{number}.png", mask)
    return tmp_path / "kvasir"


def test_one_structure_is_named_by_the_source_and_an_empty_mask_is_none(polyps: Path) -> None:
    rows = [entry.checked() for entry in iterate(source_of(polyps, structure="polyp", patient=None))]
    assert [row["targets"] for row in rows] == [[], ["polyp"], ["polyp"]]
    assert [row["patient"] for row in rows] == [f"kvasir:images/{number}.jpg" for number in range(3)]
    assert not any(row["absent"] for row in rows)
    covered = source_of(polyps, structure="polyp", patient=None, covers=["polyp"])
    assert [entry.checked()["absent"] for entry in iterate(covered)] == [["polyp"], [], []]


def test_what_nothing_tells_is_asked_for_by_its_name(polyps: Path) -> None:
    def untold(**settings: Any) -> str:
        entries = iterate(source_of(polyps, patient=None, **settings))
        error = next(entry.error for entry in entries if entry.error)
        assert isinstance(error, UntoldError) and str(polyps) in str(error)
        return error.setting

    assert untold() == "structure"
    assert untold(structure="polyp", site=None) == "site"
    save(polyps / "masks/0.png", np.arange(72, dtype=np.uint8).reshape(8, 9) % 4)
    assert untold(structure="polyp") == "names"
    assert untold(names={1: "polyp", 2: "ignore"}) == "names"
    assert (
        "1 value(s) without a name: 3" in errors(source_of(polyps, patient=None, names={1: "polyp", 2: "ignore"}))[0]
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("masks/9.png", "9.png: a mask without an image"),
        ("other/picture.png", "picture.png: a mask without an image.*in no image folder"),
        ("images/1.png", "1.png and .*1.jpg have the same name|1.jpg and .*1.png have the same name"),
    ],
)
def test_a_picture_that_fits_nowhere_is_named(polyps: Path, path: str, message: str) -> None:
    save(polyps / path, np.ones((8, 9), bool))
    with pytest.raises(ValueError, match=message):
        for entry in iterate(source_of(polyps, structure="polyp", patient=None)):
            entry.checked()


def test_folders_of_other_names_are_named_by_the_source(polyps: Path) -> None:
    (polyps / "images").rename(polyps / "A")
    (polyps / "masks").rename(polyps / "B")
    source = source_of(polyps, structure="polyp", patient=None, image_folder="A", mask_folder="B")
    assert [entry.checked()["targets"] for entry in iterate(source)] == [[], ["polyp"], ["polyp"]]


def test_all_masks_in_the_folder_of_one_image_are_its_own(tmp_path: Path) -> None:
    for case in ("x", "y"):
        save(tmp_path / f"cells/{case}1/images/{case}.png", np.full((8, 9), ord(case), np.uint8))
        for number in range(3):
            save(tmp_path / f"cells/{case}1/masks/{number}f.png", np.eye(8, 9, number) > 0)
    rows = [entry.checked() for entry in iterate(source_of(tmp_path / "cells", structure="cell", patient=None))]
    assert [row["targets"] for row in rows] == [["cell"] * 3] * 2


def test_what_is_left_out_is_said(polyps: Path) -> None:
    save(polyps / "test/images/7.png", np.zeros((8, 9), np.uint8))
    for name in ("images", "masks"):
        (polyps / "train").mkdir(exist_ok=True)
        (polyps / name).rename(polyps / "train" / name)
    (polyps / "train/images/notes.txt").write_text("by hand")
    entries = list(iterate(source_of(polyps, structure="polyp", patient=None)))
    assert len(entries) == 3
    first, second = entries[0].warnings
    assert "1 file(s) are no pictures, and not read: notes.txt" in first and "the split test has no masks" in second


def test_it_is_asked_last(tmp_path: Path) -> None:
    write_biomedparse(tmp_path / "set")
    assert fitting_layouts(tmp_path / "set")[0] == "biomedparse"
    FOLDERS["one folder"](tmp_path / "pairs")
    assert detect_layout(tmp_path / "pairs") == "pairs"


def test_both_a_structure_and_names_are_too_much(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data structure and names"):
        source_of(tmp_path, structure="liver", names=NAMES)
    with pytest.raises(ValueError, match="data names: expected a value"):
        source_of(tmp_path, names={1: 2})


def test_a_damaged_file_is_rows_or_named_errors(tmp_path: Path) -> None:
    root = tmp_path / "pairs"
    MAPS["colours"][0](root)
    (root / "names.json").write_text('{"#ff0000": "liver", "0,255,0": "left kidney", "#0010ff": "liver tumor"}')
    files = [root / "names.json", *sorted(root.rglob("*_gt.png"))]
    assert fuzz(lambda: source_of(root, names="names.json"), files) == {"rows", "errors"}
