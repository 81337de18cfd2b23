"""What do masks cost? generate with masks against the same language model's plain generate.

Both read as many prompt tokens and write the same tokens, two region codes among them; the language model's weights
are the same objects. `text` is generate with the image but without masks: it shows how the cost divides.

Rows: batch_size, prompt_tokens, new_tokens, plain_s, text_s, masks_s, text_ratio (text / plain), ratio (masks /
plain).

    python -m benchmarks.masks_cost --preset 8b --device cuda --output masks_cost.json
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from . import measuring, random_inputs


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser("benchmarks.masks_cost", __doc__)
    measuring.add_shape(options)
    measuring.add_lengths(options)
    options.add_argument("--regions", type=int, default=2)
    options.add_argument("--cache", choices=["dynamic", "static"], default="dynamic", help="static compiles on a GPU")
    chosen = options.parse_args(arguments)
    device, dtype = measuring.prepare(chosen)
    model = random_inputs.random_model(chosen.preset, device, dtype)
    plain = random_inputs.plain_language_model(model)
    rows = []
    for size in chosen.batch_size:
        inputs = random_inputs.prompts(model.config, [chosen.prompt_words] * size, device, dtype)
        text_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        answers = [random_inputs.answer(model.config, chosen.new_tokens, chosen.regions, row) for row in range(size)]
        common: dict[str, Any] = {
            "max_new_tokens": chosen.new_tokens,
            "logits_processor": random_inputs.fixed(answers, inputs["input_ids"]),
            "cache_implementation": "static" if chosen.cache == "static" else None,
        }
        cases = {
            "plain": partial(plain.generate, **text_inputs, **common),
            "text": partial(model.generate, **inputs, **common, return_dict_in_generate=False),
            "masks": partial(model.generate, **inputs, **common),
        }
        out = cases["masks"]()
        if [len(masks) for masks in out.mask_logits] != [chosen.regions] * size:
            raise RuntimeError(f"expected {chosen.regions} masks a row, got {[len(m) for m in out.mask_logits]}")
        if cases["plain"]().sequences.shape != out.sequences.shape:
            raise RuntimeError("plain generation is of another length")
        times = measuring.paired(cases, chosen, device)
        rows.append(
            {
                "batch_size": size,
                "prompt_tokens": inputs["input_ids"].shape[1],
                "new_tokens": chosen.new_tokens,
                **measuring.seconds(times),
                "text_ratio": measuring.ratio(times["text"], times["plain"]),
                "ratio": measuring.ratio(times["masks"], times["plain"]),
            }
        )
    return measuring.report(chosen, device, rows)


if __name__ == "__main__":
    main()
