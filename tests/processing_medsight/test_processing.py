"""The processor as a whole: arguments, images against placeholders, saving."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedTokenizerBase
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import ModelOutput

from processing_medsight import CHAT_TEMPLATE, MedSightImageProcessor, MedSightProcessor


IMAGE = "<|image_pad|>"
ROWS = 5


def rows_of(processor: MedSightProcessor, out: dict) -> list[int]:
    """Image rows in each sequence of the output."""
    return [list(ids).count(processor.image_token_id) for ids in out["input_ids"]]


class TestArguments:
    """What transformers' own tests of processors ask: settings of the parts hold, and a call overrides them."""

    def test_settings_of_the_tokenizer_hold(
        self, tokenizer: PreTrainedTokenizerBase, image: Image.Image, tmp_path: Path
    ) -> None:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = type(tokenizer).from_pretrained(tmp_path, max_length=117, padding="max_length")
        processor = MedSightProcessor(MedSightImageProcessor(size=28), tokenizer, image_seq_length=ROWS)
        inputs = processor(text=f"a {IMAGE}", images=image, return_tensors="pt")
        assert inputs["input_ids"].shape == (1, 117)
        inputs = processor(text=f"a {IMAGE}", images=image, return_tensors="pt", max_length=112, padding="max_length")
        assert inputs["input_ids"].shape == (1, 112)

    def test_padding_comes_first_unless_the_tokenizer_says_otherwise(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        tokenizer.save_pretrained(tmp_path)
        for given, expected in (({}, "left"), ({"padding_side": "right"}, "right")):
            tokenizer = type(tokenizer).from_pretrained(tmp_path, **given)
            processor = MedSightProcessor(MedSightImageProcessor(size=28), tokenizer, image_seq_length=ROWS)
            assert processor.tokenizer.padding_side == expected
            masks = processor(text=["a", "a longer one"], padding=True)["attention_mask"]
            assert [mask[0] for mask in masks] == [0 if expected == "left" else 1, 1]

    @pytest.mark.parametrize("how", ["flat", "nested", "chat"])
    def test_a_call_reaches_both_parts(self, how: str, processor: MedSightProcessor, image: Image.Image) -> None:
        images, text = {"rescale_factor": -1.0, "fit": "crop", "size": 20}, {"padding": "max_length", "max_length": 90}
        arguments = {"images_kwargs": images, "text_kwargs": text} if how == "nested" else {**images, **text}
        if how == "chat":
            chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "x"}]}]
            inputs = processor.apply_chat_template(
                [chat, chat], tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=arguments
            )
        else:
            tensors = {"return_tensors": "pt"} if how == "flat" else {"common_kwargs": {"return_tensors": "pt"}}
            inputs = processor(text=[f"a {IMAGE}", f"b {IMAGE}"], images=[image, image], **arguments, **tensors)
        assert inputs["pixel_values"].shape == (2, 3, 20, 20) and inputs["pixel_values"].mean() < 0
        assert inputs["input_ids"].shape == (2, 90)

    def test_inputs_are_those_that_the_model_knows(self, processor: MedSightProcessor, image: Image.Image) -> None:
        inputs = processor(text=IMAGE, images=image)
        assert set(inputs) == set(processor.model_input_names)

    @pytest.mark.parametrize(("tensors", "kind"), [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
    def test_a_chat_has_the_kind_of_output_asked_for(
        self, tensors: str | None, kind: type, processor: MedSightProcessor, image: Image.Image, tmp_path: Path
    ) -> None:
        image.save(tmp_path / "image.png")
        parts = [{"type": "image", "path": str(tmp_path / "image.png")}, {"type": "text", "text": "Segment."}]
        out = processor.apply_chat_template(
            [[{"role": "user", "content": parts}]] * 2, tokenize=True, return_dict=True, return_tensors=tensors
        )
        assert all(isinstance(value, kind) for value in out.values()) and len(out["pixel_values"]) == 2
        assert rows_of(processor, out) == [ROWS, ROWS]


class TestImagesAndPlaceholders:
    """As many images as placeholders, wherever they stand."""

    @pytest.mark.parametrize(
        ("texts", "nesting", "rows"),
        [
            (f"{IMAGE} one", [1], [1]),
            (f"{IMAGE} {IMAGE} two{IMAGE}", [3], [3]),
            ([f"{IMAGE} a", f"b {IMAGE}{IMAGE}"], [1, 2], [1, 2]),
            (["no image", f"{IMAGE}"], [0, 1], [0, 1]),
            ([f"{IMAGE}", "no image"], [1, 0], [1, 0]),
        ],
    )
    @pytest.mark.parametrize("flat", [True, False])
    def test_every_placeholder_becomes_an_image_block(
        self, texts: object, nesting: list, rows: list, flat: bool, processor: MedSightProcessor, image: Image.Image
    ) -> None:
        images = [image] * sum(nesting) if flat else [[image] * n for n in nesting]
        out = processor(text=texts, images=images, padding=True, return_tensors="pt")
        assert rows_of(processor, out) == [ROWS * n for n in rows]
        assert len(out["pixel_values"]) == len(out["original_sizes"]) == sum(rows)

    @pytest.mark.parametrize("images", [None, [], [[]], [[], []]])
    def test_text_alone(self, images: object, processor: MedSightProcessor) -> None:
        text = "a" if images != [[], []] else ["a", "b"]
        out = processor(text=text, images=images, padding=True, return_tensors="pt")
        assert set(out) == {"input_ids", "attention_mask"}

    def test_images_alone(self, processor: MedSightProcessor, image: Image.Image) -> None:
        assert set(processor(images=[image, image], return_tensors="pt")) == {"pixel_values", "original_sizes"}

    @pytest.mark.parametrize(
        ("text", "images", "message"),
        [
            ("no placeholder", 1, r"0 image placeholders .*\[0\].* 1 images"),
            (IMAGE, None, r"1 image placeholders .*no images"),
            ([IMAGE, "x"], 2, r"1 image placeholders .*\[1, 0\].* 2 images"),
            ([IMAGE, IMAGE * 2], [1, 1], r"text by text: \[1, 2\].* \[1, 1\] images"),
            ([IMAGE, IMAGE], [1], r"\[1, 1\].* \[1\] images"),
        ],
    )
    def test_a_mismatch_is_refused_with_its_numbers(
        self, text: object, images: object, message: str, processor: MedSightProcessor, image: Image.Image
    ) -> None:
        given = [image] * images if isinstance(images, int) else images and [[image] * n for n in images]
        with pytest.raises(ValueError, match=message):
            processor(text=text, images=given, padding=True)

    def test_a_cut_image_block_is_refused(self, processor: MedSightProcessor, image: Image.Image) -> None:
        with pytest.raises(ValueError, match="(?i)mismatch"):
            processor(text=IMAGE, images=image, truncation=True, max_length=3)

    def test_videos_and_nothing_are_refused(self, processor: MedSightProcessor, image: Image.Image) -> None:
        with pytest.raises(ValueError, match="images and text only"):
            processor(text="a", videos=[image])
        with pytest.raises(ValueError):
            processor()


def test_image_rows_are_known_beforehand_and_marked(processor: MedSightProcessor, image: Image.Image) -> None:
    numbers = processor._get_num_multimodal_tokens(image_sizes=[(30, 50), (4, 4)])
    assert numbers["num_image_tokens"] == [ROWS, ROWS] and numbers["num_image_patches"] == [1, 1]
    assert processor._get_num_multimodal_tokens().num_image_tokens is None
    out = processor(text=f"a {IMAGE} b", images=image, return_mm_token_type_ids=True)
    assert sum(out["mm_token_type_ids"][0]) == ROWS


def test_text_of_a_generation_keeps_its_codes(processor: MedSightProcessor) -> None:
    ids = processor.tokenizer(["<|im_start|>liver [C0_1].<|im_end|>"] * 2, return_tensors="pt")["input_ids"]
    for outputs in (ids, ModelOutput(sequences=ids)):
        assert processor.post_process_image_text_to_text(outputs) == ["liver [C0_1]."] * 2
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["liver [C0_1]."] * 2


def test_a_processor_that_cannot_work_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        MedSightProcessor(MedSightImageProcessor(), tokenizer, image_seq_length=0)
    bare = type(tokenizer)(vocab={"a": 0}, merges=[])
    with pytest.raises(ValueError, match="image_pad"):
        MedSightProcessor(MedSightImageProcessor(), bare, image_seq_length=5)


class TestSaving:
    """One folder holds all of it."""

    def test_a_folder_holds_every_setting(
        self, processor: MedSightProcessor, tmp_path: Path, image: Image.Image
    ) -> None:
        processor.chat_template += "{# changed #}"
        written = processor.save_pretrained(tmp_path)
        settings = json.loads(Path(written[0]).read_text("utf-8"))
        assert settings["image_seq_length"] == ROWS and settings["group_names"] == processor.group_names
        assert settings["auto_map"]["AutoProcessor"] == "processing_medsight.MedSightProcessor"
        assert settings["image_processor"]["auto_map"] == {
            "AutoImageProcessor": "image_processing_medsight.MedSightImageProcessor"
        }
        assert (tmp_path / "chat_template.jinja").read_text("utf-8") == CHAT_TEMPLATE + "{# changed #}"
        again = AutoProcessor.from_pretrained(tmp_path)  # installed, it needs no trust
        assert type(again) is MedSightProcessor
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is MedSightImageProcessor
        assert again.to_dict() == processor.to_dict() and again.chat_template == processor.chat_template
        assert again.tokenizer.chat_template == processor.chat_template
        one, other = (p(text=f"[C0_1]{IMAGE}", images=image, return_tensors="pt") for p in (processor, again))
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert MedSightProcessor.from_pretrained(tmp_path, image_seq_length=7).image_seq_length == 7

    def test_what_codes_stand_for_travels_with_the_folder(self, processor: MedSightProcessor, tmp_path: Path) -> None:
        processor.save_pretrained(tmp_path / "none")
        assert not (tmp_path / "none" / "region_codes.json").exists()
        assert AutoProcessor.from_pretrained(tmp_path / "none").region_codes is None
        content = {"codes": {"[C0_1]": {"group": "CT", "n": 2, "structures": {"Übergröße": 1.0}}}, "images": 2}
        processor.region_codes = content
        processor.save_pretrained(tmp_path / "some")
        assert (tmp_path / "some" / "region_codes.json").exists()
        again = AutoProcessor.from_pretrained(tmp_path / "some", local_files_only=True)
        assert again.region_codes == content and "region_codes" not in again.to_dict()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "JSONDecodeError"),
            ("{}", "KeyError: 'codes'"),
            ('{"codes": {"[C0_1]": {"n": 1, "structures": {}}}}', r"\[C0_1\]: expected a count"),
            ('{"codes": {"red": {"n": 1, "structures": {"a": 1}}}}', "'red' is not a region code"),
        ],
    )
    def test_a_damaged_description_of_codes_is_named_once_and_left_out(
        self, processor: MedSightProcessor, tmp_path: Path, text: str, message: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        processor.save_pretrained(tmp_path)
        (tmp_path / "region_codes.json").write_text(text)
        assert MedSightProcessor.from_pretrained(tmp_path).region_codes is None
        (said,) = [record.getMessage() for record in caplog.records if "region_codes.json" in record.getMessage()]
        assert re.search(message, said) and str(tmp_path / "region_codes.json") in said
