"""What a source says of its rows: names of structures, coverage, a test split of its own, an entry in a file."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from medsight.data.layouts.biomedparse import MANIFEST
from medsight.data.sources import Source, find_source, iterate, load_source


@pytest.fixture
def organs(tmp_path: Path, draw_picture: Any, write_json: Any) -> Path:
    """Twelve CT images, of which the first shows a spleen beside its liver, and a radiograph of a lung."""
    rows = [("CT", "abdomen", "liver", number) for number in range(12)] + [("X-Ray", "chest", "lung", 12)]
    rows.insert(0, ("CT", "abdomen", "spleen", 0))
    records = []
    for modality, site, target, number in rows:
        names = {"image": f"{number}.png", "mask": f"{number}_{target}.png"}
        draw_picture(tmp_path / "set" / names["image"])
        draw_picture(tmp_path / "set" / names["mask"], inside=True)
        about = {"modality": modality, "site": site, "target": target, "split": "train", "group": f"p{number // 2}"}
        records.append({**names, **about})
    write_json(tmp_path / "set" / MANIFEST, records)
    return tmp_path / "set"


def absent(source: Source) -> dict[str, list[str]]:
    return {Path(row["image"]["path"]).stem: row["absent"] for row in load_source(source)}


def test_what_is_not_labelled_is_not_absent_unless_the_source_says_so(organs: Path) -> None:
    assert not any(absent(Source("biomedparse", str(organs))).values())
    listed = absent(Source("biomedparse", str(organs), covers=["liver", "kidney"]))
    assert (listed["0"], listed["12"]) == (["kidney"], ["kidney", "liver"])
    complete = absent(Source("biomedparse", str(organs), complete=True))
    assert complete == {"0": [], "12": [], **{str(number): ["spleen"] for number in range(1, 12)}}


def test_structures_are_renamed_before_coverage_is_counted(organs: Path) -> None:
    source = Source("biomedparse", str(organs), rename={"spleen": "milt"}, complete=True)
    rows = list(load_source(source))
    assert {target for row in rows for target in row["targets"]} == {"liver", "milt", "lung"}
    assert [row["absent"] for row in rows][1] == ["milt"]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_test_split_takes_whole_patients(organs: Path, share: float) -> None:
    parts = {split: [*iterate(Source("biomedparse", str(organs), split, test_share=share))] for split in SPLITS}
    patients = {split: {entry.checked()["patient"] for entry in part} for split, part in parts.items()}
    assert len(patients["test"]) == round(share * 7) and not patients["test"] & patients["train"]
    assert sum(map(len, parts.values())) == 13
    assert {entry.checked()["split"] for entry in parts["test"]} == {"test"}
    everything = [*iterate(Source("biomedparse", str(organs), None, test_share=share))]
    assert sum(entry.checked()["split"] == "test" for entry in everything) == len(parts["test"])


SPLITS = ("train", "test")


def test_an_entry_may_be_a_file_of_its_own(organs: Path) -> None:
    file = organs.parent / "organs.yaml"
    entry = {"layout": "biomedparse", "path": "set", "complete": True, "rename": {"lung": "lungs"}}
    file.write_text(yaml.safe_dump(entry))
    source = find_source(file, split="test")
    assert source == Source("biomedparse", str(organs), "test", complete=True, rename={"lung": "lungs"})
    assert source.to_mapping() == {**entry, "path": str(organs), "split": "test"}
    assert Source.from_mapping(source.to_mapping()) == source
    assert find_source(organs) == Source("biomedparse", str(organs))
    with pytest.raises(ValueError, match=r"organs.yaml: its layout stands in it \(biomedparse\)"):
        find_source(file, "llava")
    file.write_text("- a")
    with pytest.raises(ValueError, match="organs.yaml: expected the entry of a data source"):
        find_source(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("covers", "liver"), ("covers", [1]), ("rename", {"a": 1}), ("complete", "yes"), ("test_share", 1.0)],
        *[("patient", "p"), ("patient", "("), ("modality", 3), ("site", ["a"])],
    ],
)
def test_a_bad_value_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"data {field}: expected"):
        Source.from_mapping({"layout": "biomedparse", "path": "a", field: value})
