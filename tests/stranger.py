"""Loads a folder in a process of its own, as somebody who does not have this package.

Usage: stranger.py SOURCE SAVED. Answers with SOURCE, saves processor and model to SAVED, and answers with that.
"""

import json
import runpy
import sys
from pathlib import Path

import numpy as np


HIDING = runpy.run_path(str(Path(__file__).with_name("hide_packages.py")))


def answer(folder, auto_class):
    """Model and processor of a folder, and what they make of one image: (sequences, region codes, mask pixels)."""
    model = auto_class.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Segment all."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, force_region=True)
    (masks,) = processor.post_process_masks(out.mask_logits, inputs["original_sizes"])
    (grounded,) = processor.post_process_grounded_answer(out, inputs)
    assert masks.shape == (len(out.region_code_ids[0]), 40, 64), masks.shape
    assert len(grounded.regions) == len(masks) >= 1, grounded
    return model, processor, [out.sequences.tolist(), out.region_code_ids[0].tolist(), int(masks.sum()), grounded.text]


if __name__ == "__main__":
    HIDING["hide_packages"]()
    import torch
    from PIL import Image
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMaskGeneration,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    source, saved = sys.argv[1:]
    model, processor, first = answer(source, AutoModelForImageTextToText)
    processor.save_pretrained(saved)
    model.save_pretrained(saved)
    for auto_class in (AutoModelForImageTextToText, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
        again = answer(saved, auto_class)[2]
        assert again == first, (auto_class, again, first)
    regions = AutoModelForMaskGeneration.from_pretrained(saved, trust_remote_code=True)
    assert type(regions).__name__ == "MedSightRegionModel"
    HIDING["assert_hidden"]()
    print(json.dumps(first))
