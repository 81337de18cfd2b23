"""The cases of report.html: which rows are shown, and their pictures."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from medsight.data.pictures import read_picture
from medsight.export.drawing import draw_regions, readable_side
from medsight.scans import open_scan

from .cases import Case
from .predictions import Prediction
from .scoring import predicted_masks, reference_masks


CASES, PICTURE_SIDE, JPEG_QUALITY = 4, 512, 84
Row = Mapping[str, Any]


def choose_cases(
    score: str, rows: Sequence[Row], cases: Sequence[Case], predictions: Mapping[str, Prediction]
) -> list[dict[str, Any]]:
    """The worst, middle and best rows by a score ("dice" or "answer"), varied in modality; and false masks."""
    field, called = {"dice": ("dice", "Dice"), "answer": ("answer_score", "Score")}[score]
    ranked = sorted((row[field], index) for index, row in enumerate(rows) if row.get(field) is not None)
    middle = ranked[len(ranked) // 2][0] if ranked else 0.0
    orders = {
        "Worst": ranked,
        "Best": sorted(ranked, key=lambda entry: (-entry[0], entry[1])),
        "Around the median": sorted(ranked, key=lambda entry: (abs(entry[0] - middle), entry[1])),
    }
    picked: dict[str, list[tuple[float | None, int]]] = {}
    taken: set[int] = set()
    for title, order in orders.items():
        chosen = varied([entry for entry in order if entry[1] not in taken], rows)
        taken |= {index for _, index in chosen}
        picked[title] = [*chosen]
    false = [(None, index) for index, row in enumerate(rows) if row.get("false_mask")]
    picked["A mask where there is nothing to find"] = [*false[:CASES]]
    shown = ("Worst", "Around the median", "Best", "A mask where there is nothing to find")
    return [
        {"title": title, "cases": [_case(called, value, rows[i], cases[i], predictions) for value, i in picked[title]]}
        for title in shown
        if picked[title]
    ]


def varied(ranked: Sequence[tuple[float, int]], rows: Sequence[Row]) -> list[tuple[float, int]]:
    """Some of the first quarter of a ranking and of its ties, one a modality before a second of any."""
    seen: Counter[str] = Counter()
    rounds = []
    first = max(CASES, len(ranked) // 4)
    for place, (score, index) in enumerate(ranked):
        if place >= first and score != ranked[first - 1][0]:
            break
        modality = rows[index]["modality"]
        rounds.append((seen[modality], place))
        seen[modality] += 1
    return [ranked[place] for place in sorted(place for _, place in sorted(rounds)[:CASES])]


def _case(
    called: str, value: float | None, row: Row, case: Case, predictions: Mapping[str, Prediction]
) -> dict[str, Any]:
    picture = case_picture(case, predictions.get(case.id))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=JPEG_QUALITY)
    shown = " ".join(case.prompt.replace("<image>", " ").split())
    return {
        "picture": f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}",
        "width": picture.width,
        "height": picture.height,
        "alt": f"{case.modality} image of {case.site}, {case.id}",
        "score": "false mask" if value is None else f"{called} {100 * value:.1f}",
        "origin": " · ".join(part for part in (case.dataset, case.modality) if part != "-"),
        "prompt": shown if len(shown) < 160 else f"{shown[:160]}…",
        "answer": row["answer"] or "(empty answer)",
        "reference": case.answer,
    }


def case_picture(case: Case, prediction: Prediction | None) -> Image.Image:
    """A case's image with its reference in orange and the answer's masks, as one, in blue."""
    image = open_scan(read_picture(case.images[0])).slice_image(0).convert("RGB")
    size = (image.height, image.width)
    if not case.masks and (prediction is None or not prediction.masks):
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        return image
    nothing = np.zeros(size, dtype=bool)
    references = np.logical_or.reduce([nothing, *reference_masks(case)])
    answered = np.logical_or.reduce([nothing, *(predicted_masks(prediction, size).values() if prediction else ())])
    drawn = draw_regions(image, [references, answered], readable_side(image))
    drawn.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return drawn
