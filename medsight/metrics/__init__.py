"""Metrics as `evaluate` modules, one a folder, each complete in itself so that it can be pushed to the Hub as it is.

medical_vqa    answers to questions: llava-med, strict, multiple-choice, first-letter
mask_dice      masks against reference masks: Dice, IoU, HD95 and surface Dice; medsight, medplib, citrus, biomedparse,
               named
region_codes   what region codes stand for, and how often they are missing, false or wrong
intervals      bootstrap intervals of any of their scores
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import evaluate

METRICS = ("medical_vqa", "mask_dice", "region_codes")


def load(name: str, **kwargs: Any) -> "evaluate.Metric":
    """A metric of this package, from its folder: nothing is fetched.

    Args:
        name: one of `METRICS`; another one raises ValueError.
        kwargs: passed to `evaluate.load`. Rows are kept in memory unless `num_process` or `keep_in_memory` says
            otherwise, so that runs beside each other share no file.
    """
    if name not in METRICS:
        raise ValueError(f"metric {name!r}: choose one of {', '.join(METRICS)}")
    import evaluate

    kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
    return evaluate.load(str(Path(__file__).parent / name), **kwargs)
