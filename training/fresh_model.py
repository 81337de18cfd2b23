"""A model from a preset, with a tokenizer of the corpus' own text: for runs that start from nothing pretrained."""

from typing import Any

from configuration_medsight.configuration_medsight import MedSightConfig
from configuration_medsight.presets_medsight import PRESETS
from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration
from processing_medsight.image_processing_medsight import MedSightImageProcessor
from processing_medsight.processing_medsight import MedSightProcessor
from processing_medsight.region_codes_medsight import IMAGE_TOKEN, add_region_codes

from .data.groups import Groups
from .recipe import Recipe
from .tokenizer import train_tokenizer


ROUND_VOCABULARY_TO = 64


def fresh_model(
    recipe: Recipe, groups: Groups, classes: list[str], conversations: Any
) -> tuple[MedSightForConditionalGeneration, MedSightProcessor]:
    """A randomly initialised model and its processor.

    Args:
        conversations: rows whose words the tokenizer learns.
    """
    settings = recipe.model
    if settings.preset not in PRESETS:
        raise ValueError(f"model.preset={settings.preset!r}: choose one of {', '.join(sorted(PRESETS))}")
    changes = dict(settings.config)
    codebook = changes.get("use_region_codebook", True)
    if codebook:
        changes = {"num_groups": len(groups.names), "group_names": groups.names, **changes}
    else:
        changes = {"num_groups": 1, "codes_per_group": 1, "group_names": ["any"], **changes}
    codes = changes["num_groups"] * changes.get("codes_per_group", PRESETS[settings.preset].get("codes_per_group", 32))
    tokenizer = train_tokenizer(words_of(conversations), settings.tokenizer_size)
    first = add_region_codes(tokenizer, changes["num_groups"], codes // changes["num_groups"], codebook)
    text = {
        **PRESETS[settings.preset]["text_config"],
        "vocab_size": -(-(first + codes) // ROUND_VOCABULARY_TO) * ROUND_VOCABULARY_TO,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **changes.pop("text_config", {}),
    }
    changes["vision_config"] = {**PRESETS[settings.preset]["vision_config"], **changes.get("vision_config", {})}
    config = MedSightConfig.from_preset(
        settings.preset,
        **{
            "text_config": text,
            "mask_class_names": classes,
            "num_mask_classes": len(classes),
            "region_code_start_id": first,
            "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            **changes,
        },
    )
    size = {"height": config.image_size, "width": config.image_size}
    image_processor = MedSightImageProcessor(
        size=size, fit=settings.fit, image_mean=settings.image_mean, image_std=settings.image_std
    )
    processor = MedSightProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        image_seq_length=config.image_seq_length,
        group_names=config.group_names,
    )
    return MedSightForConditionalGeneration(config).float(), processor


def words_of(conversations: Any) -> list[str]:
    """Every conversation as one text."""
    return ["\n".join(turn["content"] for turn in messages) for messages in conversations["messages"]]
