"""The recipes and accelerate files that ship: they load, mean something, and the ablations run from end to end."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from configuration_medsight import MedSightConfig
from configuration_medsight.configuration_medsight import PRESETS
from medsight.data.groups import Groups
from medsight.data.sources import Source
from medsight.processes import join_processes
from medsight.training.augmentation import Augmentation
from medsight.training.recipe import CONFIGS, Recipe, build, load_recipe
from medsight.training.run import train, training_arguments
from medsight.training.settings import resolve_stages
from modeling_medsight import MedSightForConditionalGeneration


ABLATIONS = [
    "no-region-embeddings",
    "seg-token",
    "no-vision-to-text",
    "no-text-to-vision",
    "no-unified",
    "head-decoder",
]
RECIPES = ["nano", "laptop", "small", "8b", "8b-lora", *(f"ablations/{name}" for name in ABLATIONS)]
ACCELERATE = CONFIGS.parent / "accelerate"
LEFT_OUT = {
    "seg-token": {"codebook"},
    "no-vision-to-text": {"vision_to_text"},
    "no-text-to-vision": {"text_to_vision"},
    "no-unified": {"unified", "unified_again"},
}


def test_these_are_all_that_ship() -> None:
    assert {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_its_settings_are_taken(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    for key, stage in resolve_stages(recipe).items():
        arguments = training_arguments(tmp_path, stage, recipe)
        assert arguments.output_dir == str(tmp_path) and arguments.use_cpu
        assert arguments.bf16 == recipe.training.get("bf16", False)  # also on a CPU, which computes it slowly
        assert arguments.learning_rate == recipe.stage(key)["learning_rate"]
        assert bool(stage.settings.data) == (stage.kind.reads == "conversations")
    for source in (*recipe.data.regions, *recipe.data.text, *recipe.data.conversations.values()):
        Source.from_mapping(source)
    build(Augmentation, recipe.augmentation, name)
    if recipe.data.groups:
        assert len(Groups(recipe.data.groups).names) == len(recipe.data.groups)
    if recipe.model.preset is not None:
        assert recipe.model.preset in PRESETS
    outputs = [load_recipe(other).output for other in RECIPES]
    assert outputs.count(recipe.output) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_resolved_recipe_survives_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
    assert load_recipe(file) == recipe
    assert resolve_stages(load_recipe(file)) == resolve_stages(recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.perceiver.learning_rat=1",
            r"stages\.perceiver: unknown key 'learning_rat'; did you mean 'learning_rate'",
        ),
        ("stages.percever={max_steps: 1}", r"stages: unknown key 'percever'; did you mean 'perceiver'"),
        ("training.bf=true", r"training: unknown key 'bf'; did you mean 'bf16'"),
        ("stages.unified.lora_rnk=4", r"stages\.unified: unknown key 'lora_rnk'; did you mean 'lora_rank'"),
        ("modle.dtype=float32", r"unknown key 'modle'; did you mean 'model'"),
    ],
)
@pytest.mark.parametrize("name", ["nano", "8b-lora"])
def test_an_unknown_key_is_refused_naming_the_nearest(name: str, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_stages(load_recipe(name, [override]))


def test_a_recipe_takes_another_and_changes_what_is_written() -> None:
    whole, lora = load_recipe("8b"), load_recipe("8b-lora")
    assert lora.data == whole.data and lora.model == whole.model and lora.annotations == whole.annotations
    assert lora.stage("unified") == {
        **whole.stage("unified"),
        **{"method": "lora", "lora_rank": 16, "lora_alpha": 32, "learning_rate": 2e-4},
    }
    stage = resolve_stages(lora)["unified"]
    assert stage.settings.method == "lora" and stage.settings.data == ["instructions", "grounded"]
    assert stage.argument("gradient_checkpointing") is True and stage.argument("learning_rate") == 2e-4
    assert resolve_stages(whole)["unified"].settings.method == "full"


@pytest.mark.parametrize(("name", "devices"), [("8b", 4), ("8b-lora", 1), ("small", 1)])
def test_batches_and_schedule_are_the_published_ones(name: str, devices: int) -> None:
    batches, epochs = {}, {}
    for key, stage in resolve_stages(load_recipe(name)).items():
        passed = stage.arguments
        batches[key] = passed["per_device_train_batch_size"] * passed["gradient_accumulation_steps"] * devices
        epochs[key] = passed["num_train_epochs"]
        assert passed["weight_decay"] == 0 and passed["warmup_steps"] == 0.03 and passed["bf16"] is True
    assert batches == {"perceiver": 48, "vision_to_text": 32, "codebook": 16, "text_to_vision": 32, "unified": 32}
    assert epochs == {"perceiver": 20, "vision_to_text": 1, "codebook": 3, "text_to_vision": 3, "unified": 3}


@pytest.mark.parametrize("name", ["8b", "small"])
def test_the_groups_to_initialise_with_fit_the_preset(name: str) -> None:
    recipe = load_recipe(name)
    groups = Groups(recipe.data.groups)
    config = MedSightConfig.from_preset(recipe.model.preset)
    assert (len(groups.names), config.num_groups, config.codes_per_group) == (18, 18, 32)
    for modality, site, group in (
        *(("CT", "abdomen", "CT abdomen"), ("CT", "pelvis", "CT other"), ("MRI-FLAIR", "brain", "MRI brain")),
        *(
            ("MRI-ADC", "prostate", "MRI prostate"),
            ("X-Ray", "chest", "X-ray chest"),
            ("OCT", "retinal", "OCT retina"),
        ),
        *(("endoscope", "colon", "endoscopy"), ("pathology", "breast", "pathology other")),
    ):
        assert groups.names[groups.index(modality, site)] == group


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_one_thing(name: str) -> None:
    nano, ablation = load_recipe("nano"), load_recipe(f"ablations/{name}")
    left_out = {entry["name"] for entry in nano.stages if ablation.stage(entry["name"]) is None}
    assert left_out == LEFT_OUT.get(name, set())
    assert [*resolve_stages(ablation)] == [key for key in resolve_stages(nano) if key not in left_out]
    changed = {key: value for key, value in ablation.model.config.items() if nano.model.config.get(key) != value}
    assert changed == {
        "no-region-embeddings": {"use_region_embeddings": False},
        "seg-token": {"use_region_codebook": False},
        "head-decoder": {"mask_decoder": "head"},
    }.get(name, {})
    assert (ablation.data, ablation.training, ablation.augmentation) == (nano.data, nano.training, nano.augmentation)


def run_ablation(name: str, data: Path, output: Path) -> tuple[Recipe, Path]:
    """A run of two steps a stage of the smallest model, on drawn pictures."""
    path = f"ablations/{name}"
    overrides = [
        *(f"output={output}", "threads=1", "model.preset=tiny", "model.tokenizer_size=256"),
        *(f"data.regions=[{{layout: biomedparse, path: {data}}}]", "data.text=[]", "data.text_rounds=1"),
        *("data.validation_fraction=0.2", "annotations.plain.per_image=1", "annotations.grounded.per_image=2"),
        *("training.disable_tqdm=true", "training.eval_strategy='no'", "training.logging_steps=1"),
        *("stages.perceiver.coarse_size=null", "stages.perceiver.coarse_share=0"),  # the smallest has a fixed input
    ]
    short = {"max_steps": 2, "per_device_train_batch_size": 2, "eval_batches": 1, "example_images": 0}
    overrides += [
        f"stages.{key}.{name}={value}" for key in resolve_stages(load_recipe(path)) for name, value in short.items()
    ]
    recipe = load_recipe(path, overrides)
    return recipe, train(recipe)


@pytest.mark.parametrize(
    "name", [name if name == "seg-token" else pytest.param(name, marks=pytest.mark.slow) for name in ABLATIONS]
)
def test_an_ablation_runs_to_a_model_that_answers(name: str, drawn_data: Path, tmp_path: Path) -> None:
    recipe, folder = run_ablation(name, drawn_data, tmp_path / "run")
    folders = {path.name for path in (tmp_path / "run/stages").iterdir() if (path / "finished.json").is_file()}
    assert folders == {*resolve_stages(recipe)}
    model = MedSightForConditionalGeneration.from_pretrained(folder).eval()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    config = model.config
    for key, value in recipe.model.config.items():
        assert getattr(config, key) == value
    first = config.region_code_start_id
    rows = config.image_seq_length
    assert rows == config.patch_grid[0] ** 2 + (config.num_region_queries if config.use_region_embeddings else 0)
    ids = torch.tensor([[config.image_token_id] * rows + [65, first, 66, first + config.num_region_codes - 1]])
    pixels = torch.zeros(1, 3, config.image_size, config.image_size)
    masks = model.decode_regions(ids, pixels).mask_logits
    assert masks[0].shape == (2, *config.mask_size) and bool(masks[0].isfinite().all())


@pytest.mark.parametrize("name", ["cpu", "ddp", "fsdp2", "deepspeed-zero2"])
def test_accelerate_takes_a_file(name: str) -> None:
    config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))
    kinds = {"fsdp2": DistributedType.FSDP, "deepspeed-zero2": DistributedType.DEEPSPEED}
    assert config.distributed_type == kinds.get(name, DistributedType.MULTI_GPU)
    assert config.num_processes == (2 if name == "cpu" else 4) and config.num_machines == 1
    if name.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
        # The recipe says these; a number here would be refused as a mismatch.
        assert {config.deepspeed_config[key] for key in ("gradient_accumulation_steps", "gradient_clipping")} == {
            "auto"
        }
    said = (ACCELERATE / f"{name}.yaml").read_text("utf-8").split("compute_environment")[0]
    assert ("every stage" in said or "text_to_vision" in said) and f"training/accelerate/{name}.yaml" in said


def test_these_are_all_accelerate_files() -> None:
    assert sorted(path.stem for path in ACCELERATE.iterdir()) == ["cpu", "ddp", "deepspeed-zero2", "fsdp2"]


def launch_arguments(name: str, *options: str) -> Any:
    """What accelerate's launcher makes of a file."""
    given: Any = ["--config_file", str(ACCELERATE / f"{name}.yaml"), *options, "-m", "medsight.cli"]
    return _validate_launch_command(launch_command_parser().parse_args(given))[0]


def test_a_launcher_that_starts_fewer_processes_than_were_asked_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    join_processes(cpu=True)
    for name, value in prepare_simple_launcher_cmd_env(launch_arguments("ddp", "--cpu"))[1].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="several processes were asked for and this one is alone: .*cpu.yaml"):
        join_processes(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes were asked for"):
        join_processes(cpu=True)


def test_the_launcher_hands_the_sharding_on() -> None:
    environment = prepare_multi_gpu_env(launch_arguments("fsdp2"))
    assert (environment["FSDP_VERSION"], environment["FSDP_RESHARD_AFTER_FORWARD"]) == ("2", "true")
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"


@pytest.mark.parametrize("preset", ["8b", "small"])
def test_the_layers_to_wrap_are_the_language_models(preset: str) -> None:
    wrapped = load_config_from_file(str(ACCELERATE / "fsdp2.yaml")).fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    with torch.device("meta"):
        model = MedSightForConditionalGeneration(MedSightConfig.from_preset(preset))
    names = [type(module).__name__ for module in model.modules()]
    assert wrapped.split(",") == [type(model.model.language_model.layers[0]).__name__]
    assert names.count(wrapped) == model.config.text_config.num_hidden_layers
    # Not every process has an image in every batch: what only images pass through is no unit of its own.
    assert {"CLIPEncoderLayer", "RegionPerceiverStage"} < set(names)
