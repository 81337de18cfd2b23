"""MedSIGHT's command line and Python interface, and all that a checkpoint folder does not need.

    from medsight import Predictor

    predict = Predictor()
    answer = predict("scan.png", "Segment the liver.")
    print(answer.text, [region.phrase for region in answer.regions])

Names are imported on first use, so `import medsight` and `medsight --help` load neither torch nor transformers.
"""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .answer import GroundedAnswer, GroundedRegion
    from .predict import Predictor

__version__ = "0.1.0"
__all__ = ["GroundedAnswer", "GroundedRegion", "Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("GroundedAnswer", "GroundedRegion"):
        from . import answer

        return getattr(answer, name)
    if name == "Predictor":
        from .predict import Predictor

        return Predictor
    raise AttributeError(f"module 'medsight' has no attribute {name!r}")
