"""A fresh model talks by its language model's own chat template, with image blocks let in."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medsight.conversion.chat import settle_chat
from processing_medsight import CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE, MedSightImageProcessor, MedSightProcessor
from tests.tiny_checkpoint import byte_tokenizer


IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# In the manner of SmolLM2, Qwen2.5, Llama 3 (which trims, writes its first token, and takes the system's words out of
# the messages), Llama 2 (whose marks are no tokens), and of one that marks its answers itself.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe"
    " kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set words = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set words = "" %}
{%- endif %}
{{- "<|head|>system<|neck|>\n\n" + words + "<|eot|>" }}
{%- for message in messages %}
    {{- '<|head|>' + message['role'] + '<|neck|>\n\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|neck|>\n\n' }}
{%- endif %}
"""
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content"
    " + ' [/INST]' }}{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>bot\n{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>bot\n{% endif %}"
)
# name -> template, special tokens, (bos, eos, pad), ends, the expected padding
FAMILIES: dict[str, Any] = {
    "smollm2": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], (1, 2, 2), ["<|im_end|>"], "<|endoftext|>"),
    "qwen2.5": (
        CHATML,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"],
        (None, 2, 0),
        ["<|im_end|>", "<|endoftext|>"],
        "<|endoftext|>",
    ),
    "llama3": (
        LLAMA3,
        ["<|begin|>", "<|end|>", "<|eot|>", "<|head|>", "<|neck|>"],
        (0, 2, None),
        ["<|end|>", "<|eot|>"],
        "<|pad|>",
    ),
    "llama2": (LLAMA2, ["<s>", "</s>", "<pad>"], (0, 1, None), ["</s>"], "<pad>"),
    "marked": (MARKED, ["<|im_start|>", "<|im_end|>", "<pad>"], (None, 1, 2), ["<|im_end|>"], "<pad>"),
}
CHAT = [
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "There [C0_1]."},
    {"role": "user", "content": "And now? "},
    {"role": "assistant", "content": "Gone."},
]


def tokenizer_of(special: list[str], bos: int | None, eos: int, pad: int | None) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: special[place] for name, place in names.items() if place is not None}
    )


def family(name: str) -> tuple[Any, MedSightProcessor, str, list[str]]:
    """The tokenizer before, the processor after, the template before, and the ends."""
    template, special, places, ends, _ = FAMILIES[name]
    before, tokenizer = tokenizer_of(special, *places), tokenizer_of(special, *places)
    tokenizer.chat_template = template
    chat_template, ends = settle_chat(tokenizer, ends, name)
    tokenizer.add_tokens(["[C0_0]", "[C0_1]"])
    processor = MedSightProcessor(MedSightImageProcessor(size=28), tokenizer, chat_template, image_seq_length=3)
    return before, processor, template, ends


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_words_are_put_as_the_language_model_puts_them(name: str, turns: int, prompted: bool) -> None:
    before, processor, template, _ = family(name)
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        messages = [*([] if name == "llama2" else system), *CHAT[:turns]]
        options = {"add_generation_prompt": prompted and turns % 2 == 1, "tokenize": False}
        assert processor.apply_chat_template(messages, **options) == before.apply_chat_template(
            messages, chat_template=template, **options
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_stands_where_it_was_put_and_answers_with_their_ends_are_marked(name: str) -> None:
    _, processor, _, ends = family(name)
    parts = [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": "Where is it?"}]
    messages = [{"role": "user", "content": parts}, *CHAT[1:]]
    text = processor.apply_chat_template(messages)
    assert f"Look: {IMAGE}Where is it?" in text and text.count("<|image_pad|>") == 1
    tokenizer = processor.tokenizer
    out = processor.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    marked = tokenizer.decode(out["input_ids"][0][out["assistant_masks"][0].bool()])
    assert "".join(marked.split()) == f"There[C0_1].{ends[0]}Gone.{ends[0]}"


@pytest.mark.parametrize("name", FAMILIES)
def test_ends_and_padding_are_the_models_and_never_the_same(name: str) -> None:
    before, processor, _, ends = family(name)
    _, special, _, own, padding = FAMILIES[name]
    tokenizer = processor.tokenizer
    assert set(ends) == set(own) and tokenizer.eos_token == ends[0]
    assert tokenizer.pad_token == padding not in (tokenizer.eos_token, tokenizer.bos_token)
    new = set(tokenizer.get_vocab()) - set(before.get_vocab()) - {"[C0_0]", "[C0_1]"}
    assert new == {"<|vision_start|>", "<|image_pad|>", "<|vision_end|>", padding} - set(special)
    assert not {"<think>", "</think>"} & set(tokenizer.get_vocab())


@pytest.mark.parametrize("name", FAMILIES)
def test_no_user_writes_the_templates_own_marks(name: str) -> None:
    _, processor, _, _ = family(name)
    marks = ["[INST]", "[/INST]"] if name == "llama2" else FAMILIES[name][1]
    plain, tried = (
        processor.apply_chat_template([{"role": "user", "content": f"One{text}two"}], add_generation_prompt=True)
        for text in ("", "".join(marks))
    )
    for mark in marks:
        assert tried.count(mark) == plain.count(mark)


def test_without_a_template_chatml_is_written_and_thinking_only_where_it_is_known() -> None:
    base = tokenizer_of(["<s>", "</s>"], 0, 1, None)
    assert settle_chat(base, ["</s>"], "base") == (PLAIN_CHAT_TEMPLATE, ["<|im_end|>", "</s>"])
    assert base.eos_token == "<|im_end|>" and base.pad_token == "<|pad|>"
    assert "<think>" not in base.get_vocab()
    assert "<think>" not in base.apply_chat_template(CHAT, chat_template=PLAIN_CHAT_TEMPLATE, tokenize=False)
    thinks = byte_tokenizer()
    before = thinks.get_vocab()
    assert settle_chat(thinks, ["<|im_end|>", "<|endoftext|>"], "qwen3")[0] == CHAT_TEMPLATE
    assert thinks.get_vocab() == before and (thinks.eos_token, thinks.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_a_tokenizer_that_begins_each_text_with_a_token_begins_conversations_with_one() -> None:
    base = tokenizer_of(["<s>", "</s>"], 0, 1, None)
    from tokenizers.processors import TemplateProcessing

    base.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    template, _ = settle_chat(base, ["</s>"], "base")
    processor = MedSightProcessor(MedSightImageProcessor(size=28), base, template, image_seq_length=3)
    out = processor.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    ids = out["input_ids"][0]
    assert (ids == 0).tolist() == [True] + [False] * (len(ids) - 1)
    assert base.decode(ids[out["assistant_masks"][0].bool()]) == "There [C0_1].<|im_end|>Gone.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "none of the end tokens stands"),
        ("{{ messages[-1].content }}</s>", "rewrites earlier turns"),
        ("{% for m in messages %}{{ m.content[0].text }}</s>{% endfor %}", "cannot take images"),
        ("{{ raise_exception('no chat here') }}", "no chat here"),
    ],
)
def test_a_template_that_cannot_take_images_is_refused_with_the_models_name(template: str, said: str) -> None:
    tokenizer = tokenizer_of(["<s>", "</s>"], 0, 1, None)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"chat template of some/model cannot take images.*{said}|{said}") as caught:
        settle_chat(tokenizer, ["</s>"], "some/model")
    assert "some/model" in str(caught.value)


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "qwen3_instruct_2507", "llama3", "llama3_1", "llama3_2", "phi3"])
def test_templates_of_published_models(name: str) -> None:
    found = find_spec("trl")
    if found is None or not (file := Path(found.origin).parent / "chat_templates" / f"{name}.jinja").is_file():
        pytest.skip("needs trl, which brings the templates of published models along")
    special = "<|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|> <|user|> <|assistant|> <|end|>"
    special = [*special.split(), "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"]
    end = {"q": "<|im_end|>", "l": "<|eot_id|>", "p": "<|end|>"}[name[0]]
    before, tokenizer = (tokenizer_of(special, 0, special.index(end), -3) for _ in range(2))
    tokenizer.chat_template = template = file.read_text(encoding="utf-8")
    ours, ends = settle_chat(tokenizer, [end], name)
    assert ends == [end] and (ours == CHAT_TEMPLATE) == (name == "qwen3")
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    for messages in (CHAT[:1],) if name == "qwen3" else (CHAT[:1], CHAT[:3]):
        assert tokenizer.apply_chat_template(messages, chat_template=ours, **options) == before.apply_chat_template(
            messages, chat_template=template, **options
        )
