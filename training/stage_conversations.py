"""What the stages that speak have in common: conversations in, next-token loss, masks of cited codes, their scores."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modeling_medsight.region_codes_in_text_medsight import is_region_code

from .collators import ConversationCollator
from .items import ConversationItems, Items
from .stage import Stage, StageSettings, batch_to, dice, ratio


WORDS = re.compile(r"[^\W_]+")


@dataclass
class LanguageSettings(StageSettings):
    """Settings of the stages that speak.

    Attributes:
        mask_share: share of the conversations whose codes are decoded to masks in a step.
        max_length: longest conversation in tokens, image blocks counted; a longer one is an error, never cut.
    """

    mask_share: float = 1.0
    max_length: int | None = None


class LanguageStage(Stage):
    """Reads conversations; scored by perplexity of the assistants' words."""

    reads, Settings = "conversations", LanguageSettings
    label_prompts = False
    text_only = False
    decodes_masks = False

    def items(self, rows: Any, training: bool, **common: Any) -> Items:
        share = self.settings.mask_share if training else 1.0
        own = {"mask_share": share, "text_only": self.text_only, "max_length": self.settings.max_length}
        return ConversationItems(rows, self.places, **own, **common)

    def collator(self) -> ConversationCollator:
        return ConversationCollator(self.processor, self.label_prompts, self.config.use_class_queries)

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
        return result

    def summarise(self, totals: dict[str, torch.Tensor]) -> dict[str, float]:
        nll = totals["nll"] / totals["tokens"].clamp(min=1)
        figures = {"perplexity": float(nll.exp()), "nll": float(nll)}
        if self.decodes_masks:
            figures["dice_through_codes"] = ratio(totals, "dice", "masks")
        return figures

    def example(self, model: nn.Module, sample: dict[str, Any]) -> tuple[list[torch.Tensor], list[str]]:
        """The masks that the model generates; the first label is its answer."""
        batch = batch_to(self.collator()([sample]), model.device)
        output = answer(model, batch, self.processor.tokenizer)
        text = self.processor.tokenizer.decode(output.sequences[0], skip_special_tokens=True).strip()
        codes = self.processor.tokenizer.convert_ids_to_tokens(output.region_code_ids[0].tolist())
        masks = [logits > 0 for logits in output.mask_logits[0]]
        return masks, [f"{code}: {text}" for code in codes] or [f"no region: {text}"]


def answer(model: nn.Module, batch: dict[str, Any], tokenizer: Any, max_new_tokens: int = 96) -> Any:
    """Generate greedily from the prompt of every row, which ends where the assistant's first words begin.

    Returns:
        generate's output with `sequences` (rows, new tokens) of the answers alone.
    """
    starts = [int((labels != -100).nonzero()[0]) for labels in batch["labels"]]
    width = max(starts)
    ids = batch["input_ids"].new_full((len(starts), width), tokenizer.pad_token_id)
    for row, start in enumerate(starts):
        ids[row, width - start :] = batch["input_ids"][row, :start]
    mask = (torch.arange(width, device=ids.device) >= width - torch.tensor(starts, device=ids.device)[:, None]).long()
    images = first_images(model.config, batch, starts)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        **images,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        eos_token_id=tokenizer.eos_token_id,
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


class GroundedStage(LanguageStage):
    """A stage whose answers cite region codes; scored by the Dice of the masks that the codes decode to, too."""

    decodes_masks = True


class AnsweringStage(GroundedStage):
    """Scored by what the model says by itself, too: recall of the reference's words, and codes where codes belong."""

    def score(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        result = super().score(model, batch)
        tokenizer = self.processor.tokenizer
        output = answer(model, batch, tokenizer)
        result |= {"found_words": 0, "words": 0, "agreeing": 0, "answers": len(batch["labels"])}
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
        figures = super().summarise(totals)
        figures["answer_recall"] = ratio(totals, "found_words", "words")
        figures["region_or_none_agreement"] = ratio(totals, "agreeing", "answers")
        return figures


def words(text: str) -> list[str]:
    """The words of an answer, region codes left out."""
    return WORDS.findall(re.sub(r"\[(C\d+_\d+|SEG)\]", " ", text).lower())
