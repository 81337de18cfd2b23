"""What each control of the page does: an event takes the session, and changes it and the page."""

import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from medsight.export import FORMATS, FoundRegion, mosaic, overlay, write_masks
from medsight.inference.orientations import cut_otherwise, in_words
from medsight.inference.settings import AnswerSettings
from medsight.scans.scan import PLANES, Scan
from medsight.scans.windows import FILE_WINDOW, WINDOWS

from . import markup
from .answering import Answered, stream_answer
from .controls import DEFAULT_WINDOW, Controls
from .drawing import draw_heat_map, draw_layers
from .examples import examples
from .session import Finding, Session, Turn, Window


logger = logging.getLogger(__name__)

ARCHIVE = "medsight-masks.zip"
Updates = dict[Any, Any]


def event(method: Callable[..., Updates]) -> Callable[..., Updates]:
    """An event of the page. What it refuses becomes a warning, and the page stays as it is."""

    @wraps(method)
    def handle(page: "Page", session: Session | None, *args: Any) -> Updates:
        session = session or Session(page.folder, page.predictor.learnt)
        try:
            return method(page, session, *args)
        except (ValueError, OSError) as error:
            return _warn(error, session)

    return handle


class Page(Controls):
    """The page over one loaded checkpoint. It holds no visitor's data: that is all in the visitor's `Session`.

    Args:
        predictor: a `Predictor`.
        folder: where sessions keep uploaded files; the system's temporary folder by default.

    Example:

    ```python
    from medsight import Predictor
    from medsight.app import build

    blocks = build(Predictor(device="cpu"))  # blocks.launch() serves it
    ```
    """

    def __init__(self, predictor: Any, folder: Path | None = None) -> None:
        self.predictor = predictor
        self.folder = folder
        super().__init__(examples())
        with self.blocks:
            self._connect()

    def _connect(self) -> None:
        def on(trigger: Any, method: Any, inputs: Sequence[Any] = (), **kwargs: Any) -> None:
            trigger(
                method,
                inputs=[self.session, *inputs],
                outputs=self.outputs,
                show_progress="hidden",
                api_visibility="private",
                **kwargs,
            )

        on(self.upload.upload, self.open_upload, [self.upload, self.threshold], concurrency_limit=4)
        for number, button in enumerate(self.example_buttons):
            on(button.click, self.open_example, [gr.State(number), self.threshold])
        on(self.slice.input, self.show_slice, [self.slice, self.threshold], trigger_mode="always_last")
        on(self.plane.input, self.show_plane, [self.plane, self.threshold])
        on(self.window.input, self.show_window, [self.window, self.threshold], trigger_mode="always_last")
        on(self.threshold.input, self.redraw, [self.threshold], trigger_mode="always_last")
        settings = [self.max_new_tokens, self.predicted_only, self.threshold]
        # One answer at a time: two would only share the processor.
        on(self.question.submit, self.ask, [self.question, *settings], concurrency_limit=1)
        on(self.question.stop, self.stop, queue=False)
        on(self.anew.click, self.begin_anew, [self.threshold])
        for component in (self.chat, self.layers):
            on(component.click, self.show_heat_map, [self.threshold])
        on(self.layers.select, self.show_layer, [self.threshold])
        on(self.back.click, self.show_masks, [self.threshold])
        on(self.save_button.click, self.save, [self.formats, self.deidentify, self.threshold])

    @event
    def open_upload(self, session: Session, files: list[str] | None, threshold: float) -> Updates:
        """Opens what was uploaded; where it cannot be read, what was open stays."""
        try:
            session.open_files([Path(file) for file in files or []])
        except ValueError as error:
            _warn(error, session)
            return {self.session: session, self.upload: None}
        learnt = session.learnt.of_question(session.opened())
        if len(set(learnt.values())) > 1:
            _warn(f"choose the plane: the model learnt {in_words(learnt)}")
        return self._opened(session, threshold)

    @event
    def open_example(self, session: Session, number: int, threshold: float) -> Updates:
        """Opens an example, and puts its prompt into the field."""
        session.open_example(self.examples[number].load())
        return {**self._opened(session, threshold), self.question: _asking(False, self.examples[number].prompt)}

    def _opened(self, session: Session, threshold: float) -> Updates:
        scan, slices = session.scan, session.num_slices
        controls = [self.facts, self.plane, self.window, self.deidentify]
        updates = dict.fromkeys(controls, gr.update(visible=False))
        if scan is not None:
            windows = [DEFAULT_WINDOW, *([FILE_WINDOW] if scan.has_window else [])]
            windows += WINDOWS if scan.modality == "CT" else []
            updates = {
                self.facts: gr.update(value=markup.scan_facts(scan), visible=True),
                self.plane: gr.update(visible=scan.plane is not None, choices=_planes(session), value=_plane(scan)),
                self.window: gr.update(visible=scan.is_wide, choices=windows, value=DEFAULT_WINDOW),
                self.deidentify: gr.update(visible=scan.kind == "dicom"),
                self.formats: gr.update(choices=_formats(scan), value=["png"]),
            }
        return {
            self.session: session,
            self.upload: None,
            self.slice: gr.update(
                visible=slices > 1, maximum=max(2, slices), value=session.slice_index + 1, label=f"Slice (of {slices})"
            ),
            **updates,
            **self._talk(session),
            **self._view(session, threshold),
        }

    @event
    def show_slice(self, session: Session, number: float, threshold: float) -> Updates:
        """Shows the slice of that number, counted from 1, with its own masks."""
        session.slice_index = min(max(int(number), 1), session.opened().num_slices) - 1
        session.heat = None
        return self._view(session, threshold)

    @event
    def show_plane(self, session: Session, plane: str, threshold: float) -> Updates:
        """Cuts a NIfTI volume along another plane, and begins the conversation anew."""
        session.cut_along(plane)
        return self._opened(session, threshold)

    @event
    def show_window(self, session: Session, text: str | None, threshold: float) -> Updates:
        """Shows the slices under another window: a name, the file's own, centre/width, or the default."""
        scan = session.opened()
        try:
            window = parse_window_text(text or "")
            scan.slice_image(session.slice_index, window)
        except ValueError as error:
            _warn(error, session)
            return {self.window: markup.window_text(session.window)}
        session.window = window
        return self._view(session, threshold)

    def ask(
        self, session: Session | None, question: str, max_new_tokens: float, predicted_only: bool, threshold: float
    ) -> Iterator[Updates]:
        """Answers a question about the slice that is shown: the text as it comes, then words, codes and masks."""
        if session is None or session.scan is None:
            yield _warn("open an image first")
            return
        turn = Turn(question.strip(), session.slice_index, session.window)
        session.turns.append(turn)
        session.stop.clear()
        stop = session.stop
        try:
            settings = AnswerSettings(
                max_new_tokens=int(max_new_tokens),
                allowed_groups="predicted" if predicted_only else None,
                threshold=threshold,
            )
            messages = session.messages(turn)
            if problem := cut_otherwise(session.opened(), session.learnt, turn.question):
                _warn(problem)
            yield {**self._talk(session), self.question: _asking(True, "")}
            turns = session.read_so_far(turn)
            with closing(stream_answer(self.predictor, messages, settings, stop, turns)) as pieces:
                for piece in pieces:
                    if turn not in session.turns:  # another image was opened, or a conversation begun
                        continue
                    if isinstance(piece, Answered):
                        _keep(session, turn, piece, stop.is_set())
                    else:
                        turn.text = piece
                        yield self._talk(session)
        except ValueError as error:
            _warn(error, session)
        except Exception:
            logger.exception("an answer failed")
            _warn("the model failed on this question; the server's log says why")
        finally:
            if turn.answer is None and turn in session.turns:
                session.turns.remove(turn)
        failed = turn.answer is None and not stop.is_set()
        yield {
            self.session: session,
            **self._talk(session),
            **self._view(session, threshold),
            self.question: _asking(False, question) if failed else _asking(False),
        }

    @event
    def stop(self, session: Session) -> Updates:
        """Ends the answer that is being generated; what is there of it stays, with its masks."""
        session.stop.set()
        return gr.skip()

    @event
    def begin_anew(self, session: Session, threshold: float) -> Updates:
        """Takes away the conversation and its masks; the image stays."""
        session.forget_conversation()
        return {**self._talk(session), **self._view(session, threshold)}

    @event
    def show_heat_map(self, session: Session, threshold: float, click: gr.EventData) -> Updates:
        """Shows where the mask of a clicked code is how probable, on its slice, and what the code usually means."""
        finding = session.finding(int(click._data["finding"]))
        turn = next(turn for turn in session.turns if finding in turn.findings)
        session.slice_index, session.window, session.heat = finding.slice_index, turn.window, finding.number
        return {
            self.slice: session.slice_index + 1,
            self.window: markup.window_text(session.window),
            **self._view(session, threshold),
        }

    @event
    def show_masks(self, session: Session, threshold: float) -> Updates:
        """Back from a heat map."""
        session.heat = None
        return self._view(session, threshold)

    @event
    def show_layer(self, session: Session, threshold: float, click: gr.EventData) -> Updates:
        """Switches the mask of a region on or off."""
        number, shown = int(click._data["finding"]), bool(click._data["shown"])
        session.hidden = session.hidden - {number} if shown else session.hidden | {number}
        session.heat = None
        return self._view(session, threshold)

    @event
    def redraw(self, session: Session, threshold: float) -> Updates:
        """Draws the masks anew, as after a change of the threshold."""
        return {**self._view(session, threshold), self.archive: gr.update(value=None, visible=False)}

    @event
    def save(self, session: Session, formats: list[str], deidentify: bool, threshold: float) -> Updates:
        """Writes all regions of the conversation, and a picture of them, into an archive to download."""
        scan = session.opened()
        if not session.findings:
            raise ValueError("no answer has cited a region yet: there is no mask to download")
        if not formats:
            raise ValueError("choose at least one format")
        regions = [
            FoundRegion(
                each.slice_index, self._mask(scan, each, threshold), each.label, each.region.code, each.region.score
            )
            for each in session.findings
        ]
        folder = session.new_folder()
        files = write_masks(scan, regions, folder / "masks", formats, deidentify=deidentify)
        several, picture = scan.num_slices > 1, folder / "overview.png"
        shown = mosaic(scan, regions, session.window) if several else overlay(session.image(), regions)
        shown.save(picture)
        with zipfile.ZipFile(folder / ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in [*files, picture]:
                archive.write(file, file.name)
        return {self.archive: gr.update(value=str(folder / ARCHIVE), visible=True)}

    def _talk(self, session: Session) -> Updates:
        return {
            self.chat: markup.conversation(session.turns, session.num_slices),
            self.archive: gr.update(value=None, visible=False),
        }

    def _view(self, session: Session, threshold: float) -> Updates:
        scan, image, picture, alt, layers, card = session.scan, None, None, "", "", ""
        try:  # pixels are decoded when they are to be shown
            image = None if scan is None else session.image()
        except (ValueError, OSError) as error:
            _warn(error, session)
        if scan is not None and image is not None:
            here = session.findings_here()
            masks = {finding.number: self._mask(scan, finding, threshold) for finding in here}
            areas = [_area(int(masks[finding.number].sum()), scan.pixel_mm2) for finding in here]
            layers = markup.layers(here, areas, session.hidden)
            if session.heat is None:
                drawn = [finding for finding in here if finding.number not in session.hidden]
                picture = draw_layers(image, {finding.number: masks[finding.number] for finding in drawn})
                names = ", ".join(finding.label for finding in drawn)
                alt = f"The image with masks: {names}" if drawn else "The image"
            else:
                finding = session.finding(session.heat)
                picture = draw_heat_map(image, finding.logits, self.predictor.processor)
                alt = f"Heat map of {finding.region.code}, {finding.label}"
                card = markup.code_card(finding, self.predictor.processor.region_codes)
        return {
            self.picture: gr.update(value=picture, visible=picture is not None, alt_text=alt),
            self.layers: gr.update(value=layers, visible=bool(layers)),
            self.card: gr.update(value=card, visible=bool(card)),
            self.back: gr.update(visible=bool(card)),
        }

    def _mask(self, scan: Scan, finding: Finding, threshold: float) -> Any:
        """Boolean mask of a region on the slice's own pixels."""
        processor, size = self.predictor.processor, scan.picture_size[::-1]
        mask = processor.post_process_masks([finding.logits[None]], [size], threshold)[0][0]
        return scan.to_grid(mask.cpu().numpy())


def build(predictor: Any, folder: Path | None = None) -> gr.Blocks:
    """The page as a Gradio application, for `launch`; see `Page`."""
    return Page(predictor, folder).blocks


def parse_window_text(text: str) -> Window:
    """A window as typed: empty or "default", a name, "file" (its own), or centre/width; ValueError for another."""
    text = text.strip().lower()
    if text in ("", DEFAULT_WINDOW):
        return None
    if text in (*WINDOWS, FILE_WINDOW):
        return text
    try:
        centre, width = (float(part) for part in text.replace(",", "/").split("/"))
    except ValueError:
        names = ", ".join((DEFAULT_WINDOW, FILE_WINDOW, *WINDOWS))
        raise ValueError(f"window {text!r}: expected {names}, or centre/width such as 40/400") from None
    return centre, width


def _keep(session: Session, turn: Turn, answered: Answered, stopped: bool) -> None:
    first = len(session.findings)
    # Masks of the image's size would add up over the turns: they are drawn anew from their logits.
    regions = [replace(region, mask=None) for region in answered.answer.regions]
    turn.answer, turn.stopped = replace(answered.answer, regions=regions), stopped
    turn.findings = [
        Finding(first + i, region, answered.mask_logits[i], turn.slice_index) for i, region in enumerate(regions)
    ]


def _asking(busy: bool, text: str | None = None) -> Any:
    value = {} if text is None else {"value": text}
    return gr.update(submit_btn=False if busy else "Ask", stop_btn="Stop" if busy else False, **value)


def _warn(problem: Exception | str, session: Session | None = None) -> Updates:
    message = str(problem) if session is None or isinstance(problem, str) else session.message_of(problem)
    gr.Warning(markup.escape(message[:1].upper() + message[1:]))
    return gr.skip()


def _planes(session: Session) -> list[str]:
    """The planes that a volume can be cut along, and other turns of them that the model learnt."""
    return [*PLANES, *sorted(set(session.learnt.orientations.values()) - {*PLANES.values()})]


def _plane(scan: Scan) -> str | None:
    return scan.plane if scan.plane is None or PLANES[scan.plane] == scan.orientation else scan.orientation


def _formats(scan: Scan) -> list[str]:
    """The formats that masks on a scan can be written in."""
    possible = {"dicom-seg": scan.kind == "dicom", "rtstruct": scan.kind == "dicom"}
    possible["nifti"] = scan.affine is not None or scan.kind == "nifti"
    return [name for name in FORMATS if possible.get(name, True)]


def _area(pixels: int, pixel_mm2: float | None) -> str:
    if pixel_mm2 is None:
        return f"{pixels:,} px"
    area = pixels * pixel_mm2
    return f"{area / 100:,.1f} cm²" if area >= 1000 else f"{area:,.0f} mm²"
