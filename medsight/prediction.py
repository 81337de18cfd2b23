"""One prediction: a grounded answer and what was asked, as a table for a terminal and as a folder of files."""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from medsight import __version__
from medsight.output_folder import staged_folder
from medsight.overlay import draw_overlay


if TYPE_CHECKING:
    from processing_medsight.grounded_answer_medsight import GroundedAnswer

ANSWER_FILE = "answer.json"
OVERLAY_FILE = "overlay.png"
MASK_FILE = "mask-{:02d}.png"


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model answered to one prompt about one image.

    Attributes:
        answer: clean text, raw text, and a region for every region code, each with its mask at the image's size.
        image: the image as the model's processor read it, 8-bit RGB.
        image_name: where the image came from.
        prompt: what was asked.
        model: the checkpoint folder.
    """

    answer: "GroundedAnswer"
    image: Image.Image
    image_name: str
    prompt: str
    model: str

    def to_dict(self) -> dict[str, Any]:
        """The content of `answer.json`: everything but pixels, with the name of each mask's file."""
        return {
            "medsight_version": __version__,
            "model": self.model,
            "image": self.image_name,
            "size": {"width": self.image.width, "height": self.image.height},
            "prompt": self.prompt,
            "text": self.answer.text,
            "raw_text": self.answer.raw_text,
            "regions": [
                {
                    "code": region.code,
                    "group": region.group_name,
                    "phrase": region.phrase,
                    "span": region.span,
                    "box": region.box,
                    "area": region.area,
                    "score": region.score,
                    "mask": MASK_FILE.format(index),
                }
                for index, region in enumerate(self.answer.regions, 1)
            ],
        }

    def to_table(self) -> str:
        """The answer, then an aligned table of its regions."""
        text = printable(self.answer.text)
        if not self.answer.regions:
            return f"{text}\n\nThe answer cites no region."
        rows = [("", "code", "group", "phrase", "area (px)", "box (x0, y0, x1, y1)", "score")]
        for index, region in enumerate(self.answer.regions, 1):
            box = "-" if region.box is None else ", ".join(map(str, region.box))
            score = "-" if region.score is None else f"{region.score:.2f}"
            names = (region.code, region.group_name or "-", region.phrase or "-")
            rows.append((str(index), *names, str(region.area), box, score))
        return f"{text}\n\n{align(rows)}"

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Writes `answer.json`, one `mask-NN.png` a region (0 and 255, at the image's size) and `overlay.png`.

        The folder appears complete or not at all.

        Raises:
            FileExistsError: see `check_answer_folder`.
        """
        with staged_folder(Path(folder), overwrite, check=check_answer_folder) as stage:
            self._write(stage)
        return Path(folder)

    def _write(self, folder: Path) -> None:
        content = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        (folder / ANSWER_FILE).write_text(content + "\n", encoding="utf-8")
        masks, labels = [], []
        for index, region in enumerate(self.answer.regions, 1):
            masks.append(np.asarray(region.mask, dtype=bool))
            labels.append("  ".join(filter(None, (region.phrase, region.code, region.group_name))))
            Image.fromarray(masks[-1].astype(np.uint8) * 255).save(folder / MASK_FILE.format(index))
        draw_overlay(self.image, masks, labels).save(folder / OVERLAY_FILE)


def check_answer_folder(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that an answer cannot be written to without mixing it with, or losing, other files.

    Raises:
        FileExistsError: the folder is a file; or it is not empty and `overwrite` is false; or it holds files that are
            no part of an earlier answer, which `overwrite` does not remove.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {folder} is a file; name a folder")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if not names:
        return
    if not overwrite:
        raise FileExistsError(f"output folder {folder} is not empty; name another one, or add --overwrite")
    foreign = [name for name in names if name not in (ANSWER_FILE, OVERLAY_FILE) and not _is_mask_file(name)]
    if foreign or ANSWER_FILE not in names:
        found = f"it holds {foreign[0]}" if foreign else f"it has no {ANSWER_FILE}"
        raise FileExistsError(
            f"output folder {folder}: only an earlier answer is overwritten, and {found}; name another"
        )


def _is_mask_file(name: str) -> bool:
    prefix, suffix = MASK_FILE.split("{:02d}")
    return name.startswith(prefix) and name.endswith(suffix) and name[len(prefix) : -len(suffix)].isdigit()


def printable(text: str) -> str:
    """`text` with control characters, which could drive a terminal, replaced; line ends and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text, columns two spaces apart; wide (East Asian) characters count as two cells."""
    widths = [max(map(cell_width, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell + " " * (width - cell_width(cell)) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def cell_width(text: str) -> int:
    """Cells that `text` takes in a terminal."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
