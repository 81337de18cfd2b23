import itertools
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from medsight.data.groups import Groups
from medsight.data.templates import INTENTS, TEMPLATES, Wordings, draw_alternatives
from medsight.data.wording import (
    POSITIONS,
    ConversationMaker,
    Turn,
    Vocabulary,
    corpus_texts,
    picture_words,
    position_in_words,
    with_article,
)


GROUPS = Groups(
    {
        "CT torso": ["CT/torso"],
        "MRI abdomen": ["MRI/abdomen"],
        "ultrasound breast": ["ultrasound/*"],
        "endoscopy colon": ["endoscope/colon"],
        "odd thing": ["odd/*"],
    }
)


def row(modality: str, site: str, targets=(), absent=(), finding=None) -> dict:
    known = {"dataset": "some", "modality": modality, "site": site, "finding": finding}
    return {**known, "targets": [*targets], "absent": [*absent]}


TORSO = row("CT", "torso", ["liver", "left kidney", "spleen", "aorta"])
SEVERAL = row("CT", "torso", ["lung nodule"] * 3 + ["liver"])
BREAST = row("ultrasound", "breast", ["benign breast tumor"], finding="benign")
NORMAL = row("ultrasound", "breast", absent=["breast tumor"], finding="normal")
POLYP = row("endoscope", "colon", ["polyp"])
ROWS = [TORSO, SEVERAL, BREAST, NORMAL, POLYP, row("MRI", "abdomen", ["gallbladder"]), row("odd", "thing", ["gizmo"])]


@pytest.fixture(scope="module")
def wordings() -> Wordings:
    return Wordings.load()


@pytest.fixture
def maker(wordings: Wordings) -> ConversationMaker:
    return ConversationMaker(wordings, Vocabulary.from_rows(ROWS, GROUPS), random.Random(0))


def turns(maker: ConversationMaker, one: dict, draws: int = 300) -> list[Turn]:
    return [maker.grounded(one, ["centre"] * len(one["targets"])) for _ in range(draws)]


def test_an_answer_cites_a_code_for_every_region_and_names_it(maker: ConversationMaker) -> None:
    seen = Counter()
    for one in ROWS:
        for turn in turns(maker, one):
            text = turn.text([f"[C0_{index}]" for index in range(len(turn.regions))])
            assert re.findall(r"\[C0_(\d+)\]", text) == [str(index) for index in range(len(turn.regions))]
            assert not set("{}") & set(text + turn.prompt)
            assert len(turn.regions) <= 5 and len(set(turn.regions)) == len(turn.regions)
            for slot, mask in enumerate(turn.regions):
                named = text.index(one["targets"][mask]) < text.index(f"[C0_{slot}]")
                assert named and (turn.intent == "diagnose" or f"{one['targets'][mask]} [C0_{slot}]" in text)
            assert bool(turn.regions) == (turn.absent is None) or turn.intent in ("caption", "modality", "site")
            seen[turn.intent] += 1
    assert set(seen) >= set(INTENTS["grounded"])


def test_all_masks_of_a_structure_are_cited_together(maker: ConversationMaker) -> None:
    drawn = [turn for turn in turns(maker, SEVERAL) if "nodule" in turn.answer]
    assert {turn.regions for turn in drawn} == {(0, 1, 2), (3, 0, 1, 2), (0, 1, 2, 3)}
    assert all(turn.intent != "where_is" for turn in drawn)


def test_no_answer_has_more_codes_than_allowed(wordings: Wordings) -> None:
    few = ConversationMaker(wordings, Vocabulary.from_rows(ROWS, GROUPS), random.Random(0), max_regions=2)
    drawn = turns(few, SEVERAL)
    assert not any("nodule" in turn.answer for turn in drawn)
    assert {turn.regions for turn in drawn} == {(), (3,)}
    assert {len(turn.regions) for turn in turns(few, TORSO)} == {0, 1, 2}
    assert "segment_all" not in {turn.intent for turn in turns(few, TORSO)}


def test_a_question_names_few_structures_also_where_an_answer_may_cite_many(wordings: Wordings) -> None:
    many = row("CT", "torso", [f"organ {number}" for number in range(9)])
    maker = ConversationMaker(wordings, Vocabulary.from_rows([many], GROUPS), random.Random(0), max_regions=16)
    drawn, asked = turns(maker, many), ("segment_several", "segment_all")
    cited = {intent: {len(turn.regions) for turn in drawn if turn.intent == intent} for intent in asked}
    assert cited["segment_several"] == {2, 3, 4, 5} and cited["segment_all"] == {9}


def test_an_absent_structure_is_answered_without_a_code(maker: ConversationMaker) -> None:
    for turn in turns(maker, NORMAL):
        said = {"absent": "There is no {} in this image.", "diagnose": "The image is normal: there is no {}."}
        assert turn.regions == () and turn.answer == said[turn.intent].format(turn.absent)
    listed = Counter(turn.absent == "breast tumor" for turn in turns(maker, NORMAL))
    assert 0.5 < listed[True] / 300 < 0.95


def test_nothing_is_called_absent_that_a_related_or_unknown_group_could_show(maker: ConversationMaker) -> None:
    absent = {turn.absent for turn in turns(maker, TORSO)} - {None}
    assert absent == {"polyp"}  # no breast tumour: a CT of the torso may show one; no gallbladder, no gizmo
    others = {*TORSO["targets"], "lung nodule", "gallbladder", "benign breast tumor"}
    assert {turn.absent for turn in turns(maker, POLYP, 600)} - {None} == others
    assert {turn.absent for turn in turns(maker, row("odd", "thing", ["gizmo"]))} == {None}


def expansions(prompt: str) -> set[str]:
    """All that a prompt's alternatives can make of it."""
    parts = re.split(r"\[([^][]*\|[^][]*)\]", prompt)
    choices = [part.split("|") if number % 2 else [part] for number, part in enumerate(parts)]
    return {" ".join("".join(drawn).split()) for drawn in itertools.product(*choices)}


def test_alternatives_are_drawn_and_only_they() -> None:
    prompt = "[Find|Please locate] the {target}[, please|]."
    drawn = {draw_alternatives(prompt, random.Random(seed)) for seed in range(50)}
    assert drawn == expansions(prompt) and len(drawn) == 4
    assert draw_alternatives("two  spaces [kept]", random.Random(0)) == "two  spaces [kept]"


def test_prompts_for_what_is_absent_are_those_for_what_is_present(
    maker: ConversationMaker, wordings: Wordings
) -> None:
    for turn in turns(maker, POLYP):
        if turn.intent == "absent":
            patterns = [prompt for intent in INTENTS["absent"] for prompt in wordings.prompts[intent]]
            words = {"modality": "endoscopy image", "a_modality": "an endoscopy image", "site": "colon"}
            words |= {"target": turn.absent, "a_target": with_article(turn.absent)}
            assert any(turn.prompt in expansions(pattern.format(**words)) for pattern in patterns)


def test_a_diagnosis_names_the_finding_and_cites_what_shows_it(maker: ConversationMaker) -> None:
    def diagnoses(one: dict) -> set[tuple[str, tuple[int, ...]]]:
        return {(turn.answer, turn.regions) for turn in turns(maker, one) if turn.intent == "diagnose"}

    present = "Findings consistent with {} are present"
    assert diagnoses(BREAST) == {(present.format("benign breast tumor") + ", segmented as {0}.", (0,))}
    chest = row("CT", "torso", ["lung", "ground glass opacity", "heart"], finding="pneumonia")
    assert diagnoses(chest) == {(present.format("pneumonia") + ": ground glass opacity {0}.", (1,))}
    twice = row("CT", "torso", ["liver tumor", "liver", "liver tumor"], finding="Tumor")
    assert diagnoses(twice) == {(present.format("liver tumor") + ", segmented as {0} and {1}.", (0, 2))}
    assert diagnoses(NORMAL) == {("The image is normal: there is no breast tumor.", ())}
    colitis = row("endoscope", "colon", absent=["polyp"], finding="colitis")
    assert diagnoses(colitis) == {(present.format("colitis") + ".", ())}
    limb = row("CT", "torso", ["soft tissue sarcoma", "bone", "renal cyst"])
    both = present.format("renal cyst and soft tissue sarcoma") + ": renal cyst {0}, soft tissue sarcoma {1}."
    assert diagnoses(limb) == {(both, (2, 0))}
    for without in (TORSO, row("CT", "torso", ["lung", "heart"], finding="pneumonia")):
        assert diagnoses(without) == set()


def test_where_is_says_the_place_of_the_mask_that_it_cites(maker: ConversationMaker) -> None:
    places = ["upper left", "right", "centre", "lower middle"]
    found = 0
    for _ in range(300):
        turn = maker.grounded(TORSO, places)
        if turn.intent == "where_is":
            target, place = TORSO["targets"][turn.regions[0]], places[turn.regions[0]]
            assert turn.answer == f"The {target} {{0}} is in the {place} of the image."
            found += 1
    assert found > 5


def test_a_synonym_that_fits_another_structure_of_the_image_is_not_used(maker: ConversationMaker) -> None:
    both = row("ultrasound", "breast", ["benign breast tumor", "malignant breast tumor"])
    for turn in turns(maker, both):
        if turn.intent in ("segment_one", "where_is", "is_there"):
            assert both["targets"][turn.regions[0]] in turn.prompt
    asked = [turn.prompt for turn in turns(maker, BREAST) if turn.intent == "segment_one"]
    assert not all("benign breast tumor" in prompt for prompt in asked)


def test_a_row_that_allows_nothing_gets_a_plain_question(maker: ConversationMaker) -> None:
    for turn in turns(maker, row("odd", "thing"), 50):
        assert turn.intent in ("caption", "modality", "site") and turn.regions == ()


def test_plain_questions_need_no_region(maker: ConversationMaker) -> None:
    drawn = [maker.plain(BREAST) for _ in range(200)]
    assert {turn.regions for turn in drawn} == {()}
    assert {turn.intent for turn in drawn} == {"caption", "modality", "site", "absent"}
    assert {turn.answer for turn in drawn if turn.intent != "absent"} == {
        "An ultrasound image of the breast with benign breast tumor.",
        "This is an ultrasound image.",
        "This image shows the breast.",
    }
    captions = {maker.plain(NORMAL).answer for _ in range(50)}
    assert "An ultrasound image of the breast without breast tumor." in captions


def test_held_out_prompts_are_never_among_those_for_training(maker: ConversationMaker, wordings: Wordings) -> None:
    for one in ROWS:
        words = {**picture_words(one, wordings), "target": "polyp", "a_target": "a polyp", "targets": "polyp"}
        held_out = {prompt.format(**words) for prompts in wordings.held_out_prompts.values() for prompt in prompts}
        assert not held_out & {turn.prompt for turn in turns(maker, one)} and len(held_out) > 5


def test_braces_in_names_stay_braces(maker: ConversationMaker) -> None:
    strange = row("odd", "{site}", ["a {0} b"], finding="b")
    for turn in turns(maker, strange, 100):
        text = turn.text(["[C0_1]"] * len(turn.regions))
        assert "[C0_1]" not in text.replace("a {0} b [C0_1]", "").replace("as [C0_1]", "")
    captions = {turn.answer.format() for turn in (maker.plain(strange) for _ in range(20)) if turn.intent == "caption"}
    assert captions == {"An odd image of the {site} with a {0} b."}
    for _, answer, _ in corpus_texts(maker, [strange], 20):
        assert "[" not in answer


def test_position_in_words() -> None:
    corners = {(0, 0): "upper left", (5, 9): "right", (9, 5): "lower middle", (10, 10): "lower right"}
    for at, words in {**corners, (5, 5): "centre"}.items():
        mask = np.zeros((11, 11), dtype=bool)
        mask[at] = True
        assert position_in_words(mask) == words and words in POSITIONS
    with pytest.raises(ValueError, match="empty"):
        position_in_words(np.zeros((3, 3)))


def test_articles() -> None:
    for words in ("an MRI", "a CT image", "an ultrasound image", "an X-ray", "a T2-weighted MRI", "an opacity"):
        assert with_article(words.split(" ", 1)[1]) == words


def test_the_language_models_own_text_has_no_codes_left(maker: ConversationMaker) -> None:
    pairs = list(corpus_texts(maker, ROWS, rounds=20))
    assert len(pairs) == len(ROWS) * 2 * 20
    for question, answer, origin in pairs:
        assert origin["dataset"] and all(target in answer for target in origin["targets"])
        assert question and not set("{}\ufffc") & set(question + answer)
        assert "  " not in answer and " ." not in answer and " ," not in answer and "segmented as" not in answer
    assert {"liver.", "Yes, there is polyp."} <= {answer for _, answer, _ in pairs}


def test_an_image_of_no_group_is_named() -> None:
    with pytest.raises(ValueError, match="PET/knee"):
        Vocabulary.from_rows([row("PET", "knee")], GROUPS)


def test_the_shipped_wordings_are_many(wordings: Wordings) -> None:
    for intent, prompts in wordings.prompts.items():
        assert len(set(prompts)) == len(prompts)
        if intent not in ("caption", "modality", "site"):
            assert len(prompts) >= 25, intent
        assert len(set(wordings.held_out_prompts[intent])) >= 8, intent


def changed(tmp_path: Path, change) -> Path:
    sections = yaml.safe_load(TEMPLATES.read_text("utf-8"))
    change(sections)
    path = tmp_path / "words.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("answers"), "no section 'answers'"),
        (lambda s: s["prompts"].pop("where_is"), "prompts has no section 'where_is'"),
        (lambda s: s["prompts"].update(segmentone=["x"]), "'segmentone': did you mean 'segment_one'"),
        (lambda s: s["prompts"]["where_is"].append("Where is {targt}?"), r"prompts.where_is.*\{targt\}.*\{target\}"),
        (lambda s: s["prompts"]["where_is"].append("Where is {target?"), "prompts.where_is: 'Where is {target"),
        (lambda s: s["answers"].update(absent=[]), "answers.absent: expected a list of texts"),
        (lambda s: s["held_out_prompts"]["site"].append(s["prompts"]["site"][0]), "held_out_prompts.site.*share"),
        (
            lambda s: (
                s["prompts"]["site"].append("[Say|Tell] where[ this|] is."),
                s["held_out_prompts"]["site"].append("tell  where is."),
            ),
            "held_out_prompts.site and prompts.site share 'tell  where is.'",
        ),
        (lambda s: s["held_out_prompts"]["site"].append("[a|b]"), "held_out_prompts.site.*expected no alternatives"),
        (lambda s: s["prompts"]["site"].append("[Say where"), r"prompts.site: '\[Say where'.*\[one\|another\]"),
        (lambda s: s["weights"]["plain"].update(caption=-1), "weights.plain.caption.*-1"),
        (lambda s: s["weights"]["absent"].update(dict.fromkeys(s["weights"]["absent"], 0)), "all weights are 0"),
        (lambda s: s["synonyms"].update(liver="hepar"), "synonyms.liver"),
        (lambda s: s.update(families=["CT"]), "families: expected a mapping"),
    ],
)
def test_a_file_of_wordings_that_cannot_work_is_refused(tmp_path: Path, change, message: str) -> None:
    with pytest.raises(ValueError, match=rf"words\.yaml.*{message}"):
        Wordings.load(changed(tmp_path, change))


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "words.yaml").write_text("weights: [", encoding="utf-8")
    with pytest.raises(ValueError, match="words.yaml: not valid YAML"):
        Wordings.load(tmp_path / "words.yaml")
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        Wordings.load(tmp_path / "none.yaml")


def test_a_modality_is_told_by_the_first_pattern(tmp_path: Path, wordings: Wordings) -> None:
    told = [wordings.modality(name) for name in ("MRI-T1", "MRI-PD", "mri-t1gd", "SPECT")]
    assert told == ["T1-weighted MRI", "MRI", "contrast-enhanced T1-weighted MRI", "SPECT image"]
    closed = Wordings.load(changed(tmp_path, lambda s: s["modalities"].pop("*")))
    with pytest.raises(ValueError, match="words.yaml.*'SPECT'"):
        closed.modality("SPECT")


def test_rough_prompts_keep_their_names_and_answers(wordings: Wordings) -> None:
    vocabulary = Vocabulary.from_rows(ROWS, GROUPS)
    clean, rough = (ConversationMaker(wordings, vocabulary, random.Random(0), noise=noise) for noise in (0.0, 0.4))
    changed = 0
    for seed in range(200):
        turns, asked = [], {"target": "left kidney", "a_target": "a left kidney"}
        for maker in (clean, rough):
            maker.generator = random.Random(seed)
            turns.append(maker._turn(TORSO, "segment_one", "segment_one", cited={"left kidney": [1]}, asked=asked))
        assert all("left kidney" in turn.prompt for turn in turns)
        changed += turns[0].prompt != turns[1].prompt
    assert changed > 100
    with pytest.raises(ValueError, match="noise=1.0: expected a share"):
        ConversationMaker(wordings, vocabulary, random.Random(0), noise=1.0)
