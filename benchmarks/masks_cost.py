"""What do masks cost? generate with masks against the same language model's plain generate.

Both read as many prompt tokens and write the same tokens, two region codes among them; the language model's weights
are the same objects. `text` is generate with the image but without masks: it shows how the cost divides.

Rows: batch_size, prompt_tokens, new_tokens, plain_s, text_s, masks_s, text_ratio (text / plain), ratio (masks /
plain).

    python -m benchmarks.masks_cost --preset 8b --device cuda --output masks_cost.json
"""

from collections.abc import Sequence
from typing import Any

from . import measuring, random_inputs


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser("benchmarks.masks_cost", __doc__)
    measuring.add_shape(options)
    options.add_argument("--prompt-words", type=int, default=32, help="besides the image")
    options.add_argument("--new-tokens", type=int, default=24)
    options.add_argument("--regions", type=int, default=2)
    options.add_argument("--cache", choices=["dynamic", "static"], default="dynamic", help="static compiles on a GPU")
    chosen = options.parse_args(arguments)
    device, dtype = measuring.prepare(chosen)
    model = random_inputs.random_model(chosen.preset, device, dtype)
    plain = random_inputs.plain_language_model(model)
    rows = []
    for size in chosen.batch_size:
        inputs = random_inputs.prompts(model.config, [chosen.prompt_words] * size, device, dtype)
        said = [random_inputs.answer(model.config, chosen.new_tokens, chosen.regions, seed=row) for row in range(size)]
        common: dict[str, Any] = {
            "max_new_tokens": chosen.new_tokens,
            "logits_processor": random_inputs.fixed(said, inputs["input_ids"]),
        }
        if chosen.cache == "static":
            common["cache_implementation"] = "static"
        text_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}

        def run_plain(inputs: Any = text_inputs, common: Any = common) -> Any:
            return plain.generate(**inputs, **common)

        def run_text(inputs: Any = inputs, common: Any = common) -> Any:
            return model.generate(**inputs, **common, return_dict_in_generate=False)

        def run_masks(inputs: Any = inputs, common: Any = common) -> Any:
            return model.generate(**inputs, **common)

        out = run_masks()
        if [len(masks) for masks in out.mask_logits] != [chosen.regions] * size:
            raise RuntimeError(f"expected {chosen.regions} masks a row, got {[len(m) for m in out.mask_logits]}")
        if run_plain().sequences.shape != out.sequences.shape:
            raise RuntimeError("plain generation is of another length")
        times = measuring.paired({"plain": run_plain, "text": run_text, "masks": run_masks}, chosen, device)
        rows.append(
            {
                "batch_size": size,
                "prompt_tokens": inputs["input_ids"].shape[1],
                "new_tokens": chosen.new_tokens,
                **{f"{name}_s": measuring.spread(values) for name, values in times.items()},
                "text_ratio": measuring.ratio(times["text"], times["plain"]),
                "ratio": measuring.ratio(times["masks"], times["plain"]),
            }
        )
    return measuring.report(chosen, device, rows)


if __name__ == "__main__":
    main()
