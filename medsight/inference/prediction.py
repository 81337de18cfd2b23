"""A prediction: a grounded answer and what was asked, as data, as a table for a terminal, and as a folder of files."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medsight.export import FoundRegion, measure, mosaic, overlay, write_masks
from medsight.export.writing import MASK_FILE
from medsight.files import staged_folder
from medsight.scans.scan import Scan
from medsight.text import Table, align, printable
from medsight.version import __version__
from processing_medsight.grounded_answer_medsight import GroundedAnswer, GroundedRegion
from processing_medsight.region_codes_medsight import CodeMeaning

from .answer_folder import ANSWER_FILE, OVERLAY_FILE, check_answer_folder


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model answered to one prompt about one picture, or one slice of a volume; see `Predictor`.

    Example:

    ```python
    import numpy as np
    from medsight import Predictor

    prediction = Predictor(device="cpu")(np.zeros((48, 64), np.uint8), "Segment the liver.", max_new_tokens=8)
    assert prediction.to_dict()["prompt"] == "Segment the liver."
    ```

    Attributes:
        answer: clean text, raw text, and a region for every region code, each with its mask on the slice's own pixels.
        image: the picture or slice as the model's processor read it, 8-bit RGB, in true proportions.
        image_name: where the image came from.
        prompt: what was asked.
        model: the checkpoint folder.
        scan: what the image is of.
        slice_index: which of its slices, from 0.
        window: the grey levels that were shown; None means those that suit the modality.
    """

    answer: GroundedAnswer
    image: Image.Image
    image_name: str
    prompt: str
    model: str
    scan: Scan
    slice_index: int = 0
    window: str | tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of `answer.json`: see `describe`."""
        return describe([self])

    def to_table(self) -> str:
        """The answer, then an aligned table of its regions."""
        parts = to_parts(self.to_dict())
        return "\n".join(printable(part) if isinstance(part, str) else align(part) for part in parts)

    def save(
        self, folder: str | Path, overwrite: bool = False, formats: Sequence[str] = ("png",), deidentify: bool = False
    ) -> Path:
        """Writes `answer.json`, `overlay.png` and the masks: see `save_answer`."""
        return save_answer([self], Path(folder), overwrite, formats, deidentify)


def found_regions(predictions: Sequence[Prediction]) -> list[FoundRegion]:
    """All regions of predictions about one scan, as `medsight.export` takes them, by their words, group or code."""
    return [
        FoundRegion(
            slice_index=prediction.slice_index,
            mask=np.asarray(region.mask, dtype=bool),
            label=next(name for name in (region.phrase, region.group_name, region.code) if name and name.strip()),
            code=region.code,
            score=region.score,
        )
        for prediction in predictions
        for region in prediction.answer.regions
    ]


def describe(predictions: Sequence[Prediction], run: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything but pixels of the predictions about one scan, for one prompt. Names of files are made printable.

    `slice`, `text`, `raw_text`, `is_complete` (whether the answer came to its end) and `regions` of a single
    prediction stand at the top; of several, `slices` lists them. Sizes are in pixels, and in mm² and ml where the
    scan's spacing is known; None where it is not.

    Args:
        run: what decided on the answers, for `medsight predict` to recognise a finished one by.
    """
    first = predictions[0]
    facts = first.scan.facts()
    measures = measure(first.scan, found_regions(predictions))
    areas = iter(measures.area_mm2)
    slices = [
        {
            "slice": prediction.slice_index,
            "text": prediction.answer.text,
            "raw_text": prediction.answer.raw_text,
            "is_complete": prediction.answer.is_complete,
            "regions": [_describe_region(region, next(areas)) for region in prediction.answer.regions],
        }
        for prediction in predictions
    ]
    return {
        "medsight_version": __version__,
        "model": printable(first.model),
        "image": printable(first.image_name),
        "size": {"width": facts.pop("width"), "height": facts.pop("height")},
        "scan": facts,
        "prompt": first.prompt,
        **(slices[0] if len(slices) == 1 else {"slices": slices}),
        "volumes_ml": measures.volume_ml if len(slices) > 1 else {},
        "run": run,
    }


def _describe_region(region: GroundedRegion, area_mm2: float | None) -> dict[str, Any]:
    return {
        "code": region.code,
        "group": region.group_name,
        "meaning": None if region.meaning is None else asdict(region.meaning),
        **{name: getattr(region, name) for name in ("phrase", "span", "box", "area")},
        "area_mm2": area_mm2,
        "score": region.score,
    }


def to_parts(content: dict[str, Any]) -> list[str | Table]:
    """The content of an `answer.json` for a terminal: the answer, or one a slice, and a table of all regions.

    Columns that no region has anything for are left out.
    """
    several = "slices" in content
    slices = content["slices"] if several else [content]
    regions = [(entry, region) for entry in slices for region in entry["regions"]]
    lines = [f"slice {entry['slice']}: {entry['text']}" if several else entry["text"] for entry in slices]
    cut = [str(entry["slice"]) for entry in slices if entry.get("is_complete") is False]
    of_slices = f", of slice {', '.join(cut)}" if several else ""
    ending: list[str | Table] = [f"\nCut at the limit of length{of_slices}; --max-new-tokens sets it."] if cut else []
    if not regions:
        none = "No answer cites a region." if several else "The answer cites no region."
        return ["\n".join(lines), "", none, *ending]
    columns = {
        "": [str(number) for number in range(1, len(regions) + 1)],
        "slice": [str(entry["slice"]) if several else "" for entry, _ in regions],
        "code": [region["code"] for _, region in regions],
        "group": [region["group"] or "-" for _, region in regions],
        "phrase": [region["phrase"] or "-" for _, region in regions],
        "usually": [str(CodeMeaning(**region["meaning"])) if region["meaning"] else "" for _, region in regions],
        "area (px)": [str(region["area"]) for _, region in regions],
        "area (mm²)": ["" if region["area_mm2"] is None else f"{region['area_mm2']:.1f}" for _, region in regions],
        "box (x0, y0, x1, y1)": [
            "-" if region["box"] is None else ", ".join(map(str, region["box"])) for _, region in regions
        ],
        "score": ["-" if region["score"] is None else f"{region['score']:.2f}" for _, region in regions],
    }
    filled = {title: cells for title, cells in columns.items() if any(cells)}
    parts: list[str | Table] = ["\n".join(lines), "", [tuple(filled), *zip(*filled.values(), strict=True)]]
    volumes = {name: volume for name, volume in content["volumes_ml"].items() if volume is not None}
    if volumes:
        listed = ", ".join(f"{name} {volume:.1f} ml" for name, volume in volumes.items())
        parts.append(f"\nOver the slices asked about: {listed}")
    return parts + ending


def save_answer(
    predictions: Sequence[Prediction],
    folder: Path,
    overwrite: bool = False,
    formats: Sequence[str] = ("png",),
    deidentify: bool = False,
    run: dict[str, Any] | None = None,
) -> Path:
    """Writes the predictions about one scan: `answer.json`, `overlay.png`, and what `formats` asks for.

    The overlay is the picture with its regions; for several slices it shows those that have regions side by side. The
    folder appears complete or not at all.

    Args:
        predictions: of one prompt and one scan, a slice each.
        formats, deidentify: for `medsight.export.write_masks`. With `deidentify`, no file says what the image was
            called either.
        run: see `describe`.

    Raises:
        FileExistsError: see `check_answer_folder`.
        ValueError: the scan cannot be written in one of the formats.
    """
    if deidentify:
        scan = copy.copy(predictions[0].scan)
        scan.name = "image"
        predictions = [replace(prediction, image_name="image", scan=scan) for prediction in predictions]
    first = predictions[0]
    regions = found_regions(predictions)
    content = describe(predictions, run)
    if "png" in formats:
        listed = [region for entry in content.get("slices", [content]) for region in entry["regions"]]
        for number, region in enumerate(listed, 1):
            region["mask"] = MASK_FILE.format(number)
    with staged_folder(folder, overwrite, check=check_answer_folder) as stage:
        write_masks(first.scan, regions, stage, formats, deidentify)
        several = len(predictions) > 1
        picture = mosaic(first.scan, regions, first.window) if several else overlay(first.image, regions)
        picture.save(stage / OVERLAY_FILE)
        content["files"] = sorted(path.name for path in stage.iterdir())
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        (stage / ANSWER_FILE).write_text(text + "\n", encoding="utf-8")
    return folder
