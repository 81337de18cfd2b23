"""generate(): which codes an answer may use, must use, and never uses; and settings that cannot give right masks."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from configuration_medsight import MedSightConfig
from modeling_medsight.region_codes_in_text_medsight import is_region_code

from .configurations import make_batch, make_config, make_model
from .generating import END, MODES, assert_masks_are_those_of_decode_regions, generate, say


@pytest.fixture(scope="module")
def config() -> MedSightConfig:
    return make_config("clip-qwen3")


def test_text_alone_can_neither_cite_nor_decode_codes(model: Any, config: MedSightConfig) -> None:
    out = generate(model, make_batch(config, ["ttt", "t"]))
    assert [len(codes) for codes in out.region_code_ids] == [0, 0]
    assert not is_region_code(out.sequences, config).any()
    batch = make_batch(config, ["tItt", "ttt", "tCt", "tCtIt"])  # what was cited before any image is no region
    cited = [0, 0, 0, 0]
    for seed in range(4):
        mixed = generate(model, batch, seed, do_sample=True, max_new_tokens=12)
        cited = [n + len(codes) for n, codes in zip(cited, mixed.region_code_ids, strict=True)]
        assert_masks_are_those_of_decode_regions(model, batch, mixed)
    assert [n > 0 for n in cited] == [True, False, False, True]


def test_an_image_placeholder_is_never_written(config: MedSightConfig) -> None:
    model, batch = make_model(config), make_batch(config, ["tItt", "It"])
    with torch.no_grad():
        model.lm_head.weight[config.image_token_id] = 3 * model.lm_head.weight[:256].abs().amax(0)
        model.lm_head.weight[config.image_token_id] *= model.lm_head.weight[5].sign()
    for settings in ({}, {"do_sample": True, "num_return_sequences": 3}, {"suppress_tokens": [5]}):
        out = generate(model, batch, max_new_tokens=12, **settings)
        new = out.sequences[:, batch["input_ids"].shape[1] :]
        assert not (new == config.image_token_id).any()
        if "suppress_tokens" in settings:
            assert not (new == 5).any()


@pytest.mark.parametrize("mode", ["greedy", "several samples", "several beams", "static cache"])
@pytest.mark.parametrize("allowed", [[1], ["group 1"], "group 1", [0, "group 2"], "predicted"])
def test_codes_keep_to_the_allowed_groups(model: Any, config: MedSightConfig, mode: str, allowed: Any) -> None:
    batch = make_batch(config, ["tItt", "Itt", "tIItt"])
    out = generate(model, batch, allowed_groups=allowed, max_new_tokens=12, **MODES[mode])
    copies = len(out.sequences) // 3
    if allowed == "predicted":
        groups = model.get_region_features(batch["pixel_values"]).group_logits.argmax(-1)[[0, 1, 3]]
        wanted = [{int(group)} for group in groups]
    else:
        wanted = [{0, 2} if allowed == [0, "group 2"] else {1}] * 3
    for i, codes in enumerate(out.region_code_ids):
        used = {(code - config.region_code_start_id) // config.codes_per_group for code in codes.tolist()}
        assert used <= wanted[i // copies]
    assert assert_masks_are_those_of_decode_regions(model, batch, out) > 0


def test_the_predicted_group_is_that_of_each_rows_last_image(config: MedSightConfig) -> None:
    model, batch = make_model(config), make_batch(config, ["tIItt", "Itt"])
    batch["pixel_values"] = batch["pixel_values"].mul(torch.tensor([0.0, 0.5, 1.0])[:, None, None, None])
    of_all, of_last = torch.eye(3)[[0, 2, 1]], torch.eye(3)[[2, 1]]
    model.model.group_classifier.register_forward_hook(lambda _, seen, __: of_all if len(seen[0]) == 3 else of_last)
    out = generate(model, batch, allowed_groups="predicted", max_new_tokens=16)
    used = [{(c - config.region_code_start_id) // 4 for c in codes.tolist()} for codes in out.region_code_ids]
    assert used == [{2}, {1}]


class NeverCites(LogitsProcessor):
    """A model that would rather end, or say anything else, than cite a code."""

    def __init__(self, config: MedSightConfig, ends: bool) -> None:
        self.codes = slice(config.region_code_start_id, config.region_code_start_id + config.num_region_codes)
        self.ends = ends

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.codes] -= 50
        scores[:, END] += 8 if self.ends else -50
        return scores


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("length", [{"max_new_tokens": 6}, {"max_length": 60}, {"max_new_tokens": 1}, {}])
@pytest.mark.parametrize("mode", ["greedy", "sampling", "several samples", "beams", "several beams", "static cache"])
def test_an_answer_forced_to_cite_a_region_does(
    model: Any, config: MedSightConfig, mode: str, length: dict[str, int], ends: bool
) -> None:
    batch = make_batch(config, ["tItt", "It", "tIItt"])

    def out_of(**settings: Any) -> Any:
        torch.manual_seed(0)
        reluctant = LogitsProcessorList([NeverCites(config, ends)])
        return model.generate(**batch, logits_processor=reluctant, **length, **MODES[mode], **settings)

    assert sum(len(codes) for codes in out_of().region_code_ids) == 0
    out = out_of(force_region=True)
    assert all(len(codes) >= 1 for codes in out.region_code_ids)
    assert_masks_are_those_of_decode_regions(model, batch, out)
    both = out_of(force_region=True, allowed_groups=["group 2"])
    first = config.region_code_start_id + 2 * config.codes_per_group
    assert all(len(codes) >= 1 and codes.min() >= first for codes in both.region_code_ids)


def test_a_given_configuration_leaves_open_what_the_models_own_says(
    model: Any, config: MedSightConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End and padding among it: without these no answer could be forced, and padding would be read."""
    own = GenerationConfig(eos_token_id=END, pad_token_id=256, max_new_tokens=6, return_dict_in_generate=True)
    monkeypatch.setattr(model, "generation_config", own)
    batch = make_batch(config, ["tItt", "It"])
    del batch["attention_mask"]
    reluctant = LogitsProcessorList([NeverCites(config, ends=True)])
    expected = model.generate(**batch, logits_processor=reluctant, force_region=True)
    given = model.generate(
        **batch, logits_processor=reluctant, force_region=True, generation_config=GenerationConfig(do_sample=False)
    )
    assert all(len(codes) >= 1 for codes in expected.region_code_ids)
    assert torch.equal(given.sequences, expected.sequences)
    torch.testing.assert_close(given.mask_logits, expected.mask_logits, rtol=0, atol=0)


def test_rules_for_codes_may_stand_in_a_generation_config(
    model: Any, config: MedSightConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(config, ["tItt", "It"])
    asked = {**batch, "logits_processor": LogitsProcessorList([NeverCites(config, ends=True)])}
    rules = {"allowed_groups": ["group 2"], "force_region": True}
    ends = {"eos_token_id": END, "pad_token_id": 256, "max_new_tokens": 6, "return_dict_in_generate": True}
    expected = model.generate(**asked, **rules, **ends)
    first = config.region_code_start_id + 2 * config.codes_per_group
    assert all(len(codes) >= 1 and codes.min() >= first for codes in expected.region_code_ids)
    settings = GenerationConfig(**ends, **rules)
    assert torch.equal(model.generate(**asked, generation_config=settings).sequences, expected.sequences)
    monkeypatch.setattr(model, "generation_config", settings)
    assert torch.equal(model.generate(**asked).sequences, expected.sequences)
    assert not any(len(codes) for codes in model.generate(**asked, force_region=False).region_code_ids)


def test_forcing_changes_nothing_in_an_answer_that_cites_anyway(model: Any, config: MedSightConfig) -> None:
    batch = make_batch(config, ["tItt"])
    code = config.region_code_start_id
    scripts = [[3, code, 4, 5, END]]
    assert torch.equal(say(model, batch, scripts).sequences, say(model, batch, scripts, force_region=True).sequences)


@pytest.mark.parametrize("setting", ["forced_eos_token_id", "suppress_tokens"])
def test_a_code_that_something_else_rules_out_cannot_be_forced(
    model: Any, config: MedSightConfig, setting: str
) -> None:
    codes = range(config.region_code_start_id, config.region_code_start_id + config.num_region_codes)
    ruled_out = {setting: END if setting == "forced_eos_token_id" else list(codes)}
    batch, reluctant = make_batch(config, ["tIt"]), LogitsProcessorList([NeverCites(config, ends=False)])
    with pytest.raises(ValueError, match="rules out every region code"):
        generate(model, batch, logits_processor=reluctant, force_region=True, **ruled_out)


def test_what_cannot_give_right_masks_is_refused(model: Any, config: MedSightConfig) -> None:
    good = make_batch(config, ["tItt", "It"])
    ids, pixels = good["input_ids"], good["pixel_values"]
    words = make_batch(config, ["tt"])
    right_padded = {name: good[name].flip(1) for name in ("input_ids", "attention_mask")}
    uneven = ids.clone()
    uneven[0, -1], uneven[1, -2] = config.image_token_id, 5
    longer = torch.ones(2, ids.shape[1] + 9, dtype=torch.long)  # as if the prompt were only the new turn on a cache
    for inputs, message in (
        ({**good, **right_padded}, "row 1 of the prompt is padded on the right"),
        ({**good, **right_padded, "attention_mask": None}, "row 1 of the prompt is padded on the right"),
        ({**good, "attention_mask": longer}, "whole conversation"),
        ({**good, "pixel_values": pixels[:1]}, "1 images need 21 image placeholders, 21 .* have .21, 21"),
        ({**good, "pixel_values": torch.cat([pixels] * 2)}, "4 images need 84"),
        ({**good, "pixel_values": None}, "placeholders but no images were given"),
        ({**words, "pixel_values": pixels[:1]}, "1 images need 21 image placeholders, 21 .* have .0"),
        ({"pixel_values": pixels}, "images need input_ids"),
        ({**good, "input_ids": uneven}, r"2 images need 42 .* the rows of the prompt have \[22, 20\]"),
        ({**good, "assistant_early_exit": 1}, "assistant_early_exit: .* give an assistant_model"),
        ({**good, "mm_encoder_outputs": {"image": None}}, "mm_encoder_outputs: .* give it the pixel_values"),
        ({"inputs_embeds": torch.zeros(*ids.shape, 32), "pixel_values": pixels}, "images need input_ids"),
        ({**good, "prefill_chunk_size": 8}, "prefill_chunk_size=8 cannot be used with images"),
        ({**good, "token_healing": True}, "token_healing=True cannot be used with images"),
        ({**good, "allowed_groups": ["group 9"]}, "unknown .'group 9'.*group 0"),
        ({**good, "allowed_groups": [0, 3]}, r"unknown \[3\]"),
        *(
            ({**good, "allowed_groups": wrong}, "allowed_groups=.*the groups are")
            for wrong in (True, [True], [], 99, [1.5])
        ),
        ({**words, "allowed_groups": [0]}, "needs an image"),
        ({**words, "force_region": True}, "force_region=True needs an image in every row"),
        ({**make_batch(config, ["tI", "tt"]), "force_region": True}, "force_region=True needs an image in every row"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, inputs)


@pytest.mark.parametrize("group", [1, np.int64(1), [np.int64(1)], np.array([1, 1]), torch.tensor(1)])
def test_groups_are_numbers_of_any_kind(model: Any, config: MedSightConfig, group: Any) -> None:
    batch = make_batch(config, ["tItt"])
    expected = generate(model, batch, force_region=True, allowed_groups=[config.group_names[1]])
    assert torch.equal(generate(model, batch, force_region=True, allowed_groups=group).sequences, expected.sequences)
