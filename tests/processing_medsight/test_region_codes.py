"""Region codes in the tiny tokenizer and in Qwen3's own."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from processing_medsight import QWEN3_ADDED_TOKENS, add_region_codes, parse_region_code
from processing_medsight.region_codes_medsight import region_code_ids, split_at_codes


TEXTS = [
    "Findings consistent with liver tumor are present, segmented as shown.",
    "Ünïcode: 肝臓の腫瘍, опухоль печени, 🩻 and\tTabs\n\nNewlines   spaces 3.14159 mm²",
    "[C0_] [C_1] [C0 _1] [c0_1] C0_1 [[C0]] [M0_1] [C99_99] [SEG",
    "<|im_start|>user\nSegment.<|im_end|>\n<think>\n\n</think>\n\n<|vision_start|><|image_pad|><|vision_end|>",
    "def f(x):\n    return x * 2  # code\n",
]


@pytest.mark.parametrize(("token", "code"), [("[C0_0]", (0, 0)), ("[C17_31]", (17, 31)), ("[SEG]", (0, 0))])
def test_a_code_is_parsed(token: str, code: tuple[int, int]) -> None:
    assert parse_region_code(token) == code


@pytest.mark.parametrize("token", ["[C01_2]", "[C1_02]", "[M1_2]", "[C-1_2]", "[C1_2] ", "[seg]", "", "[C١_2]"])
def test_what_is_no_code_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="is not a region code"):
        parse_region_code(token)


def test_codes_are_appended_row_major(bare_tokenizer: PreTrainedTokenizerBase) -> None:
    size = len(bare_tokenizer)
    assert add_region_codes(bare_tokenizer, 3, 4) == size
    for group in range(3):
        for index in range(4):
            token = f"[C{group}_{index}]"
            assert bare_tokenizer.convert_tokens_to_ids(token) == size + 4 * group + index
            assert parse_region_code(token) == (group, index)
            added = bare_tokenizer.added_tokens_decoder[size + 4 * group + index]
            assert not added.special and not added.normalized
    assert add_region_codes(bare_tokenizer, 3, 4) == size and len(bare_tokenizer) == size + 12


def test_without_a_codebook_there_is_one_seg_token(bare_tokenizer: PreTrainedTokenizerBase) -> None:
    first = add_region_codes(bare_tokenizer, 1, 1, use_region_codebook=False)
    assert region_code_ids(bare_tokenizer) == {first: "[SEG]"}


@pytest.mark.parametrize(
    "present",
    [["[C0_0]"], ["[C0_1]", "[C0_0]"], ["[C0_0]", "other", "[C0_1]"], ["[C0_0]", "[C0_1]", "[C0_2]"], ["[SEG]"]],
)
def test_a_tokenizer_with_other_codes_is_refused(bare_tokenizer: PreTrainedTokenizerBase, present: list[str]) -> None:
    bare_tokenizer.add_tokens(present)
    with pytest.raises(ValueError, match="already has .* region codes"):
        add_region_codes(bare_tokenizer, 1, 2)


def test_an_answer_comes_apart_at_its_codes(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = "liver [C0_1], spleen [C2_3][C2_3]."
    ids = tokenizer(answer + "<|im_end|>")["input_ids"]
    pieces, places, whole = split_at_codes(tokenizer, ids, skip_special_tokens=True)
    assert pieces == ["liver ", ", spleen ", "", "."] and whole == answer
    assert tokenizer.convert_ids_to_tokens([ids[i] for i in places]) == ["[C0_1]", "[C2_3]", "[C2_3]"]
    assert split_at_codes(tokenizer, [], True) == ([""], [], "")


def test_spaces_beside_codes_stay_where_decoding_drops_a_first_space() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "▁liver": 1, "▁and": 2, "▁spleen": 3}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    llama_like = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    first = add_region_codes(llama_like, 1, 2)
    pieces, places, whole = split_at_codes(llama_like, [1, first, 2, 3, first + 1], skip_special_tokens=True)
    assert pieces == ["liver", " and spleen", ""] and places == [1, 4] and whole == "liver[C0_0] and spleen[C0_1]"


@pytest.fixture(scope="module")
def qwen3(qwen3_saved: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(qwen3_saved)


def test_qwen3s_ids_are_where_they_belong(qwen3: PreTrainedTokenizerBase) -> None:
    assert len(qwen3) == 151_669
    for offset, (token, special) in enumerate(QWEN3_ADDED_TOKENS):
        assert qwen3.convert_tokens_to_ids(token) == 151_643 + offset
        assert qwen3.added_tokens_decoder[151_643 + offset].special == special
    assert qwen3("Hello world")["input_ids"] == [9707, 1879]


@pytest.mark.parametrize("text", TEXTS)
def test_ordinary_text_is_untouched_by_codes(
    text: str, qwen3: PreTrainedTokenizerBase, qwen3_with_codes: PreTrainedTokenizerBase
) -> None:
    assert qwen3_with_codes(text)["input_ids"] == qwen3(text)["input_ids"]
    assert qwen3_with_codes.decode(qwen3_with_codes(text)["input_ids"]) == text


@pytest.mark.parametrize("text", ["liver [C0_16], spleen[C0_7].", "[C17_31][C0_0]\n[C5_5] x", "a[C1_1]b"])
def test_codes_make_the_round_trip_and_are_not_special(text: str, qwen3_with_codes: PreTrainedTokenizerBase) -> None:
    ids = qwen3_with_codes(text)["input_ids"]
    assert qwen3_with_codes.decode([*ids, 151_645, 151_643], skip_special_tokens=True) == text


def test_codes_survive_saving(qwen3_with_codes: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    qwen3_with_codes.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert add_region_codes(again, 18, 32) == 151_669 and len(again) == len(qwen3_with_codes) == 152_245
    text = " ".join(TEXTS)
    assert again(text)["input_ids"] == qwen3_with_codes(text)["input_ids"]
    assert again.padding_side == "left" and again.eos_token == "<|im_end|>" and again.pad_token == "<|endoftext|>"
