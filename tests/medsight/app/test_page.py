"""What the page's controls do, without a browser: events take a session, change it, and say what the page shows."""

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medsight.app.drawing import color_of
from medsight.inference.orientations import LearntOrientations
from tests.medsight.app.conftest import PICTURE
from tests.medsight.scans.scan_files import nifti_bytes, npy_bytes, picture_bytes, tiff_bytes


gr = pytest.importorskip("gradio", reason="the page needs gradio (pip install 'medsight[app]')")
ASK = {"max_new_tokens": 12, "predicted_only": False, "threshold": 0.5}


def volume_file() -> bytes:
    """A NIfTI volume of four slices."""
    pytest.importorskip("nibabel")
    voxels = np.random.default_rng(0).integers(0, 900, (20, 24, 4), dtype=np.int16)
    return nifti_bytes(voxels, np.diag([-2.0, -2.0, 5.0, 1.0]))


def ct_file() -> bytes:
    data = pytest.importorskip("pydicom.data")
    return Path(data.get_testdata_file("CT_small.dcm", download=False)).read_bytes()


def asked(page: Any, session: Any, question: str = "What is it?", **settings: Any) -> list[dict[Any, Any]]:
    return list(page.ask(session, question, **{**ASK, **settings}))


def click(**data: Any) -> Any:
    return gr.EventData(None, data)


def shown(updates: dict[Any, Any], component: Any) -> Any:
    """The value that an event gives a component."""
    value = updates[component]
    return value["value"] if isinstance(value, dict) else value


def test_an_upload_is_kept_in_the_session_without_its_name_and_goes_with_it(
    page: Any, upload: Callable, tmp_path: Path
) -> None:
    session, updates = upload(PICTURE)
    assert updates[page.upload] is None
    kept = [path for path in (tmp_path / "sessions").rglob("*") if path.is_file()]
    assert [path.name for path in kept] == ["00001"]
    assert "Doe" not in repr({str(key): value for key, value in updates.items()})
    assert shown(updates, page.picture).size[0] >= 640 and not updates[page.slice]["visible"]
    session.close()
    assert list((tmp_path / "sessions").iterdir()) == []


def test_visitors_who_upload_the_same_file_all_open_it(page: Any, tmp_path: Path) -> None:
    shared = tmp_path / "as-gradio-keeps-it.png"
    shared.write_bytes(PICTURE)
    sessions = [page.open_upload(None, [str(shared)], 0.5)[page.session] for _ in range(3)]
    assert not shared.exists()  # an upload goes with its session
    assert all(session.scan is not None for session in sessions)
    for session in sessions:
        session.close()
    with pytest.warns(UserWarning, match=r"^The server failed on a file \(No such file or directory\): try again$"):
        page.open_upload(None, [str(shared)], 0.5)


@pytest.mark.parametrize("kind", ["no image", "half a DICOM file", "a damaged series"])
def test_what_cannot_be_read_is_refused_by_number_without_name_or_path_and_what_was_open_stays(
    kind: str, page: Any, session: Any, upload: Callable, tmp_path: Path
) -> None:
    files = [b"no image at all"]
    if kind != "no image":
        content = ct_file()
        files = [content[:400]] if kind == "half a DICOM file" else [content, content[:-5000]]
    asked(page, session)
    before = vars(session).copy()
    with pytest.warns(UserWarning, match="[Uu]pload") as caught:
        _, updates = upload(*files, session=session)
    warned = str([str(warning.message) for warning in caught])
    assert not any(secret in warned for secret in (str(tmp_path), "Doe", "0000")), warned
    assert vars(session) == before and session.turns and page.picture not in updates
    assert list((tmp_path / "sessions").iterdir()) == [session._folder]


def test_a_picture_that_cannot_be_decoded_and_a_model_that_fails_are_told_and_the_page_goes_on(
    page: Any, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    def fail(*arguments: Any, **settings: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="The model failed"):
        patch.setattr(page.predictor.model, "generate", fail)
        last = asked(page, session)[-1]
    assert session.turns == [] and last[page.question]["submit_btn"]

    def damaged(*arguments: Any) -> Any:
        raise ValueError(f"{session._folder}/abc/00001 is damaged")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="^The upload is damaged"):
        patch.setattr(session.scan, "slice_image", damaged)
        assert page.redraw(session, 0.5)[page.picture]["visible"] is False
    assert page.redraw(session, 0.5)[page.picture]["visible"]


def test_an_answer_is_streamed_then_has_words_codes_and_masks_of_one_colour(page: Any, session: Any) -> None:
    before = np.asarray(shown(page.redraw(session, 0.5), page.picture))
    steps = asked(page, session, "Where <b>is</b> it? {{value}} ${1}")
    assert len(steps) > 2 and steps[0][page.question]["stop_btn"] and steps[-1][page.question]["submit_btn"]
    assert "ms-cursor" in steps[1][page.chat] and "ms-cursor" not in steps[-1][page.chat]
    chat, (turn,) = steps[-1][page.chat], session.turns
    assert "<b>" not in chat and "{{" not in chat and "${" not in chat and "&lt;b&gt;is" in chat
    assert turn.findings and len(turn.findings) == len(turn.answer.regions)
    kept = [*turn.answer.regions, *(finding.region for finding in turn.findings)]
    assert all(region.mask is None for region in kept), "masks of full size add up over the turns"
    for finding in turn.findings:
        button = rf'data-finding="{finding.number}" style="--ms-color: {color_of(finding.number)}"'
        assert button in chat and button in shown(steps[-1], page.layers)
        mask = page._mask(session.scan, finding, 0.5)
        assert mask.shape == (40, 56) and mask.sum() == finding.region.area
    drawn = np.asarray(shown(steps[-1], page.picture))
    covered = np.any([page._mask(session.scan, finding, 0.5) for finding in turn.findings], axis=0)
    large = np.asarray(Image.fromarray(covered).resize(drawn.shape[1::-1], Image.Resampling.NEAREST))
    changed = (drawn != before).any(axis=2)
    assert changed[large].mean() > 0.9 and changed[~large].mean() < 0.2 or not covered.any()


def test_words_of_a_phrase_are_marked_in_the_colour_of_their_mask(page: Any) -> None:
    import torch

    from medsight.app import markup
    from medsight.app.session import Finding, Turn
    from processing_medsight.grounded_answer_medsight import GroundedAnswer, GroundedRegion

    text, mask = "The <liver> and a cyst.", torch.zeros(2, 2)
    places = (("[C0_1]", "<liver>", (4, 11)), ("[C0_2]", "cyst", (18, 22)), ("[C0_3]", None, None))
    regions = [GroundedRegion(code, 0, 0, 1, "CT", *place, 0, mask.bool(), None, 0, 0.5) for code, *place in places]
    findings = [Finding(number, region, mask, 0) for number, region in enumerate(regions, 5)]
    turn = Turn("q", 0, None, answer=GroundedAnswer(text, text, regions), findings=findings)
    chat = markup.conversation([turn], 1)
    assert re.findall(r'<mark style="--ms-color: (#\w+)">([^<]*)</mark>', chat) == [
        (color_of(5), "&lt;liver&gt;"),
        (color_of(6), "cyst"),
    ]
    assert re.findall(r"data-finding=\"(\d+)\"", chat) == ["5", "6", "7"]
    words = re.sub(r"<button.*?</button>|<[^>]*>|\s", "", chat)
    assert words == "You:qMedSIGHT:The&lt;liver&gt;andacyst."


def test_a_layer_goes_off_and_on_and_a_code_shows_its_heat_map(page: Any, session: Any) -> None:
    plain = np.asarray(shown(page.redraw(session, 0.5), page.picture))
    on = np.asarray(shown(asked(page, session)[-1], page.picture))
    for finding in session.findings:
        updates = page.show_layer(session, 0.5, click(finding=finding.number, shown=False))
    assert (np.asarray(shown(updates, page.picture)) == plain).all()
    assert " checked" not in shown(updates, page.layers)
    for finding in session.findings:
        updates = page.show_layer(session, 0.5, click(finding=finding.number, shown=True))
    assert (np.asarray(shown(updates, page.picture)) == on).all()

    heat = page.show_heat_map(session, 0.5, click(finding=0))
    code = session.findings[0].region.code
    assert code in shown(heat, page.card) and code in heat[page.picture]["alt_text"] and heat[page.back]["visible"]
    assert (np.asarray(shown(heat, page.picture)) != on).any()
    back = page.show_masks(session, 0.5)
    assert (np.asarray(shown(back, page.picture)) == on).all() and not back[page.back]["visible"]
    with pytest.warns(UserWarning, match="not there any more"):
        assert page.show_heat_map(session, 0.5, click(finding=99)) == gr.skip()


def test_the_card_says_what_a_code_usually_means(
    tiny_checkpoint: Path, tmp_path: Path, upload: Callable, page: Any
) -> None:
    from medsight.app.page import Page
    from medsight.inference.predictor import Predictor

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "described"))
    config = page.predictor.model.config
    codes = [config.region_code_token(k, m) for k in range(config.num_groups) for m in range(config.codes_per_group)]
    meaning = {"n": 1234, "structures": {"<spleen>": 0.25, "liver": 0.75}}
    (folder / "region_codes.json").write_text(json.dumps({"codes": dict.fromkeys(codes, meaning)}))
    described = Page(Predictor(folder, device="cpu"), page.folder)
    session, _ = upload(PICTURE, onto=described)
    asked(described, session)
    card = shown(described.show_heat_map(session, 0.5, click(finding=0)), described.card)
    assert "<b>liver</b> 75%, <b>&lt;spleen&gt;</b> 25% (of 1,234 reference masks)" in card


def test_each_slice_has_its_own_masks_and_conversation(page: Any, upload: Callable) -> None:
    session, updates = upload(volume_file())
    assert updates[page.slice]["visible"] and updates[page.slice]["maximum"] == 4 and session.slice_index == 2
    assert "2 × 2 × 5 mm" in shown(updates, page.facts)
    asked(page, session, "First?")
    updates = page.show_slice(session, 1, 0.5)
    assert session.slice_index == 0 and shown(updates, page.layers) == "" and not updates[page.layers]["visible"]
    asked(page, session, "Second?")
    page.show_slice(session, 3, 0.5)
    chat = asked(page, session, "Third?")[-1][page.chat]
    assert re.findall(r"Slice (\d) of 4", chat) == ["3", "1", "3"]
    read = session.read_so_far(session.turns[2])  # which the next turn about this slice goes on from
    assert read.cache is not None and session.read_so_far(session.turns[1]).cache is None

    messages = session.messages(session.turns[2])
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    assert texts == ["First?", session.turns[0].answer.raw_text, "Third?"]
    assert sum(part["type"] == "image" for message in messages for part in message["content"]) == 1
    assert [finding.slice_index for finding in session.findings_here()] == [2] * len(session.findings_here())

    heat = page.show_heat_map(session, 0.5, click(finding=session.turns[1].findings[0].number))
    assert session.slice_index == 0 and heat[page.slice] == 1


def test_a_volume_is_cut_along_another_plane_and_the_conversation_begins_anew(page: Any, upload: Callable) -> None:
    session, updates = upload(volume_file())
    assert updates[page.plane]["visible"] and updates[page.plane]["value"] == "axial" and session.scan.num_slices == 4
    asked(page, session)
    assert session.findings
    cut = page.show_plane(session, "coronal", 0.5)
    assert session.scan.plane == cut[page.plane]["value"] == "coronal" and session.scan.num_slices == 24
    assert session.turns == [] and cut[page.slice]["maximum"] == 24 and not cut[page.layers]["visible"]
    (finding, *_) = asked(page, session) and session.findings
    assert page._mask(session.scan, finding, 0.5).shape == (session.scan.height, session.scan.width) == (4, 20)
    _, picture = upload(PICTURE, session=session)
    assert not picture[page.plane]["visible"] and not picture[page.window]["visible"]


def test_a_window_is_a_name_or_two_numbers_or_refused(page: Any, upload: Callable) -> None:
    session, updates = upload(volume_file())
    plain = np.asarray(shown(updates, page.picture))
    narrow = page.show_window(session, " 200 / 100 ", 0.5)
    assert session.window == (200.0, 100.0) and (np.asarray(shown(narrow, page.picture)) != plain).any()
    for wrong in ("tall", "1/2/3", "40/-1", "nan/10"):
        with pytest.warns(UserWarning, match="indow"):
            assert page.show_window(session, wrong, 0.5) == {page.window: "200/100"}
        assert session.window == (200.0, 100.0)
    assert (np.asarray(shown(page.show_window(session, "default", 0.5), page.picture)) == plain).all()


def test_a_volume_is_cut_as_the_model_learnt_it_and_another_plane_is_used_with_a_warning(
    page: Any, upload: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page.predictor, "learnt", LearntOrientations(["MRI brain"], {"MRI brain": "AI"}))
    session, updates = upload(volume_file())
    assert updates[page.plane]["value"] == session.scan.orientation == "AI"
    assert updates[page.plane]["choices"] == ["axial", "coronal", "sagittal", "AI"]
    assert page.show_plane(session, "axial", 0.5)[page.plane]["value"] == "axial"
    with pytest.warns(UserWarning, match=r"axial slices \(LP\), but the model learnt MRI brain from sagittal"):
        assert asked(page, session) and session.turns

    learnt = LearntOrientations(["MRI brain", "MRI torso"], {"MRI brain": "AI", "MRI torso": "LP"})
    monkeypatch.setattr(page.predictor, "learnt", learnt)
    with pytest.warns(UserWarning, match="^Choose the plane: the model learnt MRI brain from sagittal"):
        assert upload(volume_file())[0].scan.plane == "axial"


def test_a_files_own_window_is_offered_where_it_has_one(page: Any, upload: Callable) -> None:
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.Nifti1Image.from_bytes(volume_file())
    image.header["cal_min"], image.header["cal_max"] = 100, 200
    session, updates = upload(image.to_bytes())
    assert updates[page.window]["choices"] == ["default", "file"]
    own = np.asarray(shown(page.show_window(session, "file", 0.5), page.picture))
    assert session.window == "file"
    assert (np.asarray(shown(page.show_window(session, "150/100", 0.5), page.picture)) == own).all()

    session, updates = upload(volume_file(), session=session)
    assert updates[page.window]["choices"] == ["default"]
    with pytest.warns(UserWarning, match="^The upload states no window"):
        assert page.show_window(session, "file", 0.5) == {page.window: "default"}


@pytest.mark.parametrize(("kind", "slices"), [("array", 6), ("TIFF", 6), ("PNG", 1)])
def test_what_has_grey_levels_to_choose_offers_a_window_and_what_has_slices_a_slider(
    kind: str, slices: int, page: Any, upload: Callable
) -> None:
    volume = np.random.default_rng(0).integers(0, 900, (6, 20, 24)).astype(np.uint16)
    pages = tiff_bytes([Image.fromarray(page) for page in volume])
    files = {"array": npy_bytes(volume), "TIFF": pages, "PNG": picture_bytes("PNG", "I;16")}
    session, updates = upload(files[kind])
    assert updates[page.slice]["visible"] == ("6 slices" in updates[page.facts]["value"]) == (slices == 6)
    assert updates[page.slice]["maximum"] == max(2, slices) and updates[page.formats]["choices"] == ["png", "coco"]
    narrow = page.show_window(session, "200/100", 0.5)
    assert updates[page.window]["visible"]
    assert (np.asarray(shown(narrow, page.picture)) != np.asarray(shown(updates, page.picture))).any()


def test_a_stopped_answer_stays_with_its_masks(page: Any, session: Any) -> None:
    steps = page.ask(session, "Go on", 400, False, 0.5)
    next(steps)
    page.stop(session)
    last = list(steps)[-1]
    (turn,) = session.turns
    assert turn.stopped and "(stopped)" in last[page.chat] and last[page.question]["submit_btn"]
    assert len(page.predictor.processor.tokenizer(turn.answer.raw_text)["input_ids"]) < 400
    assert len(turn.findings) == len(turn.answer.regions)


def test_a_visitor_who_leaves_or_opens_another_image_ends_the_answer(
    page: Any, session: Any, upload: Callable
) -> None:
    steps = page.ask(session, "Go on", 400, False, 0.5)
    next(steps), next(steps)
    stop = session.stop
    steps.close()
    assert stop.is_set() and session.turns == []

    steps = page.ask(session, "Go on", 400, False, 0.5)
    next(steps), next(steps)
    upload(PICTURE, session=session)
    assert "ms-question" not in list(steps)[-1][page.chat] and session.turns == []


def test_the_threshold_redraws_and_only_shrinks_masks(page: Any, session: Any) -> None:
    asked(page, session)
    masks = [page._mask(session.scan, session.findings[0], threshold) for threshold in (0.05, 0.5, 0.95)]
    assert (masks[0] >= masks[1]).all() and (masks[1] >= masks[2]).all() and masks[0].sum() > masks[2].sum()
    archive = page.redraw(session, 0.95)[page.archive]  # which another threshold made
    assert archive["value"] is None and not archive["visible"]


@pytest.mark.parametrize("kind", ["picture", "volume", "dicom"])
def test_the_archive_holds_the_masks_in_the_formats_that_the_source_allows(
    page: Any, upload: Callable, kind: str
) -> None:
    if kind == "dicom":
        pytest.importorskip("highdicom")
    content = {"picture": lambda: PICTURE, "volume": volume_file, "dicom": ct_file}[kind]()
    session, updates = upload(content)
    formats = updates[page.formats]["choices"]
    wanted = {"picture": {"png", "coco"}, "volume": {"png", "coco", "nifti"}, "dicom": {"png", "coco", "dicom-seg"}}
    assert wanted[kind] <= set(formats) and ("nifti" in formats) == (session.scan.affine is not None)
    assert updates[page.deidentify]["visible"] == (kind == "dicom")
    with pytest.warns(UserWarning, match="no mask to download"):
        assert page.save(session, ["png"], True, 0.5) == gr.skip()
    asked(page, session)
    saved = page.save(session, sorted(wanted[kind]), True, 0.05)
    with zipfile.ZipFile(shown(saved, page.archive)) as archive:
        names = set(archive.namelist())
        mask = np.asarray(Image.open(archive.open("mask-01.png"))) > 0
    assert (mask == page._mask(session.scan, session.findings[0], 0.05)).all()
    assert {"regions.json", "overview.png", "coco-rle.json"} <= names
    assert ("labels.nii.gz" in names) == (kind == "volume") and ("segmentation.dcm" in names) == (kind == "dicom")


def test_nothing_happens_without_an_image(page: Any) -> None:
    with pytest.warns(UserWarning, match="Open an image first"):
        assert list(page.ask(None, "What?", **ASK)) == [gr.skip()]
    for event, *values in ((page.show_slice, 1), (page.show_plane, 1), (page.show_window, 1), (page.save, [], False)):
        with pytest.warns(UserWarning, match="Open an image first"):
            assert event(None, *values, 0.5) == gr.skip()
    with pytest.warns(UserWarning, match="not there any more"):
        assert page.show_heat_map(None, 0.5, click(finding=0)) == gr.skip()
    assert page.stop(None) == gr.skip()
    for unchanged in (page.begin_anew(None, 0.5), page.redraw(None, 0.5)):
        assert not unchanged[page.picture]["visible"] and not unchanged[page.layers]["visible"]


@pytest.mark.parametrize(
    ("question", "positions", "message"),
    [("  ", 4096, "prompt is empty"), ("What is it?", 20, "begin a new conversation")],
)
def test_what_cannot_be_asked_is_refused_and_kept_out_of_the_conversation(
    question: str, positions: int, message: str, page: Any, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page.predictor.model.config.text_config, "max_position_embeddings", positions)
    with pytest.warns(UserWarning, match=message):
        last = asked(page, session, question)[-1]
    assert session.turns == []
    assert "ms-question" not in last[page.chat] and last[page.question]["submit_btn"]
    assert last[page.question]["value"] == question


def test_sessions_share_nothing(page: Any, upload: Callable) -> None:
    (one, _), (other, _) = upload(PICTURE), upload(PICTURE)
    asked(page, one)
    assert one.findings and not other.turns and "ms-question" not in page.begin_anew(other, 0.5)[page.chat]
    page.begin_anew(one, 0.5)
    assert one.turns == [] and one.scan is not None


def test_every_example_opens_and_suits_its_prompt(page: Any) -> None:
    assert page.examples
    for number, example in enumerate(page.examples):
        updates = page.open_example(None, number, 0.5)
        assert updates[page.session].scan is not None and updates[page.question]["value"] == example.prompt
        updates[page.session].close()
