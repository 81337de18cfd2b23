"""What tests of answers compare: all of a folder, and all of a prediction."""

from pathlib import Path

from medsight import Prediction


SIZE = (70, 45)  # width, height of the picture that is asked: neither square nor the model's


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(one: Prediction, other: Prediction) -> bool:
    codes = [[region.code for region in prediction.answer.regions] for prediction in (one, other)]
    masks = zip(one.answer.regions, other.answer.regions, strict=True)
    return (one.answer.raw_text, codes[0]) == (other.answer.raw_text, codes[1]) and all(
        a.mask.equal(b.mask) for a, b in masks
    )
