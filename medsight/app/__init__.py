"""The web page, `medsight app`: upload a scan, ask about it, look at the masks of the answer.

server     starts the page: address, private upload folder, no telemetry
page       what each control of the page does
controls   the controls, and where they stand
session    one visitor's scan, conversation and regions; nothing is kept outside of it
answering  an answer, streamed, with the mask logits of its codes
drawing    regions and heat maps over a slice
markup     conversation, layers and codes as HTML
examples   images to try, drawn here or taken from installed packages

`medsight.app.launch("my-model", port=7860)` starts it. It needs gradio: `pip install "medsight[app,medical]"`.
"""

import os


# gradio reads these: no telemetry, and no look for newer versions.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from .page import build
from .server import launch


__all__ = ["build", "launch"]
