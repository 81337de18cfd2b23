"""Train a small MedSIGHT from nothing, through all stages, on a BiomedParse folder.

    python -m training.train training/nano.yaml
    python -m training.train training/nano.yaml --set stages.perceiver.steps=200 --set output=/tmp/short

Stage 0 language model on the corpus' own text; 1 image encoder and region perceiver; 2 vision-to-text projector;
3a codebook and group classifier; 3b text-to-vision projector and code rows; 4 language model, code rows and both
projectors.
The YAML file sets every choice. A checkpoint is written after each stage, the finished folder at the end.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import GenerationConfig

from configuration_medsight.configuration_medsight import MedSightConfig
from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration
from processing_medsight.image_processing_medsight import MedSightImageProcessor
from processing_medsight.processing_medsight import MedSightProcessor
from processing_medsight.region_codes_medsight import add_region_codes

from .conversations import ConversationMaker, corpus_texts, load_templates
from .data import (
    GROUP_NAMES,
    Augmentation,
    Augmenter,
    ImageRecord,
    class_names,
    load_samples,
    normalisation,
    read_manifest,
    sided_groups,
    split_validation,
)
from .language import (
    LanguageStage,
    TurnEncoder,
    seeded,
    train_grounding,
    train_language_model,
    train_vision_to_text,
)
from .stage_1_perceiver import PerceiverStage, train_perceiver
from .stage_3a_codebook import CodebookStage, train_codebook
from .tokenizer import train_tokenizer
from .views import annotate, see


STAGES = {
    "language_model": LanguageStage,
    "perceiver": PerceiverStage,
    "vision_to_text": LanguageStage,
    "codebook": CodebookStage,
    "text_to_vision": LanguageStage,
    "unified": LanguageStage,
}
KEYS = {
    "preset",
    "output",
    "seed",
    "threads",
    "data",
    "tokenizer",
    "image",
    "augmentation",
    "stages",
    "views",
    "weights",
}


def load_recipe(path: str | Path, overrides: list[str]) -> dict[str, Any]:
    """Read a recipe and set `a.b=value` overrides in it; raises ValueError naming a key that it does not know."""
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for override in overrides:
        name, _, value = override.partition("=")
        *parents, last = name.split(".")
        place = recipe
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict) or (last not in place and parents[:1] not in (["stages"], ["augmentation"])):
            raise ValueError(f"--set {override}: {path} has no key {name!r}")
        place[last] = yaml.safe_load(value)
    if unknown := (set(recipe) ^ KEYS) | (set(recipe["stages"]) ^ set(STAGES)):
        raise ValueError(f"{path}: unknown or missing keys: {', '.join(sorted(unknown))}")
    return recipe


def question_texts(path: str | Path) -> list[tuple[str, str]]:
    """Questions and answers of VQA-RAD's training rows whose image is not in its test split, as text."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [
        (row["question"].strip(), str(row["answer"]).strip())
        for row in rows
        if row["split"] == "train" and not row["image_in_test"]
    ]


def build_processor(recipe: dict[str, Any], config: MedSightConfig, texts: list[str]) -> MedSightProcessor:
    """Train the tokenizer, append the region codes, and join it with the image processor."""
    tokenizer = train_tokenizer(texts, recipe["tokenizer"]["base_size"])
    first = add_region_codes(tokenizer, config.num_groups, config.codes_per_group, config.use_region_codebook)
    found = {
        "region_code_start_id": first,
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "text_config.pad_token_id": tokenizer.pad_token_id,
        "text_config.eos_token_id": tokenizer.eos_token_id,
    }
    for name, value in found.items():
        holder = config.text_config if name.startswith("text_config.") else config
        expected = getattr(holder, name.removeprefix("text_config."))
        if expected != value:
            raise ValueError(f"the preset has {name}={expected}, the trained tokenizer has {value}")
    image = recipe["image"]
    size = {"height": config.image_size, "width": config.image_size}
    image_processor = MedSightImageProcessor(
        size=size, fit=image["fit"], image_mean=image["mean"], image_std=image["std"]
    )
    return MedSightProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        image_seq_length=config.image_seq_length,
        group_names=config.group_names,
    )


class Normalise(nn.Module):
    """Pixels in 0..1 to the encoder's input, with the image processor's mean and standard deviation."""

    def __init__(self, image_processor: MedSightImageProcessor) -> None:
        super().__init__()
        self.mean, self.std = normalisation(image_processor)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels - self.mean) / self.std


def training_records(recipe: dict[str, Any]) -> tuple[list[ImageRecord], list[ImageRecord], list[ImageRecord]]:
    """All training records, and their training and validation parts."""
    data = recipe["data"]
    records = read_manifest(data["root"], "train")
    return (records, *split_validation(records, data["validation_fraction"], recipe["seed"]))


def save_folder(
    model: MedSightForConditionalGeneration, processor: MedSightProcessor, folder: Path, dtype: str
) -> None:
    """Write a folder that loads anywhere: weights stored in `dtype`, the config asks for float32 to compute in."""
    state = {
        name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == "lm_head.weight")
    }
    model.config.dtype = torch.float32
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file, e.g. training/nano.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    arguments = parser.parse_args()
    train(load_recipe(arguments.recipe, arguments.set))


def train(recipe: dict[str, Any]) -> Path:
    """Run all stages of a recipe; returns the finished folder."""
    started = time.monotonic()
    seed, output = recipe["seed"], Path(recipe["output"])
    torch.set_num_threads(recipe["threads"])
    torch.manual_seed(seed)
    stages = {name: kind(**recipe["stages"][name]) for name, kind in STAGES.items()}

    def finished(stage: str) -> None:
        save_folder(model, processor, output / "stages" / stage, "float32")
        print(f"{stage} finished after {time.monotonic() - started:.0f} s in all", flush=True)

    everything, records, held_out = training_records(recipe)
    print(f"{len(records)} training and {len(held_out)} validation images", flush=True)
    templates = load_templates(Path(__file__).with_name("templates.yaml"))
    generator, chance = seeded(seed, "text")
    pairs = corpus_texts(ConversationMaker(templates, everything, chance), records, recipe["tokenizer"]["rounds"])
    pairs += question_texts(recipe["data"]["questions"])
    names = class_names(everything)
    config = MedSightConfig.from_preset(
        recipe["preset"], group_names=list(GROUP_NAMES), mask_class_names=names, num_mask_classes=len(names)
    )
    processor = build_processor(recipe, config, [f"{question}\n{answer}" for question, answer in pairs])
    model = MedSightForConditionalGeneration(config).float()
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    encoder = TurnEncoder(processor, config)
    train_language_model(model, encoder, pairs, stages["language_model"], generator)
    finished("0_language_model")

    samples = load_samples(records, processor.image_processor)
    normalise = Normalise(processor.image_processor)
    generator, _ = seeded(seed, "perceiver")
    augmenter = Augmenter(Augmentation(**recipe["augmentation"]), sided_groups(everything), generator)
    model.model.vision_tower.to(memory_format=torch.channels_last)
    class_embedding = train_perceiver(model, samples, augmenter, normalise, stages["perceiver"])
    finished("1_perceiver")

    plain = see(model, samples, normalise)
    augmented = [see(model, samples, normalise, augmenter) for _ in range(recipe["views"] - 1)]
    views = [list(of_one_image) for of_one_image in zip(plain, *augmented, strict=True)]
    print(f"{recipe['views']} views of every image after {time.monotonic() - started:.0f} s in all", flush=True)

    generator, chance = seeded(seed, "vision to text")
    maker = ConversationMaker(templates, everything, chance)
    train_vision_to_text(model, encoder, maker, views, stages["vision_to_text"], generator)
    finished("2_vision_to_text")

    generator, _ = seeded(seed, "codebook")
    all_views = [view for of_one_image in views for view in of_one_image]
    train_codebook(model, all_views, stages["codebook"], generator)
    annotate(model, all_views)
    finished("3a_codebook")

    for name, key in (("stage 3b text to vision", "text_to_vision"), ("stage 4 unified", "unified")):
        generator, chance = seeded(seed, key)
        maker = ConversationMaker(templates, everything, chance)
        train_grounding(name, model, encoder, maker, views, class_embedding, stages[key], generator, key == "unified")
        finished({"text_to_vision": "3b_text_to_vision", "unified": "4_unified"}[key])

    model.eval()
    model.generation_config = GenerationConfig(
        max_new_tokens=160,
        do_sample=False,
        return_dict_in_generate=True,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    save_folder(model, processor, output, recipe["weights"])
    print(f"{output} written after {time.monotonic() - started:.0f} s", flush=True)
    return output


if __name__ == "__main__":
    main()
