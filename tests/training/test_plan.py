"""The plan of a recipe: parameters and memory counted without weights, against models that are really there."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import TrainingArguments

from configuration_medsight import MedSightConfig
from medsight.cli import main
from medsight.training.corpus import corpus_conversations, read_corpus
from medsight.training.fresh_model import fresh_model
from medsight.training.memory import activation_bytes, gathered_numbers, optimizer_bytes
from medsight.training.optimisation import muon_with_adamw
from medsight.training.plan import stage_plans, table
from medsight.training.recipe import Recipe, build
from medsight.training.run import train
from medsight.training.settings import resolve_stages
from medsight.training.stage import Stage
from modeling_medsight import MedSightForConditionalGeneration
from tests.tiny_checkpoint import save_tiny_checkpoint
from tests.training.tiny_run import RECIPE, STAGES, only, steps_of, tiny_recipe, tiny_values


CASES: list[tuple[str, dict[str, Any]]] = [
    *((key, {}) for key in STAGES),
    ("perceiver", {"trains": ["image_encoder", "region_perceiver"], "muon_learning_rate": 1e-3}),
]
CASES += [("unified", {"method": "lora"}), ("unified", {"muon_learning_rate": 1e-3})]
NAMES = [" ".join([key, *map(str, settings)]) for key, settings in CASES]


def one_stage(key: str, settings: dict[str, Any], **changes: Any) -> Recipe:
    """A recipe of that stage of the tiny run alone, of a step."""
    (entry,) = (entry for entry in RECIPE["stages"] if entry["name"] == key)
    chosen = {name: value for name, value in entry.items() if name in ("name", "kind", "trains", "text_only", "data")}
    values = {
        "model": {"preset": "tiny", "folder": "not there", "frozen_dtype": "float32"},
        "annotations": {"plain": {"plain_share": 1}, "grounded": {}},
        "stages": [{"max_steps": 1, **chosen, **settings}],
    }
    return build(Recipe, {**values, **changes}, "a test's recipe")


def stage_of(key: str, config: MedSightConfig, **settings: Any) -> Stage:
    stage = resolve_stages(one_stage(key, settings))[key]
    canvas: Any = SimpleNamespace(config=config, processor=None)
    return stage.kind(key, stage.settings, canvas, 0)


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def planned(key: str, settings: dict[str, Any], **changes: Any) -> Any:
    (stage,), _ = stage_plans(one_stage(key, settings, **changes), 1)
    return stage


@pytest.mark.parametrize(("key", "settings"), CASES, ids=NAMES)
def test_weights_gradients_and_optimizer_are_those_of_a_real_model(key: str, settings: dict[str, Any]) -> None:
    stage = stage_of(key, MedSightConfig.from_preset("tiny"), **settings)
    model = stage.prepare(MedSightForConditionalGeneration(stage.config).float())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    muon = settings.get("muon_learning_rate", 0)
    optimizer = muon_with_adamw(model, muon, 1e-3, 0.0) if muon else torch.optim.AdamW(trained)
    optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    result = planned(key, settings)
    assert result.name == stage.name
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert result.weights == bytes_of([*model.parameters(), *model.buffers()])
    assert result.gradients == bytes_of(parameter.grad for parameter in trained)
    assert result.optimizer == bytes_of(states)


@pytest.mark.parametrize("tied", [True, False])
def test_of_the_vocabulary_the_code_rows_train_alone(tied: bool) -> None:
    config = MedSightConfig.from_preset("tiny")
    text = {**config.text_config.to_dict(), "tie_word_embeddings": tied}
    model = {"preset": "tiny", "folder": "not there", "config": {"text_config": text}, "frozen_dtype": "float32"}
    changes = {"model": model}
    result = planned("text_to_vision", {}, **changes)
    tables, width = 1 if tied else 2, config.text_config.hidden_size
    projector = (width + 1) * width + (width + 1) * config.vision_hidden_size
    assert result.trained == projector + tables * config.num_region_codes * width
    assert result.gradients == 4 * (projector + tables * config.text_config.vocab_size * width)


def test_lora_trains_adapters_code_rows_and_projectors() -> None:
    config = MedSightConfig.from_preset("tiny")
    text, vision = config.text_config, config.vision_hidden_size
    heads, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    ends = [(text.hidden_size, heads), (heads, text.hidden_size), *[(text.hidden_size, keys)] * 2]
    ends += [(text.hidden_size, text.intermediate_size)] * 3
    adapters = 4 * text.num_hidden_layers * sum(inside + outside for inside, outside in ends)
    width = text.hidden_size
    projectors = (vision + 1) * width + 2 * (width + 1) * width + (width + 1) * vision
    rows = 2 * config.num_region_codes * width
    assert planned("unified", {"method": "lora", "lora_rank": 4}).trained == adapters + projectors + rows


def test_trl_is_planned_as_it_runs() -> None:
    plain, sft = (planned("vision_to_text", {"trainer": trainer}) for trainer in ("trainer", "sft"))
    assert plain.activations == sft.activations > 0


def test_qlora_holds_the_language_models_layers_in_four_bits() -> None:
    lora, qlora = (planned("unified", {"method": method}) for method in ("lora", "qlora"))
    model = MedSightForConditionalGeneration(MedSightConfig.from_preset("tiny"))
    linear = [m.weight for m in model.model.language_model.modules() if isinstance(m, nn.Linear)]
    saved = 4 * sum(weight.numel() for weight in linear)
    assert lora.trained == qlora.trained
    assert 0.8 * saved < lora.weights - qlora.weights < 0.9 * saved


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize(("key", "settings"), CASES, ids=NAMES)
def test_activations_are_those_of_a_pass_over_real_numbers(
    key: str, settings: dict[str, Any], autocast: torch.dtype | None
) -> None:
    config = MedSightConfig.from_preset("tiny", use_class_queries=key == "perceiver", auxiliary_loss=True)
    stages = [stage_of(key, config, **settings) for _ in range(2)]
    with torch.device("meta"):
        without = MedSightForConditionalGeneration(config)
        stages[0].prepare(without)
    real = MedSightForConditionalGeneration(config)
    stages[1].prepare(real)
    counted, wanted = (
        activation_bytes(stage, model, 2, regions=3, autocast=autocast)
        for stage, model in zip(stages, (without, real), strict=True)
    )
    assert counted == pytest.approx(wanted, rel=0.05) and counted > 0


def test_what_costs_memory_shows() -> None:
    base = {"per_device_train_batch_size": 2, "max_length": 200}
    whole, twice, longer, checkpointed = (
        planned("unified", {**base, **change})
        for change in (
            *({}, {"per_device_train_batch_size": 4}),
            *({"max_length": 400}, {"gradient_checkpointing": True}),
        )
    )
    assert 1.7 * whole.activations < twice.activations < 2.3 * whole.activations
    assert longer.activations > 1.5 * whole.activations
    assert checkpointed.activations < 0.8 * whole.activations
    assert checkpointed.weights == whole.weights and checkpointed.whole < whole.whole


def test_frozen_layers_that_gradients_flow_through_are_checkpointed() -> None:
    plain, spared = (
        planned("vision_to_text", {"max_length": 200, "gradient_checkpointing": on}) for on in (False, True)
    )
    assert spared.activations < 0.8 * plain.activations


def test_sharding_divides_what_is_held_but_where_code_rows_train_alone(tmp_path: Path) -> None:
    stages, model = only("perceiver", "text_to_vision"), {"folder": "not there", "frozen_dtype": "float32"}
    recipe = tiny_recipe(tmp_path / "not there", tmp_path / "run", model=model, stages=stages)
    pair, many = stage_plans(recipe, 2)[0], stage_plans(recipe, 1000)[0]
    for few, more in zip(pair, many, strict=True):
        assert more.batch == (*few.batch[:2], 1000)
        assert more.whole == few.whole
        if few.name == "text_to_vision":
            assert few.sharded is more.sharded is None
        else:
            held = few.weights + few.gradients + few.optimizer
            assert few.sharded - more.sharded == pytest.approx(0.499 * held, rel=0.01)
    alone = stage_plans(recipe, 1)[0]
    assert [stage.sharded for stage in alone] == [None, None]
    assert [few.whole - stage.whole for few, stage in zip(pair, alone, strict=True)] == [s.gradients for s in alone]


def test_casts_of_weights_are_not_counted_in_shards() -> None:
    """Parameters are gathered in the dtype that is computed in."""
    recipe = one_stage("unified", {"bf16": True})
    (stage,), _ = stage_plans(recipe, 2)
    gathered = 2 * gathered_numbers(MedSightForConditionalGeneration(MedSightConfig.from_preset("tiny")))
    held = (stage.weights + stage.gradients + stage.optimizer) / 2
    assert 0 < stage.sharded - held - gathered < stage.activations


def test_an_unknown_optimizer_is_not_guessed() -> None:
    result = planned("codebook", {"optim": "adafactor"})
    assert result.optimizer is None
    assert optimizer_bytes(nn.Linear(2, 2), 0.0, "sgd") == 0
    default = TrainingArguments.__dataclass_fields__["optim"].default
    assert optimizer_bytes(nn.Linear(2, 2), 0.0, default) == 2 * 4 * 6


def test_steps_follow_from_epochs_and_rows(drawn_data: Path, tmp_path: Path) -> None:
    epochs = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "eval_strategy": "no"}
    stages = {**only("perceiver", "text_to_vision", "language_model"), "perceiver": epochs}
    stages |= {"text_to_vision": {**epochs, "num_train_epochs": 1.5}, "language_model": epochs}
    recipe = tiny_recipe(drawn_data, tmp_path / "run", stages=stages)
    steps = {stage.name: stage.steps for stage in stage_plans(recipe, 1)[0]}
    train(recipe)
    assert steps == {name: len(steps_of(tmp_path / "run", name)) for name in steps}
    assert len(set(steps.values())) == 3
    assert [stage.batch for stage in stage_plans(recipe, 2)[0]] == [(3, 2, 2)] * 3


@pytest.mark.parametrize("codebook", [True, False], ids=["codebook", "seg"])
def test_a_preset_has_the_shapes_of_the_model_that_a_run_makes_of_it(
    drawn_data: Path, tmp_path: Path, codebook: bool
) -> None:
    model = {"config": {"use_region_codebook": codebook, "use_class_queries": True}}
    recipe = tiny_recipe(drawn_data, tmp_path, model=model, stages=only("perceiver"))
    corpus = read_corpus(recipe)
    made, _ = fresh_model(recipe, corpus.groups, corpus.classes, corpus_conversations(corpus))
    (stage,), notes = stage_plans(recipe, 1)
    assert stage.parameters == sum(parameter.numel() for parameter in made.parameters())
    assert stage.steps == 6 and notes == ["Model: the preset tiny, from scratch."]


def test_a_folder_that_is_there_is_planned_and_its_weights_are_not_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "start"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    values = {"model": {"folder": str(folder)}, "stages": [{"name": "codes", "kind": "codebook", "max_steps": 7}]}
    (stage,), notes = stage_plans(build(Recipe, values, "r"), 1)
    assert notes == [f"Model: {folder}."] and stage.steps == 7


@pytest.mark.parametrize("start", ["preset", "checkpoint"])
def test_a_structure_that_the_model_does_not_know_is_refused_by_plan_and_run(
    drawn_data: Path, tmp_path: Path, start: str
) -> None:
    known: dict[str, Any] = {"classes": ["left ventricle", "benign breast tumor", "livers"]}
    model = {}
    if start == "checkpoint":
        names = {"mask_class_names": known["classes"], "group_names": ["MRI heart", "ultrasound breast", "CT torso"]}
        folder = save_tiny_checkpoint(tmp_path / "start", num_mask_classes=3, num_groups=3, **names)
        known, model = {}, {"folder": str(folder), "preset": None}
    recipe = tiny_recipe(drawn_data, tmp_path / "run", model=model, data=known, stages=only("perceiver"))
    for begin in (lambda: stage_plans(recipe, 1), lambda: train(recipe)):
        with pytest.raises(ValueError, match=r"\.png: '.*' is none of the model's 3 mask classes: "):
            begin()
    assert not (tmp_path / "run" / "stages" / "perceiver").exists()


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    regions = {"regions": [{"layout": "biomedparse", "path": str(absent)}]}
    recipe = {"data": regions, "stages": [{"name": "perceiver", "kind": "regions"}]}
    with pytest.raises(FileNotFoundError, match=r"model\.folder=nowhere does not exist.*model\.preset=NAME.*tiny"):
        stage_plans(build(Recipe, {**recipe, "model": {"folder": "nowhere"}}, "r"), 1)
    stages, notes = stage_plans(build(Recipe, {**recipe, "model": {"folder": "nowhere", "preset": "tiny"}}, "r"), 1)
    assert "needs the data" in "".join(table(stages, 1)) and f"{absent}: no such folder" in "".join(notes)
    assert "nowhere is not there yet; planned as the preset tiny" in "".join(notes)
    with pytest.raises(ValueError, match="preset='tinny': choose one of"):
        stage_plans(build(Recipe, {**recipe, "model": {"preset": "tinny"}}, "r"), 1)


def test_the_command_prints_a_row_a_stage(
    drawn_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny_values(drawn_data, tmp_path / "run")), encoding="utf-8")
    assert main(["train", str(file), "--plan", "--devices", "2", "--set", "stages.unified=null"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["stage", "trained", "parameters"] and lines[0].endswith("sharded")
    assert [line.split()[0] for line in lines[1:6]] == STAGES[:5]
    assert "6 = 3 x 1 x 2" in lines[1] and lines[5].endswith("never") and not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", str(file), "--plan", "--set", "stages=[{name: codes, kind: codebook}]"]) == 0
    assert "32 = 8 x 1 x 4" in capsys.readouterr().out
