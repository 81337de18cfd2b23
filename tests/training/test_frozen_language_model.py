"""A language model that a stage does not train is held as its folder has it, comes out unchanged, and still talks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configuration_medsight import MedSightConfig
from medsight.training.plan import stage_plans
from medsight.training.recipe import Recipe
from medsight.training.run import train
from medsight.training.run_folder import load_folder
from modeling_medsight import MedSightForConditionalGeneration, MedSightRegionModel
from processing_medsight import MedSightProcessor
from tests.training.tiny_run import only, tiny_recipe


LAYERS = "model.language_model.layers."
BEFORE_4 = ("perceiver", "vision_to_text", "codebook", "text_to_vision")


@pytest.fixture(scope="module")
def start(unbroken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after its language stage, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16") / "start"
    source = unbroken / "stages" / "language_model" / "model"
    MedSightForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    MedSightProcessor.from_pretrained(source).save_pretrained(folder)
    return folder


def recipe_from(folder: Path, data: Path, output: Path, **changes: Any) -> Recipe:
    model = {"folder": str(folder), "preset": None, **changes}
    stages: dict[str, Any] = {**only(*BEFORE_4), **{name: {"max_steps": 2} for name in BEFORE_4}}
    return tiny_recipe(data, output, model=model, stages=stages)


@pytest.fixture(scope="module")
def trained(start: Path, drawn_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the stages before the fourth."""
    output = tmp_path_factory.mktemp("frozen") / "run"
    train(recipe_from(start, drawn_data, output))
    return output / "stages"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("stage", BEFORE_4)
def test_it_comes_out_bit_for_bit_in_its_own_dtype(stage: str, start: Path, trained: Path) -> None:
    before, after = weights(start), weights(trained / stage / "model")
    codes = MedSightConfig.from_pretrained(start)
    words = slice(codes.region_code_start_id)
    for name, tensor in before.items():
        if name.startswith(LAYERS):
            assert after[name].dtype == torch.bfloat16 and torch.equal(after[name], tensor), name
        elif name.startswith(("model.language_model.embed_tokens", "lm_head")):
            assert torch.equal(after[name][words].to(tensor.dtype), tensor[words]), name
            assert (after[name].dtype == torch.float32) == (stage == "text_to_vision"), name
        elif not name.startswith("model.language_model."):
            assert after[name].dtype == torch.float32, name


def test_what_trains_is_in_float32_and_learns(start: Path, trained: Path) -> None:
    before, after = weights(start), weights(trained / "text_to_vision" / "model")
    for part in ("region_perceiver.", "vision_to_text_projector.", "text_to_vision_projector.", "codebook."):
        changed = [n for n in before if n.startswith(f"model.{part}") and not torch.equal(before[n].float(), after[n])]
        assert changed, part


def test_questions_without_an_image_are_answered_as_before(start: Path, trained: Path) -> None:
    processor = MedSightProcessor.from_pretrained(start)
    asked = [{"role": "user", "content": "Which organ pumps the blood?"}]
    inputs = processor.apply_chat_template(
        asked, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    known = MedSightConfig.from_pretrained(start).region_code_start_id
    for dtype, close in ((torch.bfloat16, 0.05), (torch.float32, 1e-5)):
        first, last = (
            MedSightForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()(**inputs).logits[..., :known]
            for folder in (start, trained / "text_to_vision" / "model")
        )
        assert torch.allclose(first, last, atol=close)


@pytest.mark.parametrize(
    ("trains", "changes", "expected"),
    [
        (["region_perceiver"], {}, {"layers": "bfloat16", "words": "bfloat16"}),
        (["vision_to_text"], {}, {"layers": "bfloat16", "words": "bfloat16"}),
        (["text_to_vision", "code_rows"], {}, {"layers": "bfloat16", "words": "float32"}),
        (["language_model"], {}, {"layers": "float32", "words": "float32"}),
        (["vision_to_text"], {"frozen_dtype": "float32"}, {"layers": "float32", "words": "float32"}),
        (["vision_to_text"], {"dtype": "bfloat16"}, {"layers": "bfloat16", "words": "bfloat16"}),
    ],
)
def test_it_is_held_as_the_recipe_says(
    trains: list[str], changes: dict[str, str], expected: dict[str, str], start: Path, drawn_data: Path, tmp_path: Path
) -> None:
    model, _ = load_folder(start, recipe_from(start, drawn_data, tmp_path, **changes), trains=trains)
    held = {"layers": model.model.language_model.layers[0].mlp.up_proj, "words": model.get_input_embeddings()}
    assert {name: str(module.weight.dtype).removeprefix("torch.") for name, module in held.items()} == expected
    beside = "bfloat16" if changes.get("dtype") == "bfloat16" else "float32"
    assert str(model.model.region_perceiver.region_queries.dtype) == f"torch.{beside}"
    # The vision tower names a model's dtype, which pixels are cast to.
    assert str(model.dtype) == f"torch.{beside}"


def test_one_that_was_trained_in_float32_is_held_in_float32(unbroken: Path, drawn_data: Path, tmp_path: Path) -> None:
    folder = unbroken / "stages" / "language_model" / "model"
    model, _ = load_folder(folder, recipe_from(folder, drawn_data, tmp_path), trains=["region_perceiver"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_plan_counts_it_in_bfloat16(start: Path, drawn_data: Path, tmp_path: Path) -> None:
    recipe = recipe_from(start, drawn_data, tmp_path / "run")
    plans, _ = stage_plans(recipe, 1)
    wide, _ = stage_plans(recipe_from(start, drawn_data, tmp_path / "run", frozen_dtype="float32"), 1)
    for plan, other in zip(plans, wide, strict=True):
        (entry,) = (entry for entry in recipe.stages if entry["name"] == plan.name)
        trains = entry.get("trains", ["region_perceiver"])
        model, _ = load_folder(start, recipe, trains=trains)
        tensors = [*model.parameters(), *model.buffers()]
        assert plan.weights == sum(tensor.nbytes for tensor in tensors) < other.weights
        assert (plan.gradients, plan.optimizer) == (other.gradients, other.optimizer)


def test_the_loss_of_stage_1_does_not_jump_where_mask_logits_are_scaled() -> None:
    """A few steps of Adam on one image: products over 96 features leap without the scale that `init` sets."""
    highest = {}
    for scale in (1.0, 1 / 96):
        torch.manual_seed(0)
        vision = {"hidden_size": 96, "intermediate_size": 96}
        config = MedSightConfig.from_preset("tiny", mask_logits_scale=scale)
        config = MedSightConfig.from_preset(
            "tiny", mask_logits_scale=scale, vision_config={**config.vision_config.to_dict(), **vision}
        )
        model = MedSightRegionModel(config).train()
        optimizer = torch.optim.Adam(model.region_perceiver.parameters(), lr=1e-3)
        masks = torch.zeros(2, *config.mask_size)
        masks[0, :4], masks[1, :, 9:] = 1, 1
        batch = {"pixel_values": torch.randn(1, 3, 28, 28), "mask_labels": [masks]}
        losses = []
        for _ in range(8):
            loss = model(**batch, class_labels=[torch.tensor([0, 1])]).loss
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        highest[scale] = max(losses) / losses[0]
    assert highest[1 / 96] < 1.1
    assert highest[1.0] > 1.3
