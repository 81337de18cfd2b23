"""Region codes: in a tokenizer, `[C{k}_{m}]` is code m of group k, `[SEG]` the one code without a codebook; and what
each usually stands for, by the file region_codes.json that `medsight codes` writes into a checkpoint folder."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from configuration_medsight.configuration_medsight import SEG_TOKEN


REGION_CODES_FILE = "region_codes.json"
# The spelling of every region code; its groups are the code's group and index, `None` of `[SEG]`.
REGION_CODE = re.compile(r"\[(?:C(0|[1-9][0-9]*)_(0|[1-9][0-9]*)|SEG)\]")
IMAGE_TOKEN = "<|image_pad|>"

_QWEN3_SPECIAL = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
    <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
"""
_QWEN3_ORDINARY = """
    <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>
    <tool_response> </tool_response> <think> </think>
"""
# Qwen3's added tokens in the order of their ids, 151643 to 151668, and whether each is a special one.
QWEN3_ADDED_TOKENS = (
    *((token, True) for token in _QWEN3_SPECIAL.split()),
    *((token, False) for token in _QWEN3_ORDINARY.split()),
)


def find_codes(text: str) -> list[str]:
    """The region codes in a text, in its order."""
    return [match[0] for match in REGION_CODE.finditer(text)]


def is_region_code(token: str) -> bool:
    """Whether a token is spelled as a region code."""
    return REGION_CODE.fullmatch(token) is not None


def parse_region_code(token: str) -> tuple[int, int]:
    """Group and code index, both counted from 0, of a region code's spelling; (0, 0) for `[SEG]`.

    Raises:
        ValueError: if `token` is not a region code.
    """
    match = REGION_CODE.fullmatch(token)
    if match is None:
        raise ValueError(f"{token!r} is not a region code: expected [C<group>_<index>] or {SEG_TOKEN}")
    return int(match[1] or 0), int(match[2] or 0)


def region_code_tokens(num_groups: int, codes_per_group: int, use_region_codebook: bool = True) -> list[str]:
    """The spellings of all codes, row-major: group 0's codes first."""
    if not use_region_codebook:
        return [SEG_TOKEN]
    return [f"[C{group}_{index}]" for group in range(num_groups) for index in range(codes_per_group)]


def add_region_codes(
    tokenizer: PreTrainedTokenizerBase, num_groups: int, codes_per_group: int, use_region_codebook: bool = True
) -> int:
    """Append the codes to a tokenizer as ordinary added tokens, which `skip_special_tokens=True` keeps.

    A tokenizer that has exactly these codes already, row-major and without a gap, is left as it is.

    Returns:
        The id of the first code.

    Raises:
        ValueError: if it has some of them, or other codes, or the same ones in another order.
    """
    tokens = region_code_tokens(num_groups, codes_per_group, use_region_codebook)
    vocabulary = tokenizer.get_vocab()
    present = sorted((token_id, token) for token, token_id in vocabulary.items() if is_region_code(token))
    if present:
        first = present[0][0]
        if present != [(first + offset, token) for offset, token in enumerate(tokens)]:
            raise ValueError(
                f"the tokenizer already has {len(present)} region codes, {present[0][1]} (id {first}) to "
                f"{present[-1][1]}: they are not the {len(tokens)} codes {tokens[0]} to {tokens[-1]} in a row"
            )
        return first
    first = len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    return first


def append_region_codes(tokenizer: PreTrainedTokenizerBase, num_groups: int, codes_per_group: int, more: int) -> int:
    """Append the codes of so many `more` groups to a tokenizer whose last tokens are the codes of `num_groups` groups.

    Returns:
        The id of the first code of all.

    Raises:
        ValueError: if these are not its last tokens.
    """
    first = add_region_codes(tokenizer, num_groups, codes_per_group)
    end = first + num_groups * codes_per_group
    later = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items() if token_id >= end)
    if later:
        raise ValueError(
            f"the tokenizer has {len(later)} token(s) after its last region code, {later[0][1]!r} (id {later[0][0]}) "
            f"first: the codes of new groups must follow the known ones, from id {end} on"
        )
    tokens = region_code_tokens(num_groups + more, codes_per_group)[num_groups * codes_per_group :]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    return first


def region_code_ids(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The ids of a tokenizer's region codes and their spellings."""
    return {token_id: token for token, token_id in tokenizer.get_added_vocab().items() if is_region_code(token)}


def split_at_codes(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], skip_special_tokens: bool
) -> tuple[list[str], list[int], str]:
    """Take generated ids apart at their region codes.

    Returns:
        The text before the first code, between codes, ..., after the last; the codes' places in `ids`; the whole text.
    """
    names = region_code_ids(tokenizer)
    codes = [i for i, token_id in enumerate(ids) if token_id in names]
    ends = [*codes, len(ids)]
    pieces = [tokenizer.decode(ids[: ends[0]], skip_special_tokens=skip_special_tokens)]
    for start, end in zip(codes, ends[1:], strict=True):
        # Decoded together with its code, because some tokenizers drop the first space of what they decode.
        text = tokenizer.decode(ids[start:end], skip_special_tokens=skip_special_tokens)
        pieces.append(text.removeprefix(names[ids[start]]))
    whole = pieces[0] + "".join(names[ids[i]] + piece for i, piece in zip(codes, pieces[1:], strict=True))
    return pieces, codes, whole


@dataclass(frozen=True)
class CodeMeaning:
    """What a region code usually stands for; as text, "left ventricle (92% of 51)".

    Attributes:
        structure: what most of the masks with this code show.
        share: of these masks that show it, in (0, 1].
        count: how many masks were given the code.
    """

    structure: str
    share: float
    count: int

    def __str__(self) -> str:
        return f"{self.structure} ({100 * self.share:.0f}% of {self.count:,})"


def code_meaning(region_codes: Mapping[str, Any] | None, code: str) -> CodeMeaning | None:
    """What the content of region_codes.json says of a code; `None` without content, or where no mask was given it."""
    entry = None if region_codes is None else region_codes["codes"].get(code)
    if entry is None:
        return None
    structure = max(entry["structures"], key=entry["structures"].get)  # of equals the first, as in the file
    return CodeMeaning(structure, float(entry["structures"][structure]), entry["n"])


def structures_of_groups(region_codes: Mapping[str, Any] | None, num_groups: int) -> list[frozenset[str]]:
    """The structures that the codes of each group were given to, by the content of region_codes.json; none without."""
    found: list[set[str]] = [set() for _ in range(num_groups)]
    for code, entry in ({} if region_codes is None else region_codes["codes"]).items():
        found[parse_region_code(code)[0]] |= entry["structures"].keys()
    return [frozenset(names) for names in found]


def read_region_codes(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a region_codes.json; a ValueError names a damaged one, an OSError one that cannot be read."""
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        for code, entry in content["codes"].items():
            parse_region_code(code)
            if not isinstance(entry["n"], int) or not sum(entry["structures"].values()) > 0:
                raise ValueError(f"{code}: expected a count 'n' and shares in 'structures', got {entry!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): remove it, and write it with medsight codes"
        ) from error
    return content


def find_region_codes(folder: str | os.PathLike, **hub: Any) -> dict[str, Any] | None:
    """The content of the region_codes.json of a checkpoint folder, or of a repository on the Hub, if it has one.

    `hub` is `revision`, `token`, `subfolder` and the like, as for `from_pretrained`; errors as of `read_region_codes`.
    """
    absent_is_none = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
    path = cached_file(folder, REGION_CODES_FILE, **absent_is_none, **hub)
    return None if path is None else read_region_codes(path)


def write_region_codes(content: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Write region_codes.json into a folder."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (Path(folder) / REGION_CODES_FILE).write_text(text, encoding="utf-8")
