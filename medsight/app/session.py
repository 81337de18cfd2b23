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

from medsight.inference.orientations import LearntOrientations
from medsight.inference.predictor import EarlierTurns, Window, assistant_turn, user_turn
from medsight.scans import Scan, open_scan
from processing_medsight.grounded_answer_medsight import GroundedAnswer, GroundedRegion


UPLOAD_NAME = "the upload"  # what errors call it: a file's own name may be a patient's
# Where uploads went that sessions took, by the place where the server kept them.
_taken: dict[Path, list[Path]] = {}
_taking = threading.Lock()


def take_upload(file: Path, target: Path) -> None:
    """Move an upload; or copy it from where it was moved to, if another visitor's session took the same file."""
    with _taking:
        copies = [copy for copy in _taken.get(file, ()) if copy.exists()]
        if file.exists() or not copies:
            shutil.move(file, target)
        else:
            shutil.copyfile(copies[0], target)
        _taken[file] = [*copies, target]


@dataclass(frozen=True, eq=False)
class Finding:
    """One region of an answer."""

    number: int  # counted from 0 through the session; gives the region its colour
    region: GroundedRegion
    logits: torch.Tensor  # (h, w) mask logits on the model's grid
    slice_index: int  # where it was found

    @property
    def label(self) -> str:
        """The words that it stands for, or its group, or its code."""
        return self.region.phrase or self.region.group_name or self.region.code


@dataclass(eq=False)
class Turn:
    """A question about a slice, and what is there of its answer."""

    question: str
    slice_index: int
    window: Window
    text: str = ""  # the answer as generated so far, codes included
    answer: GroundedAnswer | None = None  # once it is complete
    findings: list[Finding] = field(default_factory=list)
    stopped: bool = False  # the visitor cut it short


@dataclass(eq=False)
class Session:
    """What one visitor has open."""

    root: Path | None = None  # folder in which the session makes its own; the system's temporary folder by default
    learnt: LearntOrientations = LearntOrientations()  # of the checkpoint that is asked
    scan: Scan | None = None
    slice_index: int = 0  # with `window`: what is shown
    window: Window = None
    turns: list[Turn] = field(default_factory=list)  # over all slices
    hidden: set[int] = field(default_factory=set)  # numbers of the regions that are switched off
    heat: int | None = None  # number of the region whose heat map is shown instead of the masks
    stop: threading.Event = field(default_factory=threading.Event)  # set to end the answer that is being generated
    _folder: Path | None = None
    _source: Any = None
    _read: tuple[tuple[int, Window], EarlierTurns] | None = None

    @property
    def findings(self) -> list[Finding]:
        """All regions, in the order of their numbers."""
        return [finding for turn in self.turns for finding in turn.findings]

    @property
    def num_slices(self) -> int:
        """Of the scan; 1 where none is open."""
        return 1 if self.scan is None else self.scan.num_slices

    def findings_here(self) -> list[Finding]:
        """The regions of the slice that is shown."""
        return [finding for finding in self.findings if finding.slice_index == self.slice_index]

    def finding(self, number: int) -> Finding:
        """The region of that number; ValueError if there is none, as where the page shows an earlier scan's."""
        found = self.findings
        if not 0 <= number < len(found):
            raise ValueError(f"region {number + 1} is not there any more: the conversation was begun anew")
        return found[number]

    def open_files(self, files: Sequence[Path]) -> None:
        """Opens uploaded files, in place of what is open, once they could be read.

        They are moved into the session's own folder under names given here, and go with it. The server keeps an upload
        by its content: where another visitor's was the same file, a copy of that one is taken.

        Raises:
            ValueError: they cannot be read, or do not belong together; then what is open stays.
        """
        opened = Session(self.root, self.learnt)
        try:
            folder = opened.new_folder()
            for number, file in enumerate(files, 1):
                take_upload(file, folder / f"{number:05d}")
            opened._show(folder if len(files) > 1 else folder / "00001", name=UPLOAD_NAME)
        except (ValueError, OSError) as error:
            message = opened.message_of(error)
            opened.close()
            raise ValueError(message) from None
        self._take(opened)

    def open_example(self, content: bytes) -> None:
        """Opens the content of a file that is not a visitor's."""
        opened = Session(self.root, self.learnt)
        opened._show(content, name="the example")
        self._take(opened)

    def _take(self, opened: "Session") -> None:
        self.close()
        self.scan, self.slice_index = opened.scan, opened.slice_index
        self._source, self._folder = opened._source, opened._folder

    def cut_along(self, plane: str) -> None:
        """Cuts the volume along another plane. The conversation ends: it was about other slices."""
        self._show(self._source, name=self.opened().name, plane=plane)
        self.forget_conversation()
        self.window = None

    def new_folder(self) -> Path:
        """A new, empty folder that goes when the scan is closed."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="visitor-", dir=self.root))
        return Path(tempfile.mkdtemp(dir=self._folder))

    def message_of(self, error: Exception) -> str:
        """What an error says, with nothing of where files lie here: "file 3 of the upload"."""
        if isinstance(error, OSError) and error.strerror:
            return f"the server failed on a file ({error.strerror}): try again"
        if self._folder is None:
            return str(error)
        several = any(self._folder.glob("*/00002"))
        inside = re.compile(rf"(?:{re.escape(str(self._folder))}(?:/\w+)?|{UPLOAD_NAME})(?:/(\d{{5}}))?")
        return inside.sub(
            lambda found: f"file {int(found[1])} of {UPLOAD_NAME}" if found[1] and several else UPLOAD_NAME, str(error)
        )

    def _show(self, source: Path | bytes, name: str, plane: str | None = None) -> None:
        """Opens a scan; a volume as the model learnt it, unless a plane is asked for or groups of it disagree."""
        scan = open_scan(source, name, plane)
        learnt = set() if plane else set(self.learnt.of_question(scan).values())
        if len(learnt) == 1 and learnt != {scan.orientation}:
            scan = open_scan(source, name, learnt.pop())
        self.scan, self._source, self.slice_index = scan, source, scan.choose_slices("middle")[0]

    def opened(self) -> Scan:
        """The scan; raises ValueError if none is open."""
        if self.scan is None:
            raise ValueError("open an image first")
        return self.scan

    def image(self) -> Image.Image:
        """The slice that is shown, as the model sees it."""
        return self.opened().slice_image(self.slice_index, self.window)

    def messages(self, turn: Turn) -> list[dict[str, Any]]:
        """The conversation up to and with `turn`, about its slice under its window alone, for the chat template.

        Earlier turns about other slices are left out: each conversation that the model reads is about one image.
        """
        image: Image.Image | None = self.opened().slice_image(turn.slice_index, turn.window)
        messages = []
        for earlier in self.turns[: self.turns.index(turn)]:
            if (earlier.slice_index, earlier.window) == (turn.slice_index, turn.window) and earlier.answer is not None:
                messages += [user_turn(earlier.question, image), assistant_turn(earlier.answer)]
                image = None
        return [*messages, user_turn(turn.question, image)]

    def read_so_far(self, turn: Turn) -> EarlierTurns:
        """What the model need not read again for `turn`: the conversation about its view. Of one view it is held."""
        view = (turn.slice_index, turn.window)
        if self._read is None or self._read[0] != view:
            self._read = view, EarlierTurns()
        return self._read[1]

    def forget_conversation(self) -> None:
        """Ends the answer that is being generated; takes away all turns and regions."""
        self.stop.set()
        self.stop, self._read = threading.Event(), None
        self.turns, self.hidden, self.heat = [], set(), None

    def close(self) -> None:
        """Takes away the conversation, the scan and its files."""
        self.forget_conversation()
        self.scan, self.slice_index, self.window = None, 0, None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
