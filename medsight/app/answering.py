"""An answer to a conversation about one image, streamed; then its regions with their mask logits."""

import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from medsight.inference.predictor import EarlierTurns, check_length, decode_greedily, tokenize_chats
from medsight.inference.settings import AnswerSettings
from processing_medsight.grounded_answer_medsight import GroundedAnswer


@dataclass(frozen=True, eq=False)
class Answered:
    """A complete answer, and (codes, h, w) mask logits of its codes on the model's grid, on the CPU."""

    answer: GroundedAnswer
    mask_logits: torch.Tensor


def stream_answer(
    predictor: Any,
    messages: list[dict[str, Any]],
    settings: AnswerSettings,
    stop: threading.Event,
    turns: EarlierTurns,
) -> Generator[str | Answered, None, None]:
    """Answers, decoding greedily.

    Args:
        predictor: what has the `model` and the `processor` of one checkpoint.
        messages: for the chat template; one image, in the first user turn.
        stop: set it to end the answer early. It is set when the caller stops listening.
        turns: what the conversation has been read up to.

    Yields:
        The text so far, codes included, as it grows; last, an `Answered`.

    Raises:
        ValueError: the conversation is too long for the model, or cannot be tokenized.
    """
    model, processor = predictor.model, predictor.processor
    inputs = tokenize_chats(model, processor, [messages])
    check_length(model, inputs, settings.max_new_tokens)
    cached = turns.take(inputs["input_ids"][0])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    outcome: list[Any] = []

    def is_stopped(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

    def generate() -> None:
        stopping = StoppingCriteriaList([is_stopped])
        try:
            chosen = {"streamer": streamer, "stopping_criteria": stopping, **cached, **settings.decoding()}
            outcome.append(decode_greedily(model, inputs, **chosen))
        except Exception as error:  # raised again below, in the caller's thread
            outcome.append(error)
            streamer.end()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    text = ""
    try:
        for piece in streamer:
            text += piece
            yield text
    except GeneratorExit:
        stop.set()
        raise
    finally:
        thread.join()
    output = outcome[0]
    if isinstance(output, Exception):
        raise output
    turns.keep(output)
    answer = processor.post_process_grounded_answer(output, inputs, threshold=settings.threshold)[0]
    yield Answered(answer, output.mask_logits[0].float().cpu())
