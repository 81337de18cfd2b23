"""Run by test_roads.py in a process of its own, the Hub's address in its environment.

Usage: roads.py push SOURCE OUTPUT: publishes one checkpoint on every road that there is, and prints its logits.
       roads.py load REPO AGAIN: loads it as somebody without this package, prints its logits, publishes it as AGAIN.
"""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments


HIDING = runpy.run_path(str(Path(__file__).parents[2] / "hide_packages.py"))


def logits_of(model, processor):
    """The next word's logits after one question about one image."""
    from PIL import Image

    content = [{"type": "image", "image": Image.new("RGB", (30, 20), (90, 40, 10))}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model.eval()(**inputs).logits[0, -1].tolist()


def push(source, output):
    from medsight.hub import push as push_folder
    from medsight.training.trainer import StageTrainer

    model = AutoModelForImageTextToText.from_pretrained(source)
    processor = AutoProcessor.from_pretrained(source)

    processor.region_codes = {"codes": {"[C0_1]": {"group": "CT", "n": 3, "structures": {"liver": 1.0}}}}
    model.push_to_hub("me/model", private=True)
    processor.push_to_hub("me/model")

    for part in (model, processor):
        part.save_pretrained(output / "saved")
    for part in (processor, model):
        part.save_pretrained(output / "saving")  # and again: what is in the folder already is uploaded too
        part.save_pretrained(output / "saving", push_to_hub=True, repo_id="me/saving")
    push_folder(output / "saved", "me/folder")

    arguments = TrainingArguments(str(output / "plain"), hub_model_id="me/trainer", use_cpu=True, report_to="none")
    Trainer(model, arguments, processing_class=processor).push_to_hub()

    stage = SimpleNamespace(shardable=True, name="stage", processor=processor)
    arguments = TrainingArguments(str(output / "stage"), hub_model_id="me/stage", use_cpu=True, report_to="none")
    StageTrainer(model, arguments, stage=stage).push_to_hub("The last stage")
    return logits_of(model, processor)


def load(repo, again):
    HIDING["hide_packages"]()
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    HIDING["assert_hidden"]()
    model.push_to_hub(again)
    processor.push_to_hub(again)
    return logits_of(model, processor)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    print(json.dumps(push(Path(rest[0]), Path(rest[1])) if what == "push" else load(*rest)))
