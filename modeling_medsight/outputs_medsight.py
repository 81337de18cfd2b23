"""What the model's methods return."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import ModelOutput
from transformers.utils.deprecation import deprecate_kwarg


# What transformers calls the key-value cache: `past_key_values`, and `cache` since 5.24.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Have a forward that knows both names warn of the old one where transformers does."""
    return (
        deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(forward) if CACHE_NAME == "cache" else forward
    )


@dataclass
class RegionPerceiverOutput(ModelOutput):
    """One pass of the region perceiver: B maps, n queries, a grid of h x w patches of width d, H = 2^L h.

    Args:
        region_embeddings (`torch.FloatTensor` of shape `(B, n, d)`): Q_r, the queries after the last stage.
        image_features (`torch.FloatTensor` of shape `(B, H, W, d)`): I_r, the map after the last stage.
        masks_queries_logits (`torch.FloatTensor` of shape `(B, n, H, W)`): a mask for each query, before the sigmoid.
        class_queries_logits (`torch.FloatTensor` of shape `(B, n, classes + 1)`): class logits of each query, 'no
            object' last.
        auxiliary_logits (`list[dict[str, torch.FloatTensor]]`): with `config.auxiliary_loss`, the two logits of the
            initial step and of every stage but the last.
        upsampled_features (`torch.FloatTensor` of shape `(B, 2h, 2w, d)`): the first stage's map before any query
            touched it, which a second pass over the same patches can take.
    """

    region_embeddings: torch.FloatTensor | None = None
    image_features: torch.FloatTensor | None = None
    masks_queries_logits: torch.FloatTensor | None = None
    class_queries_logits: torch.FloatTensor | None = None
    auxiliary_logits: list[dict[str, torch.FloatTensor]] | None = None
    upsampled_features: torch.FloatTensor | None = None


@dataclass
class MedSightRegionOutput(RegionPerceiverOutput):
    """What [`MedSightRegionModel`] sees in B images: the fields of [`RegionPerceiverOutput`] for its N region queries,
    and these.

    Args:
        patch_features (`torch.FloatTensor` of shape `(B, h*w, d)`): I, the encoder's chosen hidden state without CLS.
        group_logits (`torch.FloatTensor` of shape `(B, K)`): code group of the image.
        loss (`torch.FloatTensor`, scalar): sum of the losses below, each there only with the labels that it needs.
        perceiver_loss (`torch.FloatTensor`): matched mask and class loss of the region queries.
        class_query_loss (`torch.FloatTensor`): BCE + Dice of the masks of the classes' own queries, where the model
            has these and learns no codebook.
        codebook_loss (`torch.FloatTensor`): VQ, reconstruction and perceiver loss through the codes, with
            `group_labels`, in training only.
        vq_loss, reconstruction_loss (`torch.FloatTensor`): its first two parts.
        group_loss (`torch.FloatTensor`): cross-entropy of the group classifier, with `group_labels`.
        quantized_codes (`torch.LongTensor` of shape `(regions, 2)`): group and index of the code that each region
            took.
    """

    patch_features: torch.FloatTensor | None = None
    group_logits: torch.FloatTensor | None = None
    loss: torch.FloatTensor | None = None
    perceiver_loss: torch.FloatTensor | None = None
    class_query_loss: torch.FloatTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    vq_loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    group_loss: torch.FloatTensor | None = None
    quantized_codes: torch.LongTensor | None = None


@dataclass
class MedSightImageOutput(BaseModelOutputWithPooling):
    """The encoder's output for B images, `pooler_output` being their blocks for the language model.

    Args:
        pooler_output (`torch.FloatTensor` of shape `(B, image_seq_length, hidden)`).
        region_features ([`MedSightRegionOutput`]): what was seen; without masks and classes of regions unless the mask
            decoder needs them (`get_region_features` gives them).
    """

    region_features: MedSightRegionOutput | None = None


class HasRegionFeatures:
    """An output with `image_outputs`."""

    image_outputs: MedSightImageOutput | None

    @property
    def region_features(self) -> MedSightRegionOutput | None:
        """What was seen ([`MedSightRegionOutput`]), where there were images."""
        return None if self.image_outputs is None else self.image_outputs.region_features


@dataclass
class MedSightModelOutputWithPast(HasRegionFeatures, BaseModelOutputWithPast):
    """
    Args:
        image_outputs ([`MedSightImageOutput`]): what the images gave.
    """

    image_outputs: MedSightImageOutput | None = None


@dataclass
class MedSightCausalLMOutputWithPast(HasRegionFeatures, CausalLMOutputWithPast):
    """
    Args:
        loss (`torch.FloatTensor`, scalar): sum of the losses below, each there only with the labels that it needs.
        logits (`torch.FloatTensor` of shape `(batch, length, vocabulary)`).
        lm_loss (`torch.FloatTensor`): next-token cross-entropy, with `labels`.
        mask_loss (`torch.FloatTensor`): BCE + Dice of the masks decoded from region codes, with `mask_labels`.
        alignment_loss (`torch.FloatTensor`): distance of codes' states to the queries of their classes, with
            `code_class_labels`.
        mask_logits (`list[torch.FloatTensor]`): `(codes cited, H, W)` a sample, with `mask_labels`.
        last_hidden_state (`torch.FloatTensor` of shape `(batch, length, hidden)`): the states that the logits were
            made of.
        past_key_values (`cache` since transformers 5.24), hidden_states, attentions, image_outputs: as there.
    """

    lm_loss: torch.FloatTensor | None = None
    mask_loss: torch.FloatTensor | None = None
    alignment_loss: torch.FloatTensor | None = None
    mask_logits: list[torch.FloatTensor] | None = None
    last_hidden_state: torch.FloatTensor | None = None
    image_outputs: MedSightImageOutput | None = None


@dataclass
class MedSightDecodedRegions(ModelOutput):
    """Masks of the region codes in a batch of texts; one list entry a row, ragged.

    Args:
        mask_logits (`list[torch.FloatTensor]`): `(codes, H, W)` a row, before the sigmoid, at the model's mask size.
        region_code_ids (`list[torch.LongTensor]`): `(codes,)` token ids a row.
        region_scores (`list[torch.FloatTensor]`): `(codes,)` a row, in [0, 1]: the probability that the language model
            gave the code, times the mean probability of the mask inside itself (0 for an empty mask).
    """

    mask_logits: list[torch.FloatTensor] | None = None
    region_code_ids: list[torch.LongTensor] | None = None
    region_scores: list[torch.FloatTensor] | None = None


@dataclass
class MedSightGenerateOutput(MedSightDecodedRegions, GenerateDecoderOnlyOutput):
    """transformers' output of greedy search and sampling, and [`MedSightDecodedRegions`] of the generated codes.

    Args:
        is_complete (`torch.BoolTensor` of shape `(sequences,)`): whether each came to an end token; `False` where a
            limit of length, or a stop of the caller's own, cut it. Where the pad token ends text too, as Qwen3's does,
            a row that such a stop ended before other rows of its batch cannot be told from one that came to its end.
    """

    is_complete: torch.BoolTensor | None = None


@dataclass
class MedSightGenerateBeamOutput(MedSightDecodedRegions, GenerateBeamDecoderOnlyOutput):
    """transformers' output of beam search, and the rest as in [`MedSightGenerateOutput`]."""

    is_complete: torch.BoolTensor | None = None
