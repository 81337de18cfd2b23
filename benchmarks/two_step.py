"""Masks for text from elsewhere: what does `decode_regions` cost, one by one and in a batch?

Any engine writes the texts (`--texts FILE`, a JSON list of them); here they stand for what one wrote about as many
pictures. One by one and in a batch, the same codes must get the same masks.

Facts: agreement (largest difference between a mask's probabilities in a batch and by itself).
Rows: batch_size, codes, one_by_one_s, together_s, ratio (throughput together / one by one).

    python -m benchmarks.two_step --model DIR --batch-size 8 --output two_step.json
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_medsight import MedSightForConditionalGeneration
from processing_medsight import MedSightProcessor

from . import measuring


def texts_of(config: Any, count: int) -> list[str]:
    """Answers that cite no code, one, or two."""
    codes = [config.region_code_token(k, 0) for k in range(config.num_groups)]
    kinds = ("Segmented: first {0}, second {1}.", "Nothing of note.", "Findings consistent with a lesion: {0}.")
    return [kinds[i % len(kinds)].format(codes[i % len(codes)], codes[(i + 1) % len(codes)]) for i in range(count)]


def conversation(image: Image.Image, question: str, text: str) -> list[dict[str, Any]]:
    asked = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser("benchmarks.two_step", __doc__)
    measuring.add_folder(options)
    options.add_argument("--batch-size", type=int, nargs="+", default=[8], metavar="N")
    options.add_argument("--texts", type=Path, metavar="FILE", help="JSON list of texts  [default: texts made here]")
    chosen = options.parse_args(arguments)
    device, dtype = measuring.prepare(chosen)
    model = MedSightForConditionalGeneration.from_pretrained(chosen.model, dtype=dtype).eval().to(device)
    processor = MedSightProcessor.from_pretrained(chosen.model)
    written = json.loads(chosen.texts.read_text(encoding="utf-8")) if chosen.texts else None
    rows, agreement = [], 0.0
    for size in chosen.batch_size:
        texts = [written[i % len(written)] for i in range(size)] if written else texts_of(model.config, size)
        images = [Image.effect_noise((320 + 16 * i, 256), 60).convert("RGB") for i in range(size)]
        pairs = zip(images, texts, strict=True)
        conversations = [conversation(image, "What is to be seen?", text) for image, text in pairs]

        def decode(chosen_ones: list[Any]) -> Any:
            inputs = processor.apply_chat_template(
                chosen_ones, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
            ).to(device)
            inputs.pop("original_sizes")
            return model.decode_regions(**inputs)

        def run_together(conversations: Any = conversations) -> Any:
            return decode(conversations)

        def run_one_by_one(conversations: Any = conversations) -> Any:
            return [decode([one]) for one in conversations]

        together, alone = run_together(), run_one_by_one()
        for masks, single in zip(together.mask_logits, alone, strict=True):
            others = single.mask_logits[0]
            if len(masks) != len(others):
                raise RuntimeError(f"{len(masks)} masks in a batch, {len(others)} alone")
            if len(masks):
                difference = masks.float().sigmoid() - others.float().sigmoid()
                agreement = max(agreement, float(difference.abs().max()))
        times = measuring.paired({"one_by_one": run_one_by_one, "together": run_together}, chosen, device)
        rows.append(
            {
                "batch_size": size,
                "codes": sum(map(len, together.region_code_ids)),
                **{f"{name}_s": measuring.spread(values) for name, values in times.items()},
                "ratio": measuring.ratio(times["one_by_one"], times["together"]),
            }
        )
    return measuring.report(chosen, device, rows, agreement=agreement)


if __name__ == "__main__":
    main()
