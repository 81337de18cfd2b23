"""Recipes: what a YAML file may say, and what it is told when it says something else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from medsight.cli import main
from medsight.training.recipe import Recipe, build, differences, load_recipe
from medsight.training.settings import resolve_stages, settings_in_force
from medsight.training.stage import stage_kinds
from tests.training.tiny_run import tiny_recipe


MINIMAL = "model: {preset: tiny}\nstages: [{name: perceiver, kind: regions, max_steps: 3}]\n"
CODEBOOK = "stages.codebook={kind: codebook}"
UNIFIED = "stages.unified={kind: conversations, trains: [language_model], data: [grounded]}"
GROUNDED = "annotations={grounded: {plain_share: 0.5}}"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_values_come_from_the_file_and_from_overrides(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["seed=3", "stages.perceiver.learning_rate=1e-3", "data.groups={a: ['CT/*']}"])
    assert recipe.seed == 3 and recipe.data.groups == {"a": ["CT/*"]}
    perceiver = {"name": "perceiver", "kind": "regions", "max_steps": 3, "learning_rate": "1e-3"}
    assert recipe.stages == [perceiver] == [recipe.stage("perceiver")]
    stage = resolve_stages(recipe)["perceiver"]
    assert stage.argument("learning_rate") == 1e-3 and stage.argument("max_steps") == 3
    assert stage.settings.example_images == 4


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
        ("data.on_error=ignore", "on_error='ignore': choose one of stop, skip"),
        ("model.preset=null", "model: give a preset, to train from scratch, or a folder"),
        ("data.groups={MR: 'MRI*/heart'}", "data: groups.MR: expected a list, got 'MRI\\*/heart'"),
        ("data.classes=[liver, 3]", "data: classes, entry 1: expected str, got 3"),
        ("stages.perceiver=5", "stages.perceiver: expected a mapping, got 5"),
        ("seed=[1", r"--set seed=\[1: not valid YAML"),
        ("seed.x=3", "seed: expected int, got {'x': 3}"),
        (
            "stages.percever.max_steps=1",
            r"--set stages.percever.max_steps=1: stages: unknown key 'percever'; did you mean",
        ),
        ("stages.percever=null", "unknown key 'percever'; did you mean 'perceiver'"),
        ("stages=[{name: a}]", "stages, entry 0: kind=None: expected a word"),
        ("stages=[{name: a/b, kind: regions}]", "stages, entry 0: name='a/b': expected a word of letters"),
        ("stages=[{name: a, kind: regions}, {name: a, kind: codebook}]", "two are called 'a'"),
        ("stages=[5]", "stages, entry 0: expected a mapping, got 5"),
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
        ("stages.perceiver.kind=region", "stages.perceiver: kind: unknown key 'region'; did you mean 'regions'"),
        ("stages.perceiver.trains=[codebook]", "stages.perceiver: trains: unknown key 'codebook'"),
        (
            "stages.perceiver.trains=[]",
            "stages.perceiver: trains is empty: name some of image_encoder, region_perceiver",
        ),
        ("stages.perceiver.trainer=sft", "stages.perceiver: trainer=sft reads conversations only"),
        ("stages.perceiver.coarse_size=64", "stages.perceiver: coarse_size=64 and coarse_share=0.0: give both"),
        ("stages.unified.data=[ground]", "stages.unified: data: unknown key 'ground'; did you mean 'grounded'"),
        ("stages.unified.data=[]", "stages.unified: a stage on conversations needs data"),
        ("stages.perceiver.lerning_rate=1", "'lerning_rate'; did you mean 'learning_rate'"),
        ("stages.perceiver.output_dir=/tmp", "perceiver: output_dir is set by the run itself"),
        (
            "stages.unified={trains: [text_to_vision, code_rows], weight_decay: 0.1}",
            "unified: weight_decay=0.1 would shrink the rows of all",
        ),
        ("stages.unified={trains: [vision_to_text], method: lora}", "which it does not train"),
        (
            "stages.unified={text_only: true, trains: [language_model, vision_to_text]}",
            "unified: text_only leaves out the images that vision_to_text would learn from",
        ),
        *(
            (f"training.{name}=true", f"training: {name} is set by the run itself")
            for name in (
                *("auto_find_batch_size", "ignore_data_skip", "save_only_model", "load_best_model_at_end"),
                *("label_smoothing_factor", "resume_from_checkpoint"),
            )
        ),
        ("stages.perceiver.accelerator_config={split_batches: true}", "accelerator_config is set by the run itself"),
        ("stages.perceiver.trainer=mine", "trainer='mine': choose trainer or sft"),
        ("training.seed=3", "training: seed is set by the run itself"),
        ("stages.perceiver.train_sampling_strategy=sequential", "train_sampling_strategy is set by the run itself"),
        ("stages.perceiver={muon_learning_rate: 1e-3, optim: sgd}", "optim has no use beside muon_learning_rate"),
        ("stages.perceiver.learning_rate=fast", "learning_rate: expected a number, got 'fast'"),
        ("stages.unified={method: qloora}", "method='qloora': choose one of full, lora, qlora"),
        ("training.loging_steps=3", "training: unknown key 'loging_steps'; did you mean 'logging_steps'"),
    ],
)
def test_a_wrong_setting_of_a_stage_is_named_before_anything_runs(
    recipe_file: Path, change: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_stages(load_recipe(recipe_file, [GROUNDED, UNIFIED, change]))


def test_codes_are_not_read_before_their_codebook_is_trained(recipe_file: Path) -> None:
    with pytest.raises(
        ValueError, match="stages.unified: the answers of grounded cite region codes, which stage codeb"
    ):
        resolve_stages(load_recipe(recipe_file, [GROUNDED, UNIFIED, CODEBOOK]))
    for change in ("stages.codebook=null", "annotations.grounded.plain_share=1"):
        resolve_stages(load_recipe(recipe_file, [GROUNDED, UNIFIED, CODEBOOK, change]))
    resolve_stages(load_recipe(recipe_file, [GROUNDED, CODEBOOK, UNIFIED]))
    again = "stages.again={kind: codebook}"
    with pytest.raises(ValueError, match="which stage again learns after it"):
        resolve_stages(load_recipe(recipe_file, [GROUNDED, CODEBOOK, UNIFIED, again]))


def test_a_stage_can_be_left_out_and_put_at_the_end(recipe_file: Path) -> None:
    assert list(resolve_stages(load_recipe(recipe_file, [CODEBOOK]))) == ["perceiver", "codebook"]
    with pytest.raises(ValueError, match="the recipe has no stages"):
        resolve_stages(load_recipe(recipe_file, ["stages.perceiver=null"]))


def test_a_kind_can_come_twice(recipe_file: Path) -> None:
    more = "stages.finer={kind: regions, max_steps: 4, trains: [image_encoder]}"
    stages = resolve_stages(load_recipe(recipe_file, [more]))
    assert [stage.kind.kind for stage in stages.values()] == ["regions", "regions"]
    assert [stage.argument("max_steps") for stage in stages.values()] == [3, 4]
    assert [stage.settings.trains for stage in stages.values()] == [["region_perceiver"], ["image_encoder"]]


def test_every_value_says_where_it_comes_from(recipe_file: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    text = "extends: recipe.yaml\ntraining: {bf16: true}\nstages: {perceiver: {most_asked: 2}}\n"
    child.write_text(text, encoding="utf-8")
    settings = settings_in_force(load_recipe(child, ["stages.perceiver.learning_rate=1e-3", "seed=4"]))
    found = {key: (entry["value"], entry["source"]) for key, entry in settings.items()}
    where = "stages.perceiver"
    assert found["model.preset"] == ("tiny", f"{recipe_file} (extended)")
    assert found["seed"] == (4, "command line") and found["model.dtype"] == ("float32", "default")
    assert found["augmentation.rotate"] == (15.0, "default")
    assert found[f"{where}.max_steps"] == (3, f"{recipe_file} (extended)")
    assert found[f"{where}.most_asked"] == (2, str(child)) and found[f"{where}.bf16"] == (True, str(child))
    assert found[f"{where}.learning_rate"] == (1e-3, "command line")
    assert found[f"{where}.save_total_limit"] == (2, "default of medsight")
    assert found[f"{where}.adam_beta1"] == (0.9, "default") and found[f"{where}.seed"] == (4, "fixed")
    assert found[f"{where}.label_names"] == ([], "fixed") and found[f"{where}.trains"] == (
        ["region_perceiver"],
        "default",
    )


def test_the_command_shows_settings_and_topology(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    more = ["--set", CODEBOOK, "--set", "stages.codebook.gradient_accumulation_steps=2"]
    assert main(["train", str(recipe_file), "--show", *more, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["topology"]["processes"] == 4 and shown["topology"]["sharding"] == "FSDP"
    assert shown["topology"]["batches"]["codebook"] == {"per_device": 8, "accumulation": 2, "global": 64}
    assert main(["train", str(recipe_file), "--show", *more]) == 0
    text = capsys.readouterr().out
    assert text.count("lr_scheduler_type ") == 1  # alike in all stages, so said once
    for line in (r"max_steps +3 +\S+recipe.yaml", r"batch of codebook +64 = 8 a device x 2 micro-batches x 4"):
        assert re.search(line, text), line


def test_kinds_are_found_in_modules_of_their_own() -> None:
    assert {kind.kind: kind.__module__.rpartition(".")[2] for kind in stage_kinds().values()} == {
        name: f"stage_{name}" for name in ("codebook", "conversations", "regions")
    }


def test_files_that_are_not_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.yaml does not exist; the shipped ones are .*nano"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ValueError, match="broken.yaml: not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a", encoding="utf-8")
    with pytest.raises(ValueError, match="list.yaml: expected a mapping, got list"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "child.yaml").write_text("extends: parent.yaml", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="child.yaml: extends .*parent.yaml does not exist"):
        load_recipe(tmp_path / "child.yaml")


def test_a_recipe_extends_another_key_by_key(recipe_file: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    changes = "stages: {perceiver: {warmup_steps: 4}, codebook: {kind: codebook}}"
    child.write_text(f"extends: recipe.yaml\n{changes}\n", encoding="utf-8")
    recipe = load_recipe(child)
    assert recipe.model.preset == "tiny"
    assert recipe.stages == [
        {"name": "perceiver", "kind": "regions", "max_steps": 3, "warmup_steps": 4},
        {"name": "codebook", "kind": "codebook"},
    ]
    child.write_text(changes, encoding="utf-8")
    with pytest.raises(ValueError, match="stages: expected a list of stages, .* got a mapping of perceiver, codebook"):
        load_recipe(child)


def test_a_resolved_recipe_is_a_recipe(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path / "run")
    again = yaml.safe_load(yaml.safe_dump(recipe.to_dict()))
    assert build(Recipe, again, "again") == recipe
    assert differences(again, recipe.to_dict()) == []


def entries(**steps: int) -> list[dict[str, Any]]:
    return [{"name": name, "max_steps": count} for name, count in steps.items()]


def test_differences_are_told_by_their_full_names_and_how_a_run_is_carried_out_is_none() -> None:
    before = {"seed": 0, "training": {"logging_steps": 1, "bf16": False}, "stages": entries(a=1, b=1)}
    now = {"seed": 1, "training": {"logging_steps": 9, "bf16": False, "tf32": True}, "stages": entries(b=1, a=2)}
    assert differences(before, now) == [
        "seed: 0 -> 1",
        "training.tf32: None -> True",
        "the order of stages: a, b -> b, a",
        "stages.a.max_steps: 1 -> 2",
    ]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_another_schedule_needs_nothing_of_the_default_one(recipe_file: Path, schedule: str) -> None:
    import torch
    from transformers import get_scheduler

    stage = resolve_stages(load_recipe(recipe_file, [f"training.lr_scheduler_type={schedule}"]))["perceiver"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    options = {"scheduler_specific_kwargs": stage.argument("lr_scheduler_kwargs")}
    assert stage.argument("lr_scheduler_type") == schedule
    assert get_scheduler(schedule, optimizer, 1, 10, **options).get_last_lr()[0] <= 1.0


PARENT = """
model: {folder: model, config: {auxiliary_loss: true}}
data:
  conversations: {chats: {layout: llava, path: a.json}}
  groups: {CT torso: ["CT/torso"], MRI brain: ["MRI*/brain"]}
  classes: [liver]
training: {save_total_limit: 5, lr_scheduler_kwargs: {min_lr_rate: 0.1}}
stages:
  - {name: perceiver, kind: regions, max_steps: 3, warmup_steps: 2}
"""
GROUPS = {"CT torso": ["CT/torso"], "MRI brain": ["MRI*/brain"]}


@pytest.mark.parametrize(
    ("changes", "key", "value", "source"),
    [
        ("data: {conversations: null}", "data.conversations", {}, "child"),
        ("data: {groups: null}", "data.groups", None, "child"),
        ("data: {classes: null}", "data.classes", None, "child"),
        ("data: null", "data.validation_fraction", 0.1, "default"),
        ("model: {config: null}", "model.config", {}, "child"),
        ("training: {save_total_limit: null}", "stages.perceiver.save_total_limit", 2, "child"),
        ("stages: {perceiver: {warmup_steps: null}}", "stages.perceiver.warmup_steps", 0, "child"),
        ("data: {groups: !replace {eyes: ['fundus/*']}}", "data.groups.eyes", ["fundus/*"], "child"),
        ("data: {groups: {eyes: ['fundus/*']}}", "data.groups.CT torso", ["CT/torso"], "parent"),
        ("data: !replace {classes: !replace [polyp]}", "data.classes", ["polyp"], "child"),
        ("stages: {perceiver: !replace {kind: regions}}", "stages.perceiver.max_steps", -1, "default"),
        ("stages: !replace [{name: other, kind: regions}]", "stages.other.kind", "regions", "child"),
        ("output: elsewhere", "data.groups.MRI brain", ["MRI*/brain"], "parent"),
    ],
)
def test_null_drops_and_replace_replaces_what_is_inherited(
    tmp_path: Path, changes: str, key: str, value: Any, source: str
) -> None:
    for name, text in (("parent", PARENT), ("child", f"extends: parent.yaml\n{changes}\n")):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    told = {
        "child": str(tmp_path / "child.yaml"),
        "parent": f"{tmp_path / 'parent.yaml'} (extended)",
        "default": "default",
    }
    recipe = load_recipe(tmp_path / "child.yaml")
    entry = settings_in_force(recipe)[key]
    assert (entry["value"], entry["source"]) == (value, told[source])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("override", "groups"),
    [
        ("data.groups=null", None),
        ("data.groups=!replace {eyes: ['fundus/*']}", {"eyes": ["fundus/*"]}),
        ("data.groups={eyes: ['fundus/*']}", {**GROUPS, "eyes": ["fundus/*"]}),
        ("data.groups={MRI brain: null}", {"CT torso": ["CT/torso"]}),
    ],
)
def test_the_command_line_drops_and_replaces_too(tmp_path: Path, override: str, groups: Any) -> None:
    (tmp_path / "parent.yaml").write_text(PARENT, encoding="utf-8")
    recipe = load_recipe(tmp_path / "parent.yaml", [override])
    assert recipe.data.groups == groups
    shown = {key: entry["source"] for key, entry in settings_in_force(recipe).items() if key.startswith("data.groups")}
    assert {*shown.values()} <= {"command line", str(tmp_path / "parent.yaml")}
    assert [*shown] == ([f"data.groups.{name}" for name in groups] if groups else ["data.groups"])


@pytest.mark.parametrize("text", ["seed: !replace 3", "seed: !other 3"])
def test_a_tag_that_means_nothing_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(MINIMAL + text, encoding="utf-8")
    with pytest.raises(ValueError, match="recipe.yaml: not valid YAML"):
        load_recipe(tmp_path / "recipe.yaml")


def test_nano_is_extended_to_another_model_and_other_data(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(
        "extends: nano.yaml\nmodel: {folder: ours, extend: true, config: null}\n"
        "data: !replace {regions: [{layout: biomedparse, path: eyes}]}\nstages: {language_model: null}\n",
        encoding="utf-8",
    )
    recipe = load_recipe(child)
    assert recipe.data.groups is None and recipe.data.text == [] and recipe.model.config == {}
    assert [stage["name"] for stage in recipe.stages][0] == "perceiver"
