"""The tokenizer of a published checkpoint, which spells region codes `[M{k}_{m}]`; ours are `[C{k}_{m}]`, ids kept."""

import re
import tempfile
from pathlib import Path
from typing import Any

from transformers import Qwen2Tokenizer

from medsight.checkpoint import read_json
from medsight.files import write_json


PUBLISHED_CODE = re.compile(r"\[M(\d+)_(\d+)\]")


def load_published_tokenizer(folder: Path) -> tuple[Any, int, int, int]:
    """The folder's tokenizer with `[M{k}_{m}]` renamed `[C{k}_{m}]`, K, M, and the id of `[C0_0]`; every id stays.

    Raises:
        OSError: the folder has no tokenizer.
        ValueError: codes are missing or not in row-major order, or the image placeholder is not in the vocabulary.
    """
    published = Qwen2Tokenizer.from_pretrained(folder)
    vocabulary = published.get_vocab()
    spelled = {PUBLISHED_CODE.fullmatch(token): index for token, index in vocabulary.items()}
    ids = {(int(match[1]), int(match[2])): index for match, index in spelled.items() if match}
    if not ids:
        raise ValueError(f"{folder}: the tokenizer has no region codes, spelled [M0_0], [M0_1], …")
    groups, codes = (max(pair[axis] for pair in ids) + 1 for axis in (0, 1))
    first = ids.get((0, 0), -1)
    for k in range(groups):
        for m in range(codes):
            if ids.get((k, m)) != first + k * codes + m:
                raise ValueError(
                    f"{folder}: region code [M{k}_{m}] has id {ids.get((k, m))}, expected {first + k * codes + m}: "
                    f"{groups} groups of {codes} codes take consecutive ids, group by group"
                )
    for token in ("<|image_pad|>", "<|im_end|>", "<|endoftext|>"):
        if token not in vocabulary:
            raise ValueError(f"{folder}: the tokenizer lacks {token}")
    with tempfile.TemporaryDirectory() as temporary:
        for path in map(Path, published.save_pretrained(temporary)):
            if path.suffix == ".json":
                write_json(path, _rename_codes(read_json(path)))
        tokenizer = Qwen2Tokenizer.from_pretrained(temporary)
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = "<|im_end|>", "<|endoftext|>", None
    return tokenizer, groups, codes, first


def _rename_codes(value: Any) -> Any:
    """A tokenizer file's content with the codes renamed and ordinary: in no list of special tokens, not normalised."""
    if isinstance(value, str) and PUBLISHED_CODE.fullmatch(value):
        return value.replace("M", "C")
    if isinstance(value, list):
        return [_rename_codes(item) for item in value]
    if not isinstance(value, dict):
        return value
    renamed = {_rename_codes(key): _rename_codes(item) for key, item in value.items()}
    if PUBLISHED_CODE.fullmatch(str(value.get("content"))):
        renamed.update(special=False, normalized=False)
    special = value.get("extra_special_tokens")
    if isinstance(special, list):
        renamed["extra_special_tokens"] = [token for token in special if not PUBLISHED_CODE.fullmatch(str(token))]
    return renamed
