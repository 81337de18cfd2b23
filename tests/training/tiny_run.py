"""A BiomedParse folder of a few small pictures, drawn here, and a recipe that trains the smallest model on it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medsight.training.recipe import Recipe, build, merge


SETS = (
    ("sunnybrook", "MRI-cine", "heart", ("left ventricle",)),
    ("busi", "ultrasound", "breast", ("benign breast tumor",)),
    ("totalsegmentator", "CT", "torso", ("left kidney", "liver")),
)
COMMON = {
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 2,
    "max_steps": 6,
    "save_steps": 2,
    "eval_steps": 3,
    "example_images": 1,
    "learning_rate": 1e-3,
}
SPEAKS = {**COMMON, "kind": "conversations"}
UNIFIED = ["language_model", "vision_to_text", "text_to_vision"]
RECIPE: dict[str, Any] = {
    "threads": 1,
    "model": {"preset": "tiny", "tokenizer_size": 256, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
    "data": {"validation_fraction": 0.2, "text_rounds": 1},
    "annotations": {"plain": {"per_image": 1, "plain_share": 1.0}, "grounded": {"per_image": 2, "plain_share": 0.2}},
    "training": {"eval_strategy": "steps", "logging_steps": 1, "disable_tqdm": True},
    "stages": [
        {**SPEAKS, "name": "language_model", "trains": ["language_model"], "data": ["text"], "text_only": True},
        {**COMMON, "name": "perceiver", "kind": "regions"},
        {
            **{**SPEAKS, "name": "vision_to_text", "trains": ["vision_to_text"], "data": ["plain"]},
            "start_at_word_scale": True,
        },
        {
            **{**COMMON, "name": "codebook", "kind": "codebook"},
            **{"revive_every": 2, "revive_until": 1.0, "kmeans_images": 8, "revive_images": 6},
        },
        {**SPEAKS, "name": "text_to_vision", "trains": ["text_to_vision", "code_rows"], "data": ["grounded"]},
        {**SPEAKS, "name": "unified", "trains": UNIFIED, "data": ["grounded", "plain"], "mask_share": 0.5},
        {**SPEAKS, "name": "unified_again", "trains": UNIFIED, "data": ["grounded"]},
    ],
}
STAGES = [entry["name"] for entry in RECIPE["stages"]]


def draw_data(root: Path, images: int = 6) -> Path:
    """Write three sets of `images` pictures each, with one or two masks, and a normal picture without any."""
    rows, generator = [], np.random.default_rng(0)
    for name, modality, site, targets in SETS:
        for folder in ("train", "train_mask"):
            (root / name / folder).mkdir(parents=True)
        for number in range(images):
            pixels = generator.integers(0, 60, (24, 32), dtype=np.uint8)
            image = f"{name}/train/{number}_{modality}_{site}.png"
            row = {"image": image, "modality": modality, "site": site, "split": "train"}
            row |= {"group": f"{name}:{number}", "finding": "benign" if name == "busi" else None}
            row |= {"orientation": ("AI" if number == 1 else "LP") if name == "totalsegmentator" else None}
            for index, target in enumerate(targets):
                mask = np.zeros((24, 32), dtype=bool)
                mask[4 + number : 14 + number, 2 + 12 * index : 12 + 12 * index] = True
                pixels[mask] = 150 + 60 * index
                path = f"{name}/train_mask/{number}_{modality}_{site}_{target.replace(' ', '+')}.png"
                Image.fromarray(mask).save(root / path)
                rows.append({**row, "mask": path, "target": target})
            Image.fromarray(pixels).save(root / image)
    normal = {**rows[images], "mask": None, "target": "breast tumor", "absent": True, "group": "busi:normal"}
    normal |= {"image": "busi/train/normal_ultrasound_breast.png", "finding": "normal"}
    Image.fromarray(np.full((24, 32), 30, dtype=np.uint8)).save(root / normal["image"])
    rows.append(normal)
    (root / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def tiny_values(data: Path, output: Path, /, **changes: Any) -> dict[str, Any]:
    """The recipe as plain values; `changes` are merged in."""
    base = merge(RECIPE, {"output": str(output), "data": {"regions": [{"layout": "biomedparse", "path": str(data)}]}})
    return merge(base, changes)


def tiny_recipe(data: Path, output: Path, /, **changes: Any) -> Recipe:
    """The recipe; a stage set to None is left out."""
    return build(Recipe, tiny_values(data, output, **changes), "a test's recipe")


def only(*stages: str) -> dict[str, None]:
    """For `stages=`: leave out all other stages."""
    return {name: None for name in STAGES if name not in stages}


def steps_of(output: Path, stage: str) -> list[dict[str, float]]:
    """The losses of every step of a stage."""
    lines = (output / "stages" / stage / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
