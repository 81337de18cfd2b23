"""A model from a preset, with a tokenizer of the corpus' own text: for runs from scratch."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from configuration_medsight.configuration_medsight import PRESETS, MedSightConfig
from medsight.data.groups import Groups
from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration
from processing_medsight.image_processing_medsight import MedSightImageProcessor
from processing_medsight.processing_medsight import MedSightProcessor
from processing_medsight.region_codes_medsight import IMAGE_TOKEN, QWEN3_ADDED_TOKENS, add_region_codes

from .recipe import Recipe


ROUND_VOCABULARY_TO = 64


def fresh_config(recipe: Recipe, groups: Mapping[str, list[str]], classes: Sequence[str]) -> MedSightConfig:
    """The configuration of a preset with a tokenizer of its own: `tokenizer_size` entries, then Qwen3's added tokens,
    then the region codes.

    Args:
        groups: name -> patterns, see `Groups`; the preset's own number where there are none.
        classes: names; the preset's own number where there are none.

    Raises:
        ValueError: an unknown preset, or a contradiction in `model.config`.
    """
    settings, changes = recipe.model, dict(recipe.model.config)
    if settings.preset not in PRESETS:
        raise ValueError(f"model.preset={settings.preset!r}: choose one of {', '.join(sorted(PRESETS))}")
    preset = PRESETS[settings.preset]
    if not changes.get("use_region_codebook", True):
        changes = {"num_groups": 1, "codes_per_group": 1, "group_names": ["any"], **changes}
    elif groups:
        changes = {"num_groups": len(groups), "group_names": list(groups), "group_patterns": dict(groups), **changes}
    if classes:
        changes = {"num_mask_classes": len(classes), "mask_class_names": list(classes), **changes}
    ids = {token: settings.tokenizer_size + i for i, (token, _) in enumerate(QWEN3_ADDED_TOKENS)}
    first = settings.tokenizer_size + len(ids)
    shape = {"num_groups": 18, "codes_per_group": 32, **preset, **changes}
    rows = first + shape["num_groups"] * shape["codes_per_group"]
    text = {
        **preset["text_config"],
        "vocab_size": -(-rows // ROUND_VOCABULARY_TO) * ROUND_VOCABULARY_TO,
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        **changes.pop("text_config", {}),
    }
    vision = {**preset["vision_config"], **changes.pop("vision_config", {})}
    ids_in_config = {"region_code_start_id": first, "image_token_id": ids[IMAGE_TOKEN]}
    return MedSightConfig.from_preset(
        settings.preset, **{"text_config": text, "vision_config": vision, **ids_in_config, **changes}
    )


def fresh_model(
    recipe: Recipe, groups: Groups, classes: list[str], conversations: Any
) -> tuple[MedSightForConditionalGeneration, MedSightProcessor]:
    """A randomly initialised model and its processor.

    Args:
        conversations: rows whose words the tokenizer learns.
    """
    settings, config = recipe.model, fresh_config(recipe, groups.patterns, classes)
    texts = ["\n".join(turn["content"] for turn in messages) for messages in conversations["messages"]]
    tokenizer = train_tokenizer(texts, settings.tokenizer_size)
    add_region_codes(tokenizer, config.num_groups, config.codes_per_group, config.use_region_codebook)
    look = {"fit": settings.fit, "image_mean": settings.image_mean, "image_std": settings.image_std}
    size = {"height": config.image_size, "width": config.image_size}
    processor = MedSightProcessor(
        image_processor=MedSightImageProcessor(size=size, **look),
        tokenizer=tokenizer,
        image_seq_length=config.image_seq_length,
        group_names=config.group_names,
    )
    return MedSightForConditionalGeneration(config).float(), processor


def train_tokenizer(texts: Iterable[str], base_size: int) -> Qwen2Tokenizer:
    """A small byte-level BPE in Qwen2Tokenizer's form: `base_size` entries (256 bytes and merges) and Qwen3's 26 added
    tokens; region codes are appended later, after these.

    Raises:
        ValueError: the texts are too few for that many entries.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=base_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != base_size:
        raise ValueError(
            f"the texts give {bpe.get_vocab_size()} byte-pair entries, tokenizer.base_size is {base_size}"
        )
    model = json.loads(bpe.to_str())["model"]
    none = dict.fromkeys(("unk_token", "eos_token", "pad_token"))
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, clean_up_tokenization_spaces=False, **none)
    tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t, special in QWEN3_ADDED_TOKENS])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer
