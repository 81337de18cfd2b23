"""generate(): which codes an answer may use, must use, and never uses; and settings that cannot give right masks."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from configuration_medsight import MedSightConfig

from .configurations import make_batch, make_model
from .generating import CLOSE, END, MODES, assert_masks_are_those_of_decode_regions, generate, say


def test_text_alone_can_neither_cite_nor_decode_codes(model: Any, config: MedSightConfig) -> None:
    out = generate(model, make_batch(config, ["ttt", "t"]))
    assert [len(codes) for codes in out.region_code_ids] == [0, 0]
    assert not (
        (out.sequences >= config.region_code_start_id) & (out.sequences < config.region_code_start_id + 12)
    ).any()
    batch = make_batch(config, ["tItt", "ttt"])
    for seed in range(4):
        mixed = generate(model, batch, seed, do_sample=True, max_new_tokens=12)
        assert len(mixed.region_code_ids[1]) == 0
    assert len(mixed.region_code_ids[0]) > 0
    assert_masks_are_those_of_decode_regions(model, batch, mixed)


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
    for one, other in zip(given.mask_logits, expected.mask_logits, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("where", ["given", "the model's own"])
def test_rules_for_codes_may_stand_in_a_generation_config(
    model: Any, config: MedSightConfig, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(config, ["tItt", "It"])
    reluctant = LogitsProcessorList([NeverCites(config, ends=True)])
    rules = {"allowed_groups": ["group 2"], "force_region": True}
    ends = {"eos_token_id": END, "pad_token_id": 256, "max_new_tokens": 6, "return_dict_in_generate": True}
    expected = model.generate(**batch, logits_processor=reluctant, **rules, **ends)
    setting = GenerationConfig(**ends, **rules)
    if where == "given":
        out = model.generate(**batch, logits_processor=reluctant, generation_config=setting)
    else:
        monkeypatch.setattr(model, "generation_config", setting)
        out = model.generate(**batch, logits_processor=reluctant)
        none = model.generate(**batch, logits_processor=reluctant, force_region=False)
        assert [len(codes) for codes in none.region_code_ids] == [0, 0]
    assert torch.equal(out.sequences, expected.sequences)
    first = config.region_code_start_id + 2 * config.codes_per_group
    assert all(len(codes) >= 1 and codes.min() >= first for codes in out.region_code_ids)


def test_a_code_after_rejected_candidates_is_scored_by_its_own_state(model: Any, config: MedSightConfig) -> None:
    batch = make_batch(config, ["ttIttt"])
    batch["input_ids"][0, -2:] = batch["input_ids"][0, :2]  # something to look up, which the script rejects
    scripts = [[config.region_code_start_id + 1, 5, 7, END]]
    plain, lookup = say(model, batch, scripts), say(model, batch, scripts, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.sequences, lookup.sequences) and len(plain.region_code_ids[0]) == 1
    torch.testing.assert_close(lookup.region_scores[0], plain.region_scores[0], **CLOSE)
    torch.testing.assert_close(lookup.mask_logits[0], plain.mask_logits[0], **CLOSE)


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


def refusals(config: MedSightConfig) -> list[tuple[dict[str, Any], str]]:
    good = make_batch(config, ["tItt", "It"])
    ids, pixels = good["input_ids"], good["pixel_values"]
    words = make_batch(config, ["tt"])
    return [
        ({**good, "pixel_values": pixels[:1]}, "1 images need 21 image placeholders .* the prompt has 42"),
        ({**good, "pixel_values": torch.cat([pixels] * 2)}, "4 images need 84"),
        ({**good, "pixel_values": None}, "0 images need 0 image placeholders .* the prompt has 42"),
        ({**words, "pixel_values": pixels[:1]}, "1 images need 21 image placeholders .* the prompt has 0"),
        ({"pixel_values": pixels}, "images need input_ids"),
        ({**good, "pixel_values": None, "image_embeds": torch.zeros(2, 21, 32)}, "image_embeds: no mask can be drawn"),
        ({"inputs_embeds": torch.zeros(*ids.shape, 32), "pixel_values": pixels}, "images need input_ids"),
        ({**good, "prefill_chunk_size": 8}, "prefill_chunk_size=8 cannot be used with images"),
        ({**good, "token_healing": True}, "token_healing=True cannot be used with images"),
        ({**good, "allowed_groups": ["group 9"]}, "unknown .'group 9'.*group 0"),
        ({**good, "allowed_groups": [0, 3]}, r"unknown \[3\]"),
        ({**good, "allowed_groups": []}, "allowed_groups"),
        ({**words, "allowed_groups": [0]}, "needs an image"),
        ({**words, "force_region": True}, "force_region=True needs an image in every row"),
        ({**make_batch(config, ["tI", "tt"]), "force_region": True}, "force_region=True needs an image in every row"),
    ]


@pytest.mark.parametrize("case", range(15))
def test_what_cannot_give_right_masks_is_refused(model: Any, config: MedSightConfig, case: int) -> None:
    inputs, message = refusals(config)[case]
    with pytest.raises(ValueError, match=message):
        generate(model, inputs)
    assert len(refusals(config)) == 15


def test_only_the_new_turn_on_an_old_cache_is_refused(model: Any, config: MedSightConfig) -> None:
    batch = make_batch(config, ["ItCt"])
    one = generate(model, batch, max_new_tokens=4, min_new_tokens=4)
    turn = make_batch(config, ["tItt"], seed=3)
    turn["attention_mask"] = torch.ones(1, one.sequences.shape[1] + turn["input_ids"].shape[1], dtype=torch.long)
    with pytest.raises(ValueError, match="whole conversation"):
        generate(model, turn, past_key_values=one.past_key_values)
