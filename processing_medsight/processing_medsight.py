"""The processor of MedSIGHT: images and conversations into tensors, tokens and mask logits into grounded answers."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import logging

from configuration_medsight.remote_code_medsight import AUTO_MAP, RemoteCodeMixin

from .chat_medsight import CHAT_TEMPLATE, neutralise_conversations
from .grounded_answer_medsight import GroundedAnswer, GroundedRegion, mask_box, tidy_answer
from .image_processing_medsight import MedSightImageProcessorKwargs, flatten_images
from .region_codes_medsight import (
    IMAGE_TOKEN,
    code_meaning,
    find_region_codes,
    parse_region_code,
    split_at_codes,
    write_region_codes,
)


logger = logging.get_logger(__name__)

_OF_TOKENS = ("return_tensors", "padding", "padding_side", "truncation", "max_length")  # no variables of a template


class MedSightProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """The arguments of any processor; those of images are MedSIGHT's."""

    _defaults = {}  # type: ignore[var-annotated]  # read by transformers 5.17
    images_kwargs: MedSightImageProcessorKwargs


class SavedProcessor(RemoteCodeMixin, ProcessorMixin):
    """A processor that saves its code beside it, as one base: transformers asks the first for what is inherited."""


class MedSightProcessor(SavedProcessor):
    r"""Image processor and tokenizer in one, with a chat template.

    Call it with `images=` and `text=` whose `<|image_pad|>` placeholders are as many as the images (each becomes
    `image_seq_length` of them), or hand messages to `apply_chat_template`. Text given to the call is a finished
    prompt: what is spelled like a token there is one. Text in messages is not: there a user cannot write a turn
    marker, an image placeholder or a region code.

    Args:
        image_processor ([`MedSightImageProcessor`]): pixels and masks.
        tokenizer ([`PreTrainedTokenizerBase`]): Qwen3's, or any other with `<|image_pad|>` and the region codes added.
        chat_template (`str`, *optional*): Jinja template; [`CHAT_TEMPLATE`] by default.
        image_seq_length (`int`): rows of one image in the language model, the config's `image_seq_length`.
        group_names (`list[str]`, *optional*): what the code groups stand for, the config's `group_names`.

    `region_codes` is the content of the folder's region_codes.json, which `medsight codes` writes: what each code
    usually stands for; `None` where there is none. Saving writes it again.

    Raises:
        ValueError: if the tokenizer has no image placeholder, or `image_seq_length` is below 1.

    Example, in a checkout:

    ```python
    from PIL import Image

    from processing_medsight import MedSightProcessor

    processor = MedSightProcessor.from_pretrained("medsight/medsight-nano")
    content = [{"type": "image", "image": Image.new("RGB", (64, 48))}, {"type": "text", "text": "Segment the liver."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt",
    )
    assert inputs["original_sizes"].tolist() == [[48, 64]]
    ```
    """

    valid_processor_kwargs = MedSightProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_seq_length: int = 596,
        group_names: list[str] | None = None,
    ) -> None:
        super().__init__(
            image_processor, tokenizer, chat_template=CHAT_TEMPLATE if chat_template is None else chat_template
        )
        self.image_token = IMAGE_TOKEN
        if self.image_token not in tokenizer.get_added_vocab():
            raise ValueError(f"the tokenizer has no added token {self.image_token}, which stands for an image")
        if image_seq_length < 1:
            raise ValueError(f"image_seq_length={image_seq_length}: an image takes at least one row")
        # Prompts are padded before they begin: text is generated at their end.
        tokenizer.padding_side = tokenizer.init_kwargs.get("padding_side", "left")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.image_seq_length = image_seq_length
        self.group_names = group_names
        self.region_codes: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "MedSightProcessor":
        """As [`ProcessorMixin.from_pretrained`], with what the region codes usually stand for where the folder tells.

        A damaged region_codes.json is left out, with a warning that names it and the reason.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        place = {name: kwargs[name] for name in hub if kwargs.get(name) is not None}
        try:
            processor.region_codes = find_region_codes(pretrained_model_name_or_path, **place)
        except ValueError as error:
            logger.warning(f"what the region codes usually stand for is not known: {error}")
        return processor

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """What one placeholder becomes: as many placeholders as an image has rows."""
        return self.image_token * self.image_seq_length

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, **kwargs: Unpack[MedSightProcessorKwargs]
    ) -> tuple:
        """Read the images; bring them to a flat list, or to one list a text if they came in lists; none is `None`."""
        images, *others = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        if images is not None:
            if isinstance(images, list) and any(isinstance(entry, list) for entry in images):
                images = [list(flatten_images(entry)) for entry in images]
            else:
                images = list(flatten_images(images))
            if not any(True for _ in flatten_images(images)):
                images = None
        return images, *others

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Unpack[MedSightProcessorKwargs]) -> None:
        """Refuse videos, audio, and images that are not as many as the placeholders of their text."""
        if kwargs.get("videos") is not None or kwargs.get("audio") is not None:
            raise ValueError("MedSIGHT takes images and text only, no videos and no audio")
        if text is not None and all(isinstance(sample, str) for sample in text):
            wanted = [sample.count(self.image_token) for sample in text]
            nested = images is not None and isinstance(images[0], list)
            given = [len(entry) for entry in images] if nested else len(images or ())
            if given != (wanted if nested else sum(wanted)):
                raise ValueError(
                    f"the image tokens in the prompts should be the same as the number of images: the text holds "
                    f"{sum(wanted)} image placeholders {self.image_token} (text by text: {wanted}), but "
                    f"{given or 'no'} images were given"
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        """As [`ProcessorMixin.apply_chat_template`], with the text of messages kept from becoming control tokens.

        In every turn but the assistant's, anything spelled like an added token (turn marker, image placeholder, region
        code, ...) reads the same but is ordinary text; in the assistant's turns region codes stay codes, but turn
        markers and placeholders do not (see [`neutralise_conversations`]). The caller's messages are not changed.
        `enable_thinking=True` leaves out the empty think block that a fresh model's template writes.

        Raises:
            ValueError: if a text cannot be told apart from a control token, or for images as in a call.
        """
        template = chat_template or self.chat_template
        conversation = neutralise_conversations(conversation, self.tokenizer, self.image_token, template)
        masked = return_assistant_tokens_mask and tokenize and return_dict
        out = super().apply_chat_template(
            conversation,
            chat_template=chat_template,
            tokenize=tokenize,
            return_dict=return_dict,
            return_assistant_tokens_mask=return_assistant_tokens_mask and not masked,
            processor_kwargs={"add_special_tokens": False, **(processor_kwargs or {})},  # the template writes them
            **kwargs,
        )
        if masked:
            masks = self._assistant_masks(conversation, chat_template, out["attention_mask"], kwargs)
            out.update(BatchFeature({"assistant_masks": masks}, tensor_type=kwargs.get("return_tensors")))
        return out

    def post_process_masks(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """Boolean masks at the images' own sizes: see [`MedSightImageProcessor.post_process_masks`]."""
        return self.image_processor.post_process_masks(*args, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Text of generated sequences, region codes included: they are not special tokens.

        `generated_outputs` is a ModelOutput of `generate`, or its (rows, length) token ids; `kwargs` are for `decode`.
        """
        sequences = getattr(generated_outputs, "sequences", generated_outputs)
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)

    def post_process_grounded_answer(
        self,
        outputs: Any,
        inputs: Any,
        skip_special_tokens: bool = True,
        threshold: float = 0.5,
        fit: str | None = None,
        size: int | dict[str, int] | None = None,
    ) -> list[GroundedAnswer]:
        """Answers with their regions: clean text, and for every code its words, mask, box, area and score.

        Args:
            outputs: what `generate` returned, `sequences` with `mask_logits`, `region_code_ids`, `region_scores` and
                `is_complete` (an entry a sequence); or what `decode_regions` returned, which has no `sequences`: then
                the text is that of `inputs`, and every code in it counts.
            inputs: what the processor returned for the prompts: `input_ids`, `attention_mask`, and `original_sizes` if
                there were images. Sequence r answers prompt r // k, k being the number of returned sequences.
            skip_special_tokens: whether to leave out turn markers, padding and the like.
            threshold: probability above which a pixel is inside.
            fit, size: what the pixels were made with, where the call set its own.

        Returns:
            An answer a sequence. Masks are on the CPU.

        Raises:
            ValueError: if outputs and inputs do not belong together, naming the sequence and the counts.
        """
        if isinstance(outputs, torch.Tensor):
            raise ValueError("outputs is a plain tensor: generate gives masks with return_dict_in_generate=True only")
        prompts = torch.as_tensor(inputs["input_ids"]).cpu()
        generated = outputs.get("sequences")
        sequences = prompts if generated is None else torch.as_tensor(generated).cpu()
        if len(sequences) % len(prompts):
            raise ValueError(f"outputs has {len(sequences)} sequences, no multiple of inputs' {len(prompts)} prompts")
        sizes = self._original_sizes_by_prompt(prompts, inputs.get("original_sizes"))
        attended = inputs.get("attention_mask")
        complete = outputs.get("is_complete")
        names = self.group_names or ()
        answers = []
        for row, sequence in enumerate(sequences):
            prompt = row // (len(sequences) // len(prompts))
            positions = torch.arange(0 if generated is None else prompts.shape[1], len(sequence))
            if generated is None and attended is not None:
                positions = positions[torch.as_tensor(attended)[row].cpu().bool()]
            ids = sequence[positions].tolist()
            pieces, codes, raw_text = split_at_codes(self.tokenizer, ids, skip_special_tokens)
            text, spans = tidy_answer(pieces)
            token_ids = [ids[i] for i in codes]
            logits, scores = self._masks_of_row(outputs, row, token_ids, has_images=bool(sizes[prompt]))
            image_rows = (prompts[prompt] == self.image_token_id).long().cumsum(0)
            regions = []
            for i, (place, span) in enumerate(zip(codes, spans, strict=True)):
                image = int(image_rows[: positions[place] + 1][-1]) // self.image_seq_length - 1
                mask = None
                if logits is not None and image >= 0:
                    (masks,) = self.post_process_masks([logits[[i]]], [sizes[prompt][image]], threshold, fit, size)
                    mask = masks[0].cpu()
                code = self.tokenizer.convert_ids_to_tokens(ids[place])
                group, index = parse_region_code(code)
                regions.append(
                    GroundedRegion(
                        code=code,
                        token_id=ids[place],
                        group=group,
                        code_index=index,
                        group_name=names[group] if group < len(names) else None,
                        phrase=None if span is None else text[slice(*span)],
                        span=span,
                        image_index=image if image >= 0 else None,
                        mask=mask,
                        box=None if mask is None else mask_box(mask),
                        area=0 if mask is None else int(mask.sum()),
                        score=scores[i],
                        meaning=code_meaning(self.region_codes, code),
                    )
                )
            answers.append(GroundedAnswer(text, raw_text, regions, None if complete is None else bool(complete[row])))
        return answers

    def to_dict(self) -> dict[str, Any]:
        # A folder loaded from the Hub carries "repo--module.Class" entries; the files beside a save are plain again.
        names = ("AutoProcessor", "AutoImageProcessor")
        return {**super().to_dict(), "auto_map": {name: AUTO_MAP[name] for name in names}}

    def _save_beside(self, save_directory: str | os.PathLike) -> None:
        super()._save_beside(save_directory)
        if self.region_codes is not None:
            write_region_codes(self.region_codes, save_directory)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Rows and patches of images of the given (height, width): every image takes the same (asked for by vLLM)."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    def _assistant_masks(
        self, conversation: Any, chat_template: str | None, attention_mask: Any, variables: dict[str, Any]
    ) -> list[list[int]]:
        """1 for every token of an assistant's turn; counted before placeholders grow, as transformers 5.17 does it."""
        encoded = self.tokenizer.apply_chat_template(
            conversation if isinstance(conversation[0], list) else [conversation],
            chat_template=chat_template or self.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **{name: value for name, value in variables.items() if name not in _OF_TOKENS},
        )
        masks = []
        for ids, spoken, attended in zip(
            encoded["input_ids"], encoded["assistant_masks"], attention_mask, strict=True
        ):
            rows = (self.image_seq_length if token == self.image_token_id else 1 for token in ids)
            grown = [flag for flag, count in zip(spoken, rows, strict=True) for _ in range(count)]
            remaining = iter(grown[-int(sum(attended)) :] if self.tokenizer.truncation_side == "left" else grown)
            masks.append([next(remaining) if flag else 0 for flag in attended])
        return masks

    def _original_sizes_by_prompt(self, prompts: torch.Tensor, original_sizes: Any) -> list[list[tuple[int, int]]]:
        """The (height, width) of each prompt's images, which stand in `original_sizes` one after the other."""
        sizes = [] if original_sizes is None else [(int(height), int(width)) for height, width in original_sizes]
        rows = (prompts == self.image_token_id).sum(dim=1)
        counts = rows // self.image_seq_length
        if (rows % self.image_seq_length).any() or int(counts.sum()) != len(sizes):
            raise ValueError(
                f"inputs has {rows.tolist()} image rows, prompt by prompt, and {len(sizes)} original_sizes: expected "
                f"{self.image_seq_length} rows an image"
            )
        remaining = iter(sizes)
        return [[next(remaining) for _ in range(count)] for count in counts]

    def _masks_of_row(
        self, outputs: Any, row: int, token_ids: list[int], has_images: bool
    ) -> tuple[Any, list[float | None]]:
        """The row's mask logits (`None` if outputs has none) and scores, held against the codes in its text."""
        named, logits, scores = (outputs.get(name) for name in ("region_code_ids", "mask_logits", "region_scores"))
        if named is not None and torch.as_tensor(named[row]).tolist() != token_ids:
            raise ValueError(f"sequence {row} holds the region codes {token_ids}, not region_code_ids, {named[row]}")
        if logits is not None:
            logits = torch.as_tensor(logits[row])
            if len(logits) != len(token_ids) and (len(logits) or has_images):
                raise ValueError(f"sequence {row} holds {len(token_ids)} region codes, but {len(logits)} mask_logits")
        scores = [] if scores is None else torch.as_tensor(scores[row]).tolist()
        return logits, scores or [None] * len(token_ids)
