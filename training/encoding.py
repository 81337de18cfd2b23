"""Conversations to token ids, as the processor makes them, with the assistants' words marked."""

from typing import Any

from medsight.data.schema import IMAGE_MARKER
from processing_medsight.chat_medsight import neutralise_conversations


def encode(messages: list[dict[str, str]], processor: Any) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, image blocks at full length, and 1 where a token is the assistant's.

    Args:
        messages: turns with `role` and `content`; an image is a marker in a user's content.
        processor: a `MedSightProcessor`.
    """
    chat = [{"role": turn["role"], "content": content_parts(turn)} for turn in messages]
    encoded = processor.tokenizer.apply_chat_template(
        neutralise_conversations(chat, processor.tokenizer, processor.image_token),
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids: list[int] = []
    spoken: list[int] = []
    for token, assistant in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        repeats = processor.image_seq_length if token == processor.image_token_id else 1
        ids += [token] * repeats
        spoken += [assistant] * repeats
    return ids, spoken


def content_parts(turn: dict[str, str]) -> Any:
    """A turn's content for the chat template: the marker of an image becomes an image part."""
    if turn["role"] != "user" or IMAGE_MARKER not in turn["content"]:
        return turn["content"]
    parts: list[dict[str, str]] = []
    for index, text in enumerate(turn["content"].split(IMAGE_MARKER)):
        if index:
            parts.append({"type": "image"})
        text = text.strip("\n") if index else text
        if text:
            parts.append({"type": "text", "text": text})
    return parts
