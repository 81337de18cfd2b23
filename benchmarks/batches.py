"""What do batches bring? Items a second at each batch size against the same items one by one.

The items differ in the length of the prompt, in the length of the answer and in the number of codes cited, none among
them; a batch takes as long as its longest item.

Rows: batch_size, one_by_one_s, together_s, ratio (throughput together / one by one).

    python -m benchmarks.batches --preset 8b --device cuda --output batches.json
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from . import measuring, random_inputs


CODES = (2, 0, 1, 4, 1, 3, 0, 2)  # cited by item after item


def answer_all(model: Any, batches: Sequence[tuple[dict[str, Any], list[list[int]]]]) -> list[int]:
    """Answers batch after batch, each given as inputs and what to answer; how many masks each item gets."""
    masks: list[int] = []
    for inputs, answers in batches:
        fixed = random_inputs.fixed(answers, inputs["input_ids"])
        out = model.generate(**inputs, max_new_tokens=max(map(len, answers)) + 1, logits_processor=fixed)
        masks += map(len, out.mask_logits)
    return masks


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser("benchmarks.batches", __doc__)
    measuring.add_shape(options, (8,))
    measuring.add_lengths(options)
    chosen = options.parse_args(arguments)
    device, dtype = measuring.prepare(chosen)
    model = random_inputs.random_model(chosen.preset, device, dtype)
    rows = []
    for size in chosen.batch_size:
        # From half as long to the full length; the longest prompt has the shortest answer.
        shares = [1 - 0.5 * item / max(1, size - 1) for item in range(size)]
        lengths = [max(4, round(chosen.prompt_words * share)) for share in shares]
        counts = [CODES[item % len(CODES)] for item in range(size)]
        answers = [
            random_inputs.answer(model.config, max(count + 2, round(chosen.new_tokens * share)), count, seed=item)
            for item, (share, count) in enumerate(zip(shares[::-1], counts, strict=True))
        ]
        inputs = random_inputs.prompts(model.config, lengths, device, dtype)
        single = [(random_inputs.row_of(inputs, row), [answers[row]]) for row in range(size)]
        cases = {
            "one_by_one": partial(answer_all, model, single),
            "together": partial(answer_all, model, [(inputs, answers)]),
        }
        for run in cases.values():
            if (masks := run()) != counts:
                raise RuntimeError(f"expected {counts} masks, got {masks}")
        times = measuring.paired(cases, chosen, device)
        rows.append(
            {
                "batch_size": size,
                **measuring.seconds(times),
                "ratio": measuring.ratio(times["one_by_one"], times["together"]),
            }
        )
    return measuring.report(chosen, device, rows)


if __name__ == "__main__":
    main()
