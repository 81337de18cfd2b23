"""From generated tokens and mask logits to clean text, phrases, masks and boxes."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import ModelOutput

from processing_medsight import MedSightProcessor
from processing_medsight.grounded_answer_medsight import tidy_answer


CODE = re.compile(r"\[C\d+_\d+\]")
ANSWERS = [
    ("Segmentations: liver [C0_16], spleen [C0_7].", "Segmentations: liver, spleen.", ["liver", "spleen"]),
    (
        "Findings consistent with liver tumor are present, segmented as [C0_25].",
        "Findings consistent with liver tumor are present, segmented.",
        ["liver tumor"],
    ),
    ("There is a polyp [C3_1] and an ulcer [C3_2].", "There is a polyp and an ulcer.", ["polyp", "ulcer"]),
    ("Yes, the left kidney is here: [C1_2].", "Yes, the left kidney is here.", ["left kidney"]),
    ("Three brain lesions [C1_0] [C1_0] [C1_0] are seen.", "Three brain lesions are seen.", ["brain lesions"] * 3),
    ("There are lesions [C1_0], [C1_0] and [C1_0].", "There are lesions.", ["lesions"] * 3),
    ("[C0_16] liver, [C0_7] spleen.", "liver, spleen.", ["liver", "spleen"]),
    ("[C0_1]: liver\n[C0_2]: spleen", "liver\nspleen", ["liver", "spleen"]),
    ("- liver: [C0_1]\n- **pancreas** [C0_3]", "- liver\n- **pancreas**", ["liver", "pancreas"]),
    ("The left lobe of the liver [C0_1] is large.", None, ["left lobe of the liver"]),
    ("A tumor in the lung is located at [C2_3].", "A tumor in the lung is located.", ["tumor in the lung"]),
    ("Segmentation of the liver: [C0_1].", "Segmentation of the liver.", ["liver"]),
    ("The liver is segmented as [C0_16] and the spleen as [C0_7].", None, ["liver", "spleen"]),
    ("The tumor core, [C0_1], and edema, [C0_2], are visible.", None, ["tumor core", "edema"]),
    ("Multiple lung nodules, which are shown here: [C0_1], [C0_2].", None, ["lung nodules"] * 2),
    ("liver (right lobe) [C0_1]; kidney ([C1_2])", "liver (right lobe); kidney", ["liver", "kidney"]),
    ("Polyps (see [C1_1]) are present.", "Polyps are present.", ["Polyps"]),
    ("optic disc[C5_0]and optic cup[C5_1]", "optic disc and optic cup", ["optic disc", "optic cup"]),
    ("COVID-19 infection [C6_0].", "COVID-19 infection.", ["COVID-19 infection"]),
    ("The liver is normal. [C0_2]", "The liver is normal.", [None]),
    ("Here is the liver. It is [C0_2].", "Here is the liver. It is.", [None]),
    ("Findings: [C0_1] [C0_2].", "Findings.", [None, None]),
    ("[C0_1] [C0_2]", "", [None, None]),
    ("No tumor.", "No tumor.", []),
    ("About 3.5 cm, i.e. small: no region.", "About 3.5 cm, i.e. small: no region.", []),
    ("", "", []),
    (" " * 5000 + "[C0_1]" + " " * 5000 + ", " * 2000, None, [None]),
    ("and " * 3000 + "[C0_1]", None, [None]),
]


@pytest.mark.parametrize(("answer", "text", "phrases"), ANSWERS, ids=[answer[:30] for answer, *_ in ANSWERS])
def test_the_words_that_a_code_stands_for(answer: str, text: str | None, phrases: list) -> None:
    clean, spans = tidy_answer(CODE.split(answer))
    assert [None if span is None else clean[slice(*span)] for span in spans] == phrases
    if text is not None:
        assert clean == text


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_text_spans_fit_and_no_word_is_lost(seed: int) -> None:
    draw = np.random.default_rng(seed)
    bits = ["liver", "left kidney", "is", "segmented as", "and", "3.5", "[C0_1]", "[C2_3]", "\ufffc", *",.;:()\n"]
    answer = " ".join(draw.choice(bits, size=draw.integers(1, 30)))
    pieces = CODE.split(answer)
    clean, spans = tidy_answer(pieces)
    assert len(spans) == len(pieces) - 1 and "[C" not in clean and clean == clean.strip()
    words = re.compile(r"liver|left kidney|segmented|3\.5")
    assert words.findall(clean) == words.findall(answer)
    for span in spans:
        if span is not None:
            assert 0 <= span[0] < span[1] <= len(clean)
            phrase = clean[slice(*span)]
            assert phrase == phrase.strip() and not re.search(r"[.\n](?!5)", phrase)


def logits_of(*boxes: tuple[float, float, float, float], grid: int = 56) -> torch.Tensor:
    """(n, grid, grid) logits, each positive within (x0, y0, x1, y1), given as shares of the model's input."""
    out = torch.full((len(boxes), grid, grid), -9.0)
    for mask, (x0, y0, x1, y1) in zip(out, boxes, strict=True):
        mask[round(y0 * grid) : round(y1 * grid), round(x0 * grid) : round(x1 * grid)] = 9.0
    return out


def generated(processor: MedSightProcessor, prompts: Any, answers: list[str], boxes: list[list]) -> ModelOutput:
    """What generate would return, had the model given these answers and boxes."""
    tokenizer, k = processor.tokenizer, len(answers) // len(prompts["input_ids"])
    new = tokenizer(
        [f"{answer}<|im_end|>" for answer in answers], padding=True, padding_side="right", return_tensors="pt"
    )
    prompt_ids = prompts["input_ids"].repeat_interleave(k, dim=0)
    codes = [
        torch.tensor(tokenizer.convert_tokens_to_ids(CODE.findall(answer)), dtype=torch.long) for answer in answers
    ]
    return ModelOutput(
        sequences=torch.cat([prompt_ids, new["input_ids"]], dim=1),
        mask_logits=[logits_of(*row) for row in boxes],
        region_code_ids=codes,
        region_scores=[torch.linspace(0.5, 0.9, len(row)) for row in boxes],
        is_complete=torch.ones(len(answers), dtype=torch.bool),
    )


def ask(processor: MedSightProcessor, *conversations: list, add_generation_prompt: bool = True) -> Any:
    tensors = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
    return processor.apply_chat_template(list(conversations), add_generation_prompt=add_generation_prompt, **tensors)


def question(*images: Image.Image, text: str = "Segment.") -> list[dict]:
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}
    ]


def blank(height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height))


def test_a_region_has_all_that_is_promised(processor: MedSightProcessor) -> None:
    inputs = ask(processor, question(blank(100, 200)))
    out = generated(
        processor, inputs, ["Liver [C0_1], [\u2060x] spleen [C2_3]."], [[(0.5, 0.25, 1, 0.75), (0, 0, 0, 0)]]
    )
    (answer,) = processor.post_process_grounded_answer(out, inputs)
    assert answer.text == "Liver, [\u2060x] spleen." and answer.raw_text == "Liver [C0_1], [\u2060x] spleen [C2_3]."
    liver, spleen = answer.regions
    assert (liver.code, liver.group, liver.code_index, liver.group_name) == ("[C0_1]", 0, 1, "CT abdomen")
    assert (spleen.code, spleen.group, spleen.code_index, spleen.group_name) == ("[C2_3]", 2, 3, "endoscopy")
    assert liver.token_id == processor.tokenizer.convert_tokens_to_ids("[C0_1]")
    for region, word in ((liver, "Liver"), (spleen, "spleen")):
        assert region.phrase == word == answer.text[slice(*region.span)]
        assert region.image_index == 0 and region.mask.shape == (100, 200) and region.mask.dtype == torch.bool
        assert region.area == int(region.mask.sum())
    # Padded to a square, the image takes the middle half of the input: all of its height, its right half.
    assert np.abs(np.subtract(liver.box, (100, 0, 200, 100))).max() <= 2
    assert (liver.score, spleen.score) == pytest.approx((0.5, 0.9))
    assert spleen.box is None and spleen.area == 0 and not spleen.mask.any()


@pytest.mark.parametrize("k", [1, 3])
def test_sequences_find_their_prompts_and_images(processor: MedSightProcessor, k: int) -> None:
    rows = [
        question(blank(10, 30), text="A rather long question, so that the other prompts are padded."),
        question(text="No image."),
        [
            *question(blank(11, 12), blank(40, 20)),
            {"role": "assistant", "content": "liver [C0_0]"},
            *question(blank(7, 9)),
        ],
    ]
    inputs = ask(processor, *rows)
    answers = [f"row {row} [C{row}_{i}]" + " [C1_1]" * i for row in (0, 2) for i in range(k)]
    answers = [*answers[:k], *["no code"] * k, *answers[k:]]
    boxes = [[(0, 0, 1, 1)] * len(CODE.findall(answer)) for answer in answers]
    results = processor.post_process_grounded_answer(generated(processor, inputs, answers, boxes), inputs)
    assert len(results) == 3 * k
    for number, (result, answer) in enumerate(zip(results, answers, strict=True)):
        assert result.raw_text == answer and [region.code for region in result.regions] == CODE.findall(answer)
        height, width, image = {0: (10, 30, 0), 1: (0, 0, None), 2: (7, 9, 2)}[number // k]
        for region in result.regions:
            assert region.image_index == image and region.mask.shape == (height, width)
            assert region.box == (0, 0, width, height) and region.area == height * width


def test_codes_of_a_given_conversation_belong_to_the_image_before_them(processor: MedSightProcessor) -> None:
    conversation = [
        *question(blank(10, 30)),
        {"role": "assistant", "content": "liver [C0_0]"},
        *question(blank(40, 20), text="And here?"),
        {"role": "assistant", "content": "spleen [C0_1], polyp [C2_2]"},
    ]
    inputs = ask(processor, conversation, question(blank(5, 5)), add_generation_prompt=False)
    decoded = ModelOutput(
        mask_logits=[logits_of(*[(0, 0, 1, 1)] * 3), logits_of()],
        region_code_ids=[torch.tensor(processor.tokenizer.convert_tokens_to_ids(["[C0_0]", "[C0_1]", "[C2_2]"])), []],
        region_scores=[torch.ones(3), torch.ones(0)],
    )
    first, second = processor.post_process_grounded_answer(decoded, inputs)
    assert [(r.phrase, r.image_index, tuple(r.mask.shape)) for r in first.regions] == [
        ("liver", 0, (10, 30)),
        ("spleen", 1, (40, 20)),
        ("polyp", 1, (40, 20)),
    ]
    assert second.regions == [] and "<|" not in second.text


def test_threshold_and_geometry_of_the_call_are_honoured(processor: MedSightProcessor) -> None:
    inputs = ask(processor, question(blank(50, 100)))
    out = generated(processor, inputs, ["liver [C0_1]"], [[(0, 0, 0.5, 1)]])
    (padded,) = processor.post_process_grounded_answer(out, inputs)
    (cropped,) = processor.post_process_grounded_answer(out, inputs, fit="crop")
    assert padded.regions[0].box == (0, 0, 50, 50) and cropped.regions[0].box == (25, 0, 50, 50)
    (none,) = processor.post_process_grounded_answer(out, inputs, threshold=1.0)
    assert none.regions[0].box is None


def test_an_answer_says_whether_it_came_to_its_end_and_can_keep_special_tokens(processor: MedSightProcessor) -> None:
    inputs = ask(processor, question(blank(5, 5)), question(blank(6, 6)))
    out = generated(processor, inputs, ["A longer liver [C0_1].", "No."], [[(0, 0, 1, 1)], []])
    out["is_complete"] = torch.tensor([False, True])
    assert [a.is_complete for a in processor.post_process_grounded_answer(out, inputs)] == [False, True]
    kept, _ = processor.post_process_grounded_answer(out, inputs, skip_special_tokens=False)
    assert kept.raw_text == "A longer liver [C0_1].<|im_end|>"
    decoded = ModelOutput(mask_logits=[logits_of()] * 2, region_code_ids=[[]] * 2, region_scores=[torch.ones(0)] * 2)
    assert [a.is_complete for a in processor.post_process_grounded_answer(decoded, inputs)] == [None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out, _: {**out, "region_code_ids": out["region_code_ids"][1:] * 2}, "sequence 0.*region codes"),
        (lambda out, _: {**out, "mask_logits": out["mask_logits"][:1] * 2}, "sequence 1.*mask_logits"),
        (lambda out, _: {**out, "sequences": out["sequences"][[0, 1, 1]]}, "3 sequences, no multiple"),
        (lambda out, inputs: inputs.update(original_sizes=[(5, 5)]) or out, "original_sizes"),
        (lambda out, _: out["sequences"], "plain tensor"),
    ],
    ids=["codes", "masks", "rows", "sizes", "tensor"],
)
def test_what_does_not_belong_together_is_refused(processor: MedSightProcessor, change: Any, message: str) -> None:
    inputs = ask(processor, question(blank(5, 5)), question(blank(6, 6)))
    out = generated(processor, inputs, ["a [C0_1]", "b [C0_2] [C0_3]"], [[(0, 0, 1, 1)], [(0, 0, 1, 1)] * 2])
    with pytest.raises(ValueError, match=message):
        processor.post_process_grounded_answer(change(out, inputs), inputs)


def test_a_region_says_what_its_code_usually_stands_for(processor: MedSightProcessor) -> None:
    processor.region_codes = {
        "codes": {"[C0_1]": {"n": 51, "structures": {"left ventricle": 0.92156, "myocardium": 0.07844}}}
    }
    inputs = ask(processor, question(blank(10, 20)))
    out = generated(processor, inputs, ["Liver [C0_1], spleen [C2_3]."], [[(0, 0, 1, 1), (0, 0, 1, 1)]])
    ((liver, spleen),) = (answer.regions for answer in processor.post_process_grounded_answer(out, inputs))
    assert (liver.meaning.structure, liver.meaning.share, liver.meaning.count) == ("left ventricle", 0.92156, 51)
    assert str(liver.meaning) == "left ventricle (92% of 51)" and liver.phrase == "Liver"
    assert spleen.meaning is None
    processor.region_codes = None
    assert [r.meaning for r in processor.post_process_grounded_answer(out, inputs)[0].regions] == [None, None]
