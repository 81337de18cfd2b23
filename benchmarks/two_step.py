"""Masks for text from elsewhere: what does `decode_regions` cost, one by one and in a batch?

The texts stand for what another engine wrote about as many pictures. One by one and in a batch, the same codes must
get the same masks.

Facts: agreement (largest difference between a mask's probabilities in a batch and by itself).
Rows: batch_size, codes, one_by_one_s, together_s, ratio (throughput together / one by one).

    python -m benchmarks.two_step --model DIR --batch-size 8 --output two_step.json
"""

import itertools
from collections.abc import Sequence
from functools import partial
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


def conversation(number: int, text: str) -> list[dict[str, Any]]:
    """A question about a picture of noise, and its answer."""
    image = Image.effect_noise((320 + 16 * number, 256), 60).convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is to be seen?"}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": text}]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser("benchmarks.two_step", __doc__)
    measuring.add_folder(options)
    options.add_argument("--batch-size", type=int, nargs="+", default=[8], metavar="N")
    chosen = options.parse_args(arguments)
    device, dtype = measuring.prepare(chosen)
    model = MedSightForConditionalGeneration.from_pretrained(chosen.model, dtype=dtype).eval().to(device)
    processor = MedSightProcessor.from_pretrained(chosen.model)

    def decode(conversations: list[Any]) -> Any:
        inputs = processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
        ).to(device)
        inputs.pop("original_sizes")
        return model.decode_regions(**inputs)

    def decode_one_by_one(conversations: list[Any]) -> list[Any]:
        return [decode([conversation]) for conversation in conversations]

    rows, agreement = [], 0.0
    for size in chosen.batch_size:
        conversations = list(itertools.starmap(conversation, enumerate(texts_of(model.config, size))))
        cases = {"one_by_one": partial(decode_one_by_one, conversations), "together": partial(decode, conversations)}
        together, alone = cases["together"](), cases["one_by_one"]()
        for masks, single in zip(together.mask_logits, alone, strict=True):
            others = single.mask_logits[0]
            if len(masks) != len(others):
                raise RuntimeError(f"{len(masks)} masks in a batch, {len(others)} alone")
            if len(masks):
                difference = masks.float().sigmoid() - others.float().sigmoid()
                agreement = max(agreement, float(difference.abs().max()))
        times = measuring.paired(cases, chosen, device)
        rows.append(
            {
                "batch_size": size,
                "codes": sum(map(len, together.region_code_ids)),
                **measuring.seconds(times),
                "ratio": measuring.ratio(times["one_by_one"], times["together"]),
            }
        )
    return measuring.report(chosen, device, rows, agreement=agreement)


if __name__ == "__main__":
    main()
