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
from safetensors.torch import load_file, save_file
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
    parser.add_argument("--resume", action="store_true", help="take finished stages from the output folder")
    arguments = parser.parse_args()
    train(load_recipe(arguments.recipe, arguments.set), arguments.resume)


class Stages:
    """Checkpoints of the stages, a folder each under `output/stages`, and which of them need no training again."""

    def __init__(self, model: MedSightForConditionalGeneration, processor: MedSightProcessor, output: Path) -> None:
        self.model, self.processor, self.folder = model, processor, output / "stages"
        self.started = time.monotonic()

    def restore(self, stage: str) -> bool:
        """Load the stage's weights if it was finished before."""
        weights = self.folder / stage / "model.safetensors"
        if not weights.is_file():
            return False
        self.model.load_state_dict(load_file(weights), strict=not self.model.config.tie_word_embeddings)
        print(f"{stage} taken from {weights}", flush=True)
        return True

    def save(self, stage: str) -> None:
        save_folder(self.model, self.processor, self.folder / stage, "float32")
        wall, cpu = time.monotonic() - self.started, time.process_time()
        print(f"{stage} finished after {wall:.0f} s in all, {cpu:.0f} s of CPU", flush=True)


def train(recipe: dict[str, Any], resume: bool = False) -> Path:
    """Run all stages of a recipe, or those that `output/stages` lacks; returns the finished folder."""
    seed, output = recipe["seed"], Path(recipe["output"])
    torch.set_num_threads(recipe["threads"])
    torch.manual_seed(seed)
    settings = {name: kind(**recipe["stages"][name]) for name, kind in STAGES.items()}

    everything, records, held_out = training_records(recipe)
    print(f"{len(records)} training and {len(held_out)} validation images", flush=True)
    templates = load_templates(Path(__file__).with_name("templates.yaml"))
    generator, chance = seeded(seed, "language_model")
    pairs = corpus_texts(ConversationMaker(templates, everything, chance), records, recipe["tokenizer"]["rounds"])
    pairs += question_texts(recipe["data"]["questions"])
    names = class_names(everything)
    config = MedSightConfig.from_preset(
        recipe["preset"], group_names=list(GROUP_NAMES), mask_class_names=names, num_mask_classes=len(names)
    )
    finished = output / "stages" / "0_language_model"
    if resume and (finished / "model.safetensors").is_file():
        processor = MedSightProcessor.from_pretrained(finished)  # its tokenizer is the one that the weights know
    else:
        processor = build_processor(recipe, config, [f"{question}\n{answer}" for question, answer in pairs])
    model = MedSightForConditionalGeneration(config).float()
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    stages = Stages(model, processor, output)
    encoder = TurnEncoder(processor, config)
    if not (resume and stages.restore("0_language_model")):
        train_language_model(model, encoder, pairs, settings["language_model"], generator)
        stages.save("0_language_model")

    samples = load_samples(records, processor.image_processor)
    normalise = Normalise(processor.image_processor)
    strengths, sided = Augmentation(**recipe["augmentation"]), sided_groups(everything)
    model.model.vision_tower.to(memory_format=torch.channels_last)
    class_embedding = nn.Embedding(config.num_mask_classes, config.vision_hidden_size)
    class_queries = stages.folder / "1_perceiver" / "class_queries.safetensors"
    if resume and stages.restore("1_perceiver"):
        class_embedding.load_state_dict(load_file(class_queries))
    else:
        augmenter = Augmenter(strengths, sided, seeded(seed, "perceiver")[0])
        train_perceiver(model, class_embedding, samples, augmenter, normalise, settings["perceiver"])
        stages.save("1_perceiver")
        save_file(class_embedding.state_dict(), class_queries)

    augmenter = Augmenter(strengths, sided, seeded(seed, "views")[0])
    plain = see(model, samples, normalise)
    augmented = [see(model, samples, normalise, augmenter) for _ in range(recipe["views"] - 1)]
    views = [list(of_one_image) for of_one_image in zip(plain, *augmented, strict=True)]
    all_views = [view for of_one_image in views for view in of_one_image]
    if not (resume and stages.restore("2_vision_to_text")):
        generator, chance = seeded(seed, "vision_to_text")
        maker = ConversationMaker(templates, everything, chance)
        train_vision_to_text(model, encoder, maker, views, settings["vision_to_text"], generator)
        stages.save("2_vision_to_text")
    if not (resume and stages.restore("3a_codebook")):
        train_codebook(model, all_views, settings["codebook"], seeded(seed, "codebook")[0])
        stages.save("3a_codebook")
    annotate(model, all_views)
    for folder, key in (("3b_text_to_vision", "text_to_vision"), ("4_unified", "unified")):
        if not (resume and stages.restore(folder)):
            generator, chance = seeded(seed, key)
            maker = ConversationMaker(templates, everything, chance)
            train_grounding(
                f"stage {folder.replace('_', ' ')}",
                model,
                encoder,
                maker,
                views,
                class_embedding,
                settings[key],
                generator,
                whole_language_model=key == "unified",
            )
            stages.save(folder)

    model.eval()
    model.generation_config = GenerationConfig(
        max_new_tokens=160,
        do_sample=False,
        return_dict_in_generate=True,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    save_folder(model, processor, output, recipe["weights"])
    print(f"{output} written after {time.monotonic() - stages.started:.0f} s", flush=True)
    return output


if __name__ == "__main__":
    main()
