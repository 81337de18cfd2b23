"""generate(): whatever the decoding, each returned sequence comes with the masks of the codes in it."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from configuration_medsight import MedSightConfig
from modeling_medsight import MedSightForConditionalGeneration, generation_medsight, pretrained_medsight
from modeling_medsight.outputs_medsight import CACHE_NAME
from tests.tiny_checkpoint import byte_tokenizer

from .configurations import CONFIGURATIONS, make_batch, make_config, make_model, row_of_batch
from .generating import (
    CLOSE,
    END,
    MODES,
    ONE_ROW,
    ROWS,
    WAYS,
    CitesOften,
    EndsSoon,
    answers,
    assert_masks_are_those_of_decode_regions,
    generate,
    say,
)


@pytest.fixture(scope="module")
def config() -> MedSightConfig:
    return make_config("clip-qwen3")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_decoding_gives_the_masks_of_its_text(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, taken, looked = make_config(name), [], []
    model, settings = make_model(config), dict(MODES[mode])
    if settings.get("assistant_model") == "tiny":
        settings["assistant_model"] = make_model(make_config("clip-qwen3-patches-only" if "only" in name else name), 1)
        settings["assistant_model"].generation_config.num_assistant_tokens = 3
    elif settings.get("assistant_model") == "itself":
        settings["assistant_model"] = model
    kind = GenerateBeamDecoderOnlyOutput if "num_beams" in settings else GenerateDecoderOnlyOutput
    cut_cache, seen = generation_medsight._beginning_of_cache, 0

    def note_cut(*args: Any, **kwargs: Any) -> Any:
        cache = cut_cache(*args, **kwargs)
        taken.append("whole text" if cache is None else "cache")
        return cache

    model.model.vision_tower.register_forward_hook(lambda _, inputs, __: looked.append(len(inputs[0])))
    monkeypatch.setattr(generation_medsight, "_beginning_of_cache", note_cut)
    for rows in [[row] for row in ROWS] if mode in ONE_ROW else [ROWS]:
        batch = make_batch(config, rows)
        often = LogitsProcessorList([CitesOften(config, last_column=batch["input_ids"].shape[1] + 7)])
        taken.clear(), looked.clear()
        out = generate(model, batch, **settings, logits_processor=often)
        cites = any(len(codes) for codes in out.region_code_ids)
        assert taken == ([WAYS[mode]] if cites and WAYS[mode] != "steps" else [])
        assert looked == [len(batch["pixel_values"])] or "assistant_model" in settings
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


def test_an_answer_is_complete_where_it_came_to_an_end_alone_and_in_a_batch(
    model: Any, config: MedSightConfig
) -> None:
    batch = make_batch(config, ["tIt", "Ittt", "It", "t"])
    scripts = [[5, 7, END, 256, 256], [5, 9, 256, 256, 256], [5, 5, 5, 5, END], [5, 5, 5, 5, 5]]
    stops = StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] == 9])
    assert say(model, batch, scripts, stopping_criteria=stops).is_complete.tolist() == [True, False, True, False]
    for row, expected in enumerate([True, False, True, False]):
        alone = say(model, row_of_batch(config, batch, row), [scripts[row]], stopping_criteria=stops)
        assert alone.is_complete.tolist() == [expected]


def test_where_the_pad_token_also_ends_text(model: Any, config: MedSightConfig) -> None:
    """As Qwen3's does: a prompt is not taken for padded, and a row that ended before others is complete."""
    batch = make_batch(config, ["tItt", "Ittt"])
    batch["input_ids"][0, 0] = END
    settings = {"pad_token_id": END, "eos_token_id": END, "output_logits": True}
    scripts = [[5, END, END, END], [5, 6, 7, 8]]
    out = say(model, batch, scripts, **settings)
    assert out.is_complete.tolist() == [True, False]
    del batch["attention_mask"]
    unmasked = say(model, batch, scripts, **settings)
    torch.testing.assert_close(unmasked.logits, out.logits)


@pytest.mark.parametrize("mode", ["greedy", "static cache", "no cache", "beams"])
def test_ragged_numbers_of_codes_none_at_all_and_one_as_the_very_last_token(
    model: Any, config: MedSightConfig, mode: str
) -> None:
    first, batch = config.region_code_start_id, make_batch(config, ["tIt", "Ittt", "It"])
    scripts = [[5, first, first, 6, first + 7], [1, 2, 3, 4, 5], [first + 3, END, 256, 256, 256]]
    beams = MODES[mode].get("num_beams", 1)
    out = say(model, batch, [script for script in scripts for _ in range(beams)], **MODES[mode])
    assert [codes.tolist() for codes in out.region_code_ids] == [[first, first, first + 7], [], [first + 3]]
    assert all(codes.dtype == torch.long for codes in out.region_code_ids)
    assert_masks_are_those_of_decode_regions(model, batch, out)
    # The same code twice: two regions, two masks.
    assert not torch.allclose(out.mask_logits[0][0], out.mask_logits[0][1])


def test_the_score_is_the_probability_of_code_and_mask(model: Any, config: MedSightConfig) -> None:
    code, batch = config.region_code_start_id + 2, make_batch(config, ["tItt"])
    out = say(model, batch, [[9, code, code]])
    logits = model(input_ids=out.sequences, pixel_values=batch["pixel_values"]).logits[0]
    for i, position in enumerate((-2, -1)):
        likelihood = logits[position - 1].softmax(-1)[code]
        inside = [p for p in out.mask_logits[0][i].sigmoid().flatten().tolist() if p > 0.5]
        expected = likelihood.item() * (sum(inside) / len(inside) if inside else 0)
        assert out.region_scores[0][i].item() == pytest.approx(expected, rel=1e-3)


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
        for field in (*fields, "mask_logits", "region_code_ids", "region_scores"):
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


def test_settings_of_regions_are_followed_from_a_generation_config(
    model: Any, config: MedSightConfig, tmp_path: Path
) -> None:
    batch, wanted = (
        make_batch(config, ["ttI", "It"]),
        {"force_region": True, "allowed_groups": [config.num_groups - 1]},
    )
    expected = generate(model, batch, max_new_tokens=6, **wanted)
    assert all(len(ids) for ids in expected.region_code_ids)
    setting = GenerationConfig(
        max_new_tokens=6, eos_token_id=END, pad_token_id=256, return_dict_in_generate=True, do_sample=False, **wanted
    )
    setting.save_pretrained(tmp_path)
    for given in (setting, GenerationConfig.from_pretrained(tmp_path)):
        assert torch.equal(model.generate(**batch, generation_config=given).sequences, expected.sequences)
    model.save_pretrained(tmp_path)
    setting.save_pretrained(tmp_path)  # as generation_config.json of a folder
    again = MedSightForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.generate(**batch).sequences, expected.sequences)


def test_padding_is_found_where_no_attention_mask_is_given(model: Any, config: MedSightConfig) -> None:
    batch = make_batch(config, ["tItttt", "It"])
    out = generate(model, batch)
    del batch["attention_mask"]
    assert torch.equal(generate(model, batch).sequences, out.sequences)
    decoded = model.decode_regions(out.sequences, batch["pixel_values"], start=batch["input_ids"].shape[1])
    torch.testing.assert_close(decoded.mask_logits, out.mask_logits, **CLOSE)


@pytest.mark.parametrize("rows", [["ItCt"], ["tIttt", "ItCtt"]])
@pytest.mark.parametrize("second", ["ttt", "tItt", "IItt"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}])
def test_a_second_turn_goes_on_from_the_cache_of_the_first(
    model: Any, config: MedSightConfig, rows: list[str], second: str, settings: dict[str, Any]
) -> None:
    conversation, images = make_batch(config, [first + second for first in rows]), second.count("I")
    afresh = generate(model, conversation, **settings)
    assert assert_masks_are_those_of_decode_regions(model, conversation, afresh) > 0
    if settings:
        return
    columns = len(second) + images * (config.image_seq_length - 1)
    beginning = {name: conversation[name][:, :-columns] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        first = model(**beginning, pixel_values=conversation["pixel_values"][:: 1 + images], use_cache=True)
    cached = generate(model, conversation, past_key_values=first[CACHE_NAME])
    assert torch.equal(afresh.sequences, cached.sequences)
    assert_masks_are_those_of_decode_regions(model, conversation, cached)


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"cache_implementation": "static"}])
def test_streaming_gives_the_text_as_it_comes_and_the_masks_at_the_end(
    model: Any, config: MedSightConfig, settings: dict[str, Any]
) -> None:
    batch, streamer = make_batch(config, ["tItt"]), Mock(spec=BaseStreamer)
    out = generate(model, batch, streamer=streamer, **settings)
    given = torch.cat([call.args[0].flatten() for call in streamer.put.call_args_list])
    assert torch.equal(given, out.sequences[0]) and streamer.end.call_count == 1
    assert assert_masks_are_those_of_decode_regions(model, batch, out) > 0


def test_an_assistant_looks_once_and_draws_no_masks(model: Any, config: MedSightConfig) -> None:
    assistant, looks = make_model(config, seed=1), []
    assistant.model.region_perceiver.register_forward_hook(lambda *_: looks.append(1))
    code = config.region_code_start_id
    out = say(model, make_batch(config, ["ttIt"]), [[1, code, 2, code, 3, code, 4, 5]], assistant_model=assistant)
    assert out.region_code_ids[0].tolist() == [code] * 3
    assert looks == [1]


@pytest.mark.parametrize(
    ("settings", "last", "passes"),
    [
        ({}, "t", []),
        ({"cache_implementation": "static"}, "t", []),
        ({"do_sample": True, "num_return_sequences": 2}, "t", []),
        ({"do_sample": True}, "C", [1]),
        ({"num_beams": 2}, "t", [5 + 1]),
    ],
)
def test_masks_cost_at_most_one_forward_over_what_was_generated(
    model: Any, config: MedSightConfig, settings: dict[str, Any], last: str, passes: list[int]
) -> None:
    """None where each step's state is that of one token of each row, and no step was missing for the last."""
    read: list[int] = []
    batch, code = make_batch(config, ["tttItt"]), config.region_code_start_id
    script = [1, code, 2, code, code if last == "C" else 3]
    copies = settings.get("num_beams", settings.get("num_return_sequences", 1))
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, __, named: read.append(named["inputs_embeds"].shape[1]), with_kwargs=True
    )
    out = say(model, batch, [script] * copies, **settings)
    hook.remove()
    assert read == [batch["input_ids"].shape[1], 1, 1, 1, 1, *passes]
    assert_masks_are_those_of_decode_regions(model, batch, out)


@pytest.mark.parametrize("new_image", [True, False])
def test_a_chat_looks_at_no_image_twice_and_decodes_no_code_again(
    model: Any, config: MedSightConfig, new_image: bool
) -> None:
    """Of six images and codes in the turns before, the sixth turn takes the last image, and no column but its own."""
    batch, code = make_batch(config, ["ItCt" * 5 + ("It" if new_image else "tt")]), config.region_code_start_id
    images = len(batch["pixel_values"])
    known = batch["input_ids"].shape[1] - (config.image_seq_length + 1 if new_image else 2)
    beginning = {"input_ids": batch["input_ids"][:, :known], "pixel_values": batch["pixel_values"][:5]}
    with torch.no_grad():
        cache = model(**beginning, use_cache=True)[CACHE_NAME]
    looked, perceived, read = [], [], []
    hooks = [
        model.model.vision_tower.register_forward_pre_hook(lambda _, inputs: looked.append(len(inputs[0]))),
        model.model.region_perceiver.register_forward_pre_hook(lambda _, inputs: perceived.append(len(inputs[0]))),
        model.model.language_model.register_forward_pre_hook(
            lambda _, __, named: read.append(named["inputs_embeds"].shape[1]), with_kwargs=True
        ),
    ]
    out = say(model, batch, [[1, code, 2]], past_key_values=cache)
    for hook in hooks:
        hook.remove()
    assert images == 5 + new_image and out.region_code_ids[0].tolist() == [code]
    assert looked == [1]
    assert perceived == ([1, 1] if new_image else [1])  # regions of an image that is new, and the mask of one code
    assert read == [batch["input_ids"].shape[1] - known, 1, 1]
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
    assert sum(len(codes) for codes in out.region_code_ids) > 0
    for masks, scores in zip(out.mask_logits, out.region_scores, strict=True):
        assert masks.dtype == dtype and masks.isfinite().all()
        assert scores.dtype == torch.float32 and (scores >= 0).all() and (scores <= 1).all()


def test_what_decode_regions_reads_is_the_text_not_its_origin(model: Any, config: MedSightConfig) -> None:
    """An edited answer: one more code is one more mask, and the codes before it keep their states."""
    batch = make_batch(config, ["tItt"])
    code = config.region_code_start_id
    out = say(model, batch, [[1, code, 2]])
    edited = torch.cat((out.sequences, torch.tensor([[code + 1, 4]])), dim=1)
    decoded = model.decode_regions(input_ids=edited, pixel_values=batch["pixel_values"])
    assert decoded.region_code_ids[0].tolist() == [code, code + 1]
    assert decoded.mask_logits[0].shape == (2, *config.mask_size)
    empty = model.decode_regions(**make_batch(config, ["tI", "t"]))
    assert [masks.shape for masks in empty.mask_logits] == [(0, *config.mask_size)] * 2


def test_a_text_streamer_prints_the_answer(model: Any, config: MedSightConfig, capsys: Any) -> None:
    batch, tokenizer = make_batch(config, ["tItt"]), byte_tokenizer()
    tokenizer.add_tokens([f"[C{k}_{m}]" for k in range(3) for m in range(4)])
    scripts = [[*tokenizer("Liver ")["input_ids"], config.region_code_start_id + 6, END]]
    say(model, batch, scripts, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out == "Liver [C1_2]\n"


def test_generation_in_training_mode_works_too(config: MedSightConfig) -> None:
    batch, model = make_batch(config, ROWS), make_model(config)
    expected = generate(model, batch)
    given = generate(model.train(), batch)
    assert torch.equal(given.sequences, expected.sequences)


def test_a_code_after_rejected_candidates_is_scored_by_its_own_state(model: Any, config: MedSightConfig) -> None:
    batch = make_batch(config, ["ttIttt"])
    batch["input_ids"][0, -2:] = batch["input_ids"][0, :2]  # something to look up, which the script rejects
    scripts = [[config.region_code_start_id + 1, 5, 7, END]]
    plain, lookup = say(model, batch, scripts), say(model, batch, scripts, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.sequences, lookup.sequences) and len(plain.region_code_ids[0]) == 1
    torch.testing.assert_close(lookup.region_scores[0], plain.region_scores[0], **CLOSE)
    torch.testing.assert_close(lookup.mask_logits[0], plain.mask_logits[0], **CLOSE)


def test_processes_that_wait_for_each_other_make_the_same_passes(config: MedSightConfig, monkeypatch: Any) -> None:
    """As under ZeRO-3: whatever the prompt holds and the answer cites, where another process cites a code."""

    def reduce(tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        if not tensor.is_floating_point():  # of passes; the float says whether a process still writes
            tensor.clamp_(min=1)

    monkeypatch.setattr(pretrained_medsight, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    made = []
    for row, processors in (("tIttI", [CitesOften(config)]), ("tI", []), ("ttttt", [])):
        model, passes = make_model(config), []
        for name, module in model.model.named_children():
            module.register_forward_pre_hook(lambda *_, name=name, passes=passes: passes.append(name))
        batch = make_batch(config, [row])
        ended = {"max_new_tokens": 6, "min_new_tokens": 6, "eos_token_id": END, "pad_token_id": 256}
        quiet = {} if processors else {"suppress_tokens": list(range(config.region_code_start_id, 320))}
        answer = model.generate(**batch, **ended, **quiet, logits_processor=LogitsProcessorList(processors))
        assert bool(len(answer.region_code_ids[0])) == bool(processors)
        made.append([name for name in passes if name in ("vision_tower", "region_perceiver", "language_model")])
    assert made[0].count("language_model") == 7
    assert made[0] == made[1] == made[2]
