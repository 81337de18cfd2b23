"""Stages of the kind `conversations`: next-token loss, masks of cited codes, and how what is said is scored. By what
they train, stages 2, 3b and 4 of the paper, and the language model alone.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from medsight.conversion.init import start_at_word_scale
from modeling_medsight.region_codes_in_text_medsight import is_region_code

from .adapters import METHODS, add_adapters, merge_quantised
from .collators import ConversationCollator
from .dataset import ConversationDataset
from .stage import Stage, StageSettings, batch_to, dice, evenly, group_places, in_batches, keep_rows, ratio


WORDS = re.compile(r"[^\W_]+")
TOKENS = 128  # beside the image, in a planned conversation without a limit of its length


@dataclass
class ConversationSettings(StageSettings):
    """Settings of stages on conversations.

    Attributes:
        trains: some of `vision_to_text`, `text_to_vision` (the projectors), `code_rows` (the codes' rows of the
            vocabulary) and `language_model` (all of it, with those rows).
        groups: code groups whose codes' rows are trained, where `code_rows` are all of the vocabulary that is; all by
            default.
        text_only: learn words alone, the users' too, without images.
        mask_share: share of the conversations whose codes are decoded to masks in a step.
        max_length: longest conversation in tokens, image blocks counted; a longer one is an error, never cut.
        start_at_word_scale: scale the vision-to-text projector's last layer so that image rows start as long as words'
            embeddings: region codes start as its rows and share the head with words.
        method: of training the language model: `full`, `lora`, or `qlora` (its weights in 4 bits, by bitsandbytes, on
            a GPU).
        lora_rank, lora_alpha, lora_dropout: of the adapters.
    """

    groups: list[str] | None = None
    text_only: bool = False
    mask_share: float = 1.0
    max_length: int | None = None
    start_at_word_scale: bool = False
    method: str = "full"
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0


class ConversationStage(Stage):
    """Trains projectors, the codes' rows of the vocabulary or the language model; scored by perplexity of the
    assistants' words, by the Dice of the masks that codes decode to where codes are trained, and by what the model
    says by itself where its language model is.

    Of the vocabulary, the codes' rows alone are chosen by their gradient: without weight decay, and not on parameters
    in shards.

    Example:

    ```python
    >>> from medsight.training.stage_conversations import ConversationSettings, ConversationStage
    >>> settings = ConversationSettings(trains=["code_rows", "text_to_vision"], data=["grounded"])
    >>> ConversationStage.check(settings, {"weight_decay": 0.1})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: weight_decay=0.1 would shrink the rows of all words, where this stage trains ...

    ```
    """

    kind, reads, Settings = "conversations", "conversations", ConversationSettings
    parts = ("vision_to_text", "text_to_vision", "code_rows", "language_model")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trains, has_images = {*self.settings.trains}, not self.settings.text_only
        self.rows_alone = trains_rows_alone(self.settings)
        self.decodes_masks = has_images and trains != {"vision_to_text"}
        self.scores_answers = has_images and "language_model" in trains
        self.hooks: list[RemovableHandle] = []
        self.groups = group_places(self.config, self.settings.groups, f"stages.{self.name}: groups")

    @classmethod
    def check(cls, settings: Any, arguments: dict[str, Any]) -> None:
        super().check(settings, arguments)
        if not settings.data:
            raise ValueError(
                "a stage on conversations needs data: names of annotations or conversations, or text for the corpus' "
                "own words"
            )
        unseen = sorted({"vision_to_text", "text_to_vision"} & {*settings.trains}) if settings.text_only else []
        if unseen:
            raise ValueError(f"text_only leaves out the images that {' and '.join(unseen)} would learn from")
        if settings.method not in METHODS:
            raise ValueError(f"method={settings.method!r}: choose one of {', '.join(METHODS)}")
        if settings.method != "full" and "language_model" not in settings.trains:
            raise ValueError(f"method={settings.method!r} is of the language model, which it does not train")
        if settings.groups is not None and not trains_rows_alone(settings):
            raise ValueError(
                "groups chooses among the codes' rows, but code_rows are not all of the vocabulary to train"
            )
        if settings.keep_share and (settings.method != "full" or trains_rows_alone(settings)):
            raise ValueError(f"keep_share={settings.keep_share} is for a stage that trains modules as a whole")
        if arguments.get("weight_decay") and trains_rows_alone(settings):
            raise ValueError(
                f"weight_decay={arguments['weight_decay']} would shrink the rows of all words, where this stage "
                "trains those of the region codes alone: set it to 0"
            )

    @property
    def shardable(self) -> bool:
        whole = self.settings.method == "full"  # adapters are merged into whole weights
        return super().shardable and whole and not self.rows_alone

    def idle(self, model: nn.Module) -> int:
        rows = len(self.groups) * self.config.codes_per_group
        tables = vocabularies(model) if self.rows_alone else []
        return sum((len(table) - rows) * table.shape[1] for table in tables)

    def dataset(self, rows: Any, training: bool, **common: Any) -> ConversationDataset:
        return ConversationDataset(
            rows,
            self.canvas,
            mask_share=self.settings.mask_share if training else 1.0,
            text_only=self.settings.text_only,
            max_length=self.settings.max_length,
            **common,
        )

    def collator(self) -> ConversationCollator:
        return ConversationCollator(self.processor, self.settings.text_only, self.config.use_class_queries)

    def batch_of_zeros(self, size: int, regions: int) -> dict[str, Any]:
        config, image_length = self.config, 0 if self.settings.text_only else self.config.image_seq_length
        length = self.settings.max_length or TOKENS + image_length
        ids = torch.zeros(size, length, dtype=torch.long)
        ids[:, :image_length] = config.image_token_id
        known = torch.ones_like(ids)
        known[:, -1] = 0  # a padded batch: without padding attention needs no mask, and less memory
        batch = {"input_ids": ids, "attention_mask": known, "labels": ids.clone()}
        if self.settings.text_only:
            return batch
        batch["pixel_values"] = torch.zeros(size, 3, config.image_size, config.image_size)
        if self.decodes_masks:
            ids[:, length - regions :] = config.region_code_start_id
            decoded = math.ceil(size * self.settings.mask_share)
            masks = torch.zeros(regions, *config.mask_size)
            batch["mask_labels"] = [masks if row < decoded else None for row in range(size)]
            if config.use_class_queries:
                batch["code_class_labels"] = [torch.zeros(regions, dtype=torch.long)] * size
        return batch

    def prepare(self, model: nn.Module) -> nn.Module:
        if self.settings.method != "full":
            return add_adapters(model, self.settings)
        model = super().prepare(model)
        if self.rows_alone:
            self.hooks = [train_code_rows_only(weight, self.config, self.groups) for weight in vocabularies(model)]
        return model

    @torch.no_grad()
    def start(self, model: nn.Module, dataset: ConversationDataset) -> None:
        if not self.settings.start_at_word_scale:
            return
        model.eval()
        batches = in_batches(dataset, evenly(len(dataset), 64), self.collator(), 8, model.device)
        regions = [
            model.get_region_features(batch["pixel_values"], with_masks=False)
            for batch in batches
            if "pixel_values" in batch
        ]
        if not regions:
            raise ValueError("start_at_word_scale: no conversation has an image whose rows could be measured")
        start_at_word_scale(model, regions, self.config.region_code_start_id)

    def finish(self, model: nn.Module) -> nn.Module:
        for hook in self.hooks:
            hook.remove()
        if self.settings.method == "full":
            return super().finish(model)
        return merge_quantised(model) if self.settings.method == "qlora" else model.merge_and_unload()

    def score(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        for name in () if self.decodes_masks else ("mask_labels", "code_class_labels"):
            batch.pop(name, None)
        outputs = model(**batch)
        tokens = (batch["labels"][:, 1:] != -100).sum()
        result: dict[str, Any] = {"nll": outputs.lm_loss * tokens, "tokens": tokens}
        if self.decodes_masks:
            given, wanted = torch.cat(list(outputs.mask_logits)), torch.cat(batch["mask_labels"])
            result["dice"] = dice(given > 0, wanted >= 0.5).sum() if len(wanted) else 0.0
            result["masks"] = len(wanted)
        if self.scores_answers:
            result |= self._score_answers(model, batch)
        return result

    def _score_answers(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, int]:
        """How many of the reference's words the model says by itself, and whether it cites codes where it should."""
        tokenizer = self.processor.tokenizer
        output = answer(model, batch, tokenizer)
        result = {"found_words": 0, "words": 0, "agreeing": 0, "answers": len(batch["labels"])}
        for given, labels in zip(output.sequences, batch["labels"], strict=True):
            wanted = first_answer(labels)
            reference = Counter(words(tokenizer.decode(wanted, skip_special_tokens=True)))
            said = Counter(words(tokenizer.decode(given, skip_special_tokens=True)))
            result["found_words"] += sum((reference & said).values())
            result["words"] += sum(reference.values())
            cites = [bool(is_region_code(ids, self.config).any()) for ids in (given, wanted)]
            result["agreeing"] += cites[0] == cites[1]
        return result

    def summarise(self, totals: dict[str, torch.Tensor]) -> dict[str, float]:
        nll = totals["nll"] / totals["tokens"].clamp(min=1)
        figures = {"perplexity": float(nll.exp()), "nll": float(nll)}
        if self.decodes_masks:
            figures["dice_through_codes"] = ratio(totals, "dice", "masks")
        if self.scores_answers:
            figures["answer_recall"] = ratio(totals, "found_words", "words")
            figures["region_or_none_agreement"] = ratio(totals, "agreeing", "answers")
        return figures

    def example(self, model: nn.Module, sample: dict[str, Any]) -> tuple[list[torch.Tensor], list[str]]:
        """The masks that the model generates; the first label is its answer."""
        batch = batch_to(self.collator()([sample]), model.device)
        output = answer(model, batch, self.processor.tokenizer)
        text = self.processor.tokenizer.decode(output.sequences[0], skip_special_tokens=True).strip()
        codes = self.processor.tokenizer.convert_ids_to_tokens(output.region_code_ids[0].tolist())
        masks = [logits > 0 for logits in output.mask_logits[0]]
        return masks, [f"{code}: {text}" for code in codes] or [f"no region: {text}"]


def trains_rows_alone(settings: ConversationSettings) -> bool:
    """Whether the codes' rows are all that trains of the vocabulary."""
    return "code_rows" in settings.trains and "language_model" not in settings.trains


def vocabularies(model: nn.Module) -> list[nn.Parameter]:
    """The embedding and, where it is not the same, the language modelling head."""
    embeddings = model.get_input_embeddings().weight
    return [embeddings] if model.lm_head.weight is embeddings else [embeddings, model.lm_head.weight]


def train_code_rows_only(weight: nn.Parameter, config: Any, groups: list[int]) -> RemovableHandle:
    """Zero the gradient of every row but those of the codes of these groups."""
    first, count = config.region_code_start_id, config.num_region_codes
    trained = torch.zeros(len(weight), dtype=torch.bool)
    trained[first : first + count].view(-1, config.codes_per_group)[groups] = True
    return keep_rows(weight, trained)


def answer(model: nn.Module, batch: dict[str, Any], tokenizer: Any, max_new_tokens: int = 96) -> Any:
    """Generate greedily from the prompt of every row, which ends where the assistant's first words begin.

    Returns:
        generate's output with `sequences` (rows, new tokens) of the answers alone.
    """
    starts = [int((labels != -100).nonzero()[0]) for labels in batch["labels"]]
    prompts = [ids[:start] for ids, start in zip(batch["input_ids"], starts, strict=True)]
    ids = pad_sequence(prompts, True, tokenizer.pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, padding_side="left")
    width = ids.shape[1]
    images = first_images(model.config, batch, starts)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        **images,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    output.sequences = output.sequences[:, width:]
    return output


def first_answer(labels: torch.Tensor) -> torch.Tensor:
    """The first unbroken run of labels (n,): what an assistant says first."""
    said = labels[int((labels != -100).nonzero()[0]) :]
    end = (said == -100).nonzero()
    return said[: int(end[0])] if len(end) else said


def first_images(config: Any, batch: dict[str, Any], starts: list[int]) -> dict[str, torch.Tensor]:
    """The images that stand before the first answer of each row."""
    if "pixel_values" not in batch:
        return {}
    rows = batch["input_ids"] == config.image_token_id
    totals = (rows.sum(1) // config.image_seq_length).tolist()
    shown = [int(row[:start].sum()) // config.image_seq_length for row, start in zip(rows, starts, strict=True)]
    firsts = [sum(totals[:row]) for row in range(len(totals))]
    chosen = [first + i for first, count in zip(firsts, shown, strict=True) for i in range(count)]
    return {"pixel_values": batch["pixel_values"][chosen]} if chosen else {}


def words(text: str) -> list[str]:
    """The words of an answer, region codes left out."""
    return WORDS.findall(re.sub(r"\[(C\d+_\d+|SEG)\]", " ", text).lower())
