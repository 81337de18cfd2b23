"""A model loads from where it was saved, wherever and in whatever precision it shall run."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from configuration_medsight import MedSightConfig
from configuration_medsight.remote_code_medsight import AUTO_MAP
from modeling_medsight import MedSightForConditionalGeneration, MedSightRegionModel

from .configurations import CLOSE, GPT2, ROWS, labelled, make_batch, make_config, make_model


Inputs = dict[str, Any]


def test_weights_start_as_the_architecture_says(config: MedSightConfig) -> None:
    """Also where a checkpoint lacks them: linear layers Xavier-uniform, convolutions Kaiming-normal."""
    empty = MedSightForConditionalGeneration.from_pretrained(None, config=config, state_dict={})
    for model in (MedSightForConditionalGeneration(config), empty):
        parts = [model.model.region_perceiver, model.model.codebook]
        parts += [model.model.vision_to_text_projector, model.model.text_to_vision_projector]
        for part in parts:
            for path, layer in part.named_modules():
                if isinstance(layer, torch.nn.Linear) and not path.endswith("mask_projection"):
                    bound = (6 / sum(layer.weight.shape)) ** 0.5
                    assert 0.8 * bound < layer.weight.abs().max() <= bound, path
                elif isinstance(layer, torch.nn.Conv2d):
                    expected = (2 / layer.weight[0].numel()) ** 0.5
                    assert layer.weight.std().item() == pytest.approx(expected, rel=0.2), path
        projection = model.model.region_perceiver.segmentation_head.mask_projection.weight
        std = config.mask_projection_init_std or (2 / sum(projection.shape)) ** 0.5
        assert projection.std().item() == pytest.approx(std, rel=0.25)
        for learnt in (model.model.codebook.codes, model.model.region_perceiver.region_queries):
            assert 0.5 < learnt.std() < 2


def test_a_model_comes_back_from_its_folder(model: Any, config: MedSightConfig, batch: Inputs, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    expected = model.decode_regions(**batch)
    for auto_class in (MedSightForConditionalGeneration, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(loaded) is MedSightForConditionalGeneration and not loaded.training
        state = loaded.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    torch.testing.assert_close(loaded.decode_regions(**batch).mask_logits, expected.mask_logits)
    tied = config.text_config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied


def test_a_model_is_built_without_memory_and_filled_later(model: Any, config: MedSightConfig) -> None:
    with torch.device("meta"):
        empty = MedSightForConditionalGeneration(config)
    assert {weight.device.type for weight in empty.state_dict().values()} == {"meta"}
    assert set(empty.state_dict()) == set(model.state_dict())
    loaded = MedSightForConditionalGeneration.from_pretrained(None, config=config, state_dict=model.state_dict())
    assert {weight.device.type for weight in loaded.state_dict().values()} == {"cpu"}
    batch = make_batch(config, ["ItCt"])
    torch.testing.assert_close(loaded.decode_regions(**batch).mask_logits, model.decode_regions(**batch).mask_logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_model_loads_onto_a_device_map(model: Any, config: Any, tmp_path: Path, device_map: str) -> None:
    pytest.importorskip("accelerate", reason="a device map needs accelerate, which is in the extra `train`")
    model.save_pretrained(tmp_path)
    placed = MedSightForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
    batch = make_batch(config, ["ItCt"])
    torch.testing.assert_close(placed.decode_regions(**batch).mask_logits, model.decode_regions(**batch).mask_logits)


@torch.no_grad()
def test_bfloat16_is_close_to_float32(model: Any, config: MedSightConfig, batch: Inputs, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    half = MedSightForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    regions, expected = (each.get_region_features(batch["pixel_values"]) for each in (half, model))
    assert regions.masks_queries_logits.dtype == torch.bfloat16
    for key in ("patch_features", "group_logits"):
        torch.testing.assert_close(regions[key].float(), expected[key], rtol=0.1, atol=0.1)
    # Masked attention cuts at one half, where rounding may turn a pixel; most of the map must agree all the same.
    for key in ("masks_queries_logits", "image_features"):
        assert F.cosine_similarity(regions[key].float().flatten(), expected[key].flatten(), dim=0) > 0.97
    output, wanted = half(**batch), model(**batch)
    real = batch["attention_mask"].bool()
    assert F.cosine_similarity(output.logits[real].float().flatten(), wanted.logits[real].flatten(), dim=0) > 0.97
    decoded = half.decode_regions(**batch)
    assert all(scores.dtype == torch.float32 for scores in decoded.region_scores)


def assert_attention_agrees(model: Any, tmp_path: Path, implementations: tuple[str, ...]) -> None:
    inputs = labelled(model.config, ROWS)
    real = inputs["attention_mask"].bool()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs)
        for attention in implementations:
            other = MedSightForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
            text = other.model.language_model.config
            assert other.config._attn_implementation == text._attn_implementation == attention
            given = other(**inputs)
            torch.testing.assert_close(given.logits[real], expected.logits[real], **CLOSE)
            torch.testing.assert_close(given.mask_logits, expected.mask_logits, **CLOSE)


def test_eager_attention_and_sdpa_agree(model: Any, tmp_path: Path) -> None:
    """Also where the encoder is of convolutions, which have no attention to choose."""
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert_attention_agrees(model, tmp_path, ("eager", "sdpa"))
    switched = copy.deepcopy(model)
    for attention in ("eager", "sdpa"):
        switched.set_attn_implementation(attention)
        assert switched.config._attn_implementation == attention
        assert switched.model.language_model.config._attn_implementation == attention


@pytest.mark.slow
def test_flex_attention_agrees_too(tmp_path: Path) -> None:
    assert_attention_agrees(make_model(make_config("clip-qwen3")), tmp_path, ("flex_attention",))


def test_embeddings_can_be_resized(config: MedSightConfig, batch: Inputs) -> None:
    model = make_model(copy.deepcopy(config))
    expected = model.decode_regions(**batch)
    size = config.text_config.vocab_size
    model.resize_token_embeddings(size + 5, pad_to_multiple_of=64)
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 384
    assert model.config.text_config.vocab_size == 384
    torch.testing.assert_close(model.decode_regions(**batch).mask_logits, expected.mask_logits)
    assert model(**labelled(config, ROWS)).loss.isfinite()


@pytest.mark.parametrize("auto_class", [name for name in AUTO_MAP if name.startswith("AutoModel")])
def test_the_installed_model_is_known_to_every_auto_class_of_a_checkpoint(auto_class: str) -> None:
    """Else transformers asks whether to run the checkpoint's own code."""
    config = MedSightConfig.from_preset("tiny", auto_map=AUTO_MAP)
    kind = MedSightRegionModel if auto_class == "AutoModelForMaskGeneration" else MedSightForConditionalGeneration
    assert type(getattr(transformers, auto_class).from_config(config)) is kind


def test_rows_of_words_are_tied_whatever_the_language_model_calls_them() -> None:
    model = make_model(make_config("clip-qwen3", text_config={**GPT2, "tie_word_embeddings": True}))
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_settings_given_to_loading_are_checked_as_those_of_a_configuration(tmp_path: Path) -> None:
    make_model(make_config("clip-qwen3")).save_pretrained(tmp_path)
    for setting, message in (
        ({"mask_decoder": "heads"}, "mask_decoder='heads': choose one of"),
        ({"image_size": 40}, "image_size=40 contradicts vision_config.image_size"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoModelForImageTextToText.from_pretrained(tmp_path, **setting)
