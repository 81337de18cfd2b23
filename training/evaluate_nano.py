"""Score a trained folder through generate(): the Dice of every named structure, a set at a time.

python -m training.evaluate_nano medsight-nano                    # validation part of the train rows
python -m training.evaluate_nano medsight-nano --split test       # once, at the very end

Prints the mean Dice of every set and the examples that the README shows.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration
from processing_medsight.processing_medsight import MedSightProcessor

from .data import ImageRecord, read_image, read_manifest, read_mask, split_validation
from .train import load_recipe


PROMPT = "Segment the {target}."


def region_for(regions: list[Any], target: str) -> Any:
    """The region whose phrase is the target, else the only region, else None."""
    named = [region for region in regions if region.phrase and region.phrase.lower() == target.lower()]
    if named:
        return named[0]
    return regions[0] if len(regions) == 1 else None


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Dice of two boolean masks; 1 where both are empty."""
    total = prediction.sum() + reference.sum()
    return float(2 * (prediction & reference).sum() / total) if total else 1.0


@torch.no_grad()
def evaluate(
    model: MedSightForConditionalGeneration,
    processor: MedSightProcessor,
    records: list[ImageRecord],
    batch_size: int = 32,
    prompt: str = PROMPT,
) -> dict[str, Any]:
    """Ask for every row's target and compare.

    Returns:
        `rows` (a dict a row), `sets` (mean Dice a set), `macro` (unweighted over sets), `mean` (over rows),
        `absent_without_mask` (share of absent targets that got no region).
    """
    questions = [(record, target, False) for record in records for target in record.masks]
    questions += [(record, target, True) for record in records for target in record.absent]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        messages = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": read_image(record.image)},
                        {"type": "text", "text": prompt.format(target=target)},
                    ],
                }
            ]
            for record, target, _ in batch
        ]
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        output = model.generate(**inputs, max_new_tokens=48, return_dict_in_generate=True)
        answers = processor.post_process_grounded_answer(output, inputs)
        for (record, target, absent), answer in zip(batch, answers, strict=True):
            row = {
                "image": record.image.name,
                "set": record.dataset,
                "target": target,
                "absent": absent,
                "answer": answer.raw_text,
                "regions": len(answer.regions),
            }
            if not absent:
                region = region_for(answer.regions, target)
                size = read_image(record.image).size
                reference = read_mask(record.masks[target], size)
                row["dice"] = dice(region.mask.numpy(), reference) if region is not None else 0.0
            rows.append(row)
    return summarise(rows)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of rows as `evaluate` makes them."""
    by_set: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if not row["absent"]:
            by_set[row["set"]].append(row["dice"])
    sets = {name: float(np.mean(values)) for name, values in sorted(by_set.items())}
    absent = [row["regions"] == 0 for row in rows if row["absent"]]
    present = [value for values in by_set.values() for value in values]
    return {
        "macro": float(np.mean(list(sets.values()))),
        "mean": float(np.mean(present)),
        "sets": sets,
        "counts": {name: len(values) for name, values in sorted(by_set.items())},
        "absent_without_mask": float(np.mean(absent)) if absent else None,
        "rows": rows,
    }


def examples(rows: list[dict[str, Any]], sets: int = 5, images: int = 2) -> str:
    """A Markdown table: the first `images` images of the `sets` largest sets, each with its first target."""
    first_rows: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if not row["absent"]:
            first_rows[row["set"]].setdefault(row["image"], row)
    largest = sorted(first_rows, key=lambda name: (-len(first_rows[name]), name))[:sets]
    lines = ["| set | image | prompt | answer | Dice |", "|---|---|---|---|---|"]
    for name in largest:
        for row in list(first_rows[name].values())[:images]:
            prompt = PROMPT.format(target=row["target"])
            lines.append(f"| {name} | `{row['image']}` | {prompt} | {row['answer']} | {row['dice']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a folder that training.train wrote")
    parser.add_argument("--recipe", default=str(Path(__file__).with_name("nano.yaml")))
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--output", help="JSON file for the scores and every answer")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.set)
    torch.set_num_threads(recipe["threads"])
    data = recipe["data"]
    if arguments.split == "test":
        records = read_manifest(data["root"], "test")
    else:
        records = split_validation(read_manifest(data["root"], "train"), data["validation_fraction"], recipe["seed"])[
            1
        ]
    model = MedSightForConditionalGeneration.from_pretrained(arguments.folder, dtype=torch.float32).eval()
    processor = MedSightProcessor.from_pretrained(arguments.folder)
    scores = evaluate(model, processor, records)
    for name, value in scores["sets"].items():
        print(f"{name:20s} {value:.3f}  ({scores['counts'][name]} rows)")
    print(f"macro Dice {scores['macro']:.3f}, mean over rows {scores['mean']:.3f}")
    if scores["absent_without_mask"] is not None:
        print(f"absent structures answered without a mask: {scores['absent_without_mask']:.3f}")
    print(examples(scores["rows"]))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(scores, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
