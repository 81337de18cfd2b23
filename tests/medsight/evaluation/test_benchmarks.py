"""Declarations, and the layouts that are read as cases."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medsight.data.sources import Source, iterate
from medsight.data.templates import Wordings
from medsight.data.wording import POSITIONS, position_in_words
from medsight.evaluation.benchmarks import load_benchmark, load_declarations
from medsight.evaluation.cases import Case, fingerprint, relative
from medsight.evaluation.predictions import Prediction, Problems
from medsight.evaluation.readers import held_out_wordings, read_cases
from medsight.evaluation.region_cases import Present
from medsight.evaluation.scoring import Protocol, score_rows


Write = Callable[..., Path]
EXPECTED_ROWS = {"vqa-rad": 451, "slake-en": 1061, "pathvqa": 6719, "mmmu-med": 150, "mecovqa-g": 4142}


def read(name: str, path: Path, **options: Any) -> list[Case]:
    return read_cases(load_benchmark(name), path, **options)[0]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("{}/a/b/c/d.png", "a/b/c/d.png"),
        ("/far/away/from/here/d.png", "from/here/d.png"),
        ("a/b/c/d.png", "a/b/c/d.png"),  # no file: a picture in a parquet file, whatever folder this runs in
        ("../../d.png", "d.png"),
    ],
)
def test_a_picture_is_named_without_the_place_of_the_data(tmp_path: Path, path: str, name: str) -> None:
    assert relative(path.format(tmp_path), tmp_path) == name


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_published_sizes_are_declared() -> None:
    declared = load_declarations()
    assert {name: declared[name].expected_rows for name in EXPECTED_ROWS} == EXPECTED_ROWS
    assert declared["omnimedvqa"].expected_shards == 7
    # Data of one's own are of any size.
    assert {name for name, entry in declared.items() if entry.expected_rows} == set(EXPECTED_ROWS)


@pytest.mark.parametrize("name", load_declarations())
def test_a_set_that_is_not_there_gives_one_line_with_its_source_and_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        read(name, tmp_path)
    message = str(error.value)
    assert str(tmp_path) in message and f"benchmark {name}" in message and "\n" not in message
    assert load_benchmark(name).get in message


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'vqarad' is unknown: did you mean 'vqa-rad'.*segmentation"):
        load_benchmark("vqarad")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("x: {like: vqa-rad, task: guess}", "task 'guess', expected one of vqa, segment, diagnose"),
        ("x: {like: vqa-rad, layout: slides}", "layout 'slides': Known are annotated, biomedparse"),
        ("x: {like: vqa-rad, protocol: {masks: medsight}}", "protocol: unknown masks; expected answers"),
        ("x: {like: vqa-rad, rows: 3}", "benchmark x: unknown rows; expected title"),
        ("x: {like: diagsec}", "benchmark x: like 'diagsec': did you mean 'diagseg'"),
        ("x: {like: diagseg, fields: {mask: m}}", "fields of layout diagseg: unknown mask; expected id, question"),
        ("x: {like: vqa-rad, fields: {id: m}}", "fields of layout vqa_rad: unknown id; expected none"),
        ("x: {title: T}", "benchmark x: missing files, get, layout, prompt, protocol, split, task"),
        ("x: {like: modality, intent: caption}", "x: intent 'caption' of a vqa task: expected one of is_there"),
        ("x: {like: segmentation, intent: site}", "intent 'site' of a segment task: expected one of segment_one"),
    ],
)
def test_a_wrong_declaration_is_refused(tmp_path: Path, written: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(written)
    with pytest.raises(ValueError, match=message):
        load_benchmark(str(tmp_path / "x.yaml"))


def test_segmentation_has_a_row_an_image_and_structure_and_absent_ones(declare: Write, regions: Path) -> None:
    cases = read("segmentation", regions)
    assert cases == read(str(declare("segmentation", intent=None)), regions) and len(cases) == 9
    assert [case.id for case in cases if case.absent] == ["set/test/4.png#cyst", "set/test/6.png#breast tumor"]
    first = cases[0]
    assert (first.id, first.prompt) == ("set/test/0.png#liver", "<image>\nSegment the liver.")
    assert (len(first.masks), first.modality, first.patient, first.spacing_mm) == (1, "CT", "p0", (2.0, 2.0))
    assert cases[4].spacing_mm is None


def test_rows_of_another_layout_are_asked_the_same(declare: Write, regions: Path, tmp_path: Path) -> None:
    data = shutil.copytree(regions, tmp_path / "data")
    rows = [entry.checked() for entry in iterate(Source("biomedparse", str(data), split="test"))]
    write_parquet(data / "packed" / "rows.parquet", rows)
    packed = read(str(declare("segmentation", layout="parquet", files=["packed/*.parquet"])), data)
    asked = read("segmentation", data)
    assert packed == asked and packed[0].spacing_mm == (2.0, 2.0)
    # One set of a folder has the pixel sizes of the folder's manifest.
    assert [case.spacing_mm for case in read("segmentation", data / "set")] == [case.spacing_mm for case in asked]


def test_diagnosis_comes_from_the_finding_or_an_abnormal_name(regions: Path) -> None:
    cases = read("diagnose-then-segment", regions)
    found = [(case.answer, len(case.masks), case.absent) for case in cases]
    assert found == [*[("malignant breast tumor", 1, False)] * 3, ("normal", 0, True)]


def test_several_structures_are_asked_for_by_name(regions: Path) -> None:
    cases = read("several-structures", regions)
    assert [case.id for case in cases] == ["set/test/0.png", "set/test/1.png"]
    for case in cases:
        assert case.prompt == f"<image>\nSegment the {' and '.join(case.mask_targets)}."
        assert sorted(case.mask_targets) == ["liver", "spleen"] and len(case.masks) == 2
        assert [target in str(mask["path"]) for target, mask in zip(case.mask_targets, case.masks, strict=True)]
    everything = read("all-structures", regions)
    assert [case.mask_targets for case in everything] == [("liver", "spleen")] * 2 + [("malignant breast tumor",)] * 3


def test_as_many_structures_are_absent_as_present(regions: Path) -> None:
    asked = {(case.id, case.answer) for case in read("presence", regions)}
    assert {name for name, answer in asked if answer == "yes"} == {
        *(f"set/test/{number}.png#{target}" for number in range(2) for target in ("liver", "spleen")),
        *(f"set/test/{number}.png#malignant breast tumor" for number in (2, 3, 4)),
    }
    absent = {name for name, answer in asked if answer == "no"}
    # A CT of the torso may show a breast, so that only what the rows list is surely absent from one.
    assert absent == {"set/test/4.png#cyst", "set/test/6.png#breast tumor"}
    assert not any(case.absent or case.masks for case in read("presence", regions))


def test_what_only_unrelated_images_show_is_absent() -> None:
    def row(modality: str, site: str, *targets: str, absent: Sequence[str] = ()) -> dict[str, Any]:
        return {"modality": modality, "site": site, "targets": list(targets), "absent": list(absent)}

    eye, colon = row("fundus", "retina", "optic disc", "vessel"), row("endoscope", "colon", "polyp")
    present = Present([eye, colon, row("CT", "torso", "liver"), row("MRI", "torso", "liver", "polyp")])
    assert set(present.absent(eye, 9, Random(0))) == {"liver", "polyp"}
    assert set(present.absent(colon, 9, Random(0))) == {"liver", "optic disc", "vessel"}
    drawn = {tuple(present.absent(colon, 1, Random(seed))) for seed in range(20)}
    assert drawn == {("liver",), ("optic disc",), ("vessel",)}
    assert present.absent(row("fundus", "retina", absent=["drusen"]), 0, Random(0)) == ["drusen"]


def test_questions_about_the_picture_are_answered_from_its_row(regions: Path) -> None:
    def answers(name: str) -> list[str | None]:
        return [case.answer for case in read(name, regions)]

    assert answers("modality") == ["CT image"] * 2 + ["ultrasound image"] * 4
    assert answers("body-site") == ["torso"] * 2 + ["breast"] * 4
    options = {case.options for name in ("presence", "body-site") for case in read(name, regions)}
    assert options == {("yes", "no"), ("breast", "torso")}
    assert {"cine MRI", "CT image"} < set(read("modality", regions)[0].options)
    cases = read("position", regions)
    assert len(cases) == 7 and {case.answer_type for case in cases} == {"CLOSED"}
    for case in cases:
        image = next(one for one in read("segmentation", regions) if one.id == case.id)
        assert case.answer == position_in_words(np.asarray(Image.open(image.masks[0]["path"])))


def test_a_place_is_right_alone_and_not_by_a_side_in_the_structures_name() -> None:
    case = Case("a.png#left hip", "?", (), "right", "CLOSED", tuple(POSITIONS), target="left hip")
    answers = {
        "The left hip is in the right.": 1,
        "The left hip is in the lower right.": 0,
        "The left hip is left.": 0,
    }
    for answer, expected in answers.items():
        given = {case.id: Prediction(case.id, answer)}
        row, *_ = score_rows([case], given, load_benchmark("position"), Protocol("closed-set"), Problems())
        assert row["answer_score"] == expected, answer


@pytest.mark.parametrize(
    "name", ["segmentation", "several-structures", "all-structures", "presence", "position", "modality", "body-site"]
)
def test_other_wordings_ask_the_same(regions: Path, name: str) -> None:
    plain, asked = read(name, regions), read(name, regions, held_out_prompts=True)
    assert [case.prompt for case in plain] != [case.prompt for case in asked]
    assert plain == [dataclasses.replace(new, prompt=old.prompt) for new, old in zip(asked, plain, strict=True)]


def test_held_out_prompts_are_none_of_training_and_follow_the_seed(regions: Path) -> None:
    asked = read("segmentation", regions, held_out_prompts=True, seed=1)
    trained = {
        prompt.format(**{"target": "liver", "modality": "CT image", "a_modality": "", "site": "torso"})
        for prompt in Wordings.load().prompts["segment_one"]
        if "A_modality" not in prompt
    }
    assert asked[0].prompt.removeprefix("<image>\n") not in trained
    assert asked == read("segmentation", regions, held_out_prompts=True, seed=1)
    assert asked != read("segmentation", regions, held_out_prompts=True, seed=2)
    with pytest.raises(ValueError, match="vqa-rad asks the data's own questions"):
        held_out_wordings(load_benchmark("vqa-rad"))


def test_the_fingerprint_is_of_the_content_not_of_the_place(regions: Path, tmp_path: Path) -> None:

    copied = shutil.copytree(regions, tmp_path / "elsewhere" / "sets")
    assert fingerprint(read("segmentation", copied)) == fingerprint(read("segmentation", regions))
    image = copied / "set" / "test" / "0.png"
    image.write_bytes(image.read_bytes() + b"x")
    assert fingerprint(read("segmentation", copied)) != fingerprint(read("segmentation", regions))


# Of each set: a file, a row of it, and what the case has of it.
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vqa-rad": (
        "questions.jsonl",
        {"id": "0", "image": "a.jpg", "question": "Q?", "answer": "axial", "answer_type": "CLOSED ", "split": "test"},
        {"id": "0", "prompt": "<image>\nQ?", "answer": "axial", "answer_type": "CLOSED"},
    ),
    "slake-en": (
        "test.json",
        {"qid": 0, "q_lang": "en", "img_name": "x/source.jpg", "modality": "CT", "location": "Lung"}
        | {"question": "What?", "answer": "CT", "answer_type": "OPEN"},
        {"id": "0", "modality": "CT", "site": "Lung", "answer_type": "OPEN"},
    ),
    "omnimedvqa": (
        "QA_information/Open-access/Brain.json",
        {"question_id": "q1", "image_path": "Images/a.png", "modality_type": "MR", "dataset": "Brain"}
        | {"question": "Which?", "gt_answer": "MRI", "option_A": "CT", "option_B": "MRI"},
        {"options": ("CT", "MRI"), "answer": "MRI", "modality": "MR", "dataset": "Brain"},
    ),
    "mmmu-med": (
        "Pharmacy/validation-00000-of-00001.parquet",
        {"id": "v1", "question": "Is <image 2> like <image 1>?", "options": "['yes', \"it's not\"]", "answer": "B"}
        | {f"image_{number}": {"bytes": b"%d" % number, "path": f"{number}.png"} for number in (1, 2)},
        {"options": ("yes", "it's not"), "answer": "B", "dataset": "Pharmacy"},
    ),
    "mecovqa-g": (
        "test.json",
        {"image": "images/mr_flair--AMOS--case_1--x_3.png"}
        | {
            "conversations": [
                {"from": "human", "value": "<image>\nSegment the liver."},
                {"from": "gpt", "value": "Sure, <SEG>.<mask>masks/mr_flair--AMOS--case_1--x_3--0001.png</mask>"},
            ]
        },
        {"prompt": "<image>\nSegment the liver.", "modality": "mr", "dataset": "AMOS", "patient": "case_1"},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_a_case(tmp_path: Path, name: str) -> None:
    file, row, expected = ROWS[name]
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        write_parquet(path, [row])
    else:
        path.write_text(json.dumps(row if path.suffix == ".jsonl" else [row]))
    (case,) = read(name, tmp_path)
    assert {field: getattr(case, field) for field in expected} == expected
    if name == "omnimedvqa":
        assert "A. CT\nB. MRI\nAnswer this question" in case.prompt
    if name == "mmmu-med":  # images stand where the question names them
        assert case.prompt.startswith("Is <image> like <image>?\nA. yes\nB. it's not\n")
        assert [image["bytes"] for image in case.images] == [b"2", b"1"]
    if name == "mecovqa-g":
        (mask,) = case.masks
        assert mask["path"] == str(tmp_path / "masks/mr_flair--AMOS--case_1--x_3--0001.png")


def test_pathvqa_counts_yes_and_no_as_closed_and_names_rows_by_their_file(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": b"x", "path": None}, "question": "Q?", "answer": a} for a in ("yes", "liver")]
    write_parquet(tmp_path / "data" / "test-00000.parquet", rows)
    cases = read("pathvqa", tmp_path)
    assert [case.answer_type for case in cases] == ["CLOSED", "OPEN"]
    assert cases[0].id == "data/test-00000.parquet, row 1"
    assert cases[0].images[0]["bytes"] is cases[1].images[0]["bytes"]  # a big set's images are held once


@pytest.mark.parametrize(
    ("masks", "count", "message"),
    [
        ("m.png", 2, "two rows have the id '1'"),
        ({"counts": "x"}, 1, "expected the path of a mask or a list of paths, got .'counts': 'x'."),
    ],
)
def test_bad_diagseg_rows_are_refused(tmp_path: Path, masks: Any, count: int, message: str) -> None:
    row = {"qa_id": "1", "question": "Q?", "short_answer": "a", "image_file": "a.png", "mask_file": masks}
    (tmp_path / "x.json").write_text(json.dumps([row] * count))
    with pytest.raises(ValueError, match=message):
        read("diagseg", tmp_path)


def test_diagseg_names_the_fields_that_it_misses_and_those_it_finds(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps([{"qa_id": "1", "question": "Q?", "answer": "a", "img": "a.png"}]))
    with pytest.raises(ValueError) as error:
        read("diagseg", tmp_path)
    message = str(error.value)
    assert "expects 'short_answer' (answer), 'image_file' (image), 'mask_files' or 'mask_file' (masks)" in message
    assert "the record has 'qa_id', 'question', 'answer', 'img'" in message
    assert "diagseg: {like: diagseg, fields: {NAME: FIELD}}" in message


def test_a_declaration_of_one_s_own_names_the_fields_anew(tmp_path: Path) -> None:
    row = {"qa_id": "1", "question": "Q?", "answer": "a", "img": "a.png", "seg": ["m.png", "n.png"], "case": "p1"}
    (tmp_path / "x.json").write_text(
        json.dumps([row, row | {"qa_id": "2", "seg": []}, row | {"qa_id": "3", "seg": "m"}])
    )
    declared = tmp_path / "mine.yaml"
    declared.write_text("mine: {like: diagseg, fields: {answer: answer, image: img, masks: seg, patient: case}}")
    first, second, third = read(str(declared), tmp_path)
    assert (first.answer, first.images[0]["path"], first.patient) == ("a", str(tmp_path / "a.png"), "p1")
    assert [len(case.masks) for case in (first, second, third)] == [2, 0, 1]
    assert [case.absent for case in (first, second, third)] == [False, True, False]
    assert load_benchmark(str(declared)).title == "DiagSeg"
    declared.write_text("mine: {like: diagseg, fields: {answer: answer, image: picture}}")
    with pytest.raises(ValueError, match="say what they are called .*mine: {like: diagseg, fields: {NAME: FIELD}}"):
        read(str(declared), tmp_path)


def test_annotated_questions_bring_the_codes_of_their_masks(tmp_path: Path) -> None:
    def row(number: int, answer: str, targets: list[str]) -> dict[str, Any]:
        messages = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": answer}]
        origin = {"dataset": "d", "modality": "CT", "site": "torso", "split": "test", "patient": "p"}
        masks = [{"path": f"{target}.png", "bytes": None} for target in targets]
        images = [{"path": "a.png", "bytes": None}]
        return {"id": f"d-0-{number}", "images": images, "messages": messages, "masks": masks, **origin} | {
            "targets": targets
        }

    rows = [row(0, "Liver [C0_3] and spleen [C0_11].", ["liver", "spleen"]), row(1, "None is there.", [])]
    write_parquet(tmp_path / "test-00000-of-00001.parquet", rows)
    first, second = read("annotated", tmp_path)
    assert (first.prompt, first.codes, first.target) == ("<image>Where?", ("[C0_3]", "[C0_11]"), "liver and spleen")
    assert [mask["path"] for mask in first.masks] == [str(tmp_path / "liver.png"), str(tmp_path / "spleen.png")]
    assert (first.patient, first.absent, second.absent, second.codes) == ("p", False, True, ())
