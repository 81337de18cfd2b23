"""A conversation about an image, turn by turn: `medsight chat`."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medsight.checkpoint import check_checkpoint, shipped_checkpoint
from medsight.files import check_empty
from medsight.inference.answer_folder import safe_name
from medsight.inference.settings import AnswerSettings
from medsight.text import note, printable, quiet_transformers

from . import predict
from .console import Device, Json, Results, results


if TYPE_CHECKING:
    from medsight.inference.prediction import Prediction
    from medsight.inference.predictor import Predictor, Slice

TURN_FOLDER = "turn-{:02d}"


class Conversation:
    """Turns about one picture or slice, called `name`; each sees the ones before it, region codes included."""

    def __init__(self, predictor: "Predictor", image: "Slice", name: str, settings: AnswerSettings) -> None:
        from medsight.inference.predictor import EarlierTurns

        self.predictor = predictor
        self.image = image
        self.name = name
        self.settings = settings
        self.messages: list[dict[str, Any]] = []
        self.turns = EarlierTurns()

    def ask(self, prompt: str, on_text: Callable[[str], None] | None = None) -> "Prediction":
        """Answers the next turn. A turn that fails is not part of the conversation.

        Args:
            on_text: called with each piece of the answer, codes included, as it is generated.

        Raises:
            ValueError: the prompt is empty, or the conversation cannot be tokenized.
        """
        from medsight.inference.orientations import cut_otherwise
        from medsight.inference.predictor import assistant_turn, user_turn

        if problem := cut_otherwise(self.image.scan, self.predictor.learnt, prompt, self.settings.allowed_groups):
            note(problem)
        asked = [*self.messages, user_turn(prompt, None if self.messages else self.image.image)]
        streamer = None if on_text is None else streaming(self.predictor.processor.tokenizer, on_text)
        answer = self.predictor.answer([asked], streamer, self.turns, **asdict(self.settings))[0]
        self.messages = [*asked, assistant_turn(answer)]
        return self.predictor.prediction(answer, self.image, prompt, self.name)


def streaming(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    """A streamer of transformers' that hands on text as it comes."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)


def command(
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="Picture, DICOM or NIfTI file, or folder of a DICOM series.")
    ],
    model: predict.Model = None,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Output folder, new or empty  [default: IMAGE's name + '-chat'].")
    ] = None,
    slice_choice: Annotated[
        str, typer.Option("--slice", metavar="SLICE", help="Of a volume: N, middle or largest-foreground.")
    ] = "middle",
    window: predict.Window = None,
    plane: predict.Plane = None,
    formats: predict.Formats = "png",
    deidentify: predict.Deidentify = False,
    max_new_tokens: predict.MaxNewTokens = AnswerSettings.max_new_tokens,
    allowed_groups: predict.AllowedGroups = None,
    force_region: predict.ForceRegion = False,
    threshold: predict.Threshold = AnswerSettings.threshold,
    device: Device = "auto",
    dtype: predict.Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Talk about an image: one line per turn, from the terminal or a pipe, until its end (Ctrl+D).

    Answers appear as they are generated. After each turn its regions are listed, and its answer.json, masks and
    overlay are saved in a folder of their own (turn-01, turn-02, ...) in the output folder. Not a medical device.
    """
    from medsight.export import check_formats
    from medsight.inference.image_files import find_images
    from medsight.inference.orientations import LearntOrientations, open_as_learnt
    from medsight.inference.prediction import save_answer
    from medsight.inference.predictor import Predictor, read_slices

    settings = AnswerSettings(max_new_tokens, predict.parse_groups(allowed_groups), force_region, threshold)
    view, kinds = predict.parse_window(window), predict.parse_formats(formats)
    found = find_images([image])
    if len(found.images) != 1:
        raise ValueError(f"{image} holds {len(found.images)} images; a conversation is about one of them: name it")
    checkpoint = shipped_checkpoint() if model is None else Path(model)
    check_checkpoint(checkpoint)
    learnt = LearntOrientations.read(checkpoint)
    scan = open_as_learnt(found.images[0], learnt, plane, allowed_groups=settings.allowed_groups)
    check_formats(scan, kinds, scan.choose_slices(slice_choice))
    chosen = list(read_slices(scan, slice_choice, view))
    if len(chosen) != 1:
        raise ValueError(f"--slice {slice_choice} chooses {len(chosen)} slices; a conversation is about one of them")
    folder = Path(output or f"{'image' if deidentify else safe_name(Path(image))}-chat")
    check_empty(folder)
    with results(as_json) as out:
        with quiet_transformers():
            predictor = Predictor(model, device=device, dtype=dtype)
        conversation = Conversation(predictor, chosen[0], printable(image), settings)
        for number, prompt in enumerate(read_prompts(), 1):
            prediction = conversation.ask(prompt, None if as_json else out.write)
            saved = save_answer([prediction], folder / TURN_FOLDER.format(number), False, kinds, deidentify)
            show(out, prediction, saved)


def read_prompts() -> Iterator[str]:
    """Lines of standard input, asked for on standard error where a person types them; empty ones are passed over."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()


def show(out: Results, prediction: "Prediction", folder: Path) -> None:
    """The regions of a turn, whose text has been streamed already."""
    from medsight.inference.prediction import to_parts

    content = {**prediction.to_dict(), "output": printable(str(folder))}
    out.write("\n")
    out.show(content, *to_parts(content)[1:], f"\nSaved to {folder}/\n")
