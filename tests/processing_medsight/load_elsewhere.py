"""Run by test_processing.py in a process of its own: loads a processor as somebody who does not have this package.

Usage: load_elsewhere.py SOURCE SAVED IMAGE. Loads SOURCE, saves it to SAVED, loads that, and prints what it computes.
"""

import json
import sys

import numpy as np


OWN = ("configuration_medsight", "modeling_medsight", "processing_medsight", "medsight", "training")


class NotInstalled:
    """Hides the packages of this repository, also where they are installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OWN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, NotInstalled())
    from transformers import AutoProcessor
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    source, saved, image = sys.argv[1:]
    AutoProcessor.from_pretrained(source, trust_remote_code=True).save_pretrained(saved)
    processor = AutoProcessor.from_pretrained(saved, trust_remote_code=True)
    out = processor(text="[C0_1] <|image_pad|>", images=image)
    alone = AutoImageProcessor.from_pretrained(saved, trust_remote_code=True)(image)
    assert np.array_equal(alone["pixel_values"][0], out["pixel_values"][0])
    assert not any(name in sys.modules for name in OWN)
    print(json.dumps([out["input_ids"], float(np.asarray(out["pixel_values"]).sum())]))
