"""`generate()` with masks: text from transformers' own generation, then a mask for every region code in it."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

from .outputs_medsight import CACHE_NAME, MedSightDecodedRegions, MedSightGenerateBeamOutput, MedSightGenerateOutput
from .region_codes_in_text_medsight import count_images, is_region_code, locate_codes


UNREAD = ("original_sizes", "mm_token_type_ids")  # what the processor gives beside what the model reads


class RegionCodeConstraint(LogitsProcessor):
    """Keeps region codes to allowed groups and image placeholders out of answers, and on request lets no answer end
    without a code.

    Args:
        config: a `MedSightConfig`.
        allowed: (batch, K) boolean, the groups whose codes each row may use.
        end_ids: end-of-sequence token ids.
        prompt_length: columns of the prompt.
        force_region: put a code where the answer would end, or reach `max_length`, without one.
        max_length: columns that a sequence may have in all.

    Raises:
        ValueError: when it is called, a code has to come but other processors have ruled them all out.
    """

    def __init__(
        self,
        config: Any,
        allowed: torch.Tensor,
        end_ids: list[int],
        prompt_length: int,
        force_region: bool,
        max_length: int,
    ) -> None:
        self.config = config
        self.allowed_codes = allowed.repeat_interleave(config.codes_per_group, dim=1)
        self.refused: torch.Tensor | None = None
        self.end_ids = end_ids
        self.prompt_length = prompt_length
        self.force_region = force_region
        self.max_length = max_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        first, last = self.config.region_code_start_id, self.config.region_code_start_id + self.config.num_region_codes
        if self.refused is None or self.refused.shape != scores.shape:
            copies = len(scores) // len(self.allowed_codes)
            self.refused = torch.zeros_like(scores, dtype=torch.bool)
            self.refused[:, first:last] = ~self.allowed_codes.to(scores.device).repeat_interleave(copies, dim=0)
            self.refused[:, self.config.image_token_id] = True  # it would be part of an image that nobody gave
        scores = scores.masked_fill(self.refused, -torch.inf)
        if not self.force_region:
            return scores

        without = ~is_region_code(input_ids[:, self.prompt_length :], self.config).any(dim=1)
        at_end = torch.isin(scores.argmax(dim=1), torch.tensor(self.end_ids, device=scores.device))
        if input_ids.shape[1] >= self.max_length - 1:
            at_end = torch.ones_like(at_end)
        codes_only = torch.full_like(scores, -torch.inf)
        codes_only[:, first:last] = scores[:, first:last]
        due = without & at_end
        if bool((due & codes_only.isneginf().all(dim=1)).any()):
            raise ValueError(
                "force_region=True: another logits processor or setting (suppress_tokens, forced_eos_token_id, "
                "bad_words_ids, ...) rules out every region code where one is due"
            )
        scores = torch.where(due[:, None], codes_only, scores)
        for end_id in self.end_ids:
            scores[:, end_id] = scores[:, end_id].masked_fill(without, -torch.inf)
        return scores


class StatesOfSteps:
    """The language model's last state after every step of a search, each of which gives every row one token."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.one_each = True

    def add(self, hidden: torch.Tensor, num_new_tokens: int) -> None:
        """Take a step's states (rows, columns read, d), of which the last gave the new token."""
        self.one_each = self.one_each and num_new_tokens == hidden.shape[1] == 1
        self.steps.append(hidden[:, -1:].clone())  # a compiled step writes the next one's over it

    def of(self, new_tokens: torch.Tensor, config: Any) -> torch.Tensor | None:
        """States (rows, n, d) of the column before `new_tokens` (rows, n) and of all of these but the last; `None`
        where they are not all known, or the last column, whose state no step needed, has a code."""
        length = new_tokens.shape[1]
        if not self.one_each or len(self.steps) < length or bool(is_region_code(new_tokens[:, -1], config).any()):
            return None
        return torch.cat(self.steps[:length], dim=1)


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
        force_region: bool = False,
        **kwargs: Any,
    ) -> MedSightGenerateOutput | MedSightGenerateBeamOutput | torch.Tensor:
        """Generate answers, and a mask for every region code in them.

        All of transformers' decoding settings work: greedy, sampling, beams, several returned sequences, assisted, any
        cache, streaming. Without an image in its prompt a row cannot use region codes.

        Args:
            inputs: (batch, length) prompt; or `input_ids=`. Keyword inputs are what the processor returns.
            allowed_groups: code groups (ids or names) that answers may use, or `"predicted"` for the group that the
                classifier gives to the row's last image. All groups by default.
            force_region: let no answer end without at least one region code. A stop of the caller's own
                (`stopping_criteria`, `stop_strings`, `max_time`) still ends one where it stands.

        Returns:
            transformers' output with `mask_logits` (a tensor (codes, H, W) for each returned sequence), `region_codes`
            (token ids), `region_scores` and `is_complete` besides: see [`MedSightGenerateOutput`]. With
            `return_dict_in_generate=False`, the plain tensor of sequences.

        Raises:
            ValueError: if images and placeholders do not match, or a setting cannot give right masks.
        """
        for name in UNREAD:
            kwargs.pop(name, None)

        def setting(name: str) -> Any:
            """As transformers finds it: what a given configuration leaves open is the model's own."""
            places = (kwargs.get(name), *(getattr(c, name, None) for c in (generation_config, self.generation_config)))
            return next((value for value in places if value is not None), None)

        if setting("is_assistant"):  # drafts for another model, which gives the masks
            return super().generate(inputs, generation_config, logits_processor, **kwargs)
        if kwargs.get("image_embeds") is not None:
            raise ValueError("image_embeds: no mask can be drawn from them; give generate the pixel_values")
        if kwargs.get("synced_gpus") is None and self._is_sharded():
            kwargs["synced_gpus"] = True

        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        pixel_values = kwargs.get("pixel_values")
        self._refuse_wrong_inputs(prompt, pixel_values, kwargs.get("attention_mask"), setting)

        regions = None
        if pixel_values is not None:
            # Masks are drawn for what is cited, which only the cheaper decoder takes from this pass.
            with_masks = self.config.mask_decoder == "head"
            regions = self.get_region_features(pixel_values, with_masks, return_dict=True)
            if kwargs.get("assistant_model") is None:  # an assistant looks at the pixels with its own encoder
                kwargs["image_embeds"] = self.model.project_regions(regions)
                del kwargs["pixel_values"]
        if prompt is not None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._mask_of_padding(prompt, setting("pad_token_id"), setting("eos_token_id"))

        allowed = self._allowed_groups(prompt, regions, allowed_groups)
        if force_region and not bool(allowed.any(dim=1).all()):
            raise ValueError("force_region=True needs an image in every row of the prompt")
        end_ids = _ids(setting("eos_token_id"))
        prompt_length = 0 if prompt is None else prompt.shape[1]
        constraint = RegionCodeConstraint(
            self.config,
            allowed,
            end_ids=end_ids,
            prompt_length=prompt_length,
            force_region=force_region,
            max_length=self._length_limit(prompt, setting),
        )
        logits_processor = LogitsProcessorList([*(logits_processor or []), constraint])
        synced = bool(kwargs.get("synced_gpus"))
        # Processes that wait for each other must all make the same passes, whatever each has cited; an assistant,
        # which gets all that this model gets, need not know this; and beams change their rows.
        known = regions is not None and not synced and kwargs.get("assistant_model") is None
        states = StatesOfSteps() if known and (setting("num_beams") or 1) == 1 else None

        outputs = super().generate(inputs, generation_config, logits_processor, states=states, **kwargs)
        if not hasattr(outputs, "sequences"):
            return outputs
        decoded = self._decode_generated(outputs, prompt, kwargs.get("attention_mask"), regions, states, synced)
        complete = _is_complete(outputs.sequences[:, prompt_length:], end_ids, setting("pad_token_id"))
        beams = isinstance(outputs, GenerateBeamDecoderOnlyOutput)
        kind = MedSightGenerateBeamOutput if beams else MedSightGenerateOutput
        return kind(**outputs, **decoded, is_complete=complete)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.FloatTensor | None = None,
        states: StatesOfSteps | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Images go into the step that reads their placeholders, and into no other."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if states is not None:
            model_inputs["return_last_hidden_state"] = True
        images = {name: kwargs[name] for name in ("pixel_values", "image_embeds") if kwargs.get(name) is not None}
        for name in images:
            model_inputs.pop(name, None)
        read = (
            model_inputs["input_ids"] if model_inputs.get("input_ids") is not None else model_inputs["inputs_embeds"]
        )
        if images and (read.shape[1] > 1 or kwargs.get("is_first_iteration", False)):
            # A cache may hold the beginning of the conversation: only images after it are read now.
            unread = count_images(input_ids[:, input_ids.shape[1] - read.shape[1] :], self.config).tolist()
            blocks = _images_of_rows(input_ids, self.config)
            index = torch.cat([block[len(block) - new :] for block, new in zip(blocks, unread, strict=True)])
            if len(index):
                model_inputs.update({name: value[index.to(value.device)] for name, value in images.items()})
        return model_inputs

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        if model_kwargs.get("states") is not None:
            model_kwargs["states"].add(outputs.last_hidden_state, num_new_tokens)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder, num_new_tokens)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        """Repeat each row's images as a block: rows may have different numbers of them."""
        names = [name for name in ("pixel_values", "image_embeds") if model_kwargs.get(name) is not None]
        images = {name: model_kwargs.pop(name) for name in names}
        if images and expand_size > 1 and input_ids is not None:
            index = torch.cat([block.repeat(expand_size) for block in _images_of_rows(input_ids, self.config)])
            images = {name: value[index] for name, value in images.items()}
        expanded, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return expanded, {**model_kwargs, **images}

    def _refuse_wrong_inputs(
        self,
        prompt: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        setting: Any,
    ) -> None:
        if prompt is not None and attention_mask is not None and attention_mask.shape == prompt.shape:
            right = (attention_mask[:, -1] == 0).nonzero().flatten().tolist()
            if right:
                raise ValueError(
                    f"row {right[0]} of the prompt is padded on the right, where its answer would begin: pad on the "
                    'left (tokenizer.padding_side = "left")'
                )
        if pixel_values is None:
            if prompt is not None and bool((prompt == self.config.image_token_id).any()):
                raise ValueError("the prompt has image placeholders but no images were given (pixel_values)")
            return
        if prompt is None:
            raise ValueError("images need input_ids: without them nothing says where the images stand in the prompt")
        placeholders, rows = int((prompt == self.config.image_token_id).sum()), self.config.image_seq_length
        if placeholders != len(pixel_values) * rows:
            count = len(pixel_values)
            raise ValueError(
                f"Image features and image tokens do not match: {count} images need {count * rows} image "
                f"placeholders ({rows} each), the prompt has {placeholders}"
            )
        if attention_mask is not None and attention_mask.shape != prompt.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} but the prompt {tuple(prompt.shape)}: with "
                "images, give the whole conversation, also where past_key_values holds its beginning"
            )
        for name in ("prefill_chunk_size", "token_healing"):
            if setting(name):
                raise ValueError(
                    f"{name}={setting(name)!r} cannot be used with images: it changes how the prompt is read, "
                    "and masks would not belong to the text"
                )

    def _is_sharded(self) -> bool:
        """Whether parameters are spread over processes by FSDP2, which then must all make the same passes."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return False
        from torch.distributed.fsdp import FSDPModule

        return any(isinstance(module, FSDPModule) for module in self.modules())

    @staticmethod
    def _mask_of_padding(prompt: torch.Tensor, pad_id: Any, end_ids: Any) -> torch.Tensor:
        """The attention mask that transformers infers where none is given: padding is the pad token, unless it also
        ends text."""
        if pad_id is None or pad_id in _ids(end_ids):
            return torch.ones_like(prompt)
        return (prompt != pad_id).long()

    @staticmethod
    def _length_limit(prompt: torch.Tensor | None, setting: Any) -> int:
        length = 0 if prompt is None else prompt.shape[1]
        if setting("max_new_tokens") is not None:
            return length + setting("max_new_tokens")
        if setting("max_length") is not None:
            return setting("max_length")
        return length + 20  # transformers' own default

    def _allowed_groups(
        self, prompt: torch.Tensor | None, regions: Any, allowed_groups: str | Sequence[int | str] | None
    ) -> torch.Tensor:
        """(batch, K) boolean: groups whose codes each row may use; none for a row without an image."""
        num_groups, names = self.config.num_groups, list(self.config.group_names)
        if prompt is None or regions is None:
            if allowed_groups is not None:
                raise ValueError(f"allowed_groups={allowed_groups!r} needs an image in the prompt (pixel_values)")
            return torch.zeros(1, num_groups, dtype=torch.bool)
        images = count_images(prompt, self.config)
        if allowed_groups is None:
            allowed = torch.ones(len(prompt), num_groups, dtype=torch.bool, device=prompt.device)
        elif isinstance(allowed_groups, str) and allowed_groups == "predicted":
            last_image = (images.cumsum(0) - 1).clamp(min=0)
            predicted = regions.group_logits.argmax(-1).to(prompt.device)[last_image]
            allowed = torch.nn.functional.one_hot(predicted, num_groups).bool()
        else:
            given = allowed_groups.tolist() if hasattr(allowed_groups, "tolist") else allowed_groups
            given = list(given) if isinstance(given, (list, tuple, set, range)) else [given]
            known = {**{k: k for k in range(num_groups)}, **{name: k for k, name in enumerate(names)}}
            unknown = [group for group in given if isinstance(group, bool) or group not in known]
            if unknown or not given:
                raise ValueError(f"allowed_groups={allowed_groups!r}: unknown {unknown}; the groups are {names}")
            allowed = torch.zeros(len(prompt), num_groups, dtype=torch.bool, device=prompt.device)
            allowed[:, [known[group] for group in given]] = True
        return allowed & (images > 0)[:, None]

    def _decode_generated(
        self,
        outputs: Any,
        prompt: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        regions: Any,
        states: StatesOfSteps | None,
        synced: bool,
    ) -> MedSightDecodedRegions:
        """Masks of generated codes, from the states of the steps where these are all known; else from one
        teacher-forced pass over what was generated, on the prompt's part of the cache. With `synced` that pass is made
        also where nothing was cited: another process may wait for its share of the weights."""
        sequences = outputs.sequences
        if (
            prompt is None
            or regions is None
            or not bool(is_region_code(sequences[:, prompt.shape[1] :], self.config).any())
        ):
            if synced:
                self.lm_head(self.model(input_ids=sequences[:, -1:], use_cache=False).last_hidden_state)
            return self._no_regions(len(sequences))

        prompt_length, copies = prompt.shape[1], len(sequences) // len(prompt)
        images = count_images(prompt, self.config)
        first_image = (images.cumsum(0) - images).repeat_interleave(copies)
        # A prompt's codes before its first image, as of earlier turns that had another, are no regions of this one.
        imageless = (sequences == self.config.image_token_id).cumsum(dim=1) == 0
        imageless[:, prompt_length:] = False
        codes = locate_codes(sequences, self.config, first_image=first_image, left_out=imageless)
        earlier = is_region_code(sequences[:, :prompt_length], self.config) & ~imageless[:, :prompt_length]
        earlier = earlier.sum(dim=1).tolist()
        if states is not None and not any(earlier):
            hidden = states.of(sequences[:, prompt_length:], self.config)
            if hidden is not None:
                return self._decoded_regions(sequences, codes, hidden, regions, first_position=prompt_length - 1)

        attention_mask = attention_mask.repeat_interleave(copies, dim=0)
        attention_mask = torch.cat((attention_mask, torch.ones_like(sequences[:, prompt_length:])), dim=1)
        start = min(prompt_length - 1, int(codes.positions.min()) - 1)

        cache = None
        if not bool((sequences[:, start:] == self.config.image_token_id).any()):
            cache = _beginning_of_cache(outputs.get(CACHE_NAME), len(prompt), copies, start)
        position_ids = positions_of(attention_mask)
        if cache is not None:
            passed = {CACHE_NAME: cache, "use_cache": True}
        else:
            start = 0
            index = torch.cat([block.repeat(copies) for block in _images_of_rows(prompt, self.config)])
            passed = {"image_embeds": self.model.project_regions(regions)[index], "use_cache": False}
        hidden = self.model(
            input_ids=sequences[:, start:],
            attention_mask=attention_mask,
            position_ids=position_ids[:, start:],
            **passed,
        ).last_hidden_state
        decoded = self._decoded_regions(sequences, codes, hidden, regions, first_position=start)

        # Codes of earlier turns were decoded along, since codes of one image share a pass; they are not part of the
        # answer.
        return MedSightDecodedRegions(
            **{name: [value[n:] for value, n in zip(values, earlier, strict=True)] for name, values in decoded.items()}
        )


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (rows, length) of padded texts: padding does not count."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def _ids(token_ids: Any) -> list[int]:
    """A setting that holds no token id, one, or several."""
    found: list[int] = torch.as_tensor([] if token_ids is None else token_ids).reshape(-1).tolist()
    return found


def _is_complete(new_tokens: torch.Tensor, end_ids: Sequence[int], pad_id: int | None) -> torch.Tensor:
    """(rows,) boolean: whether each row of `new_tokens` (rows, length) came to an end token, before its padding."""
    ends = torch.isin(new_tokens, torch.tensor(end_ids, device=new_tokens.device))
    if not new_tokens.shape[1]:
        return ends.any(dim=1)
    if pad_id is None or pad_id in end_ids:
        return ends[:, -1]
    last = (new_tokens != pad_id).cumsum(dim=1).argmax(dim=1)  # the first place of the highest count
    return ends.gather(1, last[:, None])[:, 0]


def _images_of_rows(input_ids: torch.Tensor, config: Any) -> tuple[torch.Tensor, ...]:
    """For each row of `input_ids`, the indices of its images among all images of the batch."""
    counts = count_images(input_ids, config).tolist()
    return torch.arange(sum(counts)).split(counts)


def _beginning_of_cache(cache: Any, prompts: int, copies: int, length: int) -> DynamicCache | None:
    """The first `length` columns of a cache, for `copies` sequences of each prompt; `None` if this kind cannot be cut.

    Beams of one prompt share its columns, so any of them serves. The given cache is left as it is.
    """
    if not isinstance(cache, Cache) or not cache.layers or getattr(cache, "offloading", False):
        return None
    if any(type(layer) not in (DynamicLayer, StaticLayer) for layer in cache.layers):
        return None
    if cache.get_seq_length() < length or length == 0:
        return None
    rows_each = cache.layers[0].keys.shape[0] // prompts
    rows = torch.arange(prompts).repeat_interleave(copies) * rows_each
    beginning = DynamicCache()
    for index, layer in enumerate(cache.layers):
        chosen = rows.to(layer.keys.device)
        beginning.update(layer.keys[chosen, :, :length], layer.values[chosen, :, :length], index)
    return beginning
