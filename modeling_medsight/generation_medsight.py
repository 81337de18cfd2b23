"""`generate()` with masks: text from transformers' own generation, then a mask for every region code in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, cast

import torch
from transformers import GenerationMixin, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

from .outputs_medsight import (
    CACHE_NAME,
    MedSightDecodedRegions,
    MedSightGenerateBeamOutput,
    MedSightGenerateOutput,
    MedSightImageOutput,
    MedSightRegionOutput,
)
from .region_codes_in_text_medsight import RegionCodeConstraint, count_images, is_region_code, locate_codes


UNREAD = ("original_sizes", "mm_token_type_ids")  # what the processor gives beside what the model reads


@dataclass
class GroundingState:
    """What one call of `generate()` knows of regions while it runs.

    Args:
        allowed_groups: (batch, K) boolean, the groups whose codes each row may use.
        force_region: let no answer end without a code.
        collect: keep the language model's last state of every step. Only a search that gives every row one token a
            step, and never changes the order of rows, can use them.
        views: the prompt's images, in place of `pixel_values`.
    """

    allowed_groups: torch.Tensor
    force_region: bool
    collect: bool
    views: Optional["_Views"]
    states: list[torch.Tensor] = field(default_factory=list)

    def add(self, hidden: torch.Tensor) -> None:
        """Take a step's states (rows, columns that gave logits, d), of which the last gave the new token."""
        self.collect = self.collect and hidden.shape[1] == 1
        if self.collect:
            self.states.append(hidden[:, -1:].clone())  # a compiled step writes the next one's over it

    def states_before(self, new_tokens: torch.Tensor) -> torch.Tensor | None:
        """States (rows, n, d) of the column before `new_tokens` (rows, n) and of all of these but the last; `None`
        where they are not all known."""
        if not self.collect or len(self.states) < new_tokens.shape[1]:
            return None
        return torch.cat(self.states[: new_tokens.shape[1]], dim=1)


class MedSightGenerationMixin(GenerationMixin):
    """transformers' generation, and the masks of what was generated."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        *,
        allowed_groups: str | Sequence[int | str] | None = None,
        force_region: bool | None = None,
        **kwargs: Any,
    ) -> MedSightGenerateOutput | MedSightGenerateBeamOutput | torch.Tensor:
        """Generate answers, and a mask for every region code in them.

        All of transformers' decoding settings work: greedy, sampling, beams, several returned sequences, assisted, any
        cache, streaming. Without an image in its prompt a row cannot use region codes.

        Args:
            inputs: (batch, length) prompt; or `input_ids=`. Keyword inputs are what the processor returns. With
                `past_key_values` that hold the beginning of a conversation, give the whole of it all the same; images
                in that beginning are not encoded again, but where a code cites one.
            allowed_groups: code groups (ids or names) that answers may use, or `"predicted"` for the group that the
                classifier gives to the row's last image. All groups by default. Like every setting, this one and the
                next may also stand in a generation config.
            force_region: let no answer end without at least one region code. A stop of the caller's own
                (`stopping_criteria`, `stop_strings`, `max_time`) still ends one where it stands.

        Returns:
            transformers' output with `mask_logits` (a tensor (codes, H, W) for each returned sequence),
            `region_code_ids`, `region_scores` and `is_complete` besides: see [`MedSightGenerateOutput`]. With
            `return_dict_in_generate=False`, the plain tensor of sequences.

        Raises:
            ValueError: if images and placeholders do not match, or a setting cannot give right masks.
        """
        for name in UNREAD:
            kwargs.pop(name, None)
        settings, _ = self._prepare_generation_config(generation_config, **kwargs)
        if settings.is_assistant:  # drafts for another model, which gives the masks
            return super().generate(inputs, generation_config, logits_processor, **kwargs)
        if kwargs.get("mm_encoder_outputs"):
            raise ValueError("mm_encoder_outputs: generate makes them itself; give it the pixel_values")
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if kwargs.get("pixel_values") is not None and len(kwargs["pixel_values"]) == 0:
            kwargs.pop("pixel_values")
        pixel_values = kwargs.get("pixel_values")
        self._prepare_special_tokens(settings, True, device=self.device)
        if prompt is not None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._prepare_attention_mask_for_generation(prompt, settings, {})
        self._refuse_wrong_inputs(prompt, pixel_values, kwargs.get("attention_mask"), settings)

        if allowed_groups is None:
            allowed_groups = getattr(settings, "allowed_groups", None)
        if force_region is None:
            force_region = bool(getattr(settings, "force_region", False))
        # Processes that wait for each other must all make the same passes, whatever each has seen and cited.
        synced = kwargs.setdefault("synced_gpus", self._is_sharded())
        views = None if pixel_values is None else _Views(self, prompt, pixel_values)
        if synced and views is not None:
            views.encoder_outputs(prompt)
        elif synced:
            self.model.get_image_features(self.model.blank_image())
        allowed = self._allowed_groups(prompt, views, allowed_groups)
        if force_region and not bool(allowed.any(dim=1).all()):
            raise ValueError("force_region=True needs an image in every row of the prompt")

        # An assistant, which gets all that this model gets, looks at the pixels with its own encoder; and beams change
        # their rows.
        assisted = kwargs.get("assistant_model") is not None
        if not assisted:
            kwargs.pop("pixel_values", None)
        collect = views is not None and not synced and not assisted and (settings.num_beams or 1) == 1
        grounding = GroundingState(allowed, force_region, collect, None if assisted else views)
        outputs = super().generate(inputs, generation_config, logits_processor, grounding=grounding, **kwargs)
        if not hasattr(outputs, "sequences"):
            return outputs
        decoded = self._decode_generated(outputs, prompt, kwargs.get("attention_mask"), views, grounding, synced)
        new_tokens = outputs.sequences[:, 0 if prompt is None else prompt.shape[1] :]
        end_ids = torch.tensor(_as_list(settings._eos_token_tensor), device=new_tokens.device)
        complete = torch.isin(new_tokens, end_ids).any(dim=1)  # nothing but padding comes after an end
        beams = isinstance(outputs, GenerateBeamDecoderOnlyOutput)
        kind = MedSightGenerateBeamOutput if beams else MedSightGenerateOutput
        return kind(**outputs, **decoded, is_complete=complete)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.FloatTensor | None = None,
        grounding: GroundingState | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Images go into the step that reads their placeholders, and into no other."""
        pixel_values = kwargs.pop("pixel_values", None)
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        views = None if grounding is None else grounding.views
        if grounding is not None:
            model_inputs["mm_encoder_outputs"] = {}
        if pixel_values is None and views is None:
            return model_inputs
        read = model_inputs["inputs_embeds" if model_inputs.get("input_ids") is None else "input_ids"].shape[1]
        if read > 1:
            # A cache may hold the beginning of the conversation: only images after it are read now.
            start = input_ids.shape[1] - read
            if views is not None:
                model_inputs["mm_encoder_outputs"] = views.encoder_outputs(input_ids, start)
            else:
                images = _images_of(input_ids, self.config, start)
                model_inputs["pixel_values"] = pixel_values[images] if len(images) else None
        return model_inputs

    def _get_logits_processor(
        self,
        generation_config: Any,
        *args: Any,
        logits_processor: LogitsProcessorList | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LogitsProcessorList:
        """transformers' processors, and after the caller's own the rules for region codes."""
        grounding = (model_kwargs or {}).get("grounding")
        if grounding is not None:
            constraint = RegionCodeConstraint(
                self.config,
                grounding.allowed_groups,
                end_ids=_as_list(generation_config._eos_token_tensor),
                prompt_length=kwargs["input_ids_seq_length"],
                force_region=grounding.force_region,
                max_length=generation_config.max_length,
            )
            logits_processor = LogitsProcessorList([*(logits_processor or []), constraint])
        return super()._get_logits_processor(
            generation_config, *args, logits_processor=logits_processor, model_kwargs=model_kwargs, **kwargs
        )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if model_kwargs.get("grounding") is not None:
            model_kwargs["grounding"].add(outputs.last_hidden_state)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _supports_mm_encoder_outputs(self) -> bool:
        return False  # transformers would look at all images, those of earlier turns too

    def _refuse_wrong_inputs(
        self,
        prompt: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        settings: Any,
    ) -> None:
        if settings.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit: transformers can cut language models alone; give an assistant_model"
            )
        if prompt is None:
            if pixel_values is not None:
                raise ValueError("images need input_ids: nothing else says where they stand in the prompt")
            return
        if attention_mask.shape == prompt.shape and not bool(attention_mask[:, -1].all()):
            row = attention_mask[:, -1].tolist().index(0)
            raise ValueError(
                f"row {row} of the prompt is padded on the right, where its answer would begin: pad on the left "
                '(tokenizer.padding_side = "left")'
            )
        images = 0 if pixel_values is None else len(pixel_values)
        placeholders, block = (prompt == self.config.image_token_id).sum(dim=1).tolist(), self.config.image_seq_length
        if any(placeholders) and pixel_values is None:
            raise ValueError("the prompt has image placeholders but no images were given (pixel_values)")
        if sum(placeholders) != images * block or any(count % block for count in placeholders):
            raise ValueError(
                f"Image features and image tokens do not match: {images} images need {images * block} image "
                f"placeholders, {block} for each in one row; the rows of the prompt have {placeholders}"
            )
        if not images:
            return
        if attention_mask.shape != prompt.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} but the prompt {tuple(prompt.shape)}: with "
                "images, give the whole conversation, also where past_key_values holds its beginning"
            )
        for name in ("prefill_chunk_size", "token_healing"):
            if getattr(settings, name):
                raise ValueError(
                    f"{name}={getattr(settings, name)!r} cannot be used with images: it changes how the prompt is "
                    "read, and masks would not belong to the text"
                )

    def _allowed_groups(
        self, prompt: torch.Tensor | None, views: "_Views | None", allowed_groups: str | Sequence[int | str] | None
    ) -> torch.Tensor:
        """(batch, K) boolean: groups whose codes each row may use; none for a row without an image."""
        num_groups, names = self.config.num_groups, list(self.config.group_names)
        if views is None:
            if allowed_groups is not None:
                raise ValueError(f"allowed_groups={allowed_groups!r} needs an image in the prompt (pixel_values)")
            return torch.zeros(1, num_groups, dtype=torch.bool)
        images = count_images(prompt, self.config)
        has_image = images > 0
        allowed = has_image[:, None].repeat(1, num_groups)
        if isinstance(allowed_groups, str) and allowed_groups == "predicted":
            places, regions = views.features((images.cumsum(0) - 1)[has_image])
            predicted = regions.group_logits.argmax(-1)[places.to(regions.group_logits.device)]
            allowed[has_image] = torch.nn.functional.one_hot(predicted.to(prompt.device), num_groups).bool()
        elif allowed_groups is not None:
            given = allowed_groups.tolist() if hasattr(allowed_groups, "tolist") else allowed_groups
            given = list(given) if isinstance(given, (list, tuple, set, range)) else [given]
            known = {**{k: k for k in range(num_groups)}, **{name: k for k, name in enumerate(names)}}
            unknown = [group for group in given if isinstance(group, bool) or group not in known]
            if unknown or not given:
                raise ValueError(f"allowed_groups={allowed_groups!r}: unknown {unknown}; the groups are {names}")
            chosen = {known[group] for group in given}
            allowed[:, [k for k in range(num_groups) if k not in chosen]] = False
        return allowed

    def _decode_generated(
        self,
        outputs: Any,
        prompt: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        views: "_Views | None",
        grounding: GroundingState,
        synced: bool,
    ) -> MedSightDecodedRegions:
        """Masks of generated codes, from the states of the steps where these are known; else from one teacher-forced
        pass over what was generated, on the prompt's part of the cache.

        Codes of the prompt, which are of earlier turns, are not decoded again. With `synced` the pass is made also
        where nothing was cited: another process may wait for its share of the weights.
        """
        sequences = outputs.sequences
        length = 0 if prompt is None else prompt.shape[1]
        new_tokens = sequences[:, length:]
        codes = locate_codes(sequences, self.config, start=length)
        if views is None or not sum(codes.counts):
            width = self.config.text_config.hidden_size
            states = torch.empty(len(sequences), 0, width, dtype=self.dtype, device=self.device)
            if synced:
                states = self.model(input_ids=sequences[:, -1:], use_cache=False).last_hidden_state
            return self._decoded_regions(sequences, codes, states, None)

        images = views.images_of(sequences).to(codes.images.device)[codes.images]
        codes.images, regions = views.features(images, for_masks=True)
        states, start = grounding.states_before(new_tokens), length - 1
        if states is not None:
            if not bool(is_region_code(new_tokens[:, -1], self.config).any()):
                return self._decoded_regions(sequences, codes, states, regions, first_position=start)
            start = sequences.shape[1] - 1  # of the last column alone no step needed the state

        copies = len(sequences) // len(prompt)
        attention_mask = attention_mask.repeat_interleave(copies, dim=0)
        attention_mask = torch.cat((attention_mask, torch.ones_like(new_tokens)), dim=1)
        cache = None
        if not bool((sequences[:, start:] == self.config.image_token_id).any()):
            cache = _beginning_of_cache(outputs.get(CACHE_NAME), len(prompt), copies, start, shared=states is None)
        if cache is not None:
            passed = {CACHE_NAME: cache, "use_cache": True, "mm_encoder_outputs": {}}
        else:
            states, start = None, 0
            passed = {"mm_encoder_outputs": views.encoder_outputs(sequences), "use_cache": False}
        hidden = self.model(
            input_ids=sequences[:, start:],
            attention_mask=attention_mask,
            position_ids=positions_of(attention_mask)[:, start:],
            **passed,
        ).last_hidden_state
        if states is not None:
            hidden, start = torch.cat((states.to(hidden.device), hidden), dim=1), length - 1
        return self._decoded_regions(sequences, codes, hidden, regions, first_position=start)


class _Views:
    """The images of one call of `generate()`, looked at once each, and only where this is needed."""

    def __init__(self, model: Any, prompt: torch.Tensor, pixel_values: torch.Tensor) -> None:
        self.model = model.model
        self.rows = len(prompt)
        self.pixel_values = pixel_values
        self.known, self.regions = torch.arange(0), cast(Any, None)

    def images_of(self, sequences: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Indices of the images in `sequences`, one or several for each row of the prompt, from column `start` on."""
        return _images_of(sequences, self.model.config, start, copies=len(sequences) // self.rows)

    def encoder_outputs(self, sequences: torch.Tensor, start: int = 0) -> dict[str, Any]:
        """Blocks of these images, as the model's forward takes them; empty where there are none."""
        images = self.images_of(sequences, start)
        if not len(images):
            return {}
        places, regions = self.features(images)
        blocks = self.model.project_regions(regions)
        return {"image": MedSightImageOutput(pooler_output=blocks[places.to(blocks.device)])}

    def features(self, images: torch.Tensor, for_masks: bool = False) -> tuple[torch.Tensor, Any]:
        """For each of `images` (n,) its place in the features that come with it; all are looked at unless they were
        last time. `for_masks` alone, the perceiver that draws them needs no pass for regions before."""
        asked, by_head = images.cpu(), self.model.config.mask_decoder == "head"
        known = self.regions is not None and bool(torch.isin(asked, self.known).all())
        if not known or (self.regions.region_embeddings is None and not for_masks):
            self.known = asked.unique()
            pixels = self.pixel_values[self.known.to(self.pixel_values.device)]
            if for_masks and not by_head:
                _, grid, _ = self.model._encode(pixels)
                self.regions = MedSightRegionOutput(patch_features=grid.flatten(1, 2))
            else:
                self.regions = self.model.get_region_features(pixels, with_masks=by_head, return_dict=True)
        return torch.searchsorted(self.known, asked).to(images.device), self.regions


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (rows, length) of padded texts: padding does not count."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def _as_list(token_ids: torch.Tensor | None) -> list[int]:
    """Token ids of a prepared generation config, which holds none, one or several."""
    return [] if token_ids is None else token_ids.reshape(-1).tolist()


def _images_of(input_ids: torch.Tensor, config: Any, start: int, copies: int = 1) -> torch.Tensor:
    """Indices, among all images of a batch, of those in `input_ids` from column `start` on; `copies` rows in a
    sequence are of one row of the batch."""
    counts = count_images(input_ids[::copies], config).tolist()
    later = count_images(input_ids[::copies, start:], config).tolist()
    blocks = torch.arange(sum(counts)).split(counts)
    return torch.cat([block[len(block) - n :].repeat(copies) for block, n in zip(blocks, later, strict=True)])


def _beginning_of_cache(cache: Any, prompts: int, copies: int, length: int, shared: bool) -> DynamicCache | None:
    """The first `length` columns of a cache, for `copies` sequences of each prompt; `None` if this kind cannot be cut.

    The given cache is left as it is.

    Args:
        shared: the columns are the prompt's: beams share them, so any row of a prompt serves. Else the rows of the
            cache are the sequences.
    """
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        return None
    if any(type(layer) not in (DynamicLayer, StaticLayer) for layer in cache.layers):
        return None
    rows_each = cache.layers[0].keys.shape[0] // prompts
    rows = torch.arange(prompts * copies)
    if shared:
        rows = torch.arange(prompts).repeat_interleave(copies) * rows_each
    beginning = DynamicCache()
    for index, layer in enumerate(cache.layers):
        chosen = rows.to(layer.keys.device)
        beginning.update(layer.keys[chosen, :, :length], layer.values[chosen, :, :length], index)
    return beginning
