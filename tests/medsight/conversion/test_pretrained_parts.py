"""A model of real pretrained parts, SmolLM2-135M-Instruct and a DINOv2 ViT-S, as `medsight init` makes it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from medsight.conversion.init import ask, init, length_of
from modeling_medsight import MedSightForConditionalGeneration
from processing_medsight import MedSightProcessor
from tests.pretrained_parts import parts_are_installed, write_dinov2, write_smollm2
from tests.shared import shared_folder


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not parts_are_installed(), reason="needs the packages that tests/pretrained_parts.py names"),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    (root / "dinov2").mkdir()
    write_smollm2(root / "smollm2")
    write_dinov2(root / "dinov2")
    (root / "groups.txt").write_text("CT torso\nultrasound breast\n", encoding="utf-8")
    sizes: dict[str, Any] = {"image_size": 224, "codes_per_group": 8, "perceiver_num_stages": 1}
    init(root / "smollm2", root / "dinov2", root / "groups.txt", root / "start", **sizes)
    return root / "start"


@pytest.fixture(scope="module")
def loaded(start: Path) -> tuple[Any, Any]:
    model = MedSightForConditionalGeneration.from_pretrained(start, dtype=torch.float32).eval()
    return model, MedSightProcessor.from_pretrained(start)


def test_it_answers_a_question_in_words(start: Path) -> None:
    assert "heart" in ask(start).lower()


def test_it_is_prompted_as_the_language_model_was_trained(loaded: tuple[Any, Any]) -> None:
    """And so neither ends at once nor is surprised by a plain answer."""
    model, processor = loaded
    asked = {"role": "user", "content": "Is the heart enlarged in cardiomegaly?"}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([asked], add_generation_prompt=True, **options)
    end = processor.tokenizer.eos_token_id
    with torch.no_grad():
        first = model(**inputs).logits[0, -1].softmax(-1)
        assert float(first[end]) < 0.01
        assert float(first[model.config.region_code_start_id :].sum()) < 0.01
        said = [asked, {"role": "assistant", "content": "Yes, the heart is enlarged."}]
        whole = processor.apply_chat_template(said, return_assistant_tokens_mask=True, **options)
        labels = whole["input_ids"].masked_fill(whole.pop("assistant_masks") == 0, -100)
        assert float(model(**whole, labels=labels).loss) < 2.5
    tokenizer = processor.tokenizer
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.eos_token == "<|im_end|>"
    assert "<think>" not in tokenizer.get_vocab()


def test_rows_of_real_pictures_are_as_long_as_words(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    files = sorted(shared_folder("data", "segmentation").glob("*/train/*.png"))[::100][:8]
    pictures = [Image.open(file).convert("RGB") for file in files]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        rows = model.model.project_regions(model.get_region_features(pixels))
    words = model.get_input_embeddings().weight[:49152]
    assert 0.8 < float(length_of(rows) / length_of(words)) < 1.25
