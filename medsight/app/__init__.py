"""The web page, `medsight app`: upload a scan, ask about it, look at the masks of the answer.

server     starts the page: address, private upload folder, no telemetry
page       what is on the page, and what each control does
session    one visitor's scan, conversation and regions; nothing is kept outside of it
answering  an answer, streamed, with the mask logits of its codes
drawing    regions and heat maps over a slice
markup     conversation, layers and codes as HTML
examples   images to try, drawn here or taken from installed packages
"""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .page import build
    from .server import launch

__all__ = ["build", "launch"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from .page import build

        return build
    if name == "launch":
        from .server import launch

        return launch
    raise AttributeError(f"module 'medsight.app' has no attribute {name!r}")
