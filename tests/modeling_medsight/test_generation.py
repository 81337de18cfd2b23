"""generate(): whatever the decoding, each returned sequence comes with the masks of the codes in it."""

from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from configuration_medsight import MedSightConfig
from modeling_medsight import MedSightForConditionalGeneration
from modeling_medsight.outputs_medsight import CACHE_NAME
from tests.tiny_checkpoint import byte_tokenizer

from .configurations import CONFIGURATIONS, make_batch, make_config, make_model, row_of_batch


CLOSE = {"rtol": 1e-3, "atol": 5e-4}
END = 258
# Two images and a cited code, one image, three images in a row with text before: padded on the left.
ROWS = ["ItCtttItt", "Itt", "ttIIItt"]
# Every way to decode; those marked take one row only.
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "chat": {"do_sample": True, "temperature": 0.2, "repetition_penalty": 1.2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 2},
    "no cache": {"use_cache": False},
    "no cache, beams": {"use_cache": False, "num_beams": 2, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": "tiny"},
    "assisted by itself": {"assistant_model": "itself"},
}
ONE_ROW = ("lookup", "assisted", "assisted by itself")


class Scripted(LogitsProcessor):
    """Makes each row say what its script says; `None` leaves the choice to the model."""

    def __init__(self, prompt_length: int, scripts: list[list[int | None]]) -> None:
        self.prompt_length, self.scripts = prompt_length, scripts

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step, scores = input_ids.shape[1] - self.prompt_length, scores.clone()
        for row, script in enumerate(self.scripts):
            if step < len(script) and script[step] is not None:
                scores[row] = -torch.inf
                scores[row, script[step]] = 0
        return scores


class CitesOften(LogitsProcessor):
    """Makes region codes likely after every other token or so."""

    def __init__(self, config: MedSightConfig) -> None:
        self.codes = slice(config.region_code_start_id, config.region_code_start_id + config.num_region_codes)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.codes] += 12.0 * (input_ids[:, -1:] % 2)
        return scores


class EndsSoon(LogitsProcessor):
    """Ends answers of two tokens or more after any token whose id 3 divides, so that rows end at different times."""

    def __init__(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        ends = (input_ids[:, -1] % 3 == 0) & (input_ids.shape[1] > self.prompt_length + 1)
        scores[:, END] = torch.where(ends, 100.0, -torch.inf)
        return scores


@pytest.fixture(scope="module")
def config() -> MedSightConfig:
    return make_config("clip-qwen3")


@pytest.fixture(scope="module")
def model(config: MedSightConfig) -> MedSightForConditionalGeneration:
    return make_model(config)


def generate(model: Any, batch: dict[str, torch.Tensor], seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(**batch, **{"max_new_tokens": 8, **settings})


def say(model: Any, batch: dict[str, torch.Tensor], scripts: list[list[int | None]], **settings: Any) -> Any:
    script = LogitsProcessorList([Scripted(batch["input_ids"].shape[1], scripts)])
    return generate(model, batch, logits_processor=script, max_new_tokens=len(scripts[0]), **settings)


def answers(batch: dict[str, torch.Tensor], sequences: torch.Tensor) -> list[list[int]]:
    """The new tokens of each sequence, up to its end."""
    new = sequences[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in new]


def is_code(config: MedSightConfig, token: int) -> bool:
    return 0 <= token - config.region_code_start_id < config.num_region_codes


def assert_masks_are_those_of_decode_regions(model: Any, batch: dict[str, torch.Tensor], out: Any) -> int:
    """Each sequence alone and without padding, read as a finished text, has the same masks. Returns how many."""
    config, seen = model.config, 0
    copies, rest = divmod(len(out.sequences), len(batch["input_ids"]))
    assert rest == 0
    assert len(out.mask_logits) == len(out.region_codes) == len(out.region_scores) == len(out.sequences)
    for i, answer in enumerate(answers(batch, out.sequences)):
        codes = [token for token in answer if is_code(config, token)]
        assert out.region_codes[i].tolist() == codes
        assert out.mask_logits[i].shape == (len(codes), *config.mask_size)
        assert out.region_scores[i].shape == (len(codes),)
        if not codes:
            continue
        single = row_of_batch(config, batch, i // copies)
        whole = torch.cat((single["input_ids"], torch.tensor([answer])), dim=1)
        decoded = model.decode_regions(input_ids=whole, pixel_values=single["pixel_values"])
        torch.testing.assert_close(out.mask_logits[i], decoded.mask_logits[0][-len(codes) :], **CLOSE)
        torch.testing.assert_close(out.region_scores[i], decoded.region_scores[0][-len(codes) :], **CLOSE)
        seen += len(codes)
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_decoding_gives_the_masks_of_its_text(name: str, mode: str) -> None:
    config = make_config(name)
    model, settings = make_model(config), dict(MODES[mode])
    if settings.get("assistant_model") == "tiny":
        settings["assistant_model"] = make_model(make_config("clip-qwen3-patches-only" if "only" in name else name), 1)
        settings["assistant_model"].generation_config.num_assistant_tokens = 3
    elif settings.get("assistant_model") == "itself":
        settings["assistant_model"] = model
    kind = GenerateBeamDecoderOnlyOutput if "num_beams" in settings else GenerateDecoderOnlyOutput
    settings["logits_processor"] = LogitsProcessorList([CitesOften(config)])
    seen = 0
    for rows in [[row] for row in ROWS] if mode in ONE_ROW else [ROWS]:
        batch = make_batch(config, rows)
        out = generate(model, batch, **settings)
        assert len(out.sequences) == len(rows) * settings.get("num_return_sequences", 1)
        assert isinstance(out, kind)
        seen += assert_masks_are_those_of_decode_regions(model, batch, out)
    assert seen > 3


@pytest.mark.parametrize("mode", ["greedy", "several samples", "several beams", "static cache"])
def test_answers_that_end_at_different_times(model: Any, config: MedSightConfig, mode: str) -> None:
    lengths, seen = set(), 0
    for seed in range(3):
        batch = make_batch(config, ROWS, seed)
        ends = LogitsProcessorList([CitesOften(config), EndsSoon(batch["input_ids"].shape[1])])
        out = generate(model, batch, seed, max_new_tokens=12, logits_processor=ends, **MODES[mode])
        lengths |= {len(answer) for answer in answers(batch, out.sequences)}
        assert out.is_complete.tolist() == [answer[-1] == END for answer in answers(batch, out.sequences)]
        seen += assert_masks_are_those_of_decode_regions(model, batch, out)
    assert len(lengths) > 1 and seen > 0


class StopsAt(StoppingCriteria):
    """A stop of the caller's own, row by row."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


def test_an_answer_is_complete_where_it_came_to_an_end_alone_and_in_a_batch(
    model: Any, config: MedSightConfig
) -> None:
    batch = make_batch(config, ["tIt", "Ittt", "It", "t"])
    scripts = [[5, 7, END, 256, 256], [5, 9, 256, 256, 256], [5, 5, 5, 5, END], [5, 5, 5, 5, 5]]
    stops = StoppingCriteriaList([StopsAt(9)])
    assert say(model, batch, scripts, stopping_criteria=stops).is_complete.tolist() == [True, False, True, False]
    for row, expected in enumerate([True, False, True, False]):
        alone = say(model, row_of_batch(config, batch, row), [scripts[row]], stopping_criteria=stops)
        assert alone.is_complete.tolist() == [expected]


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_ragged_numbers_of_codes_and_none_at_all(model: Any, config: MedSightConfig, cache: dict[str, Any]) -> None:
    first, batch = config.region_code_start_id, make_batch(config, ["tIt", "Ittt", "It"])
    scripts = [[5, first, first, 6, first + 7], [1, 2, 3, 4, 5], [first + 3, END, 256, 256, 256]]
    out = say(model, batch, scripts, **cache)
    assert [codes.tolist() for codes in out.region_codes] == [[first, first, first + 7], [], [first + 3]]
    assert [masks.shape[0] for masks in out.mask_logits] == [3, 0, 1]
    assert_masks_are_those_of_decode_regions(model, batch, out)
    # The same code twice: two regions, two masks.
    assert not torch.allclose(out.mask_logits[0][0], out.mask_logits[0][1])


@pytest.mark.parametrize("mode", ["greedy", "static cache", "no cache", "beams"])
@pytest.mark.parametrize("length", [1, 2])
def test_a_code_as_the_very_last_token_has_its_mask(model: Any, config: Any, mode: str, length: int) -> None:
    code, batch = config.region_code_start_id + 5, make_batch(config, ["tIttt", "It"])
    beams = MODES[mode].get("num_beams", 1)
    out = say(model, batch, [[7] * (length - 1) + [code]] * 2 * beams, **MODES[mode])
    assert [codes.tolist() for codes in out.region_codes] == [[code], [code]]
    assert_masks_are_those_of_decode_regions(model, batch, out)


def test_an_answer_without_codes_has_no_masks(model: Any, config: MedSightConfig) -> None:
    batch = make_batch(config, ["tIt", "It"])
    out = say(model, batch, [[5, 6, 7]] * 2)
    for masks, codes, scores in zip(out.mask_logits, out.region_codes, out.region_scores, strict=True):
        assert masks.shape == (0, *config.mask_size)
        assert codes.shape == scores.shape == (0,) and codes.dtype == torch.long


def test_the_score_is_the_probability_of_code_and_mask(model: Any, config: MedSightConfig) -> None:
    code, batch = config.region_code_start_id + 2, make_batch(config, ["tItt"])
    out = say(model, batch, [[9, code, code]])
    logits = model(input_ids=out.sequences, pixel_values=batch["pixel_values"]).logits[0]
    for i, position in enumerate((-2, -1)):
        likelihood = logits[position - 1].softmax(-1)[code]
        inside = [p for p in out.mask_logits[0][i].sigmoid().flatten().tolist() if p > 0.5]
        expected = likelihood.item() * (sum(inside) / len(inside) if inside else 0)
        assert out.region_scores[0][i].item() == pytest.approx(expected, rel=1e-3)


def test_text_alone_can_neither_cite_nor_decode_codes(model: Any, config: MedSightConfig) -> None:
    out = generate(model, make_batch(config, ["ttt", "t"]))
    assert [len(codes) for codes in out.region_codes] == [0, 0]
    assert not (
        (out.sequences >= config.region_code_start_id) & (out.sequences < config.region_code_start_id + 12)
    ).any()
    batch = make_batch(config, ["tItt", "ttt"])
    for seed in range(4):
        mixed = generate(model, batch, seed, do_sample=True, max_new_tokens=12)
        assert len(mixed.region_codes[1]) == 0
    assert len(mixed.region_codes[0]) > 0
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


def test_without_a_dictionary_there_are_just_the_sequences(model: Any, config: MedSightConfig) -> None:
    batch = make_batch(config, ROWS)
    for settings in ({}, {"num_beams": 2}):
        plain = generate(model, batch, return_dict_in_generate=False, **settings)
        assert type(plain) is torch.Tensor
        assert torch.equal(plain, generate(model, batch, **settings).sequences)


def test_all_that_transformers_own_output_has_is_there(model: Any, config: MedSightConfig) -> None:
    wanted = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    for settings, fields in (
        ({}, ("sequences", "scores", "logits", "hidden_states", CACHE_NAME)),
        ({"num_beams": 2}, ("sequences", "sequences_scores", "beam_indices", "scores", CACHE_NAME)),
    ):
        out = generate(model, make_batch(config, ["tIt"]), **wanted, **settings)
        for field in (*fields, "mask_logits", "region_codes", "region_scores"):
            assert getattr(out, field) is not None and out[field] is getattr(out, field)


def test_a_generation_config_object_is_followed(model: Any, config: MedSightConfig) -> None:
    batch = make_batch(config, ROWS)
    setting = GenerationConfig(
        max_new_tokens=5, num_beams=2, return_dict_in_generate=True, eos_token_id=END, pad_token_id=256
    )
    out = model.generate(**batch, generation_config=setting)
    assert torch.equal(out.sequences, generate(model, batch, max_new_tokens=5, num_beams=2).sequences)
    assert_masks_are_those_of_decode_regions(model, batch, out)
    by_position = model.generate(batch["input_ids"], setting, pixel_values=batch["pixel_values"])
    assert torch.equal(out.sequences, by_position.sequences)


def test_padding_is_found_where_no_attention_mask_is_given(model: Any, config: MedSightConfig) -> None:
    batch = make_batch(config, ["tItttt", "It"])
    batch["input_ids"][batch["attention_mask"] == 1] = batch["input_ids"][batch["attention_mask"] == 1]
    out = generate(model, batch)
    without = generate(model, {key: value for key, value in batch.items() if key != "attention_mask"})
    assert torch.equal(out.sequences, without.sequences)
    assert_masks_are_those_of_decode_regions(model, batch, without)


def test_padding_at_the_beginning_of_a_text_is_not_decoded(model: Any, config: MedSightConfig) -> None:
    batch, code = make_batch(config, ["tItttt", "It"]), config.region_code_start_id
    out = say(model, batch, [[1, code, 2], [3, code + 1, END]])
    decoded = model.decode_regions(out.sequences, batch["pixel_values"])
    for one, other in zip(decoded.mask_logits, out.mask_logits, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("rows", [["ItCt"], ["tIt", "ItC"]])
@pytest.mark.parametrize("second", ["ttt", "tItt", "IItt"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}])
def test_a_second_turn_goes_on_from_the_cache_of_the_first(
    model: Any, config: MedSightConfig, rows: list[str], second: str, settings: dict[str, Any]
) -> None:
    batch = make_batch(config, rows)
    one = generate(model, batch, max_new_tokens=4, min_new_tokens=4)
    more = make_batch(config, [second] * len(rows), seed=4)
    images = second.count("I")
    pixels = []
    for row in range(len(rows)):
        pixels += [batch["pixel_values"][row : row + 1]]
        if images:
            pixels += [more["pixel_values"][row * images : (row + 1) * images]]
    conversation = {
        "input_ids": torch.cat((one.sequences, more["input_ids"]), dim=1),
        "attention_mask": torch.cat(
            (batch["attention_mask"], torch.ones(len(rows), 4, dtype=torch.long), more["attention_mask"]), dim=1
        ),
        "pixel_values": torch.cat(pixels),
    }
    afresh = generate(model, conversation, **settings)
    assert assert_masks_are_those_of_decode_regions(model, conversation, afresh) > 0
    if settings:
        return
    cached = generate(model, conversation, past_key_values=one.past_key_values)
    assert torch.equal(afresh.sequences, cached.sequences)
    assert_masks_are_those_of_decode_regions(model, conversation, cached)


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
    for i, codes in enumerate(out.region_codes):
        used = {(code - config.region_code_start_id) // config.codes_per_group for code in codes.tolist()}
        assert used <= wanted[i // copies]
    assert assert_masks_are_those_of_decode_regions(model, batch, out) > 0


def test_the_predicted_group_is_that_of_each_rows_last_image(config: MedSightConfig) -> None:
    model, batch = make_model(config), make_batch(config, ["tIItt", "Itt"])
    batch["pixel_values"] = batch["pixel_values"].mul(torch.tensor([0.0, 0.5, 1.0])[:, None, None, None])
    with torch.no_grad():
        model.model.group_classifier.weight.zero_()
    groups = iter([0, 2, 1])
    logits = torch.stack([torch.eye(3)[next(groups)] for _ in range(3)])
    model.model.group_classifier.register_forward_hook(lambda *_: logits)
    out = generate(model, batch, allowed_groups="predicted", max_new_tokens=16)
    used = [{(c - config.region_code_start_id) // 4 for c in codes.tolist()} for codes in out.region_codes]
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

    assert sum(len(codes) for codes in out_of().region_codes) == 0
    out = out_of(force_region=True)
    assert all(len(codes) >= 1 for codes in out.region_codes)
    assert_masks_are_those_of_decode_regions(model, batch, out)
    both = out_of(force_region=True, allowed_groups=["group 2"])
    first = config.region_code_start_id + 2 * config.codes_per_group
    assert all(len(codes) >= 1 and codes.min() >= first for codes in both.region_codes)


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
    assert all(len(codes) >= 1 for codes in expected.region_codes)
    assert torch.equal(given.sequences, expected.sequences)
    for one, other in zip(given.mask_logits, expected.mask_logits, strict=True):
        assert torch.equal(one, other)


def test_a_code_after_rejected_candidates_is_scored_by_its_own_state(model: Any, config: MedSightConfig) -> None:
    batch = make_batch(config, ["ttIttt"])
    batch["input_ids"][0, -2:] = batch["input_ids"][0, :2]  # something to look up, which the script rejects
    scripts = [[config.region_code_start_id + 1, 5, 7, END]]
    plain, lookup = say(model, batch, scripts), say(model, batch, scripts, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.sequences, lookup.sequences) and len(plain.region_codes[0]) == 1
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
        ({**good, "pixel_values": None}, "placeholders but no images"),
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


class Collector(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.given += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"cache_implementation": "static"}])
def test_streaming_gives_the_text_as_it_comes_and_the_masks_at_the_end(
    model: Any, config: MedSightConfig, settings: dict[str, Any]
) -> None:
    batch, streamer = make_batch(config, ["tItt"]), Collector()
    out = generate(model, batch, streamer=streamer, **settings)
    assert streamer.given == out.sequences[0].tolist() and streamer.ended
    assert assert_masks_are_those_of_decode_regions(model, batch, out) > 0


def test_a_text_streamer_prints_the_answer(model: Any, config: MedSightConfig, capsys: Any) -> None:
    batch, tokenizer = make_batch(config, ["tItt"]), byte_tokenizer()
    tokenizer.add_tokens([f"[C{k}_{m}]" for k in range(3) for m in range(4)])
    scripts = [[*tokenizer("Liver ")["input_ids"], config.region_code_start_id + 6, END]]
    say(model, batch, scripts, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out == "Liver [C1_2]\n"


def test_the_image_is_encoded_once(model: Any, config: MedSightConfig) -> None:
    seen: list[int] = []
    hook = model.model.vision_tower.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    for settings in ({}, {"num_beams": 3}, {"use_cache": False}, {"num_return_sequences": 2, "do_sample": True}):
        seen.clear()
        out = generate(model, make_batch(config, ROWS), **settings)
        assert sum(len(codes) for codes in out.region_codes) > 0
        assert seen == [6]
    hook.remove()


def test_an_assistant_looks_once_and_draws_no_masks(model: Any, config: MedSightConfig) -> None:
    assistant, looks = make_model(config, seed=1), []
    assistant.model.region_perceiver.register_forward_hook(lambda *_: looks.append(1))
    code = config.region_code_start_id
    out = say(model, make_batch(config, ["ttIt"]), [[1, code, 2, code, 3, code, 4, 5]], assistant_model=assistant)
    assert out.region_codes[0].tolist() == [code] * 3
    assert looks == [1]


@pytest.mark.parametrize(
    ("settings", "last_is_code", "passes"),
    [
        ({}, False, 0),
        ({"cache_implementation": "static"}, False, 0),
        ({"do_sample": True, "num_return_sequences": 2}, False, 0),
        ({"do_sample": True}, True, 1),
        ({"num_beams": 2}, False, 1),
    ],
)
def test_masks_cost_at_most_one_forward_over_what_was_generated(
    model: Any, config: MedSightConfig, settings: dict[str, Any], last_is_code: bool, passes: int
) -> None:
    """None where each step's state is that of one token of each row, and no step was missing for the last."""
    read: list[int] = []

    def note(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        read.append(named["inputs_embeds"].shape[1])

    batch = make_batch(config, ["tttItt"])
    code = config.region_code_start_id
    script = [1, code, 2, code, code if last_is_code else 3]
    copies = settings.get("num_beams", settings.get("num_return_sequences", 1))
    hook = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    plain = say(model, batch, [script] * copies, **settings, return_dict_in_generate=False)
    without, read[:] = list(read), []
    out = say(model, batch, [script] * copies, **settings)
    hook.remove()
    torch.testing.assert_close(out.sequences, plain)
    assert read[: len(without)] == without
    assert len(read) == len(without) + passes and all(length <= 5 + 1 for length in read[len(without) :])
    assert_masks_are_those_of_decode_regions(model, batch, out)


def test_the_given_cache_is_left_as_it_was_generated(model: Any, config: MedSightConfig) -> None:
    batch = make_batch(config, ["tttItt"])
    code = config.region_code_start_id
    with_codes = say(model, batch, [[1, code, 2, code, 3]])
    assert with_codes.past_key_values.get_seq_length() == with_codes.sequences.shape[1] - 1
    logits = model(input_ids=with_codes.sequences, pixel_values=batch["pixel_values"], use_cache=True).past_key_values
    for layer, other in zip(with_codes.past_key_values.layers, logits.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys[:, :, :-1], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generation_in_half_precision(config: MedSightConfig, dtype: torch.dtype) -> None:
    model, batch = make_model(config).to(dtype), make_batch(config, ROWS)
    out = generate(model, {**batch, "pixel_values": batch["pixel_values"].to(dtype)}, num_beams=2)
    assert sum(len(codes) for codes in out.region_codes) > 0
    for masks, scores in zip(out.mask_logits, out.region_scores, strict=True):
        assert masks.dtype == dtype and masks.isfinite().all()
        assert scores.dtype == torch.float32 and (scores >= 0).all() and (scores <= 1).all()


def test_generation_in_training_mode_works_too(config: MedSightConfig) -> None:
    batch, model = make_batch(config, ROWS), make_model(config)
    expected = generate(model, batch)
    given = generate(model.train(), batch)
    assert torch.equal(given.sequences, expected.sequences)


def test_what_decode_regions_reads_is_the_text_not_its_origin(model: Any, config: MedSightConfig) -> None:
    """An edited answer: one more code is one more mask, and the codes before it keep their states."""
    batch = make_batch(config, ["tItt"])
    code = config.region_code_start_id
    out = say(model, batch, [[1, code, 2]])
    edited = torch.cat((out.sequences, torch.tensor([[code + 1, 4]])), dim=1)
    decoded = model.decode_regions(input_ids=edited, pixel_values=batch["pixel_values"])
    assert decoded.region_codes[0].tolist() == [code, code + 1]
    assert decoded.mask_logits[0].shape == (2, *config.mask_size)
    empty = model.decode_regions(**make_batch(config, ["tI", "t"]))
    assert [masks.shape for masks in empty.mask_logits] == [(0, *config.mask_size)] * 2
