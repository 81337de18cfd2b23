"""Data sets of the Hub's library: read as their copy in BiomedParse's layout, from every form on disk."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

from medsight.data.registry import Source
from medsight.data.sources import detect_layout, find_source, iterate, load_source
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


SIZES = {"train": 6, "test": 1}


def source_of(path: Path | str, **settings: Any) -> Source:
    return Source.from_mapping({"layout": "huggingface", "path": str(path), "split": None, **ORIGIN, **settings})


def embedded(path: Path, pixels: Any) -> dict[str, Any]:
    return {"path": path.name, "bytes": save(path, pixels).read_bytes()}


def data_set(folder: Path, split: str, form: str = "list") -> Dataset:
    """The examples of a split: a list of masks an image with their targets, or a label map."""
    rows, classes = [], ClassLabel(names=list(NAMES.values()))
    for each in examples():
        if each.split != split:
            continue
        row: dict[str, Any] = {"image": embedded(folder / f"{each.stem}.png", each.pixels), "patient_id": each.patient}
        if form == "map":
            row["label"] = embedded(folder / f"{each.stem}_map.png", each.labels)
        else:
            found = dict(each.masks())
            row["masks"] = [embedded(folder / f"{each.stem}_{name}.png", mask) for name, mask in found.items()]
            row["targets"] = [classes.str2int(name) for name in found]
        rows.append(row)
    features: dict[str, Any] = {"image": Image(), "patient_id": Value("string")}
    features |= {"label": Image()} if form == "map" else {"masks": List(Image()), "targets": List(classes)}
    return Dataset.from_list(rows, features=Features(features))


def saved(root: Path, folder: Path, form: str) -> None:
    DatasetDict({split: data_set(folder, split, form) for split in ("train", "test")}).save_to_disk(root)


def in_parquet(root: Path, folder: Path, form: str) -> None:
    (root / "data").mkdir(parents=True)
    for split in ("train", "test"):
        rows = data_set(folder, split, form)
        rows.to_parquet(root / f"data/{split}-00000-of-00001.parquet")
        if form == "map":  # as other writers leave it: no features of the library's own
            table = Dataset.from_parquet(str(root / f"data/{split}-00000-of-00001.parquet")).with_format("arrow")[:]
            pyarrow.parquet.write_table(
                table.replace_schema_metadata(None), root / f"data/{split}-00000-of-00001.parquet"
            )


@pytest.mark.parametrize("form", ["list", "map"])
@pytest.mark.parametrize("write", [saved, in_parquet])
def test_it_is_read_as_its_copy_in_biomedparse(tmp_path: Path, write: Any, form: str) -> None:
    root = tmp_path / "hub"
    write(root, tmp_path / "files", form)
    expected = contents(write_biomedparse(tmp_path / "biomedparse"))
    names = {"names": NAMES} if form == "map" else {}
    assert contents(source_of(root, **names)) == expected
    assert contents(source_of(root, split="test", **names)) == {"p3_06": expected["p3_06"]}
    assert len(load_source(source_of(root, split="train", **names))) == 6
    assert detect_layout(root) == "huggingface"


def test_an_image_folder_names_its_masks_in_its_metadata(tmp_path: Path) -> None:
    root, lines = tmp_path / "folder", []
    for each in examples():
        for name, mask in each.masks():
            if name == "liver":
                save(root / f"{each.stem}.png", each.pixels)
                save(root / f"{each.stem}_mask.png", mask)
                known = {"file_name": f"{each.stem}.png", "mask_file_name": f"{each.stem}_mask.png"}
                lines.append({**known, "patient": each.patient})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert detect_layout(root) == "huggingface"
    found = contents(source_of(root, structure="liver"), told=("patient",))
    expected = contents(write_biomedparse(tmp_path / "biomedparse"), told=("patient",))
    livers = {stem: [mask for mask in masks if mask[0] == "liver"] for stem, (_, masks, _) in expected.items()}
    assert {stem: masks for stem, (_, masks, _) in found.items()} == {stem: m for stem, m in livers.items() if m}
    assert {stem: origin for stem, (_, _, origin) in found.items()}.items() <= {
        stem: origin for stem, (_, _, origin) in expected.items()
    }.items()


def test_only_an_address_is_fetched_and_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any, **settings: Any) -> DatasetDict:
        asked.append((arguments, settings))
        return DatasetDict({split: data_set(tmp_path / "files", split) for split in ("train", "test")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    entry = tmp_path / "hub.yaml"
    entry.write_text("layout: huggingface\npath: hf://owner/name\nmodality: CT\nsite: abdomen\n")
    source = find_source(entry, split="test")
    assert len(load_source(source)) == 1
    assert {arguments for arguments, _ in asked} == {("owner/name",)}
    assert all(settings == {"name": None} for _, settings in asked)
    assert detect_layout("hf://owner/name") == "huggingface"
    with pytest.raises(ValueError, match="hf://x: expected hf://OWNER/NAME"):
        list(iterate(source_of("hf://x")))


def test_columns_are_named_by_the_source(tmp_path: Path) -> None:
    rows = data_set(tmp_path / "files", "train", "map").rename_columns({"image": "x", "label": "y"})
    rows.save_to_disk(tmp_path / "hub")
    columns = {"image": "x", "mask": "y"}
    assert len(list(iterate(source_of(tmp_path / "hub", names=NAMES, columns=columns)))) == 6
    with pytest.raises(
        ValueError, match=r"expected a column of each image: say which it is .* there are x, patient_id"
    ):
        errors(source_of(tmp_path / "hub", names=NAMES))
    with pytest.raises(ValueError, match="there is no column 'z'"):
        errors(source_of(tmp_path / "hub", names=NAMES, columns={**columns, "mask": "z"}))


def test_a_column_tells_the_split_where_the_library_does_not(tmp_path: Path) -> None:
    parts = [data_set(tmp_path / "files", split).add_column("split", [split] * n) for split, n in SIZES.items()]
    datasets.concatenate_datasets(parts).save_to_disk(tmp_path / "hub")
    assert contents(source_of(tmp_path / "hub")) == contents(write_biomedparse(tmp_path / "biomedparse"))
    assert list(contents(source_of(tmp_path / "hub", split="test"))) == ["p3_06"]


def test_a_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    secret = save(tmp_path / "secret.png", examples()[0].pixels)
    rows = [{"image": {"path": str(secret), "bytes": None}, "mask": {"path": str(secret), "bytes": None}}]
    (tmp_path / "hub").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "hub/a.parquet")
    assert "leads out of" in errors(source_of(tmp_path / "hub", structure="liver"))[0]


def test_a_damaged_file_is_rows_or_named_errors(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    in_parquet(root, tmp_path / "files", "list")
    assert fuzz(lambda: source_of(root), sorted(root.rglob("*.parquet")), rounds=40) == {"rows", "errors"}
    saved(tmp_path / "saved", tmp_path / "files", "list")
    files = [file for file in sorted((tmp_path / "saved").rglob("*")) if file.is_file()]
    assert fuzz(lambda: source_of(tmp_path / "saved"), files, rounds=60) == {"rows", "errors"}
