"""Quantisation in one line: the language model's layers, and nothing that a mask is made with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, EetqConfig, GPTQConfig

from modeling_medsight import MedSightForConditionalGeneration
from modeling_medsight.pretrained_medsight import NOT_QUANTIZED, of_language_model

from .configurations import QWEN3, make_batch, make_config, make_model


MODES: dict[str, dict[str, Any]] = {
    "8 bits": {"load_in_8bit": True},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}


def test_what_is_kept_is_all_of_the_model_but_the_language_models_layers() -> None:
    model = make_model(make_config("clip-qwen3"))
    children = {name for name, _ in model.model.named_children()} | {name for name, _ in model.named_children()}
    assert set(NOT_QUANTIZED) == children - {"model", "language_model", "perceiver_loss"}


@pytest.mark.parametrize("field", ["llm_int8_skip_modules", "modules_to_not_convert"])
def test_what_the_caller_keeps_is_kept_too(field: str) -> None:
    kind: Any = BitsAndBytesConfig if field.startswith("llm") else EetqConfig
    given = kind(**{field: ["x"]})
    for config in (of_language_model(given), of_language_model(of_language_model(given))):
        kept = getattr(config, field)
        assert kept[0] == "x" and set(NOT_QUANTIZED) <= set(kept) and len(kept) == len(set(kept))
    assert getattr(given, field) == ["x"]


def test_a_method_that_can_keep_nothing_is_refused() -> None:
    config = GPTQConfig.__new__(GPTQConfig)
    with pytest.raises(ValueError, match=r"GPTQConfig has no field .* use BitsAndBytesConfig"):
        of_language_model(config)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_folder_loads_quantised_in_one_line(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # bitsandbytes' kernels for some CPUs want layers of whole blocks of 64
    config = make_config("clip-qwen3", text_config={**QWEN3, "hidden_size": 64, "head_dim": 16})
    model = make_model(config)
    model.save_pretrained(tmp_path / "whole")
    settings = BitsAndBytesConfig(**MODES[mode])
    quantised = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", quantization_config=settings)
    assert type(quantised) is MedSightForConditionalGeneration
    quantised.save_pretrained(tmp_path / "quantised")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "quantised")
    state = model.state_dict()
    batch = make_batch(config, ["ttItCtC", "ItC"])
    expected = model.decode_regions(**batch)
    for loaded in (quantised, again):
        converted = {n for n, module in loaded.named_modules() if type(module).__module__.startswith("bitsandbytes")}
        layers = config.text_config.num_hidden_layers
        assert len(converted) == 7 * layers
        assert all(name.startswith("model.language_model.layers.") for name in converted)
        for name, weight in loaded.named_parameters():
            if name.rpartition(".")[0] not in converted:
                assert torch.equal(weight, state[name]), name
        given = loaded.decode_regions(**batch)
        assert [len(masks) for masks in given.mask_logits] == [2, 1]
        for masks, others in zip(given.mask_logits, expected.mask_logits, strict=True):
            assert torch.isfinite(masks).all() and masks.dtype == others.dtype
