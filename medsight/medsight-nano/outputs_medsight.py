"""What the model's methods return."""

from dataclasses import dataclass

import torch
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput


# What transformers calls the key-value cache: `past_key_values`, and `cache` since 5.24.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass
class MedSightRegionOutput(ModelOutput):
    """What is seen in images, before any language. B images, h*w patches of width d, N region queries, H = 2^L h.

    Args:
        patch_features (`torch.FloatTensor` of shape `(B, h*w, d)`): I, the encoder's chosen hidden state without CLS.
        region_embeddings (`torch.FloatTensor` of shape `(B, N, d)`): Q_r.
        image_features (`torch.FloatTensor` of shape `(B, H, W, d)`): I_r, the perceiver's final map.
        masks_queries_logits (`torch.FloatTensor` of shape `(B, N, H, W)`): a mask a query, before the sigmoid.
        class_queries_logits (`torch.FloatTensor` of shape `(B, N, classes + 1)`): a class a query, 'no object' last.
        group_logits (`torch.FloatTensor` of shape `(B, K)`): code group of the image.
        auxiliary_logits (`list[dict]`): mask and class logits of the earlier stages, with `config.auxiliary_loss`.
        upsampled_features (`torch.FloatTensor` of shape `(B, 2h, 2w, d)`): the perceiver's map before any query
            touched it, for a second pass.
    """

    patch_features: torch.FloatTensor | None = None
    region_embeddings: torch.FloatTensor | None = None
    image_features: torch.FloatTensor | None = None
    masks_queries_logits: torch.FloatTensor | None = None
    class_queries_logits: torch.FloatTensor | None = None
    group_logits: torch.FloatTensor | None = None
    auxiliary_logits: list[dict[str, torch.FloatTensor]] | None = None
    upsampled_features: torch.FloatTensor | None = None


@dataclass
class MedSightModelOutputWithPast(BaseModelOutputWithPast):
    """
    Args:
        image_hidden_states (`torch.FloatTensor` of shape `(images, image_seq_length, hidden)`): image blocks as the
            language model read them.
        region_features ([`MedSightRegionOutput`]): what the perceiver saw, where pixel values were given.
    """

    image_hidden_states: torch.FloatTensor | None = None
    region_features: MedSightRegionOutput | None = None


@dataclass
class MedSightCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Args:
        loss (`torch.FloatTensor`, scalar): sum of the losses below that were asked for.
        logits (`torch.FloatTensor` of shape `(batch, length, vocabulary)`).
        lm_loss (`torch.FloatTensor`): next-token cross-entropy, with `labels`.
        mask_loss (`torch.FloatTensor`): BCE + Dice of the masks decoded from region codes, with `mask_labels`.
        perceiver_loss (`torch.FloatTensor`): matched mask and class loss of the region queries, with `class_labels`.
        class_query_loss (`torch.FloatTensor`): BCE + Dice of the masks of the classes' own queries, where the model
            has these.
        alignment_loss (`torch.FloatTensor`): distance of codes' states to the queries of their classes, with
            `code_class_labels`.
        codebook_loss (`torch.FloatTensor`): VQ, reconstruction and perceiver loss through the codes, with
            `group_labels`, in training only.
        vq_loss, reconstruction_loss (`torch.FloatTensor`): its first two parts.
        quantized_codes (`torch.LongTensor` of shape `(regions, 2)`): group and index of the code that each region
            took.
        group_loss (`torch.FloatTensor`): cross-entropy of the group classifier, with `group_labels`.
        mask_logits (`list[torch.FloatTensor]`): `(codes cited, H, W)` a sample, with `mask_labels`.
        last_hidden_state (`torch.FloatTensor` of shape `(batch, length, hidden)`): what the logits were made of, with
            `return_last_hidden_state`.
        past_key_values (`cache` since transformers 5.24), hidden_states, attentions, image_hidden_states: as there.
        region_features ([`MedSightRegionOutput`]): what the perceiver saw, where pixel values were given.
    """

    lm_loss: torch.FloatTensor | None = None
    mask_loss: torch.FloatTensor | None = None
    alignment_loss: torch.FloatTensor | None = None
    perceiver_loss: torch.FloatTensor | None = None
    class_query_loss: torch.FloatTensor | None = None
    vq_loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    quantized_codes: torch.LongTensor | None = None
    group_loss: torch.FloatTensor | None = None
    mask_logits: list[torch.FloatTensor] | None = None
    last_hidden_state: torch.FloatTensor | None = None
    image_hidden_states: torch.FloatTensor | None = None
    region_features: MedSightRegionOutput | None = None


@dataclass
class MedSightDecodedRegions(ModelOutput):
    """Masks of the region codes in a batch of texts; one list entry a row, ragged.

    Args:
        mask_logits (`list[torch.FloatTensor]`): `(codes, H, W)` a row, before the sigmoid, at the model's mask size.
        region_codes (`list[torch.LongTensor]`): `(codes,)` token ids a row.
        region_scores (`list[torch.FloatTensor]`): `(codes,)` a row, in [0, 1]: the probability that the language model
            gave the code, times the mean probability of the mask inside itself (0 for an empty mask).
    """

    mask_logits: list[torch.FloatTensor] | None = None
    region_codes: list[torch.LongTensor] | None = None
    region_scores: list[torch.FloatTensor] | None = None


@dataclass
class MedSightGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output of greedy search and sampling, and [`MedSightDecodedRegions`] of the generated codes.

    Args:
        is_complete (`torch.BoolTensor` of shape `(sequences,)`): whether each came to an end token; `False` where a
            limit of length, or a stop of the caller's own, cut it. Where the pad token ends text too, as Qwen3's does,
            a row that such a stop ended before other rows of its batch cannot be told from one that came to its end.
    """

    mask_logits: list[torch.FloatTensor] | None = None
    region_codes: list[torch.LongTensor] | None = None
    region_scores: list[torch.FloatTensor] | None = None
    is_complete: torch.BoolTensor | None = None


@dataclass
class MedSightGenerateBeamOutput(GenerateBeamDecoderOnlyOutput):
    """transformers' output of beam search, and the rest as in [`MedSightGenerateOutput`]."""

    mask_logits: list[torch.FloatTensor] | None = None
    region_codes: list[torch.LongTensor] | None = None
    region_scores: list[torch.FloatTensor] | None = None
    is_complete: torch.BoolTensor | None = None
