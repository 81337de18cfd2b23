"""Chat templates, and what keeps the text of a message from becoming a token that only the template may write."""

import dataclasses
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase


# The text of a message, whose content is a string or parts; and what no template here has a place for.
_PARTS = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- elif part.type == 'image' -%}
                {{- 'IMAGE' -}}
            {%- else -%}
                {{- raise_exception("a message holds a part of type '" ~ part.type ~ "': use text or image") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools or documents -%}
    {{- raise_exception('this chat template has no place for tools or documents') -}}
{%- endif -%}
"""
_EACH_MESSAGE = """\
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception("a message has the role '" ~ message.role ~ "': use system, user or assistant") -}}
    {%- endif -%}
"""
_TEMPLATE = (
    _PARTS
    + "{%- set no_thinking = NO_THINKING -%}\nDEFAULT_SYSTEM"
    + _EACH_MESSAGE
    + """\
    {%- set text = render(message.content) -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- if not text.startswith('<think>') -%}
            {{- no_thinking -}}
        {%- endif -%}
        {%- generation -%}
            {{- text ~ '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- text ~ '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' ~ no_thinking -}}
{%- endif -%}
"""
)
IMAGE_BLOCK = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")

# Qwen3's turns, with images between <|vision_start|> and <|vision_end|>. Two deliberate differences: thinking is off
# unless enable_thinking=True, and the empty think block that switches it off stands in every assistant turn, earlier
# ones too. So the prompt of a turn is a prefix of every later one: a model is prompted as it was trained, and the
# codes of earlier answers keep their states.
_CHAT = _TEMPLATE.replace("IMAGE", "".join(IMAGE_BLOCK)).replace("DEFAULT_SYSTEM", "")
CHAT_TEMPLATE = _CHAT.replace(
    "NO_THINKING", r"'' if enable_thinking is defined and enable_thinking else '<think>\n\n</think>\n\n'"
)
# The same turns of a language model that has no think marks.
PLAIN_CHAT_TEMPLATE = _CHAT.replace("NO_THINKING", "''")

# The released checkpoint's prompt: a default system turn, the bare image block and a newline, no think block.
_DEFAULT_SYSTEM = r"""{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
"""
PUBLISHED_CHAT_TEMPLATE = (
    _TEMPLATE.replace("IMAGE", r"<|image_pad|>\n")
    .replace("NO_THINKING", "''")
    .replace("DEFAULT_SYSTEM", _DEFAULT_SYSTEM)
)

# Another language model's template, OWN, with image blocks let in: it renders messages whose parts are one text. An
# answer is what it adds to its prompt for that answer, up to the END of the turn: here, too, the prompt of a turn is a
# prefix of every later one, and where a template rewrites earlier turns this one refuses.
_OWN = (
    _PARTS.replace("IMAGE", "".join(IMAGE_BLOCK))
    + """\
{%- set enable_thinking = enable_thinking is defined and enable_thinking -%}
{%- macro medsight_own(messages, add_generation_prompt) %}
OWN{% endmacro -%}
{%- set medsight = namespace(messages=[], written='') -%}
"""
    + _EACH_MESSAGE
    + """\
    {%- set medsight.messages = medsight.messages + [dict(message, content=render(message.content))] -%}
{%- endfor -%}
{%- for message in medsight.messages -%}
    {%- if message.role == 'assistant' -%}
        {%- set prompt = medsight_own(medsight.messages[:loop.index0], true) -%}
        {%- set turns = medsight_own(medsight.messages[:loop.index], false) -%}
        {%- set answer = turns[prompt | length:] -%}
        {%- if not (prompt.startswith(medsight.written) and turns.startswith(prompt) and END in answer) -%}
            {{- raise_exception('the chat template rewrites earlier turns, or does not end this one with ' ~ END) -}}
        {%- endif -%}
        {{- prompt[medsight.written | length:] -}}
        {%- generation -%}
            {{- answer.split(END)[0] ~ END -}}
        {%- endgeneration -%}
        {%- set medsight.written = prompt ~ answer.split(END)[0] ~ END -%}
    {%- endif -%}
{%- endfor -%}
{%- set turns = medsight_own(medsight.messages, add_generation_prompt) -%}
{%- if not turns.startswith(medsight.written) -%}
    {{- raise_exception('the chat template rewrites earlier turns') -}}
{%- endif -%}
{{- turns[medsight.written | length:] -}}
"""
)


def own_chat_template(template: str, end: str) -> str:
    """A language model's own chat template with image blocks let in, and its answers marked for `assistant_masks`.

    Args:
        template: Jinja, for messages of text.
        end: the token that ends an assistant's turn.
    """
    unmarked = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    unmarked = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", unmarked)
    quoted = json.dumps(end, ensure_ascii=False)
    return _OWN.replace("END", quoted).replace("OWN", unmarked.removesuffix("\n"))


WORD_JOINER = "\u2060"
_MEDIA = ("image", "image_url", "video", "audio")
_MARKS = re.compile(r"<\|[^|<>\s]+\|>|\[/?[A-Z_]{3,}\]|<</?[A-Z]+>>")


def neutralise_conversations(
    conversations: Any, tokenizer: PreTrainedTokenizerBase, image_token: str, chat_template: Any = None
) -> Any:
    """Copies of chat messages in which no text is a token that it must not write.

    What stands in any turn but the assistant's never becomes an added token of the tokenizer: no turn marker, image
    placeholder, think mark, region code. An assistant's turn keeps its region codes and think marks (added tokens
    that are not special). Wherever such a token begins, an invisible word joiner (U+2060) is put after its first
    character: the text reads the same and is tokenized as ordinary text. Nothing is removed, so nothing can close up
    into a new token; neighbouring text parts are joined first, as a template joins them. The same is done to marks of
    the chat template that are no tokens, such as `[INST]`.

    Args:
        conversations: a list of messages, or a list of such lists, as `apply_chat_template` takes: dicts, dataclasses
            or pydantic's models. Not changed.
        tokenizer: the tokenizer whose added tokens count.
        image_token: a token that no text may write, special or not.
        chat_template: the Jinja text that the messages are for.

    Raises:
        ValueError: if a text would still become such a token (one of a single character, for example), or if a message
            is not one.
    """
    conversations = getattr(conversations, "messages", conversations)
    if not conversations:
        raise ValueError("a conversation is empty: expected a list of messages")
    if isinstance(conversations[0], (list, tuple)) or hasattr(conversations[0], "messages"):
        return [neutralise_conversations(chat, tokenizer, image_token, chat_template) for chat in conversations]
    added = tokenizer.added_tokens_decoder
    everything = {i: token.content for i, token in added.items() if token.content and not token.content.isspace()}
    special = {i: text for i, text in everything.items() if added[i].special or text == image_token}
    marks = set(_MARKS.findall(chat_template if isinstance(chat_template, str) else "")) - {*everything.values()}
    messages = []
    for number, message in enumerate(conversations):
        message = _as_dicts(message)
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(f"message {number}: expected a dict with 'role' and 'content', got {message!r:.200}")
        _check_content(message.get("content"), f"message {number}")
        forbidden = special if message["role"] == "assistant" else everything
        where = f"message {number} ({str(message['role'])[:40]})"
        forbidden = {**forbidden, **{-1 - i: mark for i, mark in enumerate(sorted(marks))}}  # marks have no id
        messages.append({key: _neutralise(value, forbidden, tokenizer, where) for key, value in message.items()})
    return messages


def _as_dicts(value: Any) -> Any:
    """Dicts in place of dataclasses and pydantic's models, without their fields that are None."""
    if isinstance(value, (list, tuple)):
        return [_as_dicts(entry) for entry in value]
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "model_dump"):
        fields = value.model_dump()
    else:
        return {name: _as_dicts(entry) for name, entry in value.items()} if isinstance(value, dict) else value
    return {name: _as_dicts(entry) for name, entry in fields.items() if entry is not None}


def _check_content(content: Any, where: str) -> None:
    """Raises ValueError for what a template would render as something else, or not at all."""
    if content is None or isinstance(content, str):
        return
    for part in content if isinstance(content, (list, tuple)) else [content]:
        is_part = isinstance(part, dict) and "type" in part and (part["type"] != "text" or _is_text_part(part))
        if not is_part or part is content:
            raise ValueError(
                f"{where}: expected text or a list of parts such as {{'type': 'text', 'text': ...}}, got {part!r:.200}"
            )


def neutralise(text: str, tokens: Iterable[str]) -> str:
    """`text` with a word joiner after the first character of every place where one of `tokens` begins."""
    return _beginnings(tuple(tokens)).sub(rf"\g<0>{WORD_JOINER}", text)


@lru_cache(maxsize=32)
def _beginnings(tokens: tuple[str, ...]) -> re.Pattern:
    """Matches the first character of every place where a token begins, also of places that overlap."""
    first = "|".join({re.escape(token[0]) for token in tokens})  # looked for before the tokens, to be fast
    return re.compile(f"(?={first})(?={'|'.join(map(re.escape, tokens))}).", flags=re.DOTALL)


def _neutralise(value: Any, forbidden: dict[int, str], tokenizer: PreTrainedTokenizerBase, where: str) -> Any:
    if isinstance(value, str):
        text = neutralise(value, forbidden.values())
        written = set(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) & forbidden.keys()
        written.discard(tokenizer.unk_token_id)
        if written:
            raise ValueError(
                f"{where}: its text becomes the token {forbidden[min(written)]!r}, which only the chat template may "
                "write, and cannot be told apart from it: reword it"
            )
        return text
    if isinstance(value, dict):
        if value.get("type") in _MEDIA:  # a path or a base64 string, never tokenized
            return value
        return {key: _neutralise(entry, forbidden, tokenizer, where) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_neutralise(entry, forbidden, tokenizer, where) for entry in _join_text_parts(value)]
    return value


def _join_text_parts(parts: Iterable[Any]) -> list[Any]:
    joined: list[Any] = []
    for part in parts:
        if joined and _is_text_part(joined[-1]) and _is_text_part(part):
            joined[-1] = {**joined[-1], "text": joined[-1]["text"] + part["text"]}
        else:
            joined.append(part)
    return joined


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
