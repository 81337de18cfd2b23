"""The benchmarks of answers. Each returns rows, whose fields its docstring lists; `NAME_s` are seconds."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitsAndBytesConfig

from configuration_medsight import MedSightConfig
from medsight.checkpoint import shipped_checkpoint
from medsight.inference.predictor import decode_greedily, tokenize_chats, user_turn
from modeling_medsight import MedSightForConditionalGeneration
from modeling_medsight.region_perceiver_medsight import RegionPerceiver
from processing_medsight import MedSightProcessor

from .measuring import Row, copy_bandwidth, matmul_rate, paired, peak_memory, ratio, seconds, spread
from .random_inputs import answer, dtype_of, fixed, plain_language_model, prompts, random_model, weight_bytes


PROMPT_WORDS, NEW_TOKENS, LONG, REGIONS = 32, 24, 72, 2
CODES = (2, 0, 1, 4, 1, 3, 0, 2)  # how many codes item after item of `batches` cites
KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "8 bits": {"load_in_8bit": True},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}


def masks_cost(device: torch.device, preset: str, batch_sizes: Sequence[int], **rounds: int) -> list[Row]:
    """What do masks cost? generate with masks against the same language model's plain generate.

    Both read as many prompt tokens and write the same tokens, some region codes among them; the language model's
    weights are the same objects.

    Rows: batch_size, prompt_tokens, plain_s, masks_s, ratio (masks / plain).
    """
    model = random_model(preset, device)
    plain = plain_language_model(model)
    rows = []
    for size in batch_sizes:
        inputs = prompts(model, [PROMPT_WORDS] * size)
        answers = [answer(model.config, NEW_TOKENS, REGIONS, seed=row) for row in range(size)]
        settings: Row = {"max_new_tokens": NEW_TOKENS, "logits_processor": fixed(answers, inputs["input_ids"])}
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        cases = {
            "plain": partial(plain.generate, **text, **settings),
            "masks": partial(model.generate, **inputs, **settings),
        }
        counts = [len(masks) for masks in cases["masks"]().mask_logits]
        if counts != [REGIONS] * size:
            raise RuntimeError(f"expected {REGIONS} masks a row, got {counts}")
        times = paired(cases, device, **rounds)
        rows.append(
            {
                "batch_size": size,
                "prompt_tokens": inputs["input_ids"].shape[1],
                **seconds(times),
                "ratio": ratio(times["masks"], times["plain"]),
            }
        )
    return rows


def decoding(device: torch.device, preset: str, batch_size: int, **rounds: int) -> list[Row]:
    """How near is decoding to the memory's bandwidth? Milliseconds a token against reading all weights once.

    A token's time is that of an answer of 72 tokens less that of one of 24, so that reading the prompt
    falls out; reading it is `prefill_ms`, an answer of one token. `item_s` is a whole answer with its masks. The cache
    is static, with which transformers compiles decoding on a GPU.

    Rows: batch_size, prefill_ms, token_ms, ratio (token_ms / limit_ms), item_s, items_per_s, limit_ms (bytes
    of the weights / bytes read and written a second).
    """
    model = random_model(preset, device)
    language_model = model.model.language_model
    weights = weight_bytes(language_model.layers, language_model.norm, model.lm_head)
    limit = weights / copy_bandwidth(device) * 1e3
    inputs = prompts(model, [PROMPT_WORDS] * batch_size)
    # One script serves answers of all lengths; the two codes stand within the shortest but one.
    rest = answer(model.config, LONG, 0, seed=batch_size)
    answers = [[*answer(model.config, NEW_TOKENS, 2, seed=row), *rest] for row in range(batch_size)]
    generate = partial(
        model.generate, **inputs, logits_processor=fixed(answers, inputs["input_ids"]), cache_implementation="static"
    )
    cases = {
        # The long answer comes first: its static cache serves the others.
        "long": partial(generate, max_new_tokens=LONG, return_dict_in_generate=False),
        "short": partial(generate, max_new_tokens=NEW_TOKENS, return_dict_in_generate=False),
        "prompt": partial(generate, max_new_tokens=1, return_dict_in_generate=False),
        "item": partial(generate, max_new_tokens=NEW_TOKENS),
    }
    times = paired(cases, device, **rounds)
    pairs = zip(times["long"], times["short"], strict=True)
    tokens = [(longer - shorter) / (LONG - NEW_TOKENS) * 1e3 for longer, shorter in pairs]
    return [
        {
            "batch_size": batch_size,
            "prefill_ms": spread([value * 1e3 for value in times["prompt"]]),
            "token_ms": spread(tokens),
            "ratio": spread([value / limit for value in tokens]),
            "item_s": spread([value / batch_size for value in times["item"]]),
            "items_per_s": spread([batch_size / value for value in times["item"]]),
            "limit_ms": limit,
        }
    ]


def batches(device: torch.device, preset: str, **rounds: int) -> list[Row]:
    """What do batches bring? Eight items answered together against one by one.

    The items differ in the length of the prompt, in the length of the answer and in the number of codes cited, none
    among them; a batch takes as long as its longest item.

    Rows: batch_size, codes, one_by_one_s, together_s, ratio (throughput together / one by one).
    """
    model = random_model(preset, device)
    shares = [1 - item / 14 for item in range(8)]
    # From half as long to the full length; the longest prompt has the shortest answer.
    lengths = [round(PROMPT_WORDS * share) for share in shares]
    answers = [
        answer(model.config, round(NEW_TOKENS * share), codes, seed=item)
        for item, (share, codes) in enumerate(zip(shares[::-1], CODES, strict=True))
    ]

    def generate(inputs: dict[str, torch.Tensor], answers: list[list[int]]) -> list[int]:
        processor = fixed(answers, inputs["input_ids"])
        out = model.generate(**inputs, max_new_tokens=max(map(len, answers)) + 1, logits_processor=processor)
        return [len(masks) for masks in out.mask_logits]

    single = [prompts(model, [length]) for length in lengths]

    def one_by_one() -> list[int]:
        return [count for inputs, text in zip(single, answers, strict=True) for count in generate(inputs, [text])]

    together = partial(generate, prompts(model, lengths), answers)
    return [against_one_by_one(one_by_one, together, device, **rounds)]


def two_step(device: torch.device, batch_size: int = 8, **rounds: int) -> list[Row]:
    """Masks for text from elsewhere: what does `decode_regions` cost, one by one and in a batch?

    The texts stand for what another engine wrote about as many pictures; they cite no code, one, or two.

    Rows: batch_size, codes, one_by_one_s, together_s, ratio (throughput together / one by one).
    """
    folder = shipped_checkpoint()
    model: Any = MedSightForConditionalGeneration.from_pretrained(folder, dtype=dtype_of(device)).eval().to(device)
    processor = MedSightProcessor.from_pretrained(folder)
    codes = [model.config.region_code_token(group, 0) for group in range(model.config.num_groups)]
    kinds = ("Segmented: first {0}, second {1}.", "Nothing of note.", "Findings consistent with a lesion: {0}.")
    conversations = []
    for number in range(batch_size):
        image = Image.effect_noise((320 + 16 * number, 256), 60).convert("RGB")
        text = kinds[number % 3].format(codes[number % len(codes)], codes[(number + 1) % len(codes)])
        conversations.append([user_turn("What is to be seen?", image), {"role": "assistant", "content": text}])

    def decode(conversations: list[Any]) -> list[int]:
        inputs = processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
        ).to(device)
        inputs.pop("original_sizes")
        return [len(masks) for masks in model.decode_regions(**inputs).mask_logits]

    def one_by_one() -> list[int]:
        return [count for conversation in conversations for count in decode([conversation])]

    return [against_one_by_one(one_by_one, partial(decode, conversations), device, **rounds)]


def against_one_by_one(
    one_by_one: Callable[[], list[int]], together: Callable[[], list[int]], device: torch.device, **rounds: int
) -> Row:
    """A row on items one by one and together; either way gives the numbers of the items' masks."""
    masks = together()
    if masks != (alone := one_by_one()):
        raise RuntimeError(f"{masks} masks in a batch, {alone} one by one")
    times = paired({"one_by_one": one_by_one, "together": together}, device, **rounds)
    throughput = ratio(times["one_by_one"], times["together"])
    return {"batch_size": len(masks), "codes": sum(masks), **seconds(times), "ratio": throughput}


@torch.no_grad()
def perceiver(
    device: torch.device, preset: str, batch_sizes: Sequence[int], num_codes: int = 2, **rounds: int
) -> list[Row]:
    """How near is the region perceiver to the rate of matrix products? A pass against its operations at that rate.

    The second pass draws the masks of `num_codes` codes from what the first has left.

    Rows: batch_size, pass_s, codes_s (the second pass), limit_ratio (pass / operations at the rate), pass_bytes,
    codes_bytes (peak memory of a GPU above what was held before), matmul_flops (operations a second of a large
    product), image_flop (operations of one pass, an image).
    """
    config, dtype = MedSightConfig.from_preset(preset), dtype_of(device)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        model = RegionPerceiver(config).to(dtype).eval()
    for queries in (model.region_queries, model.class_queries):
        if queries is not None:
            queries.data.normal_()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        RegionPerceiver(config).requires_grad_(False)(torch.empty(1, *config.patch_grid, config.vision_hidden_size))
    flop, rate = counter.get_total_flops(), matmul_rate(device, dtype)
    rows = []
    for size in batch_sizes:
        grid = torch.randn(size, *config.patch_grid, config.vision_hidden_size, device=device).to(dtype)
        codes = torch.randn(size, num_codes, config.vision_hidden_size, device=device).to(dtype)
        upsampled = model(grid).upsampled_features
        cases = {"pass": partial(model, grid), "codes": partial(model, grid, codes, upsampled_features=upsampled)}
        times = paired(cases, device, **rounds)
        rows.append(
            {
                "batch_size": size,
                **seconds(times),
                "limit_ratio": spread([value / (size * flop / rate) for value in times["pass"]]),
                **{f"{name}_bytes": peak_memory(run, device) for name, run in cases.items()},
                "matmul_flops": rate,
                "image_flop": flop,
            }
        )
    return rows


@torch.no_grad()
def quantised(device: torch.device, data: Path | str, items: int) -> list[Row]:
    """What do 8 and 4 bits save, and what do masks lose? The shipped folder's language model against bfloat16.

    bfloat16 answers requests evenly over those test rows of a BiomedParse folder with a manifest.jsonl that name a
    structure which is there, citing at least one region each. All kinds then make the masks of these answers, so that
    Dice compares masks of the same codes.

    Rows: what, language_model_bytes, other_bytes (weights), dice (mean over masks, against bfloat16), same_answers
    (share of its own answers that read as bfloat16's), masks (how many are compared).
    """
    folder = shipped_checkpoint()
    processor = MedSightProcessor.from_pretrained(folder)
    lines = (Path(data) / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [row for row in map(json.loads, lines) if row["split"] == "test" and row.get("mask")]
    chats = [
        [user_turn(f"Segment the {row['target']}.", Image.open(Path(data) / row["image"]).convert("RGB"))]
        for row in asked[:: max(1, len(asked) // items)][:items]
    ]
    rows: list[Row] = []
    expected: list[torch.Tensor] = []
    expected_masks = torch.empty(0)
    for name, settings in KINDS.items():
        given = {"quantization_config": BitsAndBytesConfig(**settings)} if settings else {}
        model: Any = MedSightForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16, device_map={"": str(device)}, **given
        ).eval()
        requests = [tokenize_chats(model, processor, [chat]) for chat in chats]
        answers = [
            decode_greedily(model, inputs, max_new_tokens=NEW_TOKENS, force_region=True).sequences
            for inputs in requests
        ]
        expected = expected or answers
        pairs = zip(requests, expected, strict=True)
        logits = [model.decode_regions(ids, inputs["pixel_values"]).mask_logits[0] for inputs, ids in pairs]
        masks = torch.cat(logits).flatten(1) > 0
        if not rows:
            expected_masks = masks
        both, either = (masks & expected_masks).sum(1), masks.sum(1) + expected_masks.sum(1)
        language_model = weight_bytes(model.model.language_model)
        rows.append(
            {
                "what": name,
                "language_model_bytes": language_model,
                "other_bytes": weight_bytes(model) - language_model,
                # Two empty masks agree.
                "dice": torch.where(either > 0, 2 * both / either.clamp(min=1), 1.0).mean().item(),
                "same_answers": sum(map(torch.equal, answers, expected)) / len(expected),
                "masks": len(masks),
            }
        )
    return rows
