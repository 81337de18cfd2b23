"""`Predictor`: a loaded checkpoint that answers prompts about pictures, slices of volumes, and whole conversations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, overload

import torch
from PIL import Image
from transformers.utils import logging

from medsight.checkpoint import check_checkpoint, shipped_checkpoint
from medsight.loading import choose_device, load_checkpoint
from medsight.scans.opening import Source, open_scan
from medsight.scans.scan import Scan
from medsight.text import printable
from modeling_medsight.outputs_medsight import CACHE_NAME
from processing_medsight.grounded_answer_medsight import GroundedAnswer, mask_box

from .orientations import LearntOrientations, cut_otherwise, open_as_learnt
from .prediction import Prediction
from .settings import BATCH_SIZE, AnswerSettings


logger = logging.get_logger(__name__)

Window: TypeAlias = str | tuple[float, float] | None
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class Slice:
    """A slice of a scan, or a picture, as the model sees it; made by `read_slices`.

    Attributes:
        scan: what it is of.
        index: which slice, from 0.
        image: 8-bit RGB, of the scan's `picture_size`.
        window: the grey levels that are shown; None means those that suit the modality.
    """

    scan: Scan
    index: int
    image: Image.Image
    window: Window = None


def read_slices(
    source: Source | Scan, slices: int | str | Sequence[int] = "middle", window: Window = None
) -> Iterator[Slice]:
    """The chosen slices of a scan, or of anything that `open_scan` opens, decoded one by one.

    Raises:
        ValueError: it cannot be read, has no such slice, or cannot be shown with that window; the message names it.
    """
    scan = source if isinstance(source, Scan) else open_scan(source)
    for index in scan.choose_slices(slices):
        yield Slice(scan, index, scan.slice_image(index, window).convert("RGB"), window)


class Predictor:
    """A loaded checkpoint that answers prompts about images.

    Example:

    ```python
    import numpy as np

    from medsight import Predictor

    predict = Predictor(device="cpu")
    volume = np.random.default_rng(0).integers(-1000, 1000, (9, 64, 64))
    prediction = predict(volume, "Segment the liver.", slices=4, window="abdomen", max_new_tokens=8)
    assert all(region.mask.shape == (64, 64) for region in prediction.answer.regions)
    ```

    Args:
        model: checkpoint folder; the small one that comes with the package by default.
        device: "auto" (a GPU where there is one), or a torch device such as "cpu" or "cuda:1".
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".

    Raises:
        OSError: the folder or a file of it is missing.
        ValueError: the folder is no complete MedSIGHT checkpoint, or the device or dtype is not to be had.
    """

    def __init__(self, model: str | Path | None = None, device: str = "auto", dtype: str = "auto") -> None:
        self.folder = shipped_checkpoint() if model is None else Path(model)
        check_checkpoint(self.folder)
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        self.device = choose_device(device)
        self.model_name = self.folder.name if model is None else str(model)
        self.model, self.processor = load_checkpoint(self.folder, dtype)
        self.model.to(self.device).eval()
        self.learnt = LearntOrientations.read(self.folder)

    @overload
    def __call__(self, image: Source | Scan, prompt: str, *view: Any, **settings: Any) -> Prediction: ...

    @overload
    def __call__(
        self, image: list[Any] | tuple[Any, ...], prompt: str | Sequence[str], *view: Any, **settings: Any
    ) -> list[Prediction]: ...

    def __call__(
        self,
        image: Any,
        prompt: str | Sequence[str],
        slices: int | str | Sequence[int] = "middle",
        window: Window = None,
        batch_size: int = BATCH_SIZE,
        **settings: Any,
    ) -> Prediction | list[Prediction]:
        """Answers a prompt about an image; or, of a list of images, about each of them, in batches.

        Args:
            image: a file of any kind that `open_scan` knows, a DICOM series' folder, bytes, a PIL image, an array, or
                a `Scan`. Or a list of these, which gives a list: a prediction for each chosen slice of each of them. A
                NIfTI volume is cut as the model learnt what is asked for; open it yourself for another plane.
            prompt: the question or instruction; for a list of images also a list of them, one an image.
            slices: which slice of a volume, as `Scan.choose_slices` takes it; of a single image it must choose one.
            window: how grey levels are shown, as `Scan.slice_image` takes it.
            batch_size: slices answered at once. Answers do not depend on it beyond the rounding of the dtype.
            **settings: fields of `AnswerSettings`.

        Raises:
            ValueError: an image cannot be read, or an argument is out of range; the message names it.
        """
        if not isinstance(image, (list, tuple)):
            if not isinstance(prompt, str):
                raise ValueError("several prompts for one image: give the image as a list, once for each prompt")
            chosen = list(read_slices(self._opened(image, prompt, settings), slices, window))
            if len(chosen) != 1:
                raise ValueError(
                    f"slices={slices!r} chooses {len(chosen)} slices of {chosen[0].scan.name}: give the image in a "
                    "list to get a list of predictions"
                )
            return self.predict_slices(chosen, [prompt], [_name_of(image)], **settings)[0]
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: expected at least 1")
        prompts = [prompt] * len(image) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(image):
            raise ValueError(f"expected one prompt, or one an image, got {len(prompts)} for {len(image)} images")
        entries = (
            (shown, asked, _name_of(source))
            for source, asked in zip(image, prompts, strict=True)
            for shown in read_slices(self._opened(source, asked, settings), slices, window)
        )
        predictions: list[Prediction] = []
        while batch := list(islice(entries, batch_size)):
            predictions += self.predict_slices(*zip(*batch, strict=True), **settings)
        return predictions

    def _opened(self, image: Any, prompt: str, settings: dict[str, Any]) -> Scan:
        if not isinstance(image, Scan):
            return open_as_learnt(image, self.learnt, None, prompt, settings.get("allowed_groups"))
        if problem := cut_otherwise(image, self.learnt, prompt, settings.get("allowed_groups")):
            logger.warning(problem)
        return image

    def predict_slices(
        self, slices: Sequence[Slice], prompts: Sequence[str], names: Sequence[str], **settings: Any
    ) -> list[Prediction]:
        """Answers one batch: a prompt about each slice; `names` are what the images are called."""
        chats = [[user_turn(prompt, shown.image)] for prompt, shown in zip(prompts, slices, strict=True)]
        answers = self.answer(chats, **settings)
        return [self.prediction(*entry) for entry in zip(answers, slices, prompts, names, strict=True)]

    def prediction(self, answer: GroundedAnswer, shown: Slice, prompt: str, name: str) -> Prediction:
        """An answer with what was asked; `name` is what the image is called."""
        return Prediction(
            answer=on_grid(answer, shown.scan),
            image=shown.image,
            image_name=name,
            prompt=prompt,
            model=self.model_name,
            scan=shown.scan,
            slice_index=shown.index,
            window=shown.window,
        )

    def answer(
        self,
        conversations: Sequence[Sequence[dict[str, Any]]],
        streamer: Any = None,
        turns: "EarlierTurns | None" = None,
        **settings: Any,
    ) -> list[GroundedAnswer]:
        """Answers the last turn of each conversation, as one batch.

        Args:
            conversations: chat messages, as `apply_chat_template` takes them; see `user_turn`. The assistant's earlier
                turns are `raw_text`s, so that their region codes are read again.
            streamer: one of transformers', which gets the tokens of the one conversation as they come.
            turns: what the one conversation has been read up to; the same at each of its turns.
            **settings: fields of `AnswerSettings`.

        Returns:
            An answer a conversation; the masks of its regions are at the size of the image they belong to.

        Raises:
            ValueError: a conversation cannot be tokenized or is too long, a setting is out of range, or there is no
                such group.
        """
        chosen = AnswerSettings(**settings)
        inputs = tokenize_chats(self.model, self.processor, conversations)
        check_length(self.model, inputs, chosen.max_new_tokens)
        cached = {} if turns is None else turns.take(inputs["input_ids"][0])
        output = decode_greedily(self.model, inputs, streamer=streamer, **cached, **chosen.decoding())
        if turns is not None:
            turns.keep(output)
        answers: list[GroundedAnswer] = self.processor.post_process_grounded_answer(
            output, inputs, threshold=chosen.threshold
        )
        return answers


def on_grid(answer: GroundedAnswer, scan: Scan) -> GroundedAnswer:
    """An answer about a slice as it is shown, its regions' masks, boxes and areas on the slice's own pixels."""
    if scan.picture_size == (scan.width, scan.height):
        return answer
    regions = []
    for region in answer.regions:
        if region.mask is not None:
            mask = torch.from_numpy(scan.to_grid(region.mask.cpu().numpy()))
            region = replace(region, mask=mask, box=mask_box(mask), area=int(mask.sum()))
        regions.append(region)
    return replace(answer, regions=regions)


class EarlierTurns:
    """The keys and values of a conversation's turns, which the next one need not read again."""

    cache: Any = None
    token_ids: torch.Tensor

    def take(self, prompt: torch.Tensor) -> dict[str, Any]:
        """The cache, for `generate`, if a prompt's token ids (length,) begin with those that it holds.

        It is kept no longer: a turn that fails may have added to it.
        """
        cache, self.cache = self.cache, None
        goes_on = cache is not None and prompt[: len(self.token_ids)].equal(self.token_ids)
        return {CACHE_NAME: cache} if goes_on and len(prompt) > len(self.token_ids) else {}

    def keep(self, output: Any) -> None:
        """Keeps the cache that `generate` returned for one conversation."""
        self.cache = output[CACHE_NAME]
        self.token_ids = output.sequences[0, : self.cache.get_seq_length()]


def tokenize_chats(model: Any, processor: Any, conversations: Sequence[Sequence[dict[str, Any]]]) -> Any:
    """Conversations, each ending with a turn of the user, as one left-padded batch on the model's device.

    Raises:
        ValueError: one of them cannot be tokenized.
    """
    return processor.apply_chat_template(
        [list(messages) for messages in conversations],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(model.device, dtype=model.dtype)


def check_length(model: Any, inputs: Any, max_new_tokens: int) -> None:
    """Refuse conversations that leave the model no place for an answer.

    Raises:
        ValueError: the longest takes more tokens, with `max_new_tokens` for its answer, than the model has positions.
    """
    length, limit = inputs["input_ids"].shape[1], model.config.text_config.max_position_embeddings
    if length + max_new_tokens > limit:
        raise ValueError(
            f"the conversation takes {length} tokens, and with {max_new_tokens} for the answer that is more than the "
            f"model's {limit}: ask less at once, begin a new conversation, or lower max_new_tokens"
        )


def decode_greedily(model: Any, inputs: Any, **settings: Any) -> Any:
    """What the model's `generate`, which `settings` are for, returns at the likeliest token each time."""
    with torch.inference_mode():
        return model.generate(**inputs, do_sample=False, num_beams=1, return_dict_in_generate=True, **settings)


def user_turn(prompt: str, image: Any = None) -> dict[str, Any]:
    """A message of the user: an image, where one is given, and what is asked.

    Raises:
        ValueError: the prompt is empty, or has bytes that are no text.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; ask about the image, for example 'Segment the liver.'")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError(f"the prompt {prompt!r} has bytes that are no UTF-8: write it in UTF-8")
    shown = [] if image is None else [{"type": "image", "image": image}]
    return {"role": "user", "content": [*shown, {"type": "text", "text": prompt}]}


def assistant_turn(answer: GroundedAnswer) -> dict[str, Any]:
    """An answer as a turn of the conversation that goes on after it."""
    return {"role": "assistant", "content": [{"type": "text", "text": answer.raw_text}]}


def _name_of(source: Any) -> str:
    return printable(str(source)) if isinstance(source, (str, PathLike)) else getattr(source, "name", None) or "image"
