"""MedSIGHT: image encoder, region perceiver, region codebook and language model as one model (paper arXiv
2606.06760)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, torch_compilable_check

from configuration_medsight.card_medsight import HubCardMixin
from configuration_medsight.configuration_medsight import MedSightConfig

from .codebook_medsight import RegionCodebook, RegionQuantizerOutput
from .generation_medsight import UNREAD, MedSightGenerationMixin, positions_of
from .loss_medsight import RegionPerceiverLoss
from .outputs_medsight import (
    CACHE_NAME,
    MedSightCausalLMOutputWithPast,
    MedSightDecodedRegions,
    MedSightModelOutputWithPast,
    MedSightRegionOutput,
)
from .quantization_medsight import of_language_model
from .region_codes_in_text_medsight import CodeLocations, locate_codes
from .region_perceiver_medsight import RegionPerceiver
from .training_loss_medsight import TrainingLossMixin, refuse_uneven_labels, refuse_useless, require
from .unet_encoder_medsight import MedSightUNetEncoder
from .vision_medsight import encode_image


class Projector(nn.Module):
    """Linear, activation, Linear: between the widths of vision and language."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim_hidden)
        self.activation = activation
        self.linear_2 = nn.Linear(dim_hidden, dim_out)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.activation(self.linear_1(hidden_states)))


class MedSightPreTrainedModel(HubCardMixin, PreTrainedModel):
    """Weight initialisation and what transformers needs to know about the family."""

    config: MedSightConfig
    config_class = MedSightConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["RegionPerceiverStage"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that transformers also initialises modules without parameters of their own (projectors, CLIP's
        blocks); it may, since `_init_weights` leaves loaded weights alone.
        """
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """As [`PreTrainedModel.from_pretrained`]; a `quantization_config` is applied to the language model alone."""
        if quantization_config is not None:
            kwargs["quantization_config"] = of_language_model(quantization_config)
        return super().from_pretrained(*args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As [`PreTrainedModel.set_attn_implementation`]; convolutions have no attention that a name could be for."""
        if isinstance(attn_implementation, str) and not has_attention(self.config.vision_config):
            names = {"": attn_implementation, "text_config": attn_implementation, "vision_config": "eager"}
            attn_implementation = names
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RegionPerceiver):
            init.normal_(module.region_queries)
            if module.class_queries is not None:
                init.normal_(module.class_queries)
        if isinstance(module, RegionCodebook):
            init.normal_(module.codes)
        if isinstance(module, (RegionPerceiver, RegionCodebook, Projector)):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    init.xavier_uniform_(layer.weight)
                elif isinstance(layer, nn.Conv2d):
                    init.kaiming_normal_(layer.weight)
        if isinstance(module, RegionPerceiver) and self.config.mask_projection_init_std is not None:
            init.normal_(module.segmentation_head.mask_projection.weight, std=self.config.mask_projection_init_std)


def has_attention(vision_config: Any) -> bool:
    """Whether an encoder has attention to choose an implementation of."""
    return hasattr(vision_config, "num_attention_heads")


class MedSightModel(MedSightPreTrainedModel):
    """Everything but the language modelling head."""

    def __init__(self, config: MedSightConfig) -> None:
        super().__init__(config)
        config.refuse_contradictions()  # `from_pretrained(folder, image_size=...)` sets them after the construction
        vision_dim, text_dim = config.vision_hidden_size, config.text_config.hidden_size
        if not has_attention(config.vision_config):
            config.vision_config._attn_implementation = "eager"
        # By name: a checkpoint folder's own code may know the configuration's class twice, and AutoModel one of them.
        own = config.vision_config.model_type == MedSightUNetEncoder.config_class.model_type
        self.vision_tower = (MedSightUNetEncoder._from_config if own else AutoModel.from_config)(config.vision_config)
        self.region_perceiver = RegionPerceiver(config)
        self.codebook = RegionCodebook(config)
        self.group_classifier = nn.Linear(vision_dim, config.num_groups)
        self.vision_to_text_projector = Projector(vision_dim, text_dim, text_dim, nn.GELU())
        self.text_to_vision_projector = Projector(text_dim, text_dim, vision_dim, nn.ReLU())
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_region_features(
        self, pixel_values: torch.Tensor, with_masks: bool = True, **kwargs: Any
    ) -> MedSightRegionOutput:
        """Look at images: patches, regions, masks and classes of regions, the group of each image.

        Args:
            pixel_values: (images, 3, image_size, image_size).
            with_masks: false leaves out the masks and classes of regions and the map that they are read from.
        """
        return self._see(pixel_values, with_masks, **kwargs)[1]

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Image blocks for the language model, (images, image_seq_length, hidden), in `pooler_output`."""
        kwargs.pop("original_sizes", None)  # the processor's, which serving engines pass on with the pixels
        encoder_output, regions = self._see(pixel_values, with_masks=False, **kwargs)
        all_layers = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=encoder_output.last_hidden_state,
            pooler_output=self.project_regions(regions),
            hidden_states=encoder_output.hidden_states if all_layers else None,
            attentions=getattr(encoder_output, "attentions", None),
        )

    def project_regions(self, regions: MedSightRegionOutput) -> torch.Tensor:
        """P_{v→t} on the (pooled) patch rows and then the region rows: (images, image_seq_length, hidden)."""
        rows = regions.patch_features
        if self.config.patch_pooling > 1:
            grid = rows.unflatten(1, self.config.patch_grid).permute(0, 3, 1, 2)
            rows = F.avg_pool2d(grid, self.config.patch_pooling).flatten(2).transpose(1, 2)
        if self.config.use_region_embeddings:
            rows = torch.cat((rows, regions.region_embeddings), dim=1)
        return self.vision_to_text_projector(rows)

    def quantize_regions(self, region_embeddings: torch.Tensor, groups: torch.Tensor) -> RegionQuantizerOutput:
        """Nearest code of each region in its image's group: see [`RegionCodebook`]."""
        return self.codebook(region_embeddings, groups)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        cache: Cache | None = None,
        with_masks: bool = True,
        **kwargs: Any,
    ) -> MedSightModelOutputWithPast:
        """
        Args:
            input_ids: (batch, length), image blocks as runs of `config.image_token_id`.
            pixel_values: (images, 3, H, W), all images of the batch in the order of their blocks.
            image_embeds: (images, image_seq_length, hidden), in place of `pixel_values`: what `project_regions` gives.
            with_masks: see [`MedSightModel.get_region_features`].
            cache: what transformers calls `past_key_values` since 5.24; either name is taken.

        Raises:
            ValueError: if image blocks and images do not match, or not exactly one of `input_ids`, `inputs_embeds` is
                given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        for name in UNREAD:
            kwargs.pop(name, None)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            placeholders = input_ids == self.config.image_token_id
        elif pixel_values is not None or image_embeds is not None:
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            placeholders = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

        regions = None
        if image_embeds is None and pixel_values is not None:
            regions = self._see(pixel_values, with_masks)[1]
            image_embeds = self.project_regions(regions)
        if image_embeds is not None:
            expected = image_embeds.shape[0] * image_embeds.shape[1]
            torch_compilable_check(
                placeholders.sum() == expected,
                lambda: (
                    f"Image features and image tokens do not match: {len(image_embeds)} images need {expected} image "
                    f"placeholders ({image_embeds.shape[1]} each), the text has {int(placeholders.sum())}"
                ),
            )
            image_embeds = image_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(placeholders[..., None], image_embeds)
        elif input_ids is not None and input_ids.shape[1] > 1:
            torch_compilable_check(~placeholders.any(), "the text has image placeholders but no images were given")
            if self.training:
                # Every trained parameter stays in the graph, as in `_mask_loss`, also where a batch has no images.
                nothing = inputs_embeds.new_zeros(1, self.config.vision_hidden_size, dtype=self.vision_tower.dtype)
                inputs_embeds = inputs_embeds + 0 * self.vision_to_text_projector(nothing).sum()

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache if past_key_values is None else past_key_values},
            **kwargs,
        )
        return MedSightModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs[CACHE_NAME] if CACHE_NAME in outputs else None},
            image_hidden_states=image_embeds,
            region_features=regions,
        )

    def decode_codes(
        self,
        last_hidden_state: torch.Tensor,
        codes: CodeLocations,
        regions: MedSightRegionOutput,
        first_position: int = 0,
    ) -> torch.Tensor:
        """Mask logits (codes, H, W) of region codes, from the language model's states (paper: text-to-vision).

        P_{t→v} of a code's state takes the place of the perceiver's learnable queries. All codes of one row and one
        image are decoded together: the map attends to each of them.

        Args:
            last_hidden_state: (rows, length, hidden), after the final norm.
            codes: where the codes stand.
            regions: features of the images that `codes.images` counts.
            first_position: column of the sequence that `last_hidden_state` begins with.
        """
        states = last_hidden_state[codes.rows, codes.positions + self.config.region_state_offset - first_position]
        states = self.text_to_vision_projector(states)
        if self.config.mask_decoder == "head":
            projected = self.region_perceiver.segmentation_head.mask_projection(states)
            return torch.einsum("nd,nhwd->nhw", projected, regions.image_features[codes.images])

        num_entries = codes.num_entries if codes.num_entries is not None else len(regions.patch_features)
        shape = (num_entries, max(codes.counts))
        queries = states.new_zeros(*shape, states.shape[-1]).index_put((codes.entries, codes.slots), states)
        known = None
        if len(states) < num_entries * max(codes.counts):
            known = torch.zeros(shape, dtype=torch.bool, device=states.device)
            known = known.index_put((codes.entries, codes.slots), torch.ones_like(codes.slots, dtype=torch.bool))
        image_of_entry = torch.zeros(num_entries, dtype=torch.long, device=states.device)
        image_of_entry = image_of_entry.index_put((codes.entries,), codes.images)
        output = self.region_perceiver(
            regions.patch_features[image_of_entry].unflatten(1, self.config.patch_grid),
            queries=queries,
            query_mask=known,
            upsampled_features=regions.upsampled_features[image_of_entry],
        )
        return output.masks_queries_logits[codes.entries, codes.slots]

    def _see(
        self, pixel_values: torch.Tensor, with_masks: bool = True, **kwargs: Any
    ) -> tuple[Any, MedSightRegionOutput]:
        encoder_output, grid, summary = encode_image(self.vision_tower, pixel_values, self.config, **kwargs)
        return encoder_output, self.perceive(grid, summary, with_masks)

    def perceive(self, grid: torch.Tensor, summary: torch.Tensor, with_masks: bool = True) -> MedSightRegionOutput:
        """What the region queries and the group classifier find in encoded images: see `encode_image`."""
        return MedSightRegionOutput(
            patch_features=grid.flatten(1, 2),
            group_logits=self.group_classifier(summary),
            **self.region_perceiver(grid, with_masks=with_masks),
        )


class MedSightForConditionalGeneration(TrainingLossMixin, MedSightPreTrainedModel, MedSightGenerationMixin):
    """MedSIGHT with a language modelling head: reads images, answers in words, and gives a mask for every region
    code."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    accepts_loss_kwargs = False  # of Trainer, which knows of tokens alone: `loss_counts` tells of masks, too

    def __init__(self, config: MedSightConfig) -> None:
        super().__init__(config)
        self.model = MedSightModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.perceiver_loss = RegionPerceiverLoss(config)
        words = self.get_input_embeddings()
        table = next(name for name, module in self.named_modules() if module is words)  # GPT-2 calls it wte
        self._tied_weights_keys = {"lm_head.weight": f"{table}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_region_features(
        self, pixel_values: torch.Tensor, with_masks: bool = True, **kwargs: Any
    ) -> MedSightRegionOutput:
        """See [`MedSightModel.get_region_features`]."""
        return self.model.get_region_features(pixel_values, with_masks, **kwargs)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See [`MedSightModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def quantize_regions(self, region_embeddings: torch.Tensor, groups: torch.Tensor) -> RegionQuantizerOutput:
        """See [`RegionCodebook`]."""
        return self.model.quantize_regions(region_embeddings, groups)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        mask_labels: list[torch.Tensor] | None = None,
        class_labels: list[torch.LongTensor] | None = None,
        group_labels: torch.LongTensor | None = None,
        code_class_labels: list[torch.LongTensor] | None = None,
        asked_classes: list[torch.LongTensor] | None = None,
        matched_images: torch.LongTensor | None = None,
        loss_counts: dict[str, float] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_last_hidden_state: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MedSightCausalLMOutputWithPast:
        """
        With text, the language model's loss (`labels`) and that of the masks of cited codes (`mask_labels`). With
        pixel values alone, the training of what sees: the perceiver (`mask_labels`, `class_labels`) and the codebook
        (`group_labels` too).

        Args:
            labels: (batch, length), next-token targets, -100 where there is none. With them, or with `mask_labels`,
                `region_features` comes without masks and classes of regions, unless `class_labels` or the mask decoder
                need these.
            mask_labels: a tensor (n_i, H, W) a sample, boolean or in [0, 1], of any size. With text, mask j is the
                target of the j-th region code in row i; `None` leaves the masks of row i undecoded. Without, the
                regions of image i.
            class_labels: a tensor (n_i,) an image, the class of each region.
            group_labels: (images,), the code group of each image.
            code_class_labels: with text and class queries: a tensor (codes,) a row, the class of each cited code's
                region, -1 where it is not known.
            asked_classes: with class queries: the classes that are asked of each image, those of its regions by
                default; one that it has no region of has an empty mask.
            matched_images: indices of the images whose regions are found by region queries; all by default.
            loss_counts: `masks`, `images`, `asked` classes and `codes` that the losses are averages over; by default
                those of this call. `num_items_in_batch` is the same for `labels`.
            return_last_hidden_state: give the states that the logits were made of, too.

        transformers' own `Trainer` evaluates with these losses where `TrainingArguments` has `label_names=["labels"]`:
        by default it waits for every argument whose name has "label" in it.

        Raises:
            ValueError: if the mask labels of a sample do not match its codes, a needed input is missing, or one has
                no use beside the others.
        """
        if input_ids is None and inputs_embeds is None:
            refuse_useless("without text", labels=labels, code_class_labels=code_class_labels)
            return self._perceive(
                pixel_values, mask_labels, class_labels, group_labels, asked_classes, matched_images, loss_counts or {}
            )

        refuse_useless("with text", group_labels=group_labels, asked_classes=asked_classes)
        if not self.config.use_class_queries:
            refuse_useless("without class queries", code_class_labels=code_class_labels)
        of_loss = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            image_embeds=image_embeds,
            with_masks=class_labels is not None
            or self.config.mask_decoder == "head"
            or (labels is None and mask_labels is None),
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept = hidden[:, keep, :]
        logits = self.lm_head(kept)

        lm_loss = perceiver_loss = None
        if labels is not None or of_loss.get("shift_labels") is not None:
            lm_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **of_loss
            )
        mask_logits, mask_loss, alignment_loss = self._grounding_losses(
            input_ids, hidden, outputs.region_features, mask_labels, code_class_labels, loss_counts or {}
        )
        if class_labels is not None:
            require(mask_labels=mask_labels, pixel_values=pixel_values)
            refuse_uneven_labels(pixel_values, mask_labels, class_labels)
            perceiver_loss = self._perceiver_loss(
                outputs.region_features, mask_labels, class_labels, loss_counts or {}
            )[0]
        losses = [loss for loss in (lm_loss, mask_loss, alignment_loss, perceiver_loss) if loss is not None]
        return MedSightCausalLMOutputWithPast(
            loss=sum(losses) if losses else None,
            logits=logits,
            lm_loss=lm_loss,
            mask_loss=mask_loss,
            alignment_loss=alignment_loss,
            perceiver_loss=perceiver_loss,
            mask_logits=mask_logits,
            last_hidden_state=kept if return_last_hidden_state else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            region_features=outputs.region_features,
            **{CACHE_NAME: outputs[CACHE_NAME] if CACHE_NAME in outputs else None},
        )

    @torch.no_grad()
    def decode_regions(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MedSightDecodedRegions:
        """Masks of all region codes that stand in a given text: generated elsewhere, or edited.

        Args:
            input_ids: (batch, length), with the image blocks and the codes.
            pixel_values: (images, 3, H, W), in the order of the blocks.
            attention_mask: (batch, length); by default, all but the pad tokens that a row begins with.

        Raises:
            ValueError: if a code has no image before it.
        """
        codes = locate_codes(input_ids, self.config)
        if attention_mask is None:
            pad_id = self.generation_config.pad_token_id
            began = torch.ones_like(input_ids) if pad_id is None else (input_ids != pad_id).cumsum(dim=1)
            attention_mask = (began > 0).long()
        kwargs.setdefault("position_ids", positions_of(attention_mask))
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            use_cache=False,
            with_masks=self.config.mask_decoder == "head",
            **kwargs,
        )
        return self._decoded_regions(input_ids, codes, outputs.last_hidden_state, outputs.region_features)

    def _decoded_regions(
        self,
        sequences: torch.Tensor,
        codes: CodeLocations,
        hidden: torch.Tensor,
        regions: MedSightRegionOutput | None,
        first_position: int = 0,
    ) -> MedSightDecodedRegions:
        """Masks, ids and scores of located codes, split by row; `hidden` begins at column `first_position`."""
        if not sum(codes.counts):
            return self._no_regions(len(sequences))
        masks = self.model.decode_codes(hidden, codes, regions, first_position)
        ids = sequences[codes.rows, codes.positions]
        logits = self.lm_head(hidden[codes.rows, codes.positions - 1 - first_position])
        likelihood = logits.float().softmax(-1).gather(1, ids[:, None])[:, 0]
        probabilities = masks.float().sigmoid().flatten(1)
        inside = probabilities > 0.5
        certainty = (probabilities * inside).sum(1) / inside.sum(1).clamp(min=1)
        return MedSightDecodedRegions(
            mask_logits=list(masks.split(codes.counts)),
            region_codes=list(ids.split(codes.counts)),
            region_scores=list((likelihood * certainty).split(codes.counts)),
        )

    def _no_regions(self, rows: int) -> MedSightDecodedRegions:
        empty = torch.empty(0, device=self.device)
        return MedSightDecodedRegions(
            mask_logits=[empty.to(self.dtype).reshape(0, *self.config.mask_size) for _ in range(rows)],
            region_codes=[empty.long() for _ in range(rows)],
            region_scores=[empty.float() for _ in range(rows)],
        )
