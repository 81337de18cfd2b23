"""The web page as a Hugging Face Space; also runs anywhere else: `python app.py`."""

import os

from huggingface_hub import snapshot_download

from medsight.app import launch


# A folder, or a repository on the Hub; the small shipped model by default.
model = os.environ.get("MEDSIGHT_MODEL")
if model and not os.path.isdir(model):
    model = snapshot_download(model)
# A Space's container is reached from outside of it alone.
launch(model, host="0.0.0.0", port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))  # noqa: S104 (see above)
