"""COCO's instances: read as their copy in BiomedParse's layout, in every form of a mask and of a folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.mask import decode, encode

from medsight.data.picture_labels import polygon_mask, rle_mask
from medsight.data.pictures import read_mask
from medsight.data.registry import Source
from medsight.data.sources import detect_layout, iterate
from medsight.export.outlines import outlines
from tests.medsight.data.layouts.picture_sets import (
    NAMES,
    ORIGIN,
    contents,
    errors,
    examples,
    fuzz,
    save,
    write_biomedparse,
)


def polygons(mask: np.ndarray) -> Any:
    return [part.ravel().tolist() for part in outlines(mask)]


def compressed(mask: np.ndarray) -> Any:
    found = encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


def uncompressed(mask: np.ndarray) -> Any:
    flat = np.concatenate([[False], mask.T.ravel()])
    edges = np.flatnonzero(np.diff(flat)).tolist()
    runs = np.diff([0, *edges, mask.size]).tolist()
    return {"size": list(mask.shape), "counts": runs}


FORMS = {"polygons": polygons, "compressed": compressed, "uncompressed": uncompressed}


def write(root: Path, form: str = "polygons", layout: str = "instances_{}2017.json") -> Path:
    """A file a split in `annotations/`, images in a folder beside it; or as `layout` says."""
    for split in ("train", "test"):
        file = root / "annotations" / layout.format(split) if "/" not in layout else root / layout.format(split)
        content: dict[str, list] = {"images": [], "annotations": []}
        content["categories"] = [{"id": 10 * value, "name": name} for value, name in NAMES.items()]
        for number, each in enumerate(examples()):
            if each.split != split:
                continue
            folder = file.parent if "/" in layout else root / f"{split}2017"
            save(folder / f"{each.stem}.png", each.pixels)
            size = {"width": each.pixels.shape[1], "height": each.pixels.shape[0]}
            content["images"].append({"id": number, "file_name": f"{each.stem}.png", **size, "patient": each.patient})
            for name, mask in each.masks():
                value = next(key for key, known in NAMES.items() if known == name)
                known = {"id": len(content["annotations"]), "image_id": number, "category_id": 10 * value}
                content["annotations"].append({**known, "segmentation": FORMS[form](mask), "iscrowd": value % 2})
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=None if split == "train" else 1))
    return root


def source_of(root: Path, **settings: Any) -> Source:
    return Source("coco", str(root), **{"split": None, **ORIGIN, **settings})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["instances_{}2017.json", "{}/_annotations.coco.json"])
def test_it_is_read_as_its_copy_in_biomedparse(tmp_path: Path, form: str, layout: str) -> None:
    root = write(tmp_path / "coco", form, layout)
    expected = contents(write_biomedparse(tmp_path / "biomedparse"))
    assert contents(source_of(root)) == expected
    assert contents(source_of(root, split="test")) == {"p3_06": expected["p3_06"]}
    assert detect_layout(root) == "coco"


def test_a_file_is_named_alone_and_its_images_are_found_or_said(tmp_path: Path) -> None:
    root = write(tmp_path / "coco")
    file = root / "annotations/instances_test2017.json"
    assert detect_layout(file) == "coco"
    assert list(contents(source_of(file))) == ["p3_06"]
    (root / "test2017").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"instances_test2017.json: no image 'p3_06.png'.*images: DIR"):
        errors(source_of(file))
    assert list(contents(source_of(file, images=str(tmp_path / "elsewhere")))) == ["p3_06"]


def test_instances_of_a_category_are_masks_of_their_own(tmp_path: Path) -> None:
    root = write(tmp_path / "coco")
    file = root / "annotations/instances_test2017.json"
    content = json.loads(file.read_text())
    content["annotations"].append({**content["annotations"][0], "id": 99})
    file.write_text(json.dumps(content))
    (entry,) = iterate(source_of(file))
    row = entry.checked()
    assert row["targets"] == ["liver", "left kidney", "liver"]
    assert len({mask["path"] for mask in row["masks"]}) == 3


def test_run_lengths_are_those_of_pycocotools() -> None:
    assert rle_mask([1, 2, 3], (3, 2), "here").tolist() == [[False, True, False], [True, False, False]]
    chance = np.random.default_rng(0)
    for share in np.linspace(0, 1, 40):
        mask = chance.random(chance.integers(1, 200, 2)) < share
        form = compressed(mask)
        assert np.array_equal(rle_mask(form["counts"], mask.shape[::-1], "here"), decode(form))
        assert np.array_equal(rle_mask(uncompressed(mask)["counts"], mask.shape[::-1], "here"), mask)


def test_polygons_take_in_the_pixels_whose_centres_they_hold() -> None:
    square = [0.9, 0.9, 3.1, 0.9, 3.1, 2.1, 0.9, 2.1]
    assert np.argwhere(polygon_mask([square], (5, 4), "here")).tolist() == [[1, 1], [1, 2]]
    chance = np.random.default_rng(0)
    for _ in range(40):
        mask = chance.random((30, 20)) < 0.5
        assert np.array_equal(polygon_mask(polygons(mask), (20, 30), "here"), mask)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("segmentation", [], "annotation 0: expected polygons or run lengths in 'segmentation': a box is no mask"),
        ("segmentation", [[1, 1, 5, 5]], "annotation 0: expected a polygon of at least 3 points, got 2"),
        ("segmentation", [[1, 1, 5, 5, 1]], "annotation 0: expected a polygon x, y"),
        ("segmentation", [[1, 1, 5, 5, 1e9, 2]], "annotation 0: a point of a polygon lies far outside"),
        ("segmentation", {"size": [18, 24], "counts": [1]}, "run lengths of 1 pixels, for an image of 24x18"),
        ("segmentation", {"size": [1, 2], "counts": [2]}, r"of the size \[1, 2\], for an image of \[18, 24\]"),
        ("segmentation", {"size": [18, 24], "counts": "o"}, "the text of run lengths is damaged or cut short"),
        ("category_id", 4, "no category has the id 4"),
        ("image_id", 77, "expected the image_id of an image, got 77"),
    ],
)
def test_a_bad_annotation_is_named(tmp_path: Path, field: str, value: Any, message: str) -> None:
    file = write(tmp_path / "coco") / "annotations/instances_test2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0][field] = value
    file.write_text(json.dumps(content))
    found = errors(source_of(file))
    assert len(found) == 1 and "instances_test2017.json" in found[0]
    with pytest.raises(ValueError, match=message):
        raise ValueError(found[0])


def test_a_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "coco") / "annotations/instances_test2017.json"
    save(tmp_path / "secret.png", np.zeros((18, 24), np.uint8))
    file.write_text(file.read_text().replace("p3_06.png", "../../secret.png"))
    assert "'../../secret.png' leads out of" in errors(source_of(file))[0]


def test_a_damaged_file_is_rows_or_named_errors(tmp_path: Path) -> None:
    root = write(tmp_path / "coco", "compressed")
    files = sorted(root.rglob("*.json"))
    assert fuzz(lambda: source_of(root), files) == {"rows", "errors"}
    assert read_mask(next(iterate(source_of(root, split="test"))).checked()["masks"][0], (24, 18)).any()
