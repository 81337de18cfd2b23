"""MedSIGHT: what sees (`region_model_medsight`) and a language model as one model (paper arXiv 2606.06760)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from configuration_medsight.configuration_medsight import MedSightConfig

from .codebook_medsight import RegionQuantizerOutput
from .generation_medsight import UNREAD, MedSightGenerationMixin, positions_of
from .loss_medsight import code_mask_loss, total
from .outputs_medsight import (
    CACHE_NAME,
    MedSightCausalLMOutputWithPast,
    MedSightDecodedRegions,
    MedSightImageOutput,
    MedSightModelOutputWithPast,
    MedSightRegionOutput,
    takes_cache,
)
from .pretrained_medsight import MedSightPreTrainedModel
from .region_codes_in_text_medsight import CodeLocations, is_region_code, locate_codes
from .region_model_medsight import MedSightRegionModel, SeesRegions


# What language has no use for.
REGION_LABELS = ("class_labels", "group_labels", "asked_classes", "matched_images", "unlabelled_classes")


class Projector(nn.Module):
    """Linear, activation, Linear: between the widths of vision and language."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim_hidden)
        self.activation = activation
        self.linear_2 = nn.Linear(dim_hidden, dim_out)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states.to(self.linear_1.weight.dtype)
        return self.linear_2(self.activation(self.linear_1(hidden_states)))


class MedSightModel(SeesRegions, MedSightPreTrainedModel):
    """Everything but the language modelling head: the modules of [`MedSightRegionModel`], a language model, and a
    projector each way.

    ```python
    import torch
    from configuration_medsight import MedSightConfig
    from modeling_medsight import MedSightModel

    config = MedSightConfig.from_preset("tiny")
    pixel_values = torch.zeros(2, 3, config.image_size, config.image_size)
    blocks = MedSightModel(config).get_image_features(pixel_values).pooler_output
    assert blocks.shape == (2, config.image_seq_length, config.text_config.hidden_size)
    ```
    """

    def __init__(self, config: MedSightConfig) -> None:
        super().__init__(config)
        self.add_region_modules(config)
        vision_dim, text_dim = config.vision_hidden_size, config.text_config.hidden_size
        self.vision_to_text_projector = Projector(vision_dim, text_dim, text_dim, nn.GELU())
        self.text_to_vision_projector = Projector(text_dim, text_dim, vision_dim, nn.ReLU())
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Projector):
            self._init_layers(module)

    @property
    def region_model(self) -> MedSightRegionModel:
        """What sees, as a model of its own over the same modules: to train it trains this model."""
        with torch.device("meta"):
            region_model = MedSightRegionModel(self.config)
        for name, module in self.named_children():
            if hasattr(region_model, name):
                setattr(region_model, name, module)
        region_model.training = self.training
        return region_model

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> MedSightImageOutput:
        """Image blocks for the language model, (images, image_seq_length, hidden), in `pooler_output`, and what they
        are made from."""
        kwargs.pop("original_sizes", None)  # the processor's, which serving engines pass on with the pixels
        encoder_output, grid, summary = self._encode(pixel_values, **kwargs)
        regions = self._perceive(grid, summary, with_masks=self.config.mask_decoder == "head")
        all_layers = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        return MedSightImageOutput(
            last_hidden_state=encoder_output.last_hidden_state,
            pooler_output=self.project_regions(regions),
            hidden_states=encoder_output.hidden_states if all_layers else None,
            attentions=getattr(encoder_output, "attentions", None),
            region_features=regions,
        )

    def project_regions(self, regions: MedSightRegionOutput) -> torch.Tensor:
        """P_{v→t} on the (pooled) patch rows and then the region rows: (images, image_seq_length, hidden)."""
        rows = regions.patch_features
        if self.config.patch_pooling > 1:
            grid = rows.unflatten(1, self.config.patch_grid).permute(0, 3, 1, 2)
            rows = F.avg_pool2d(grid, self.config.patch_pooling).flatten(2).transpose(1, 2)
        if self.config.use_region_embeddings:
            rows = torch.cat((rows, regions.region_embeddings.to(rows)), dim=1)
        return self.vision_to_text_projector(rows)

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MedSightModelOutputWithPast:
        """
        Args:
            input_ids: (batch, length), image blocks as runs of `config.image_token_id`.
            pixel_values: (images, 3, H, W), all images of the batch in the order of their blocks.
            mm_encoder_outputs: in place of `pixel_values`: under "image", what `get_image_features` gave for them;
                empty where no process has images.
            cache: what transformers calls `past_key_values` before 5.24; either name is taken.

        Raises:
            ValueError: if image blocks and images do not match, or not exactly one of `input_ids`, `inputs_embeds` is
                given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds; images alone are for region_model")
        for name in UNREAD:
            kwargs.pop(name, None)
        if pixel_values is not None and pixel_values.shape[0] == 0:
            pixel_values = None
        images = (mm_encoder_outputs or {}).get("image")
        if images is not None and pixel_values is not None:
            raise ValueError("give one of pixel_values and mm_encoder_outputs")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            placeholders = input_ids == self.config.image_token_id
        elif pixel_values is not None or images is not None:
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            placeholders = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

        if pixel_values is not None:
            recorded = {name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs}
            images = self.get_image_features(pixel_values, return_dict=True, **recorded)
        image_embeds = None if images is None else images.pooler_output
        if image_embeds is None and mm_encoder_outputs is None and input_ids is not None and input_ids.shape[1] > 1:
            image_embeds = self._no_blocks()
        if image_embeds is not None:
            placeholders = placeholders.to(inputs_embeds.device)
            self._check_placeholders(placeholders, *image_embeds.shape[:2])
            image_embeds = image_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(placeholders[..., None], image_embeds)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds.to(self._layers_dtype(inputs_embeds.dtype)),
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache if past_key_values is None else past_key_values},
            **kwargs,
        )
        return MedSightModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            image_outputs=images,
        )

    def _layers_dtype(self, otherwise: torch.dtype) -> torch.dtype:
        """What the language model's layers compute in: they may be of another precision than the words that train."""
        words = self.get_input_embeddings().weight
        weight = next((weight for weight in self.language_model.parameters() if weight is not words), None)
        return weight.dtype if weight is not None and weight.is_floating_point() else otherwise

    def _no_blocks(self) -> torch.Tensor:
        """No image blocks (0, image_seq_length, hidden), in the graph all the same: another process may have some, and
        wait for the weights or the gradients of what makes them."""
        if self._is_sharded():
            return self.get_image_features(self.blank_image(), return_dict=True).pooler_output[:0]
        shape = (0, self.config.image_seq_length, self.config.vision_hidden_size)
        return self.vision_to_text_projector(torch.zeros(shape, device=self.device))

    @staticmethod
    def _check_placeholders(placeholders: torch.Tensor, images: int, block: int) -> None:
        """Refuse a batch whose rows do not hold whole blocks of as many images as there are."""
        counts = placeholders.sum(dim=1)
        torch_compilable_check(
            (counts.sum() == images * block) & (counts % block == 0).all(),
            lambda: (
                f"Image features and image tokens do not match: {images} images need {images * block} image "
                f"placeholders, {block} for each in one row; the rows of the text have {counts.tolist()}"
            ),
        )

    def decode_states(
        self,
        last_hidden_state: torch.Tensor,
        codes: CodeLocations,
        regions: MedSightRegionOutput | None,
        first_position: int = 0,
    ) -> torch.Tensor:
        """Mask logits (codes, H, W) of region codes, from the language model's states (paper: text-to-vision).

        P_{t→v} of a code's state takes the place of the perceiver's learnable queries.

        Args:
            last_hidden_state: (rows, length, hidden), after the final norm, from column `first_position` on.
            regions: features of the images that `codes.images` counts; not needed where there are no codes.
        """
        codes = codes.to(last_hidden_state.device)
        states = last_hidden_state[codes.rows, codes.positions + self.config.region_state_offset - first_position]
        queries = self.text_to_vision_projector(states)
        return self.decode_queries(queries, codes.images, codes.entries, max(codes.counts), regions)


class MedSightForConditionalGeneration(MedSightPreTrainedModel, MedSightGenerationMixin):
    """MedSIGHT with a language modelling head: reads images, answers in words, and gives a mask for every region
    code.

    ```python
    from PIL import Image
    from modeling_medsight import MedSightForConditionalGeneration
    from processing_medsight import MedSightProcessor

    model = MedSightForConditionalGeneration.from_pretrained("medsight/medsight-nano")
    processor = MedSightProcessor.from_pretrained("medsight/medsight-nano")
    text = f"{processor.image_token}Segment the liver."
    inputs = processor(images=Image.new("RGB", (64, 48)), text=text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, force_region=True)
    answer = processor.post_process_grounded_answer(output, inputs)[0]
    assert answer.regions[0].mask.shape == (48, 64)
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    accepts_loss_kwargs = False  # of Trainer, which knows of tokens alone: `loss_counts` tells of masks, too

    def __init__(self, config: MedSightConfig) -> None:
        super().__init__(config)
        self.model = MedSightModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        words = self.get_input_embeddings()
        table = next(name for name, module in self.named_modules() if module is words)  # GPT-2 calls it wte
        self._tied_weights_keys = {"lm_head.weight": f"{table}.weight"}
        self.post_init()

    @property
    def region_model(self) -> MedSightRegionModel:
        """See [`MedSightModel.region_model`]."""
        return self.model.region_model

    def get_region_features(
        self, pixel_values: torch.Tensor, with_masks: bool = True, **kwargs: Any
    ) -> MedSightRegionOutput:
        """See [`MedSightRegionModel.get_region_features`]."""
        return self.model.get_region_features(pixel_values, with_masks, **kwargs)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> MedSightImageOutput:
        """See [`MedSightModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def quantize_regions(self, region_embeddings: torch.Tensor, groups: torch.Tensor) -> RegionQuantizerOutput:
        """See [`RegionCodebook`]."""
        return self.model.quantize_regions(region_embeddings, groups)

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        labels: torch.LongTensor | None = None,
        mask_labels: list[torch.Tensor | None] | None = None,
        code_class_labels: list[torch.LongTensor] | None = None,
        loss_counts: dict[str, float] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MedSightCausalLMOutputWithPast:
        """
        The language model's loss (`labels`), and that of the masks of cited codes (`mask_labels`). The losses of what
        sees are those of [`MedSightRegionModel`].

        Args:
            labels: (batch, length), next-token targets, -100 where there is none.
            mask_labels: a tensor (n_i, H, W) a row, boolean or in [0, 1], of any size: mask j is the target of the
                j-th region code in row i; `None` leaves the codes of row i undecoded.
            code_class_labels: with class queries: a tensor (codes,) a row, the class of each cited code's region, -1
                where it is not known.
            loss_counts: `masks` and `codes` that the losses are averages over (see [`MedSightRegionModel.forward`]);
                by default those of this call. `num_items_in_batch` is the same for `labels`.

        transformers' own `Trainer` evaluates with these losses where `TrainingArguments` has `label_names=["labels"]`:
        by default it waits for every argument whose name has "label" in it.

        Raises:
            ValueError: if the mask labels of a row do not match its codes, or a needed input is missing.
        """
        useless = [name for name in REGION_LABELS if kwargs.pop(name, None) is not None]
        if code_class_labels is not None and not self.config.use_class_queries:
            useless.append("code_class_labels")
        if useless:
            raise ValueError(
                f"{', '.join(useless)}: of no use here; region_model takes the labels of regions, and a model with "
                "class queries code_class_labels"
            )
        if input_ids is None and not (mask_labels is None and code_class_labels is None):
            raise ValueError("mask_labels and code_class_labels need input_ids, where the codes stand")
        of_loss = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **{CACHE_NAME: cache if past_key_values is None else past_key_values},
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last_states = hidden[:, keep, :]
        logits = self.lm_head(last_states.to(self.lm_head.weight.dtype))

        lm_loss = mask_logits = mask_loss = alignment_loss = None
        if labels is not None or of_loss.get("shift_labels") is not None:
            lm_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **of_loss
            )
        counts = loss_counts or {}
        if mask_labels is not None:
            mask_logits, mask_loss = self._mask_loss(input_ids, hidden, outputs.region_features, mask_labels, counts)
        if code_class_labels is not None:
            alignment_loss = self._alignment_loss(input_ids, hidden, code_class_labels, counts)
        losses = (lm_loss, mask_loss, alignment_loss)
        loss = total(losses) if any(loss is not None for loss in losses) else None
        beside_language = [part for name, part in self.model.named_children() if name != "language_model"]
        return MedSightCausalLMOutputWithPast(
            loss=self._in_graph(loss, [*beside_language, self.lm_head]),
            logits=logits,
            lm_loss=lm_loss,
            mask_loss=mask_loss,
            alignment_loss=alignment_loss,
            mask_logits=mask_logits,
            last_hidden_state=last_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _mask_loss(
        self,
        input_ids: torch.Tensor,
        hidden: torch.Tensor,
        regions: MedSightRegionOutput | None,
        mask_labels: list[torch.Tensor | None],
        loss_counts: dict[str, float],
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Masks of the cited codes, a tensor a row, and their loss."""
        if len(mask_labels) != len(input_ids):
            raise ValueError(
                f"{len(mask_labels)} mask_labels for {len(input_ids)} samples: "
                "give one entry a sample, empty if it cites no code"
            )
        left_out = torch.tensor([masks is None for masks in mask_labels], device=input_ids.device)[:, None]
        input_ids = input_ids.masked_fill(left_out & is_region_code(input_ids, self.config), -1)
        given = [hidden.new_zeros(0, 1, 1) if masks is None else masks for masks in mask_labels]
        counts = [len(masks) for masks in given]
        cited = is_region_code(input_ids, self.config).sum(dim=1)
        torch_compilable_check(
            (cited == torch.tensor(counts, device=cited.device)).all(),
            lambda: next(
                f"sample {row} cites {codes} region codes but has {masks} mask_labels"
                for row, (codes, masks) in enumerate(zip(cited.tolist(), counts, strict=True))
                if codes != masks
            ),
        )
        codes = locate_codes(input_ids, self.config, counts=counts)
        decoded = list(self.model.decode_states(hidden, codes, regions).split(counts))
        return decoded, code_mask_loss(decoded, given, loss_counts.get("masks"))

    def _alignment_loss(
        self,
        input_ids: torch.Tensor,
        hidden: torch.Tensor,
        code_class_labels: list[torch.Tensor],
        loss_counts: dict[str, float],
    ) -> torch.Tensor:
        """Squared distance of a code's projected state to the query of its class, in units of these queries'
        variance."""
        codes = locate_codes(input_ids, self.config).to(hidden.device)
        wanted = torch.cat(code_class_labels).to(hidden.device)
        if len(wanted) != len(codes.rows):
            raise ValueError(f"{len(wanted)} code_class_labels for {len(codes.rows)} cited region codes")
        known = wanted >= 0
        states = hidden[codes.rows, codes.positions + self.config.region_state_offset]
        states = self.model.text_to_vision_projector(states[known]).float()
        aims = self.model.region_perceiver.class_queries.detach().to(states)
        distance = (states - aims[wanted[known].to(aims.device)]).square().mean(-1).sum() / aims.var()
        return self.config.alignment_loss_weight * distance / max(1, loss_counts.get("codes", int(known.sum())))

    @torch.no_grad()
    def decode_regions(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        start: int = 0,
        **kwargs: Any,
    ) -> MedSightDecodedRegions:
        """Masks of all region codes that stand in a given text: generated elsewhere, or edited.

        Codes of one image are decoded together, as those of an answer are by `generate`: to get the masks of an
        answer at the end of a conversation, give the length of its prompt as `start`.

        Args:
            input_ids: (batch, length), with the image blocks and the codes.
            pixel_values: (images, 3, H, W), in the order of the blocks.
            attention_mask: (batch, length); by default, all but the pad tokens that a row begins with.
            start: first column whose codes are decoded.

        Raises:
            ValueError: if a code has no image before it.
        """
        codes = locate_codes(input_ids, self.config, start=start)
        if attention_mask is None:
            pad_id = self.generation_config.pad_token_id
            began = torch.ones_like(input_ids) if pad_id is None else (input_ids != pad_id).cumsum(dim=1)
            attention_mask = (began > 0).long()
        kwargs.setdefault("position_ids", positions_of(attention_mask))
        outputs = self.model(
            input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, use_cache=False, **kwargs
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
        masks = self.model.decode_states(hidden, codes, regions, first_position)
        ids = sequences[codes.rows, codes.positions]
        codes = codes.to(hidden.device)
        states = hidden[codes.rows, codes.positions - 1 - first_position]
        logits = self.lm_head(states.to(self.lm_head.weight.dtype))
        likelihood = logits.float().softmax(-1).gather(1, ids[:, None].to(logits.device))[:, 0].to(masks.device)
        probabilities = masks.float().sigmoid().flatten(1)
        inside = probabilities > 0.5
        certainty = (probabilities * inside).sum(1) / inside.sum(1).clamp(min=1)
        return MedSightDecodedRegions(
            mask_logits=list(masks.split(codes.counts)),
            region_code_ids=list(ids.split(codes.counts)),
            region_scores=list((likelihood * certainty).split(codes.counts)),
        )
