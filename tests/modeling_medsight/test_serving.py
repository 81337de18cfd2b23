"""What vLLM's transformers backend does with a model and a processor, done here without vLLM; and masks for text that
another engine wrote."""

import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_medsight import MedSightForConditionalGeneration, MedSightModel
from processing_medsight import MedSightProcessor
from tests.tiny_checkpoint import tiny_processor

from .configurations import CLOSE, make_batch


# What docs/performance.md says to hand over as `hf_overrides`: an engine puts its own head on a model without one.
OVERRIDES = {
    "auto_map": {"AutoConfig": "configuration_medsight.MedSightConfig", "AutoModel": "modeling_medsight.MedSightModel"}
}


class Engine:
    """Attention of an engine: registered by name, told which layer asks, handed the engine's own instances."""

    def __init__(self, layers: int) -> None:
        self.instances = {layer: object() for layer in range(layers)}
        self.asked: list[int] = []

    def __call__(self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        assert kwargs["attention_instances"] is self.instances
        self.asked.append(module.layer_idx)
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=kwargs["scaling"], enable_gqa=True
        )
        return output.transpose(1, 2), None


@torch.no_grad()
def test_only_the_language_model_attends_by_the_engine(
    config: Any, model: MedSightForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(config, ["ttIttCtIC"])
    expected = model.model(**batch, use_cache=False).last_hidden_state[0]

    engine = Engine(config.text_config.num_hidden_layers)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "engine", engine)
    served = type(config)(**{**config.to_dict(), "text_config": config.text_config.to_dict()})
    served.text_config._attn_implementation = "engine"
    base = MedSightModel._from_config(served).eval()
    base.load_state_dict(model.model.state_dict())
    assert type(base).is_backend_compatible()
    assert base.get_decoder() is base.language_model and base.get_encoder(modality="image") is base.vision_tower

    # As an engine does: images by themselves, rows of all of them one after the other, then text without a batch.
    sizes = torch.tensor([[30, 40], [10, 20]])
    rows = base.get_image_features(batch["pixel_values"], original_sizes=sizes).pooler_output.flatten(0, 1)
    assert not engine.asked
    ids = batch["input_ids"][0]
    embeds = base.get_input_embeddings()(ids)
    embeds[ids == config.image_token_id] = rows
    output = base(
        input_ids=None,
        inputs_embeds=embeds[None],
        position_ids=torch.arange(len(ids))[None],
        use_cache=False,
        attention_instances=engine.instances,
        return_dict=False,
    )
    assert engine.asked == list(engine.instances)
    torch.testing.assert_close(output[0][0], expected, **CLOSE)


def test_plans_for_many_gpus_divide_the_language_model_and_nothing_else(
    model: MedSightForConditionalGeneration,
) -> None:
    base = model.model
    modules = dict(base.named_modules())
    matched = {
        name: style
        for pattern, style in base.tp_plan.items()
        for name in modules
        if re.fullmatch(pattern.replace(".", r"\.").replace("*", r"\d+"), name)
    }
    assert all(name.startswith("language_model.") for name in matched)
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    assert {name for name in linear if name.startswith("language_model.")} <= set(matched)

    stages = [attrgetter(name)(base) for name in base._pp_plan]
    assert [type(stage) for stage in stages].count(nn.ModuleList) == 1
    assert {id(stage) for stage in stages} <= {id(module) for module in base.language_model.children()}


def test_weights_bear_the_names_that_an_engine_looks_for(model: MedSightForConditionalGeneration) -> None:
    assert {name for name in model.state_dict() if not name.startswith("model.")} == {"lm_head.weight"}


def test_an_engine_finds_the_places_of_images(config: Any) -> None:
    processor = tiny_processor(config)
    images = [Image.new("RGB", (40, 30)), Image.new("RGB", (10, 30))]
    out = processor(
        text=processor.image_token * 2,
        images=images,
        return_text_replacement_offsets=True,
        truncation=False,
        add_special_tokens=False,
        return_tensors="pt",
    )
    counts = processor._get_num_multimodal_tokens(image_sizes=[(30, 40), (10_000, 10_000)])
    assert counts["num_image_tokens"] == [config.image_seq_length] * 2
    assert sum(counts["num_image_patches"]) == len(out["pixel_values"]) == 2
    replaced = out["text_replacement_offsets"][0]
    assert [entry["type"] for entry in replaced] == ["image", "image"]
    for entry in replaced:
        ids = processor.tokenizer.encode(entry["replacement"], add_special_tokens=False)
        assert ids == [processor.image_token_id] * config.image_seq_length
    assert (processor.image_processor.size["height"], processor.image_processor.size["width"]) == (
        (config.image_size,) * 2
    )
    # Whatever the image processor returns must be named by it: an engine hands that on, and drops the rest.
    assert set(out) - {"input_ids", "attention_mask", "text_replacement_offsets"} <= set(
        processor.image_processor.model_input_names
    )


def test_a_folder_gives_the_model_without_a_head(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In a process of its own: where this package is imported, the folder's code is not what is loaded."""
    script = f"""
from transformers import AutoConfig, AutoModel
config = AutoConfig.from_pretrained({str(tiny_checkpoint)!r}, trust_remote_code=True)
config.update({OVERRIDES!r})
base = AutoModel.from_config(config, trust_remote_code=True)
print(type(base).__name__, type(base.get_decoder()).__name__, config.get_text_config() is base.language_model.config)
"""
    settings = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.stdout.split() == ["MedSightModel", "Qwen3Model", "True"], done.stderr


@torch.no_grad()
def test_masks_of_text_from_elsewhere(tiny_checkpoint: Path) -> None:
    model = MedSightForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
    processor = MedSightProcessor.from_pretrained(tiny_checkpoint)
    written = ["Two: liver [C0_1] and spleen [C2_3].", "Nothing of note.", "[C1_0]"]
    images = [Image.effect_noise((30 + 10 * i, 40), 90).convert("RGB") for i in range(3)]
    conversations = [
        [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": text},
        ]
        for image, text in zip(images, written, strict=True)
    ]
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    regions = model.decode_regions(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
    answers = processor.post_process_grounded_answer(regions, inputs)
    found = [[region.code for region in answer.regions] for answer in answers]
    assert found == [["[C0_1]", "[C2_3]"], [], ["[C1_0]"]]
    for image, answer in zip(images, answers, strict=True):
        assert all(region.mask.shape == (image.height, image.width) for region in answer.regions)
