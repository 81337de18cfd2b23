"""A checkpoint's answers to the cases of a benchmark: batched, resumable, over as many processes as were launched.

Greedy decoding, in double precision on the CPU and in single on a GPU unless asked otherwise: so an answer and its
masks do not depend on what else is in the batch, and one process and several give the same file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from medsight.checkpoint import check_checkpoint, read_json
from medsight.data.pictures import read_picture
from medsight.data.schema import IMAGE_MARKER
from medsight.files import write_json, write_text
from medsight.inference.predictor import decode_greedily, tokenize_chats
from medsight.loading import choose_device, load_checkpoint
from medsight.processes import LOCK_FILE, gather, on_main

from .cases import Case
from .figures import METRICS, REPORT, ROWS
from .predictions import Prediction, append_predictions, drop_partial_line, encode_mask, read_predictions, to_line
from .reference_codes import ReferenceCodes


PREDICTIONS, RUN = "predictions.jsonl", "run.json"
PART = "predictions.part-{:04d}.jsonl"
PARTS = "predictions.part-*.jsonl"


@dataclass(frozen=True)
class RunSettings:
    """What decides on the answers.

    Example:
        >>> RunSettings(max_new_tokens=64).threshold
        0.5
    """

    max_new_tokens: int = 256  # an answer is cut there, and said to be
    threshold: float = 0.5  # probability above which a pixel belongs to a mask
    dtype: str | None = None  # precision; None takes float64 on the CPU and float32 elsewhere
    masks_from: str = "states"  # of the language model where it cites a code; or "codes", the codebook's own entries


def refuse_foreign(output: Path) -> None:
    """Raises FileExistsError where the folder holds something else than an evaluation."""
    names = {path.name for path in output.iterdir()} - {LOCK_FILE} if output.is_dir() else set()
    if names and not names & {RUN, METRICS, ROWS, REPORT, PREDICTIONS}:
        raise FileExistsError(f"output folder {output} holds something else than an evaluation; name another one")


def prepare_output(output: Path, described: dict[str, Any], overwrite: bool) -> None:
    """Makes the output folder that of this run, or finds that an earlier start of the same run left it.

    Raises:
        FileExistsError: it holds something else, or the predictions of another run.
    """
    previous = output / RUN
    if not previous.is_file():
        if output.is_dir() and any(path.name != LOCK_FILE for path in output.iterdir()):
            raise FileExistsError(f"output folder {output} holds something else than an evaluation; name another one")
    elif overwrite:
        for path in (*output.glob(PARTS), *(output / name for name in (PREDICTIONS, METRICS, ROWS, REPORT))):
            path.unlink(missing_ok=True)
    else:
        before = read_json(previous)
        differing = [key for key in described if before.get(key) != described[key]]
        if differing:
            raise FileExistsError(
                f"output folder {output} holds an evaluation with another {', '.join(differing)}; name another "
                "folder, or add --overwrite to start again"
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    write_json(previous, described)


def answer_cases(
    cases: Sequence[Case], model: Any, processor: Any, output: Path, settings: RunSettings, batch_size: int
) -> Path:
    """Answers every case that the folder has no answer to yet; the path of predictions.jsonl, in the cases' order.

    The processes share the cases; each writes a part, and the first merges them.

    Args:
        model, processor: of one checkpoint, on the device and in the precision to run with.
        output: a folder from `prepare_output`.
        batch_size: cases at once.

    Raises:
        OSError, ValueError: an image is missing or cannot be read; the message names it.
    """
    merged, state = output / PREDICTIONS, PartialState()
    rank, count = state.process_index, state.num_processes

    def answered() -> set[str]:
        for path in (merged, *output.glob(PARTS)):
            drop_partial_line(path)
        return set(_written(output))

    done = on_main(answered)
    unanswered = [case for case in cases if case.id not in done]
    mine = unanswered[rank::count]
    references = ReferenceCodes(cases, model, processor)
    path = merged if count == 1 else output / PART.format(rank)
    started = len(cases) - len(unanswered)
    with tqdm(total=len(cases), initial=started, unit="row", desc="answering", disable=rank > 0) as bar:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            append_predictions(path, answer_batch(batch, model, processor, settings, references))
            bar.update(min(len(batch) * count, bar.total - bar.n))

    def merge() -> None:
        found = _written(output)
        write_text(merged, "".join(to_line(found[case.id]) for case in cases))
        for part in output.glob(PARTS):
            part.unlink()

    gather(None)  # all have answered
    on_main(merge)
    return merged


def _written(output: Path) -> dict[str, Prediction]:
    """The predictions in a folder, by their ids: the merged ones, and those of each process."""
    files = [path for path in (output / PREDICTIONS, *sorted(output.glob(PARTS))) if path.is_file()]
    return {prediction.id: prediction for path in files for _, prediction in read_predictions(path)}


def answer_batch(
    cases: Sequence[Case], model: Any, processor: Any, settings: RunSettings, references: ReferenceCodes
) -> list[Prediction]:
    """Greedy answers to some cases, with their masks at the images' own sizes, and the codes that would be right."""
    messages = [[{"role": "user", "content": content_of(case)}] for case in cases]
    inputs = tokenize_chats(model, processor, messages)
    output = decode_greedily(model, inputs, max_new_tokens=settings.max_new_tokens)
    if settings.masks_from == "codes":
        output = masks_from_codes(model, output, inputs.get("pixel_values"), [len(case.images) for case in cases])
    answers = processor.post_process_grounded_answer(output, inputs, threshold=settings.threshold)
    known = references.of(cases, inputs.get("pixel_values"))
    predictions = []
    for case, answer, (group, codes) in zip(cases, answers, known, strict=True):
        regions = [region for region in answer.regions if region.mask is not None]
        predictions.append(
            Prediction(
                id=case.id,
                answer=answer.text,
                raw_text=answer.raw_text,
                masks=[encode_mask(np.asarray(region.mask, dtype=bool)) for region in regions],
                codes=[region.code for region in regions],
                groups=[region.group_name for region in regions],
                phrases=[region.phrase for region in regions],
                scores=[None if region.score is None else round(float(region.score), 6) for region in regions],
                group=group,
                reference_codes=codes,
                is_complete=answer.is_complete,
            )
        )
    return predictions


def masks_from_codes(model: Any, output: Any, pixel_values: Any, images: Sequence[int]) -> Any:
    """What `generate` returned, with masks from the codebook alone; the scores, which weigh the other masks, go.

    Args:
        pixel_values: all images of the rows, in order.
        images: how many each row has, at least one; codes belong to its last one.
    """
    if not model.config.use_region_codebook:
        raise ValueError("the model has no region codebook: its masks are decoded from states alone")
    codes = [torch.zeros(0, dtype=torch.long)] * len(pixel_values)
    last = [place - 1 for place in accumulate(images)]
    for place, ids in zip(last, output.region_code_ids, strict=True):
        codes[place] = ids
    with torch.inference_mode():
        masks = model.region_model.decode_codes(codes, pixel_values)
    return type(output)(**{**output, "mask_logits": [masks[place] for place in last], "region_scores": None})


def content_of(case: Case) -> list[dict[str, Any]]:
    """A prompt as the parts of a message, each image where its marker stands."""
    texts = case.prompt.split(IMAGE_MARKER)
    if len(texts) != len(case.images) + 1:
        raise ValueError(f"case {case.id}: {len(texts) - 1} image markers in its prompt for {len(case.images)} images")
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        if number:
            parts.append({"type": "image", "image": read_picture(case.images[number - 1])})
        if text.strip():
            parts.append({"type": "text", "text": text.removeprefix("\n") if number == 1 else text})
    return parts


def load_for_evaluation(folder: Path, settings: RunSettings, device: str = "auto") -> tuple[Any, Any]:
    """Model and processor of a checkpoint folder, checked, placed and in the precision of the settings."""
    check_checkpoint(folder)
    place = choose_device(device)
    # The short cuts of a GPU's single precision would let a batch's make-up show in the results.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model, processor = load_checkpoint(folder, settings.dtype or ("float64" if place.type == "cpu" else "float32"))
    return model.to(place).eval(), processor
