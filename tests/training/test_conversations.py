import random
from pathlib import Path

import pytest
import torch

from training.conversations import ConversationMaker, Turn, corpus_texts, load_templates, position_in_words


TEMPLATES = Path(__file__).resolve().parents[2] / "training" / "templates.yaml"


@pytest.fixture
def maker(records: list, chance: random.Random) -> ConversationMaker:
    return ConversationMaker(load_templates(TEMPLATES), records, chance)


def test_an_answer_cites_a_code_for_every_region_and_names_it(maker: ConversationMaker, records: list) -> None:
    for record in records * 20:
        turn = maker.grounded(record, torch.ones(len(record.masks), 4, 4))
        text = turn.text([f"[C0_{index}]" for index in range(len(turn.regions))])
        assert text.count("[C0_") == len(turn.regions)
        assert "{" not in text and "{" not in turn.prompt
        for target in turn.regions:
            assert target in record.masks and target in text


def test_an_absent_structure_is_answered_without_a_code(maker: ConversationMaker, records: list) -> None:
    normal = next(record for record in records if not record.masks)
    for _ in range(20):
        turn = maker.grounded(normal, torch.zeros(0, 4, 4))
        assert turn.regions == () and turn.answer.startswith("There is no ")


def test_nothing_is_called_absent_that_a_related_group_could_show(maker: ConversationMaker, records: list) -> None:
    torso = next(record for record in records if record.dataset == "totalsegmentator")
    assert sorted(sum(maker.absent_targets(torso).values(), [])) == ["benign breast tumor", "left ventricle"]


def test_a_wrong_number_of_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="1 codes for 2 regions"):
        Turn("?", "{0}, {1}", ("a", "b")).text(["[C0_0]"])


@pytest.mark.parametrize(
    ("row", "column", "words"), [(0, 0, "upper left"), (5, 9, "right"), (9, 5, "lower"), (5, 5, "centre")]
)
def test_position_in_words(row: int, column: int, words: str) -> None:
    mask = torch.zeros(11, 11)
    mask[row, column] = 1
    assert position_in_words(mask) == words


def test_the_language_models_own_text_has_no_slots_left(maker: ConversationMaker, records: list) -> None:
    for question, answer in corpus_texts(maker, records, rounds=5):
        assert "{" not in question + answer and "  " not in answer and " ." not in answer


def test_templates_without_a_section_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("prompts: {}", encoding="utf-8")
    with pytest.raises(ValueError, match="t.yaml.*answers"):
        load_templates(tmp_path / "t.yaml")
