"""What tests of generate() share: ways to decode, what makes answers cite and end, and what their masks must be."""

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from configuration_medsight import MedSightConfig

from .configurations import row_of_batch


CLOSE = {"rtol": 1e-3, "atol": 5e-4}
END = 258
# Two images and a cited code, one image, three images in a row with text before: padded on the left.
ROWS = ["ItCtttItt", "Itt", "ttIIItt"]
# Every way to decode; those in ONE_ROW take one row only.
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
# Where the states of generated codes come from: the steps of the search; one pass over what was generated, on the
# prompt's part of the cache; or one pass over the whole text. Each mode has its way, unless a code comes last.
WAYS = {
    **dict.fromkeys(MODES, "steps"),
    **dict.fromkeys([mode for mode in MODES if "beams" in mode], "cache"),
    **dict.fromkeys(ONE_ROW, "cache"),
    "no cache, beams": "whole text",
}


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
    """Makes region codes likely after every other token or so; none comes in the last column, if that is known."""

    def __init__(self, config: MedSightConfig, last_column: int | None = None) -> None:
        self.codes = slice(config.region_code_start_id, config.region_code_start_id + config.num_region_codes)
        self.last_column = last_column

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.codes] += 12.0 * (input_ids[:, -1:] % 2)
        if input_ids.shape[1] == self.last_column:
            scores[:, self.codes] = -torch.inf
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
    assert len(out.mask_logits) == len(out.region_code_ids) == len(out.region_scores) == len(out.sequences)
    for i, answer in enumerate(answers(batch, out.sequences)):
        codes = [token for token in answer if is_code(config, token)]
        assert out.region_code_ids[i].tolist() == codes
        assert out.mask_logits[i].shape == (len(codes), *config.mask_size)
        assert out.region_scores[i].shape == (len(codes),)
        if not codes:
            continue
        single = row_of_batch(config, batch, i // copies)
        whole = torch.cat((single["input_ids"], torch.tensor([answer])), dim=1)
        decoded = model.decode_regions(
            input_ids=whole, pixel_values=single["pixel_values"], start=single["input_ids"].shape[1]
        )
        torch.testing.assert_close(out.mask_logits[i], decoded.mask_logits[0], **CLOSE)
        torch.testing.assert_close(out.region_scores[i], decoded.region_scores[0], **CLOSE)
        seen += len(codes)
    return seen
