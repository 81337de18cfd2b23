"""Fine-tune medsight-nano on structures that it does not know, and score what it learns and what it forgets.

    python -m benchmarks.finetuning --data ../shared/data --output runs/finetuning
    python -m benchmarks.finetuning --data ../shared/data --output runs/forgetting --sets teeth nerve \\
        --variants plain replay recall keep lora --minutes 10
    python -m benchmarks.finetuning --data ../shared/data --output runs/curve --sets teeth --images 10 30 100

Each set is copied into the layout of another archive, as a lab's data would lie, and `medsight finetune` does the
rest. Old data are the training data of nano. A run that was stopped goes on; figures.json and a table are written at
the end: those of docs/fine-tune.md.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from medsight.checkpoint import shipped_checkpoint
from medsight.data.pictures import read_mask, read_picture
from medsight.data.sources import Source, find_source, load_source
from medsight.evaluation.predictions import encode_mask
from medsight.files import write_json, write_text
from medsight.text import align
from medsight.training.finetune import finetune
from medsight.training.finetune_report import table_of


# What nano does not know: name -> set of segmentation_more, layout to copy it into.
SETS = {
    "teeth": ("ufba425", "nnunet"),
    "nerve": ("usgra", "coco"),
    "fovea": ("faz_octa", "pairs"),
    "spine": ("spider", "coco"),
}
KEPT = ("vertebrae", "intervertebral discs")  # of the spine's structures: the single vertebrae are too few
# How forgetting is held back: what a variant changes in the stages of the recipe, by name.
NOTHING = {"perceiver": {"recalled": 0, "replay_share": 0.0}, "unified": {"replay_share": 0.0}}
NOTHING["text_to_vision"] = {"replay_share": 0.0}
LORA = {"method": "lora", "learning_rate": 1.0e-3, "muon_learning_rate": 0.0, "weight_decay": 0.0}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "plain": NOTHING,
    "replay": {"perceiver": {"recalled": 0}},
    "recall": {**NOTHING, "perceiver": {"recalled": 4, "replay_share": 0.0}},
    "keep": {name: {**changes, "keep_share": 0.3} for name, changes in NOTHING.items() if name != "text_to_vision"}
    | {"text_to_vision": {"replay_share": 0.0}},
    "lora": {**NOTHING, "unified": {"replay_share": 0.0, **LORA}},
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="folder of segmentation and segmentation_more")
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS])
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=["default"])
    options.add_argument("--images", nargs="+", type=int, help="training images  [default: all]")
    options.add_argument("--minutes", type=float, default=30.0)
    options.add_argument("--model", type=Path, default=shipped_checkpoint())
    chosen = options.parse_args(arguments)
    rows = [
        run(chosen, name, variant, images)
        for name in chosen.sets
        for images in chosen.images or [None]
        for variant in chosen.variants
    ]
    write_json(chosen.output / "figures.json", {"minutes": chosen.minutes, "rows": rows})
    print(align([[*rows[0]], *([str(value) for value in row.values()] for row in rows)]))


def run(chosen: Any, name: str, variant: str, images: int | None) -> dict[str, Any]:
    """One fine-tuning, and its figures."""
    folder = chosen.output / "-".join(filter(None, (name, variant, str(images or ""))))
    lab = chosen.output / "data" / f"{name}{images or ''}"
    source = copied(chosen.data / "segmentation_more", *SETS[name], lab, images)
    old = Source("biomedparse", str(chosen.data / "segmentation"))
    asked: dict[str, Any] = {"replay": old, "minutes": chosen.minutes, "accept_problems": True}
    recipe = folder / "finetune.yaml"
    if not recipe.is_file():
        finetune(source, folder, chosen.model, **asked, plan_only=True)
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        for stage in values["stages"]:
            stage |= VARIANTS[variant].get(stage["name"], {})
        write_text(recipe, yaml.safe_dump(values, sort_keys=False))
    finetune(source, folder, chosen.model, **asked)
    new, old_scores = table_of(folder, "new"), table_of(folder, "old")["dice"]
    return {
        "set": name,
        "variant": variant,
        "images": images or "all",
        "dice": round(new["dice"]["b"], 3),
        "named": round(float(np.mean([line["named"] for line in new["lines"]])), 3),
        "old before": round(old_scores["a"], 3),
        "old after": round(old_scores["b"], 3),
    }


def copied(root: Path, dataset: str, layout: str, folder: Path, images: int | None) -> Source:
    """A set as the data of a lab in another layout, with at most so many training images, drawn by lot."""
    entry = folder / "source.yaml"
    if not entry.is_file():
        rows = list(load_source(Source("biomedparse", str(root / dataset), split=None)))
        rows = [row for row in rows if row["targets"]]
        training = [row for row in rows if row["split"] == "train"]
        random.Random(0).shuffle(training)
        rows = training[:images] + [row for row in rows if row["split"] == "test"]
        told = WRITERS[layout](folder, rows)
        about = {"modality": rows[0]["modality"], "site": rows[0]["site"]}
        write_text(entry, yaml.safe_dump({"layout": layout, "path": ".", **about, **told}))
    return find_source(entry)


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A file name for each row, without an ending, that begins with its patient."""
    return [f"{str(row['patient']).replace('/', '-').replace(':', '-')}__{i:04d}" for i, row in enumerate(rows)]


def _shown(row: Mapping[str, Any]) -> tuple[Image.Image, list[tuple[str, np.ndarray]]]:
    """A row's picture, and its structures with their masks, (height, width)."""
    picture, wanted = read_picture(row["image"]), [*zip(row["targets"], row["masks"], strict=True)]
    kept = [pair for pair in wanted if pair[0] in KEPT] or wanted
    return picture, [(target, read_mask(mask, picture.size)) for target, mask in kept]


def write_coco(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A folder of pictures and an annotation file for each split."""
    ids: dict[str, int] = defaultdict(lambda: len(ids) + 1)
    files: dict[str, dict[str, list[Any]]] = {}
    for number, (name, row) in enumerate(zip(_names(rows), rows, strict=True), start=1):
        content = files.setdefault(row["split"], {"images": [], "annotations": []})
        picture, shown = _shown(row)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        picture.save(folder / "images" / f"{name}.png")
        about = {"width": picture.width, "height": picture.height}
        content["images"].append({"id": number, "file_name": f"{name}.png", **about})
        for target, mask in shown:
            shape = {"segmentation": encode_mask(mask), "iscrowd": 1, "area": int(mask.sum())}
            place = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": ids[target]}
            content["annotations"].append({**place, **shape})
    categories = [{"id": number, "name": target} for target, number in ids.items()]
    for split, content in files.items():
        (folder / f"{split}.json").write_text(json.dumps({**content, "categories": categories}))
    return {"patient": "^(.+?)__"}


def write_nnunet(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """PNG images and label maps; masks do not overlap."""
    labels: dict[str, int] = defaultdict(lambda: len(labels) + 1)
    for name, row in zip(_names(rows), rows, strict=True):
        picture, shown = _shown(row)
        values = np.zeros(picture.size[::-1], dtype=np.uint8)
        for target, mask in shown:
            values[mask] = labels[target]
        end = "Ts" if row["split"] == "test" else "Tr"
        for part, image, ending in (("images", picture, "_0000"), ("labels", Image.fromarray(values), "")):
            (folder / f"{part}{end}").mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{part}{end}" / f"{name}{ending}.png")
    content: dict[str, Any] = {"channel_names": {"0": rows[0]["modality"]}, "labels": {"background": 0, **labels}}
    content |= {"numTraining": sum(row["split"] == "train" for row in rows), "file_ending": ".png"}
    (folder / "dataset.json").write_text(json.dumps(content))
    return {"patient": "^(.+?)__"}


def write_pairs(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Folders of images and of masks of one structure, in a folder for each split."""
    for name, row in zip(_names(rows), rows, strict=True):
        picture, ((_, mask),) = _shown(row)
        for part, image in (("images", picture), ("masks", Image.fromarray(mask))):
            (folder / row["split"] / part).mkdir(parents=True, exist_ok=True)
            image.save(folder / row["split"] / part / f"{name}.png")
    return {"structure": rows[0]["targets"][0], "patient": "^(.+?)__"}


WRITERS: dict[str, Callable[[Path, Sequence[Mapping[str, Any]]], dict[str, Any]]] = {
    "coco": write_coco,
    "nnunet": write_nnunet,
    "pairs": write_pairs,
}


if __name__ == "__main__":
    main()
