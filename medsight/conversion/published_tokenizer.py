"""The tokenizer of a published checkpoint, which spells region codes `[M{k}_{m}]`; ours are `[C{k}_{m}]`, ids kept."""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import Qwen2Tokenizer

from medsight.checkpoint import read_json


PUBLISHED_CODE = re.compile(r"\[M(\d+)_(\d+)\]")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt"),
)


def load_published_tokenizer(folder: Path) -> tuple[Any, int, int, int]:
    """The folder's tokenizer with `[M{k}_{m}]` renamed `[C{k}_{m}]`, K, M, and the id of `[C0_0]`; every id stays.

    Raises:
        ValueError: codes are missing or not in row-major order, or the image placeholder is not in the vocabulary.
    """
    with tempfile.TemporaryDirectory() as temporary:
        copied = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
        if not {"tokenizer.json", "vocab.json"} & set(copied):
            raise FileNotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json")
        ids: dict[str, int] = {}
        for name in copied:
            if not name.endswith(".json"):
                shutil.copy(folder / name, temporary)
                continue
            content = read_json(folder / name)
            ids.update(_ids_in(name, content))
            (Path(temporary) / name).write_text(
                json.dumps(_rename_codes(content), ensure_ascii=False), encoding="utf-8"
            )
        tokenizer = Qwen2Tokenizer.from_pretrained(temporary)
    vocabulary = tokenizer.get_vocab()
    for token, index in ids.items():
        renamed = PUBLISHED_CODE.sub(r"[C\1_\2]", token)
        if vocabulary.get(renamed) != index:
            raise ValueError(
                f"{folder}: token {token!r} has id {index} in one tokenizer file but {vocabulary.get(renamed)} in all "
                "together: they contradict each other"
            )
    spelled = {index: PUBLISHED_CODE.fullmatch(token) for token, index in ids.items()}
    published = {(int(found[1]), int(found[2])): index for index, found in spelled.items() if found}
    if not published:
        raise ValueError(f"{folder}: the tokenizer has no region codes, spelled [M0_0], [M0_1], …")
    groups, codes = (max(pair[axis] for pair in published) + 1 for axis in (0, 1))
    first = published.get((0, 0), -1)
    for k in range(groups):
        for m in range(codes):
            if published.get((k, m)) != first + k * codes + m:
                raise ValueError(
                    f"{folder}: region code [M{k}_{m}] has id {published.get((k, m))}, expected "
                    f"{first + k * codes + m}: {groups} groups of {codes} codes take consecutive ids, group by group"
                )
    for token in ("<|image_pad|>", "<|im_end|>", "<|endoftext|>"):
        if token not in vocabulary:
            raise ValueError(f"{folder}: the tokenizer lacks {token}")
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = "<|im_end|>", "<|endoftext|>", None
    return tokenizer, groups, codes, first


def _ids_in(file: str, content: dict[str, Any]) -> dict[str, int]:
    if file == "tokenizer.json":
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return {**content.get("model", {}).get("vocab", {}), **added}
    return content if file in ("vocab.json", "added_tokens.json") else {}


def _rename_codes(value: Any) -> Any:
    """A tokenizer file's content with the codes renamed and ordinary: in no list of special tokens, not normalised."""
    if isinstance(value, str):
        return PUBLISHED_CODE.sub(r"[C\1_\2]", value) if PUBLISHED_CODE.fullmatch(value) else value
    if isinstance(value, dict):
        renamed = {_rename_codes(key): _rename_codes(item) for key, item in value.items()}
        for key in ("additional_special_tokens", "extra_special_tokens"):
            if isinstance(value.get(key), list):
                renamed[key] = [token for token in value[key] if not PUBLISHED_CODE.fullmatch(_content(token))]
        if PUBLISHED_CODE.fullmatch(_content(value)):
            renamed.update(special=False, normalized=False)
        return renamed
    return [_rename_codes(item) for item in value] if isinstance(value, list) else value


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)
