"""A small byte-level BPE in Qwen2Tokenizer's form, trained on the corpus' own text."""

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from processing_medsight.region_codes_medsight import QWEN3_ADDED_TOKENS


def train_tokenizer(texts: Iterable[str], base_size: int) -> Qwen2Tokenizer:
    """Train a BPE of exactly `base_size` entries (256 bytes and merges) and append Qwen3's 26 added tokens.

    Args:
        texts: whatever the language model shall read and write.
        base_size: entries without the added tokens; region codes are appended later, after these.

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
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,
        eos_token=None,
        pad_token=None,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t, special in QWEN3_ADDED_TOKENS])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer
