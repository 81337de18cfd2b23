"""How a fresh model talks: by its language model's own chat template, end tokens and padding, with image blocks."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import AddedToken

from processing_medsight import CHAT_TEMPLATE, IMAGE_BLOCK, PLAIN_CHAT_TEMPLATE, own_chat_template


THINK = ("<think>", "</think>")
TURNS = ("<|im_start|>", "<|im_end|>")  # of ChatML, for a language model without a chat template
PADDING = ("<|endoftext|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>")
SHOWN = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": SHOWN},
    {"role": "assistant", "content": "A liver."},
    {"role": "user", "content": "Is it whole?"},
    {"role": "assistant", "content": "It is."},
]


def settle_chat(tokenizer: Any, ends: Sequence[str], name: str) -> tuple[str, list[str]]:
    """Adds to a tokenizer what turns, image blocks and padding need and it lacks, and sets its end and padding.

    Args:
        tokenizer: the language model's; it keeps its own padding, unless that is also the end of a turn.
        ends: tokens that end what the language model generates.
        name: of the language model, for error messages.

    Returns:
        The chat template: the language model's own with image blocks let in; ChatML where it has none; the template of
        medsight's own models where it prompts like Qwen3's, whose think block then stands in earlier turns, too. And
        the tokens that end an answer, that of a turn first.

    Raises:
        ValueError: its template cannot take image blocks, or does not show where an answer begins and ends.
    """
    thinks = all(token in tokenizer.get_vocab() for token in THINK)
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    add_special(tokenizer, IMAGE_BLOCK)
    if template is None or (thinks and prompts_alike(tokenizer, template, CHAT_TEMPLATE)):
        add_special(tokenizer, TURNS)
        end, chat_template = TURNS[1], CHAT_TEMPLATE if thinks else PLAIN_CHAT_TEMPLATE
        if template is None and begins_with_bos(tokenizer):
            chat_template = "{{- bos_token -}}\n" + chat_template
    else:
        end, chat_template = admit_images(tokenizer, template, ends, name)
    tokenizer.eos_token = end
    if tokenizer.pad_token in (None, end, tokenizer.bos_token):
        known = [token for token in PADDING if token in tokenizer.get_vocab() and token != end]
        add_special(tokenizer, [] if known else PADDING[-1:])
        tokenizer.pad_token = [*known, PADDING[-1]][0]
    tokenizer.chat_template = None  # it is the processor's
    return chat_template, list(dict.fromkeys([end, *ends]))


def add_special(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Appends those of `tokens` that a tokenizer lacks."""
    missing = [token for token in tokens if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing])


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its first token before every text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def prompts_alike(tokenizer: Any, template: str, other: str) -> bool:
    """Whether two templates ask for the first answer in the same words, without thinking."""
    asked = [{"role": "user", "content": "What is shown?"}]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    try:
        first, second = (tokenizer.apply_chat_template(asked, chat_template=t, **options) for t in (template, other))
    except TemplateError:
        return False
    return bool(first == second)


def admit_images(tokenizer: Any, template: str, ends: Sequence[str], name: str) -> tuple[str, str]:
    """The token that ends a turn of a language model's own template, and this template with image blocks let in; shown
    on two questions and answers.

    Raises:
        ValueError: it is not to be had.
    """
    plain = [{**turn, "content": "What is shown?"} if turn["role"] == "user" else turn for turn in PROBE[:2]]
    try:
        said = tokenizer.apply_chat_template(plain, chat_template=template, tokenize=False)
        _, answer, after = said.rpartition(PROBE[1]["content"])
        found = sorted(
            (after.find(token), token) for token in {*ends, tokenizer.eos_token} if token and token in after
        )
        if not answer or not found:
            raise ValueError(
                f"an answer ends in {after!r}, where none of the end tokens stands ({', '.join(ends) or 'none'})"
            )
        end = found[0][1]
        chat_template = own_chat_template(template, end)
        check_template(tokenizer, chat_template, end)
    except (TemplateError, ValueError, TypeError) as error:
        raise ValueError(
            f"the chat template of {name} cannot take images ({error}): use a language model whose template writes "
            "one turn after the other and ends an answer with an end token, or remove its template to get ChatML's"
        ) from error
    return end, chat_template


def check_template(tokenizer: Any, chat_template: str, end: str) -> None:
    """Raises ValueError where a template loses a turn or an image, or does not mark answers and their ends."""
    options: dict[str, Any] = {
        "chat_template": chat_template,
        "return_dict": True,
        "return_assistant_tokens_mask": True,
    }
    encoded = tokenizer.apply_chat_template(PROBE, **options)
    text = tokenizer.decode(encoded["input_ids"])
    block = "".join(IMAGE_BLOCK)
    places = [text.find(part) for part in (block, SHOWN[1]["text"], *(turn["content"] for turn in PROBE[1:]))]
    if min(places) < 0 or places != sorted(places):
        raise ValueError(f"two questions about an image and their answers become {text!r}")
    marked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    answers = tokenizer.decode([token for token, flag in marked if flag])
    wanted = [f"{turn['content']}{end}" for turn in PROBE[1::2]]
    if "".join(answers.split()) != "".join("".join(wanted).split()):
        raise ValueError(f"what it marks as answers is {answers!r}, where {''.join(wanted)!r} was said")
