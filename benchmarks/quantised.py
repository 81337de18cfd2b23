"""What do 8 and 4 bits save, and what do masks lose? The language model quantised against the same folder in bfloat16.

bfloat16 answers `--items` requests, citing at least one region each; all kinds then make the masks of these answers,
so that Dice compares masks of the same codes. With `--data`, a set in BiomedParse's layout with a manifest.jsonl, its
test rows are asked for; otherwise pictures of noise.

Rows: what, language_model_bytes, other_bytes (weights), load_s, answer_s (an item), ratio (answer / bfloat16's), dice
(mean over masks, against bfloat16), same_answers (share of its own answers that read as bfloat16's), why (what kept it
from running).

    python -m benchmarks.quantised --data ../shared/data/segmentation --items 64 --output quantised.json
"""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BitsAndBytesConfig

from modeling_medsight import MedSightForConditionalGeneration
from processing_medsight import MedSightProcessor

from . import measuring, random_inputs


KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "8 bits": {"load_in_8bit": True},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}


def requests(data: Path | None, count: int) -> list[tuple[Image.Image, str]]:
    """Pictures and what is asked about them: evenly over the test rows that name a structure which is there."""
    if data is None:
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randint(256, (64, 80), generator=generator, dtype=torch.uint8) for _ in range(count)]
        return [(Image.fromarray(pixels.numpy()).convert("RGB"), "Segment the lesion.") for pixels in noise]
    lines = (data / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "test" and row.get("mask")]
    chosen = rows[:: max(1, len(rows) // count)][:count]
    return [(Image.open(data / row["image"]).convert("RGB"), f"Segment the {row['target']}.") for row in chosen]


def load(folder: Path, settings: dict[str, Any], device: torch.device) -> Any:
    quantised = {"quantization_config": BitsAndBytesConfig(**settings)} if settings else {}
    return MedSightForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": str(device)}, **quantised
    ).eval()


def mean_dice(given: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float | None:
    """Mean Dice of masks (codes, H, W), row by row; two empty masks agree."""
    values = []
    for masks, others in zip(given, expected, strict=True):
        ours, theirs = masks.flatten(1) > 0, others.flatten(1) > 0
        both, either = (ours & theirs).sum(1), ours.sum(1) + theirs.sum(1)
        values += torch.where(either > 0, 2 * both / either.clamp(min=1), 1.0).tolist()
    return sum(values) / len(values) if values else None


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser("benchmarks.quantised", __doc__, repeats=3)
    measuring.add_folder(options)
    options.add_argument("--data", type=Path, metavar="DIR", help="BiomedParse's layout, with manifest.jsonl")
    options.add_argument("--items", type=int, default=8)
    options.add_argument("--new-tokens", type=int, default=24)
    chosen = options.parse_args(arguments)
    device, _ = measuring.prepare(chosen)
    processor = MedSightProcessor.from_pretrained(chosen.model)
    prompts = []
    for image, question in requests(chosen.data, chosen.items):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        ).to(device)
        inputs.pop("original_sizes")
        prompts.append(inputs)

    def answers(model: Any, count: int = chosen.items) -> list[torch.Tensor]:
        settings = {"max_new_tokens": chosen.new_tokens, "force_region": True}
        return [model.generate(**inputs, **settings).sequences for inputs in prompts[:count]]

    models: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for name, settings in KINDS.items():
        start = time.perf_counter()
        try:
            models[name] = load(chosen.model, settings, device)
        except (ImportError, RuntimeError) as error:
            rows.append({"what": name, "load_s": None, "why": " ".join(str(error).split())[:120]})
            continue
        measuring.synchronise(device)
        rows.append({"what": name, "load_s": time.perf_counter() - start})
    times = measuring.paired({name: partial(answers, model, 1) for name, model in models.items()}, chosen, device)
    expected = answers(models["bfloat16"])
    expected_masks = masks_of(models["bfloat16"], prompts, expected)
    for row in rows:
        if (model := models.get(row["what"])) is None:
            continue
        language_model = random_inputs.weight_bytes(model.model.language_model)
        row |= {
            "language_model_bytes": language_model,
            "other_bytes": random_inputs.weight_bytes(model) - language_model,
            "answer_s": measuring.spread(times[row["what"]]),
            "ratio": measuring.ratio(times[row["what"]], times["bfloat16"]),
            "dice": mean_dice(masks_of(model, prompts, expected), expected_masks),
            "same_answers": sum(map(torch.equal, answers(model), expected)) / len(expected),
        }
    return measuring.report(chosen, device, rows, items=len(prompts), masks=sum(map(len, expected_masks)))


def masks_of(model: Any, prompts: list[Any], answers: list[torch.Tensor]) -> list[torch.Tensor]:
    """Mask logits (codes, H, W) of the codes of each answer."""
    pairs = zip(prompts, answers, strict=True)
    return [model.decode_regions(answer, inputs["pixel_values"]).mask_logits[0] for inputs, answer in pairs]


if __name__ == "__main__":
    main()
