"""Random models of any preset, prompts for them, answers fixed beforehand, and the language model by itself."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from configuration_medsight import MedSightConfig
from modeling_medsight import MedSightForConditionalGeneration


PAD, END, FIRST_WORD = 0, 1, 2  # token ids; words are the ids from FIRST_WORD on


def dtype_of(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_model(preset: str, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A seeded model of a preset with random weights, made where it is to run, which decodes greedily."""
    torch.manual_seed(0)
    config = MedSightConfig.from_preset(preset)
    with torch.device(device):
        model = MedSightForConditionalGeneration._from_config(config, dtype=dtype or dtype_of(device))
    model.generation_config = GenerationConfig(
        do_sample=False, return_dict_in_generate=True, pad_token_id=PAD, eos_token_id=END
    )
    return model.eval()


def plain_language_model(model: Any) -> Any:
    """The language model as transformers' own `ForCausalLM`, on the very same weights."""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config), dtype=model.dtype)
    plain.model, plain.lm_head = model.model.language_model, model.lm_head
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval()


def words(config: MedSightConfig, count: int, generator: torch.Generator) -> list[int]:
    """Token ids that are neither codes nor placeholders nor an end."""
    last = min(config.image_token_id, config.region_code_start_id)
    return torch.randint(FIRST_WORD, last, (count,), generator=generator).tolist()


def prompts(model: Any, lengths: Sequence[int]) -> dict[str, torch.Tensor]:
    """A prompt for each of `lengths`: an image between that many words, left-padded."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        text = words(config, length, generator)
        image = [config.image_token_id] * config.image_seq_length
        rows.append([*text[: length // 4], *image, *text[length // 4 :]])
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    pixels = torch.randn(len(rows), 3, config.image_size, config.image_size, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": (ids != PAD).long().to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }


def answer(config: MedSightConfig, length: int, codes: int, seed: int) -> list[int]:
    """An answer of `length` tokens that cites `codes` region codes, evenly spread, and does not end by itself."""
    generator = torch.Generator().manual_seed(seed)
    tokens = words(config, length, generator)
    cited = torch.randint(config.num_region_codes, (codes,), generator=generator).tolist()
    for number, code in enumerate(cited, 1):
        tokens[number * length // (codes + 1)] = config.region_code_start_id + code
    return tokens


class FixedAnswers(LogitsProcessor):
    """Makes each row say the answer that is given for it, and then end."""

    def __init__(self, answers: Sequence[Sequence[int]], prompt_length: int, device: torch.device) -> None:
        longest = max(map(len, answers)) + 1
        self.answers = torch.tensor([[*row, *[END] * (longest - len(row))] for row in answers], device=device)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = min(input_ids.shape[1] - self.prompt_length, self.answers.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, self.answers[:, step : step + 1], 0.0)


def fixed(answers: Sequence[Sequence[int]], input_ids: torch.Tensor) -> LogitsProcessorList:
    """`logits_processor=` that makes `generate` say these answers."""
    return LogitsProcessorList([FixedAnswers(answers, input_ids.shape[1], input_ids.device)])


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of the weights of modules, shared ones once."""
    weights = {id(p): p for module in modules for p in module.parameters()}
    return sum(weight.numel() * weight.element_size() for weight in weights.values())
