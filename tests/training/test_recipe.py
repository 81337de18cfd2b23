"""Recipes: what a YAML file may say, and what it is told when it says something else."""

from pathlib import Path

import pytest
import yaml

from medsight.training.recipe import Recipe, build, differences, load_recipe
from medsight.training.run import stage_settings
from tests.training.tiny_run import tiny_recipe


MINIMAL = "model: {preset: tiny}\nstages: {perceiver: {max_steps: 3}}\n"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_values_come_from_the_file_and_from_overrides(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["seed=3", "stages.perceiver.learning_rate=1e-3", "data.groups={a: ['CT/*']}"])
    assert recipe.seed == 3 and recipe.stages["perceiver"] == {"max_steps": 3, "learning_rate": "1e-3"}
    assert recipe.data.groups == {"a": ["CT/*"]}
    settings, arguments = stage_settings(recipe)["perceiver"]
    assert arguments["learning_rate"] == 1e-3 and arguments["max_steps"] == 3
    assert settings.example_images == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sead=3", "unknown key 'sead'; did you mean 'seed'"),
        ("data.regoins=[]", "data: unknown key 'regoins'; did you mean 'regions'"),
        ("annotations.grounded.per_imag=3", "annotations.grounded: unknown key 'per_imag'; did you mean 'per_image'"),
        ("seed=three", "seed: expected int, got 'three'"),
        ("data.validation_fraction=much", "validation_fraction: expected a number, got 'much'"),
        ("data.validation_fraction=1.5", "validation_fraction=1.5: expected 0 to below 1"),
        ("model.dtype=bf16", "model.dtype='bf16': choose one of float32, bfloat16, float16"),
        ("model.save_dtype=half", "model.save_dtype='half': choose one of"),
        ("data.on_error=ignore", "on_error='ignore': choose stop or skip"),
        ("model={}", "model: give a preset, to train from nothing, or a folder"),
        ("data.groups={MR: 'MRI*/heart'}", "data: groups.MR: expected a list, got 'MRI\\*/heart'"),
        ("data.classes=[liver, 3]", "data: classes, entry 1: expected str, got 3"),
        ("stages.perceiver=5", "stages.perceiver: expected a mapping, got 5"),
        ("seed=[1", r"--set seed=\[1: not valid YAML"),
        ("seed.x=3", "--set seed.x=3: seed .* is not a mapping"),
        ("seed", "--set seed: expected KEY=VALUE"),
    ],
)
def test_a_wrong_key_or_value_is_named(recipe_file: Path, change: str, message: str) -> None:
    recipe_file.write_text(MINIMAL + "seed: 0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_file, [change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages.percever={}", "'percever'; did you mean 'perceiver'"),
        ("stages.perceiver.lerning_rate=1", "'lerning_rate'; did you mean 'learning_rate'"),
        ("stages.perceiver.output_dir=/tmp", "perceiver: output_dir is set by the run itself"),
        ("stages.text_to_vision.weight_decay=0.1", "text_to_vision: weight_decay=0.1 would shrink the rows of all"),
        ("stages.perceiver.load_best_model_at_end=true", "load_best_model_at_end is set by the run itself"),
        ("training.label_smoothing_factor=0.1", "training: label_smoothing_factor is set by the run itself"),
        ("stages.perceiver.trainer=mine", "trainer='mine': choose trainer or sft"),
        ("training.seed=3", "training: seed is set by the run itself"),
        ("stages.perceiver.train_sampling_strategy=sequential", "train_sampling_strategy is set by the run itself"),
        (
            "stages.perceiver={muon_learning_rate: 1e-3, optim: sgd}",
            "optim has no use beside muon_learning_rate",
        ),
        ("stages.perceiver.learning_rate=fast", "learning_rate: expected a number, got 'fast'"),
        ("stages.unified={method: qloora}", "method='qloora': choose full, lora or qlora"),
        ("training.loging_steps=3", "training: unknown key 'loging_steps'; did you mean 'logging_steps'"),
    ],
)
def test_a_wrong_setting_of_a_stage_is_named_before_anything_runs(
    recipe_file: Path, change: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stage_settings(load_recipe(recipe_file, [change]))


def test_codes_are_not_read_before_their_codebook_is_trained(recipe_file: Path) -> None:
    read = ["annotations={grounded: {plain_share: 0.5}}", "stages.vision_to_text={data: [grounded]}"]
    with pytest.raises(ValueError, match="stages.vision_to_text: the answers of grounded cite region codes"):
        stage_settings(load_recipe(recipe_file, [*read, "stages.codebook={}"]))
    for change in ("stages.codebook=null", "annotations.grounded.plain_share=1"):
        stage_settings(load_recipe(recipe_file, [*read, "stages.codebook={}", change]))
    stage_settings(load_recipe(recipe_file, [read[0], "stages.codebook={}", "stages.unified={data: [grounded]}"]))


def test_a_stage_can_be_left_out(recipe_file: Path) -> None:
    assert list(stage_settings(load_recipe(recipe_file, ["stages.codebook={}"]))) == ["perceiver", "codebook"]
    with pytest.raises(ValueError, match="the recipe has no stages"):
        stage_settings(load_recipe(recipe_file, ["stages.perceiver=null"]))


def test_files_that_are_not_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.yaml does not exist; the shipped ones are .*nano"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ValueError, match="broken.yaml is not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a", encoding="utf-8")
    with pytest.raises(ValueError, match="list.yaml: expected a mapping, got list"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "child.yaml").write_text("extends: parent.yaml", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="child.yaml: extends .*parent.yaml, which does not exist"):
        load_recipe(tmp_path / "child.yaml")


def test_a_recipe_extends_another_key_by_key(recipe_file: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: recipe.yaml\nstages: {perceiver: {warmup_steps: 4}, codebook: {}}\n", encoding="utf-8")
    recipe = load_recipe(child)
    assert recipe.model.preset == "tiny"
    assert recipe.stages == {"perceiver": {"max_steps": 3, "warmup_steps": 4}, "codebook": {}}


def test_a_resolved_recipe_is_a_recipe(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path / "run")
    again = yaml.safe_load(yaml.safe_dump(recipe.to_dict()))
    assert build(Recipe, again, "again") == recipe
    assert differences(again, recipe.to_dict()) == []


def test_differences_are_told_by_their_full_names_and_how_a_run_is_carried_out_is_none() -> None:
    before = {"seed": 0, "training": {"logging_steps": 1, "bf16": False}, "stages": {"a": {"max_steps": 1}}}
    now = {"seed": 1, "training": {"logging_steps": 9, "bf16": False, "tf32": True}, "stages": {"a": {"max_steps": 2}}}
    assert differences(before, now) == [
        "seed: 0 -> 1",
        "training.tf32: None -> True",
        "stages.a.max_steps: 1 -> 2",
    ]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_another_schedule_needs_nothing_of_the_default_one(recipe_file: Path, schedule: str) -> None:
    import torch
    from transformers import get_scheduler

    _, arguments = stage_settings(load_recipe(recipe_file, [f"training.lr_scheduler_type={schedule}"]))["perceiver"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    options = {"scheduler_specific_kwargs": arguments["lr_scheduler_kwargs"]}
    assert arguments["lr_scheduler_type"] == schedule
    assert get_scheduler(schedule, optimizer, 1, 10, **options).get_last_lr()[0] <= 1.0
