"""Tokenizers for tests: Qwen3's own, from the ranks that the package dashscope ships, and a tiny one of its kind."""

import base64
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

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


def read_ranks(path: Path) -> dict[bytes, int]:
    """A tiktoken file: base64 token and rank a line."""
    lines = path.read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The one merge that makes each token of more than a byte: the two parts that lower ranks leave of it."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = byte_pair_encode(token, ranks, below=rank)
            if len(parts) != 2:
                raise ValueError(f"rank {rank} ({token!r}) is not made of two lower ranks: {parts}")
            merges.append((parts[0], parts[1]))
    return merges


def byte_pair_encode(text: bytes, ranks: dict[bytes, int], below: int | None = None) -> list[bytes]:
    """tiktoken's rule: always merge the neighbours whose union has the lowest rank (below `below`)."""
    parts = [text[i : i + 1] for i in range(len(text))]
    while True:
        best, at = below, None
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1])
            if rank is not None and (best is None or rank < best):
                best, at = rank, i
        if at is None:
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def build_qwen3_tokenizer(path: Path) -> Qwen2Tokenizer:
    """Qwen3's tokenizer, byte for byte: 151,643 ranks, 151,387 merges, 26 added tokens."""
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ranks = read_ranks(path)
    vocab = {spell(token): rank for token, rank in ranks.items()}
    return _with_added_tokens(vocab, [(spell(left), spell(right)) for left, right in merges_of(ranks)])


def _with_added_tokens(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Qwen2Tokenizer:
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, padding_side="left", model_max_length=131072)
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in QWEN3_ADDED_TOKENS])
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    return letters
