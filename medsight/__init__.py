"""MedSIGHT's command line and Python interface, and all that a checkpoint folder does not need.

    from medsight import Predictor

    predict = Predictor()
    prediction = predict("scan.png", "Segment the liver.")
    print(prediction.answer.text, [region.phrase for region in prediction.answer.regions])
    prediction.save("scan-answer")

`open_scan` opens a DICOM, NIfTI or other file as slices. Names are imported on first use, so `import medsight` and
`medsight --help` load neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__


if TYPE_CHECKING:
    from .inference.prediction import Prediction
    from .inference.predictor import Predictor
    from .scans import open_scan

__all__ = ["Prediction", "Predictor", "__version__", "open_scan"]
HOMES = {"Prediction": ".inference.prediction", "Predictor": ".inference.predictor", "open_scan": ".scans"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'medsight' has no attribute {name!r}")
    return getattr(import_module(HOMES[name], __name__), name)
