"""How near is decoding to the memory's bandwidth? Milliseconds a token against reading all weights once.

A token's time is that of a long answer less that of a short one, so that reading the prompt falls out; reading it is
`prefill_ms`, an answer of one token. `item_s` is a whole answer with its masks. With a static cache, transformers
compiles decoding on a GPU: `model.generate(..., cache_implementation="static")` is all that it takes.

Facts: copy_bandwidth (bytes read and written a second), weight_bytes (what a token reads), limit_ms (their quotient).
Rows: cache, batch_size, prefill_ms, token_ms, ratio (token_ms / limit_ms), item_s, items_per_s.

    python -m benchmarks.decoding --preset 8b --device cuda --batch-size 1 --cache static --output decoding.json
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from . import measuring, random_inputs


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser("benchmarks.decoding", __doc__)
    measuring.add_shape(options, (1, 32))
    measuring.add_lengths(options)
    options.add_argument("--long", type=int, default=72, help="tokens of the long answer")
    options.add_argument("--cache", nargs="+", choices=["dynamic", "static"], default=["dynamic", "static"])
    chosen = options.parse_args(arguments)
    if chosen.long <= chosen.new_tokens:
        options.error(f"--long {chosen.long} must be above --new-tokens {chosen.new_tokens}")
    device, dtype = measuring.prepare(chosen)
    model = random_inputs.random_model(chosen.preset, device, dtype)
    language_model = model.model.language_model
    weights = random_inputs.weight_bytes(language_model.layers, language_model.norm, model.lm_head)
    bandwidth = measuring.copy_bandwidth(device)
    limit = weights / bandwidth * 1e3
    rows = []
    for size in chosen.batch_size:
        inputs = random_inputs.prompts(model.config, [chosen.prompt_words] * size, device, dtype)
        # One script serves answers of all lengths; the two codes stand within the shortest but one.
        starts = [random_inputs.answer(model.config, chosen.new_tokens, 2, seed=row) for row in range(size)]
        rest = random_inputs.answer(model.config, chosen.long, 0, seed=size)
        processor = random_inputs.fixed([[*start, *rest] for start in starts], inputs["input_ids"])
        for cache in chosen.cache:
            generate = partial(
                model.generate,
                **inputs,
                logits_processor=processor,
                cache_implementation="static" if cache == "static" else None,
            )
            cases = {
                # The long answer comes first: its static cache serves the others.
                "long": partial(generate, max_new_tokens=chosen.long, return_dict_in_generate=False),
                "short": partial(generate, max_new_tokens=chosen.new_tokens, return_dict_in_generate=False),
                "prompt": partial(generate, max_new_tokens=1, return_dict_in_generate=False),
                "item": partial(generate, max_new_tokens=chosen.new_tokens),
            }
            times = measuring.paired(cases, chosen, device)
            between = chosen.long - chosen.new_tokens
            tokens = [
                (long - short) / between * 1e3 for long, short in zip(times["long"], times["short"], strict=True)
            ]
            rows.append(
                {
                    "cache": cache,
                    "batch_size": size,
                    "prefill_ms": measuring.spread([value * 1e3 for value in times["prompt"]]),
                    "token_ms": measuring.spread(tokens),
                    "ratio": measuring.spread([value / limit for value in tokens]),
                    "item_s": measuring.spread([value / size for value in times["item"]]),
                    "items_per_s": measuring.spread([size / value for value in times["item"]]),
                }
            )
    return measuring.report(chosen, device, rows, copy_bandwidth=bandwidth, weight_bytes=weights, limit_ms=limit)


if __name__ == "__main__":
    main()
