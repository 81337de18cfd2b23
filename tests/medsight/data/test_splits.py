"""Which conversations are held out: with their images and patients, and with the masks of these."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features
from PIL import Image

from medsight.data.schema import CONVERSATION_FEATURES, REGION_FEATURES
from medsight.data.sources import Source, load_source
from medsight.data.splits import divide, hold_out_rows


def split(rows: Dataset, fraction: float, seed: int, *beside: tuple[Dataset, Dataset]) -> tuple[Dataset, Dataset]:
    return divide(rows, hold_out_rows(rows, fraction, seed, beside))


def test_validation_holds_out_patients_or_the_last_slices_of_few(manifest_sets: Path) -> None:
    rows = load_source(Source("biomedparse", str(manifest_sets)))
    training, held = split(rows, 0.2, seed=0)
    assert len(training) + len(held) == len(rows)
    patients = {"busi": set(), "torso": set()}
    for row in held:
        patients[row["dataset"]].add(row["patient"])
    assert len(patients["busi"]) == 1 and not patients["busi"] & set(training["patient"])
    slices = sorted(Path(row["image"]["path"]).name for row in held if row["dataset"] == "torso")
    assert slices == ["a5_CT_torso.png", "b5_CT_torso.png"]
    again = split(rows.shuffle(seed=3), 0.2, seed=0)[1]
    assert sorted(again["patient"]) == sorted(held["patient"])
    everything, nothing = split(rows, 0, seed=0)
    assert everything[:] == rows[:] and len(nothing) == 0
    assert len({tuple(split(rows, 0.2, seed=seed)[1]["patient"]) for seed in range(8)}) > 1


def test_a_fraction_that_cannot_be_held_out_is_refused(named_sets: Path) -> None:
    rows = load_source(Source("biomedparse", str(named_sets / "hc")))
    with pytest.raises(ValueError, match="0.5 cannot be held out"):
        split(rows, 0.5, seed=0)
    with pytest.raises(ValueError, match="fraction is 1.5"):
        split(rows, 1.5, seed=0)


Conversations = Callable[[list[dict]], Dataset]


def test_all_conversations_of_an_image_come_on_one_side(conversations: Conversations) -> None:
    # Six patients of two images, of which one has two conversations; p4's images come with one of p3's.
    rows = conversations(
        [
            {"image": [f"{p}-{number}.png", "3-0.png"][: 1 + (p == 4)], "patient": f"p{p}"}
            for p in range(6)
            for number in (0, 1, 0)
        ]
    )
    for seed in range(12):
        training, held = split(rows, 0.2, seed)
        assert len(training) + len(held) == len(rows)
        sides = [{path["path"] for row in side for path in row["images"]} for side in (training, held)]
        assert not sides[0] & sides[1]
        assert len(held) == (6 if {"p3", "p4"} & set(held["patient"]) else 3)
    assert len(split(rows, 0, 0)[1]) == 0


def test_images_and_patients_are_on_the_side_of_their_masks(manifest_sets: Path, conversations: Conversations) -> None:
    """Conversations about images that have masks, others of the same patients, and about ones of neither."""
    regions = load_source(Source("biomedparse", str(manifest_sets)))
    told = [
        {"image": row["image"]["path"], "dataset": "questions", "patient": f"q{number}"}
        for number, row in enumerate(regions)
    ]
    busi = enumerate(regions.filter(lambda row: row["dataset"] == "busi")["patient"])
    told += [{"image": f"{number}.png", "dataset": "busi", "patient": patient} for number, patient in busi]
    free = [{"image": f"free {number}.png", "dataset": "questions", "patient": f"f{number}"} for number in range(40)]
    for some in (told + free, told):
        rows = conversations(some)
        for seed in range(4):
            both = split(regions, 0.3, seed + 10)
            training, held = split(rows, 0.2, seed, both)
            assert len(training) + len(held) == len(rows) and len(held)
            for side, other in ((training, both[1]), (held, both[0])):
                paths, patients = {row["image"]["path"] for row in other}, set(other["patient"])
                assert not {row["images"][0]["path"] for row in side} & paths
                assert not {row["patient"] for row in side if row["dataset"] == "busi"} & patients
            assert len(some) == len(told) or any("free" in row["images"][0]["path"] for row in held)


@pytest.mark.parametrize("turned", [False, True])
def test_patients_of_masks_are_known_whatever_source_comes_first(
    manifest_sets: Path, conversations: Conversations, turned: bool
) -> None:
    regions = load_source(Source("biomedparse", str(manifest_sets)))
    both = split(regions, 0.3, 0)
    patients = set(both[1].filter(lambda row: row["dataset"] == "busi")["patient"])
    assert patients
    asked = [{"image": f"other {p}.png", "dataset": "busi", "patient": p} for p in sorted({*regions["patient"]})]
    captions = [{"image": item["image"]} for item in asked]
    rows = conversations(captions + asked if turned else asked + captions)
    for seed in range(3):
        sides = [{Path(row["images"][0]["path"]).name for row in side} for side in split(rows, 0.3, seed, both)]
        assert {f"other {p}.png" for p in patients} <= sides[1] and not sides[0] & sides[1]


def test_an_image_and_a_patient_of_two_sets_are_on_one_side(conversations: Conversations) -> None:
    items = [{"image": f"{p}-x.png", "dataset": "one", "patient": f"{p}"} for p in range(10)]
    items += [
        {"image": f"{p}-{part}.png", "dataset": "two", "patient": f"of two {p}"} for p in range(10) for part in "xy"
    ]
    items += [{"image": f"unlike {p}.png", "dataset": "three", "patient": f"{p}"} for p in range(10)]
    rows, told = conversations(items), set()
    for seed in range(6):
        sides = [[items[int(number)] for number in side["id"]] for side in split(rows, 0.3, seed)]
        patients = [{item["image"].split("-")[0] for item in side if item["dataset"] != "three"} for side in sides]
        assert patients[1] and not patients[0] & patients[1]
        # patients of one name in data sets that share no image are not one
        told.add({i["patient"] for i in sides[1] if i["dataset"] == "three"} == patients[1])
    assert told == {False}


def test_embedded_images_are_told_apart_by_their_content(manifest_sets: Path) -> None:
    regions = load_source(Source("biomedparse", str(manifest_sets)))
    both = split(regions, 0.3, 0)
    rows = [
        {
            **dict.fromkeys(CONVERSATION_FEATURES),
            "images": [{"path": "picture.png", "bytes": Path(row["image"]["path"]).read_bytes()}],
            **{name: row[name] for name in ("dataset", "modality", "patient")},
        }
        for row in regions
        for _ in range(3)
    ]
    embedded = Dataset.from_list(rows, features=CONVERSATION_FEATURES)
    for regions_beside in ([both], []):
        training, held = split(embedded, 0.3, 0, *regions_beside)
        sides = [{row["images"][0]["bytes"] for row in some} for some in (training, held)]
        assert len(held) and not sides[0] & sides[1] and len(training) + len(held) == len(rows)
        if regions_beside:
            assert sides[1] == {Path(row["image"]["path"]).read_bytes() for row in both[1]}


@pytest.mark.parametrize("embedded", [False, True], ids=["files", "bytes"])
def test_no_picture_or_patient_is_on_both_sides_whatever_files_are_called(tmp_path: Path, embedded: bool) -> None:
    """Every patient has a 0.png, a 1.png and a 2.png; a second set has a copy of the first under another name."""
    rows = []
    for patient in range(20):
        for number in range(4):
            copied = number == 3
            path = tmp_path / f"{patient}" / ("copy.png" if copied else f"{number}.png")
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((4, 4), 3 * patient + number % 3, dtype=np.uint8)).save(path)
            image = {"path": path.name, "bytes": path.read_bytes()} if embedded else {"path": str(path), "bytes": None}
            origin = ("second", f"of {patient}") if copied else ("first", f"{patient}")
            rows.append({"image": image, "dataset": origin[0], "patient": origin[1], "modality": "CT"})
    features = Features({name: REGION_FEATURES[name] for name in rows[0]})
    for seed in range(5):
        sides = split(Dataset.from_list(rows, features=features), 0.2, seed)
        for of in (
            lambda row: row["patient"].split()[-1],
            lambda row: row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes(),
        ):
            training, held = (set(map(of, side)) for side in sides)
            assert held and not training & held


def test_what_cannot_be_validated_on_is_said(
    manifest_sets: Path, conversations: Conversations, caplog: pytest.LogCaptureFixture
) -> None:
    both = split(load_source(Source("biomedparse", str(manifest_sets))), 0.3, 0)
    rows = conversations([{"image": row["image"]["path"], "patient": str(n)} for n, row in enumerate(both[0])])
    training, held = split(rows, 0.2, 0, both)
    assert len(training) == len(rows) and not len(held) and "none is held out" in caplog.text


def test_the_same_patients_are_held_out_as_from_the_images(manifest_sets: Path, conversations: Conversations) -> None:
    regions = load_source(Source("biomedparse", str(manifest_sets)))
    items = [
        {"image": row["image"]["path"], **{name: row[name] for name in ("dataset", "modality", "patient")}}
        for row in regions
        for _ in range(2)
    ]
    rows = conversations(items)
    for seed in range(3):
        held = {row["image"]["path"] for row in split(regions, 0.3, seed)[1]}
        assert {row["images"][0]["path"] for row in split(rows, 0.3, seed)[1]} == held


def drawn_rows() -> tuple[Dataset, Dataset]:
    """Images of three sets with masks (many patients, one volume, too few to hold any out), and conversations."""
    draw = random.Random(5)
    regions = [("many", f"p{i % 23}", draw.choice(["CT", "MRI"]), f"/data/many/{i}.png") for i in range(90)]
    regions += [("volume", "v", "CT", f"/data/volume/{i:02}.png") for i in range(30)]
    regions += [("few", None, "OCT", f"/data/few/{i}.png") for i in range(3)]
    images = [
        {"image": {"path": path, "bytes": None}, "dataset": name, "patient": patient, "modality": modality}
        for name, patient, modality, path in regions
    ]
    asked = [
        (draw.choice(["many", "asked"]), f"p{i % 31}", f"/data/many/{draw.randrange(130)}.png") for i in range(120)
    ]
    conversations = []
    for i, (name, patient, path) in enumerate(asked):
        shown = [{"path": place, "bytes": None} for place in (path, f"/data/other/{i % 40}.png")][: 1 + i % 2]
        conversations.append({"images": shown, "dataset": name, "patient": patient, "modality": None})
    conversations += [{"images": [], "dataset": "words", "patient": None, "modality": None}] * 7
    known = {name: REGION_FEATURES[name] for name in images[0]}
    asked_features = {name: CONVERSATION_FEATURES[name] for name in conversations[0]}
    return (
        Dataset.from_list(images, features=Features(known)),
        Dataset.from_list(conversations, features=Features(asked_features)),
    )


@pytest.mark.parametrize(("fraction", "seed", "digest"), [(0.1, 0, "85e7b1f188590d41"), (0.2, 3, "d8a9556fabee09eb")])
def test_the_rows_that_a_seed_holds_out_stay_the_same(fraction: float, seed: int, digest: str) -> None:
    """What a published checkpoint was validated on must not be trained on by a later version."""
    regions, conversations = drawn_rows()
    held = hold_out_rows(regions, fraction, seed)
    alone = hold_out_rows(conversations, fraction, seed)
    beside = hold_out_rows(conversations, fraction, seed, [divide(regions, held)])
    found = json.dumps([sorted(held), sorted(alone), sorted(beside)])
    assert hashlib.sha256(found.encode()).hexdigest()[:16] == digest
