"""One visitor's scan, conversation and regions. Files and memory go with the session; nothing is shared."""

import re
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from medsight.inference.predictor import Window, assistant_turn, user_turn
from medsight.scans import Scan, open_scan
from processing_medsight.grounded_answer_medsight import GroundedAnswer, GroundedRegion


UPLOAD_NAME = "the upload"  # what errors call it: a file's own name may be a patient's


@dataclass(frozen=True, eq=False)
class Finding:
    """One region of an answer.

    Attributes:
        number: counted from 0 through the session; gives the region its colour.
        region: the code, its words and its score.
        logits: (h, w) mask logits on the model's grid.
        slice_index: the slice that it was found on.
    """

    number: int
    region: GroundedRegion
    logits: torch.Tensor
    slice_index: int

    @property
    def label(self) -> str:
        """The words that it stands for, or its group, or its code."""
        return self.region.phrase or self.region.group_name or self.region.code


@dataclass(eq=False)
class Turn:
    """A question and what is there of its answer.

    Attributes:
        question: as asked.
        slice_index, window: what the question is about.
        text: the answer as generated so far, codes included.
        answer: once it is complete.
        findings: its regions.
        stopped: the visitor cut it short.
    """

    question: str
    slice_index: int
    window: Window
    text: str = ""
    answer: GroundedAnswer | None = None
    findings: list[Finding] = field(default_factory=list)
    stopped: bool = False


@dataclass(eq=False)
class Session:
    """What one visitor has open.

    Attributes:
        root: folder in which the session makes its own; the system's temporary folder by default.
        scan: the opened scan, or `None`.
        slice_index, window: what is shown.
        turns: the conversation, over all slices.
        hidden: numbers of the regions that are switched off.
        heat: number of the region whose heat map is shown instead of the masks, or `None`.
        stop: set to end the answer that is being generated.
    """

    root: Path | None = None
    scan: Scan | None = None
    slice_index: int = 0
    window: Window = None
    turns: list[Turn] = field(default_factory=list)
    hidden: set[int] = field(default_factory=set)
    heat: int | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    _folder: Path | None = None
    _source: Path | bytes | None = None

    @property
    def findings(self) -> list[Finding]:
        """All regions, in the order of their numbers."""
        return [finding for turn in self.turns for finding in turn.findings]

    def findings_here(self) -> list[Finding]:
        """The regions of the slice that is shown."""
        return [finding for finding in self.findings if finding.slice_index == self.slice_index]

    def finding(self, number: int) -> Finding:
        """The region of that number.

        Raises:
            ValueError: there is none (the page shows an earlier scan's).
        """
        found = self.findings
        if not 0 <= number < len(found):
            raise ValueError(f"region {number + 1} is not there any more: the conversation was begun anew")
        return found[number]

    def open_files(self, files: Sequence[Path]) -> None:
        """Opens uploaded files, which are moved into the session's own folder under names given here.

        Raises:
            ValueError: they cannot be read, or do not belong together; then no scan is open.
        """
        if not files:
            raise ValueError("no file was uploaded")
        self.close()
        folder = self.new_folder()
        for number, file in enumerate(files, 1):
            shutil.move(file, folder / f"{number:05d}")
        try:
            self._source = folder if len(files) > 1 else folder / "00001"
            self._show(open_scan(self._source, name=UPLOAD_NAME))
        except (ValueError, OSError) as error:
            message = self.without_paths(str(error))
            self.close()
            raise ValueError(message) from None

    def open_example(self, content: bytes) -> None:
        """Opens the content of a file that is not a visitor's."""
        self.close()
        self._source = content
        self._show(open_scan(content, name="the example"))

    def cut_along(self, plane: str) -> None:
        """Cuts the volume along another plane. The conversation ends: it was about other slices.

        Raises:
            ValueError: the scan has no planes to choose from; nothing changes.
        """
        if self.scan is None or self._source is None:
            raise ValueError("no scan is open")
        scan = open_scan(self._source, name=self.scan.name, plane=plane)
        self.forget_conversation()
        self.window = None
        self._show(scan)

    def new_folder(self) -> Path:
        """A new, empty folder that goes when the scan is closed."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="visitor-", dir=self.root))
        return Path(tempfile.mkdtemp(dir=self._folder))

    def without_paths(self, text: str) -> str:
        """A message about the upload, with nothing of where its files lie here: "file 3 of the upload"."""
        if self._folder is None:
            return text
        several = len(list(self._folder.glob("*/00002"))) > 0
        inside = re.compile(rf"(?:{re.escape(str(self._folder))}(?:/\w+)?|{UPLOAD_NAME})(?:/(\d{{5}}))?")
        return inside.sub(
            lambda found: f"file {int(found[1])} of {UPLOAD_NAME}" if found[1] and several else UPLOAD_NAME, text
        )

    def _show(self, scan: Scan) -> None:
        self.scan = scan
        self.slice_index = scan.choose_slices("middle")[0]

    def image(self, slice_index: int | None = None, window: Window = None) -> Image.Image:
        """A slice as the model sees it; the one that is shown by default."""
        if self.scan is None:
            raise ValueError("no scan is open")
        if slice_index is None:
            slice_index, window = self.slice_index, self.window
        return self.scan.slice_image(slice_index, window)

    def messages(self, turn: Turn) -> list[dict[str, Any]]:
        """The conversation up to and with `turn`, about its slice under its window alone, for the chat template.

        Earlier turns about other slices are left out: each conversation that the model reads is about one image.

        Raises:
            ValueError: the question is empty.
        """
        same = [
            earlier
            for earlier in self.turns[: self.turns.index(turn)]
            if (earlier.slice_index, earlier.window) == (turn.slice_index, turn.window) and earlier.answer is not None
        ]
        messages: list[dict[str, Any]] = []
        for asked in [*same, turn]:
            image = None if messages else self.image(turn.slice_index, turn.window)
            messages.append(user_turn(asked.question, image))
            if asked is not turn and asked.answer is not None:
                messages.append(assistant_turn(asked.answer))
        return messages

    def forget_conversation(self) -> None:
        """Ends the answer that is being generated; takes away all turns and regions."""
        self.stop.set()
        self.stop = threading.Event()
        self.turns, self.hidden, self.heat = [], set(), None

    def close(self) -> None:
        """Takes away the conversation, the scan and its files."""
        self.forget_conversation()
        self.scan, self.slice_index, self.window, self._source = None, 0, None, None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
