"""What do batches bring? Items a second at each batch size against the same items one by one.

The items differ in the length of the prompt, in the length of the answer and in the number of codes cited, none among
them; a batch takes as long as its longest item.

Rows: batch_size, one_by_one_s, together_s, ratio (throughput together / one by one).

    python -m benchmarks.batches --preset 8b --device cuda --output batches.json
"""

from collections.abc import Sequence
from typing import Any

from . import measuring, random_inputs


CODES = (2, 0, 1, 4, 1, 3, 0, 2)  # cited by item after item


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser("benchmarks.batches", __doc__)
    measuring.add_shape(options, (8,))
    options.add_argument("--prompt-words", type=int, default=32, help="of the longest prompt, besides the image")
    options.add_argument("--new-tokens", type=int, default=24, help="of the longest answer")
    chosen = options.parse_args(arguments)
    device, dtype = measuring.prepare(chosen)
    model = random_inputs.random_model(chosen.preset, device, dtype)
    rows = []
    for size in chosen.batch_size:
        # From half as long to the full length.
        shares = [1 - 0.5 * item / max(1, size - 1) for item in range(size)]
        lengths = [max(4, round(chosen.prompt_words * share)) for share in shares]
        counts = [CODES[item % len(CODES)] for item in range(size)]
        said = [
            random_inputs.answer(model.config, max(count + 2, round(chosen.new_tokens * share)), count, seed=item)
            for item, (share, count) in enumerate(zip(shares[::-1], counts, strict=True))
        ]
        together = random_inputs.prompts(model.config, lengths, device, dtype)
        singles = [random_inputs.row_of(together, row) for row in range(size)]

        def run(inputs: dict[str, Any], answers: list[list[int]]) -> Any:
            fixed = random_inputs.fixed(answers, inputs["input_ids"])
            return model.generate(**inputs, max_new_tokens=max(map(len, answers)) + 1, logits_processor=fixed)

        def run_together(together: Any = together, said: Any = said) -> Any:
            return run(together, said)

        def run_one_by_one(singles: Any = singles, said: Any = said) -> Any:
            return [run(inputs, [tokens]) for inputs, tokens in zip(singles, said, strict=True)]

        for masks in ([len(m) for m in run_together().mask_logits], [len(o.mask_logits[0]) for o in run_one_by_one()]):
            if masks != counts:
                raise RuntimeError(f"expected {counts} masks, got {masks}")
        times = measuring.paired({"one_by_one": run_one_by_one, "together": run_together}, chosen, device)
        rows.append(
            {
                "batch_size": size,
                **{f"{name}_s": measuring.spread(values) for name, values in times.items()},
                "ratio": measuring.ratio(times["one_by_one"], times["together"]),
            }
        )
    return measuring.report(chosen, device, rows)


if __name__ == "__main__":
    main()
