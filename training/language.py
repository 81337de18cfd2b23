"""The stages that speak: 0 language model, 2 vision to text, 3b text to vision, 4 unified."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from configuration_medsight.configuration_medsight import MedSightConfig
from modeling_medsight.loss_medsight import code_mask_loss
from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration
from modeling_medsight.outputs_medsight import MedSightRegionOutput
from modeling_medsight.region_codes_in_text_medsight import locate_codes
from processing_medsight.processing_medsight import MedSightProcessor

from .conversations import ConversationMaker, Turn
from .data import sampling_weights
from .optimisation import Optimisation, train_only
from .views import View


IGNORED = -100


@dataclass(frozen=True)
class LanguageStage:
    """Settings of a language stage.

    Attributes:
        steps, batch_size, learning_rate, muon_learning_rate, weight_decay, warmup: see `Optimisation`.
        set_power: sets are drawn in proportion to their size to this power.
        plain_share: share of the questions that are answered without regions.
        mask_share: share of the steps that decode the cited codes' masks and train on them.
        alignment_weight: weight of the distance between a code's query and the class query that stage 1 learnt.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1e-3
    muon_learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: int = 50
    set_power: float = 0.6
    plain_share: float = 0.0
    mask_share: float = 1.0
    alignment_weight: float = 1.0


class TurnEncoder:
    """Turns to token ids and labels, in the chat template and the image block of the processor."""

    def __init__(self, processor: MedSightProcessor, config: MedSightConfig) -> None:
        self.processor, self.tokenizer, self.config = processor, processor.tokenizer, config
        self.end = self.tokenizer.eos_token

    def prompt(self, text: str, with_image: bool) -> str:
        """A user's turn as text, up to where the answer begins."""
        content = [{"type": "image"}] if with_image else []
        content.append({"type": "text", "text": text})
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def encode(self, prompt: str, answer: str, with_image: bool) -> tuple[list[int], int]:
        """Token ids of the whole conversation and how many of them are the prompt's."""
        ids = self.tokenizer(self.prompt(prompt, with_image), add_special_tokens=False).input_ids
        block, expanded = self.config.image_token_id, []
        for token in ids:
            expanded.extend([block] * self.config.image_seq_length if token == block else [token])
        reply = self.tokenizer(answer + self.end, add_special_tokens=False).input_ids
        return expanded + reply, len(expanded)

    def batch(self, encoded: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
        """Right-padded input_ids, attention_mask and labels; only answers are labelled."""
        width = max(len(ids) for ids, _ in encoded)
        shape = (len(encoded), width)
        input_ids = torch.full(shape, self.tokenizer.pad_token_id)
        labels = torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, (ids, start) in enumerate(encoded):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, start : len(ids)] = torch.tensor(ids[start:])
            mask[row, : len(ids)] = 1
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

    def codes(self, view: View, turn: Turn) -> list[str]:
        """The codes of a turn's regions in this view, as text."""
        targets = view.record.targets
        return [
            self.config.region_code_token(view.record.group, int(view.codes[targets.index(target)]))
            for target in turn.regions
        ]


def answer_loss(model: MedSightForConditionalGeneration, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy; logits are computed only where there is a label."""
    wanted = labels[:, 1:] != IGNORED
    logits = model.lm_head(hidden[:, :-1][wanted])
    return F.cross_entropy(logits.float(), labels[:, 1:][wanted])


def train_language_model(
    model: MedSightForConditionalGeneration,
    encoder: TurnEncoder,
    pairs: list[tuple[str, str]],
    settings: LanguageStage,
    generator: torch.Generator,
) -> None:
    """Stage 0: the language model alone, on questions and answers without images; prompts are read as text too."""
    parameters = train_only(model, ("model.language_model.", "lm_head."))
    encoded = [encoder.encode(prompt, answer, with_image=False) for prompt, answer in pairs]
    optimisation = _optimisation("stage 0 language model", parameters, settings)
    for _ in range(settings.steps):
        drawn = torch.randint(len(encoded), (settings.batch_size,), generator=generator).tolist()
        batch = encoder.batch([(encoded[index][0], 0) for index in drawn])
        hidden = model.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        optimisation.step(answer_loss(model, hidden, batch["labels"]))


def train_vision_to_text(
    model: MedSightForConditionalGeneration,
    encoder: TurnEncoder,
    maker: ConversationMaker,
    views: list[list[View]],
    settings: LanguageStage,
    generator: torch.Generator,
) -> None:
    """Stage 2: P_vt alone, on captions and questions that need no region; `views` has an image's views an entry."""
    _start_at_word_scale(model, [image_views[0] for image_views in views])
    parameters = train_only(model, ("model.vision_to_text_projector.",))
    optimisation = _optimisation("stage 2 vision to text", parameters, settings)
    for batch_views in _draw_views(views, settings, generator):
        turns = [maker.plain(view.record) for view in batch_views]
        batch = encoder.batch([encoder.encode(turn.prompt, turn.answer, True) for turn in turns])
        hidden = _hidden(model, batch, _regions(batch_views))
        optimisation.step(answer_loss(model, hidden, batch["labels"]))


def train_grounding(
    name: str,
    model: MedSightForConditionalGeneration,
    encoder: TurnEncoder,
    maker: ConversationMaker,
    views: list[list[View]],
    class_embedding: nn.Embedding,
    settings: LanguageStage,
    generator: torch.Generator,
    whole_language_model: bool,
) -> None:
    """Stages 3b and 4: answers that cite codes, and the masks that the codes decode to.

    Args:
        whole_language_model: False trains P_tv and the codes' rows (3b), True also the language model and P_vt (4).
    """
    config, core = model.config, model.model
    prefixes = ["model.text_to_vision_projector."]
    if whole_language_model:
        prefixes += ["model.language_model.", "model.vision_to_text_projector.", "lm_head."]
    else:
        prefixes += ["model.language_model.embed_tokens.", "lm_head."]
    parameters = train_only(model, prefixes)
    hooks = [] if whole_language_model else [_train_code_rows_only(weight, config) for weight in _vocabularies(model)]
    class_ids = {target: index for index, target in enumerate(config.mask_class_names)}
    aims = class_embedding.weight.detach()
    if not whole_language_model:
        settings = replace(settings, weight_decay=0.0)  # decay would move the words' rows too
    optimisation = _optimisation(name, parameters, settings)
    for batch_views in _draw_views(views, settings, generator):
        turns = [
            maker.plain(view.record)
            if maker.random.random() < settings.plain_share
            else maker.grounded(view.record, view.masks.float())
            for view in batch_views
        ]
        answers = [turn.text(encoder.codes(view, turn)) for view, turn in zip(batch_views, turns, strict=True)]
        batch = encoder.batch(
            [encoder.encode(turn.prompt, answer, True) for turn, answer in zip(turns, answers, strict=True)]
        )
        regions = _regions(batch_views)
        hidden = _hidden(model, batch, regions)
        parts = {"answer": answer_loss(model, hidden, batch["labels"])}

        codes = locate_codes(batch["input_ids"], config)
        if sum(codes.counts):
            states = hidden[codes.rows, codes.positions + config.region_state_offset]
            wanted = torch.tensor([class_ids[target] for turn in turns for target in turn.regions])
            distance = F.mse_loss(core.text_to_vision_projector(states), aims[wanted]) / aims.var()
            parts["alignment"] = settings.alignment_weight * distance
            if maker.random.random() < settings.mask_share:
                masks = list(core.decode_codes(hidden, codes, regions).split(codes.counts))
                targets = [
                    torch.stack([view.masks[view.record.targets.index(t)] for t in turn.regions]).float() / 255
                    if turn.regions
                    else view.masks[:0].float()
                    for view, turn in zip(batch_views, turns, strict=True)
                ]
                parts["masks"] = code_mask_loss(masks, targets)
        optimisation.step(sum(parts.values()), **parts)
    for hook in hooks:
        hook.remove()


def _optimisation(name: str, parameters: list[tuple[str, nn.Parameter]], settings: LanguageStage) -> Optimisation:
    return Optimisation(
        name,
        parameters,
        settings.steps,
        settings.learning_rate,
        settings.muon_learning_rate,
        settings.weight_decay,
        settings.warmup,
    )


def _draw_views(views: list[list[View]], settings: LanguageStage, generator: torch.Generator) -> Iterator[list[View]]:
    """Batches of views, `settings.steps` of them: an image by its set's weight, then one of its views."""
    weights = sampling_weights([image_views[0].record for image_views in views], settings.set_power)
    for _ in range(settings.steps):
        drawn = torch.multinomial(weights, settings.batch_size, replacement=True, generator=generator).tolist()
        look = torch.randint(1 << 30, (settings.batch_size,), generator=generator).tolist()
        yield [views[index][number % len(views[index])] for index, number in zip(drawn, look, strict=True)]


def _regions(views: list[View]) -> MedSightRegionOutput:
    return MedSightRegionOutput(
        patch_features=torch.stack([view.patch_features for view in views]),
        region_embeddings=torch.stack([view.region_embeddings for view in views]),
    )


def _hidden(
    model: MedSightForConditionalGeneration, batch: dict[str, torch.Tensor], regions: MedSightRegionOutput
) -> torch.Tensor:
    """States after the final norm, (batch, length, hidden), with image blocks made from precomputed regions."""
    return model.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        image_embeds=model.model.project_regions(regions),
        use_cache=False,
    ).last_hidden_state


@torch.no_grad()
def _start_at_word_scale(model: MedSightForConditionalGeneration, views: list[View]) -> None:
    """Scale P_vt so that its rows start as long as words': codes start as its rows and share the head with words."""
    rows = model.model.project_regions(_regions(views[:64]))
    words = model.get_input_embeddings().weight[: model.config.region_code_start_id]
    model.model.vision_to_text_projector.linear_2.weight *= words.norm(dim=-1).mean() / rows.norm(dim=-1).mean()


def _vocabularies(model: MedSightForConditionalGeneration) -> list[nn.Parameter]:
    embeddings = model.get_input_embeddings().weight
    return [embeddings] if model.lm_head.weight is embeddings else [embeddings, model.lm_head.weight]


def _train_code_rows_only(weight: nn.Parameter, config: MedSightConfig) -> RemovableHandle:
    """Zero the gradient of every row but the region codes': with a fresh optimizer the words then stay as they are."""
    rows = torch.zeros(len(weight), 1)
    rows[config.region_code_start_id : config.region_code_start_id + config.num_region_codes] = 1
    return weight.register_hook(lambda gradient: gradient * rows)


def seeded(seed: int, name: str) -> tuple[torch.Generator, random.Random]:
    """The two sources of chance of a stage, which depend on the seed and the stage's name only."""
    chance = random.Random(f"{seed}:{name}")
    return torch.Generator().manual_seed(chance.getrandbits(48)), chance
