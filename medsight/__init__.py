"""MedSIGHT's command line and Python interface, and all that a checkpoint folder does not need.

    from medsight import Predictor

    predict = Predictor()
    prediction = predict("scan.png", "Segment the liver.")
    print(prediction.answer.text, [region.phrase for region in prediction.answer.regions])
    prediction.save("scan-answer")

Names are imported on first use, so `import medsight` and `medsight --help` load neither torch nor transformers.
"""

from typing import TYPE_CHECKING, Any

from .version import __version__


if TYPE_CHECKING:
    from .inference.prediction import Prediction
    from .inference.predictor import Predictor

__all__ = ["Prediction", "Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Predictor":
        from .inference.predictor import Predictor

        return Predictor
    if name == "Prediction":
        from .inference.prediction import Prediction

        return Prediction
    raise AttributeError(f"module 'medsight' has no attribute {name!r}")
