"""A tiny random checkpoint folder: the `tiny` preset, a tokenizer of bytes, Qwen3's added tokens and region codes."""

from pathlib import Path

import torch
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from configuration_medsight import MedSightConfig
from modeling_medsight import MedSightForConditionalGeneration
from processing_medsight import QWEN3_ADDED_TOKENS, MedSightImageProcessor, MedSightProcessor, add_region_codes


def byte_tokenizer() -> Qwen2Tokenizer:
    """256 bytes, then Qwen3's 26 added tokens: `<|endoftext|>` is 256, `<|im_end|>` 258, `<|image_pad|>` 268."""
    vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=None, eos_token=None, pad_token=None)
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in QWEN3_ADDED_TOKENS])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer


def tiny_processor(config: MedSightConfig) -> MedSightProcessor:
    """The processor that fits a configuration of the `tiny` preset's vocabulary."""
    tokenizer = byte_tokenizer()
    add_region_codes(tokenizer, config.num_groups, config.codes_per_group, config.use_region_codebook)
    image_processor = MedSightImageProcessor(size={"height": config.image_size, "width": config.image_size})
    return MedSightProcessor(
        image_processor, tokenizer, image_seq_length=config.image_seq_length, group_names=config.group_names
    )


def save_tiny_checkpoint(folder: Path, **overrides: object) -> Path:
    """Write model and processor of the `tiny` preset, seeded, into `folder`."""
    config = MedSightConfig.from_preset("tiny", **overrides)
    torch.manual_seed(0)
    model = MedSightForConditionalGeneration(config).eval()
    model.generation_config.return_dict_in_generate = True
    model.save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    return folder
