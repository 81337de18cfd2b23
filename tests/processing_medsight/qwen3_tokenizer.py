"""Tokenizers for tests: Qwen3's own, from the ranks that the package dashscope ships, and a tiny one of its kind."""

import base64
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from processing_medsight import QWEN3_ADDED_TOKENS


CORPUS = [
    "Segment the liver. Segmentations: liver, spleen, left kidney and right kidney.",
    "Findings consistent with liver tumor are present, segmented as shown here.",
    "You are a helpful assistant. Is there a polyp or an ulcer in the image? Yes, there is a polyp.",
    "user system assistant\n\nBrain lesions are seen in the left hemisphere, segmented in the MRI of the brain.",
]


def build_tiny_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE of Qwen2's kind, trained on a few lines, with Qwen3's 26 added tokens after 400 entries."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    vocab = trained.get_vocab()
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    return _with_added_tokens(vocab, merges)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The one merge that makes each token of more than a byte: the two parts that lower ranks leave of it.

    tiktoken's rule: always merge the neighbours whose union has the lowest rank.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            unions = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            at = unions.index(min(unions))
            if unions[at] == rank:
                raise ValueError(f"rank {rank} ({token!r}) is not made of two lower ranks: {parts}")
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def build_qwen3_tokenizer(path: Path) -> Qwen2Tokenizer:
    """Qwen3's tokenizer, byte for byte: 151,643 ranks, 151,387 merges, 26 added tokens."""
    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    lines = path.read_bytes().splitlines()  # base64 token and rank a line
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    vocab = {spell(token): rank for token, rank in ranks.items()}
    return _with_added_tokens(vocab, [(spell(left), spell(right)) for left, right in merges_of(ranks)])


def _with_added_tokens(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Qwen2Tokenizer:
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, padding_side="left", model_max_length=131072)
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in QWEN3_ADDED_TOKENS])
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer
