"""What `guess` says of data: the layout, what would be read, and an entry that reads just that."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsight.data.guess import Guess, guess, write_entry
from medsight.data.sources import find_source, fitting_layouts, iterate
from tests.medsight.data.layouts import test_coco, test_table, test_yolo
from tests.medsight.data.layouts.picture_sets import NAMES, ORIGIN, contents, examples, save, write_biomedparse
from tests.medsight.data.layouts.test_pairs import FOLDERS, MAPS


PATIENT = r"^(p\d)_"


def table(root: Path) -> Path:
    root.mkdir()
    test_table.write(root / "rows.csv", test_table.records(root))
    return root


def label_maps(root: Path) -> Path:
    MAPS["numbers"][0](root)
    return root


def folders(root: Path) -> Path:
    FOLDERS["a folder a class below"](root)
    return root


WRITTEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "coco": (test_coco.write, ORIGIN),
    "yolo": (test_yolo.write, {**ORIGIN, "patient": PATIENT}),
    "table": (table, {}),
    "pairs": (folders, {**ORIGIN, "patient": PATIENT}),
    "label maps": (label_maps, {**ORIGIN, "patient": PATIENT, "names": NAMES}),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_the_entry_that_it_writes_reads_what_it_counted(tmp_path: Path, form: str) -> None:
    write, known = WRITTEN[form]
    root = write(tmp_path / "set")
    found = guess(root, **known)
    assert found.source.layout == {"label maps": "pairs"}.get(form, form)
    assert not found.missing and found.report.ok
    assert {split: found.report.counts["patients"][split] for split in ("train", "test")} == {"train": 3, "test": 1}
    assert dict(found.report.targets["liver"]) == {"train": 4, "test": 1}
    assert found.sizes == {(24, 18): 7}
    write_entry(found, tmp_path / "entry.yaml")
    expected = contents(write_biomedparse(tmp_path / "biomedparse"))
    assert contents(find_source(tmp_path / "entry.yaml", split="test")) == {"p3_06": expected["p3_06"]}
    assert len(contents(find_source(tmp_path / "entry.yaml"))) == 6  # of the split train
    with pytest.raises(FileExistsError, match="entry.yaml is there already"):
        write_entry(found, tmp_path / "entry.yaml")
    write_entry(found, tmp_path / "entry.yaml", overwrite=True)
    json.dumps(found.to_dict())


def test_what_is_missing_is_counted_under_a_placeholder_and_named(tmp_path: Path) -> None:
    found = guess(label_maps(tmp_path / "set"))
    assert set(found.missing) == {"names", "modality", "site"}
    assert found.entry()["names"] == {1: "structure 1", 2: "structure 2", 3: "structure 3"}
    assert (found.entry()["modality"], found.entry()["site"]) == (None, None)
    assert found.report.counts["masks"] == Counter(train=7, test=2)
    text = found.to_yaml()
    assert "# names: say the name of each value" in text and "# modality: say CT" in text
    (tmp_path / "entry.yaml").write_text(text)
    entries = list(iterate(find_source(tmp_path / "entry.yaml")))
    assert all("say modality: NAME" in str(entry.error) for entry in entries)


def test_values_that_cannot_be_counted_are_named(tmp_path: Path) -> None:
    MAPS["colours"][0](tmp_path / "set")
    found = guess(tmp_path / "set", **ORIGIN)
    assert set(found.missing) == {"names"} and found.entry()["names"] is None
    assert "2 value(s) without a name: #00ff00, #ff0000" in found.to_text()


def test_several_layouts_are_named_and_one_can_be_chosen(tmp_path: Path) -> None:
    root = tmp_path / "set"
    test_coco.write(root)
    for each in examples():
        save(root / "masks" / f"{each.split}2017" / f"{each.stem}.png", each.labels > 0)
    assert fitting_layouts(root) == ["coco", "pairs"]
    found = guess(root, **ORIGIN)
    assert found.layouts == ["coco", "pairs"] and "coco; it looks like pairs too (--layout)" in found.to_text()
    chosen = guess(root, "pairs", structure="organ", **ORIGIN)
    assert chosen.source.layout == "pairs" and set(chosen.report.targets) == {"organ"}


def test_renamed_structures_and_a_split_of_its_own(tmp_path: Path) -> None:
    save(tmp_path / "set/test/images/a.png", np.zeros((5, 5), np.uint8))
    save(tmp_path / "set/test/masks/a.png", np.eye(5) > 0)
    found = guess(tmp_path / "set", structure="line", rename={"line": "diagonal"}, **ORIGIN)
    assert found.entry()["split"] == "test" and list(found.report.targets) == ["diagonal"]
    assert found.rows[0]["targets"] == ["diagonal"]


def test_conversations_are_guessed_too(grounded_file: Path) -> None:
    found = guess(grounded_file)
    assert isinstance(found, Guess) and found.source.layout == "grounded"
    assert found.report.counts["conversations"] == {"train": 2}


def test_an_image_that_is_broken_is_a_problem(tmp_path: Path) -> None:
    root = folders(tmp_path / "set")
    image = next((root / "images").rglob("*.png"))
    image.write_bytes(b"x")
    assert image.name in guess(root, **ORIGIN).to_text()


def test_a_layout_may_be_named_that_nothing_shows(tmp_path: Path) -> None:
    save(tmp_path / "set/Bild/a.png", np.zeros((5, 5), np.uint8))
    save(tmp_path / "set/Maske/a.png", np.eye(5) > 0)
    with pytest.raises(ValueError, match="none of the layouts"):
        guess(tmp_path / "set", structure="line", image_folder="Bild", mask_folder="Maske")
    found = guess(tmp_path / "set", "pairs", structure="line", image_folder="Bild", mask_folder="Maske", **ORIGIN)
    assert found.layouts == ["pairs"] and found.report.counts["masks"] == {"train": 1}


def test_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it looks like none of the layouts"):
        guess(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        guess(tmp_path / "gone")
    with pytest.raises(ValueError, match="unknown key 'structure'"):
        guess(test_coco.write(tmp_path / "coco"), structure="liver")
