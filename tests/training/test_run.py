"""A whole run: its result, its files, what each stage may change, and going on after a stop."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from medsight import Predictor
from medsight.training.corpus import conversation_rows, corpus_conversations, read_corpus
from medsight.training.recipe import Recipe, build
from medsight.training.run import train, training_arguments
from medsight.training.settings import resolve_stages
from medsight.training.trainer import StageTrainer, checkpoints
from tests.training.tiny_run import STAGES, only, steps_of, tiny_recipe, tiny_values


# What the paper trains in each stage; in a run from scratch the language model has a stage of its own.
TRAINED = {
    "language_model": ("model.language_model.", "lm_head."),
    "perceiver": ("model.region_perceiver.",),
    "vision_to_text": ("model.vision_to_text_projector.",),
    "codebook": ("model.codebook.", "model.group_classifier."),
    "text_to_vision": ("model.text_to_vision_projector.",),
    "unified": (
        *("model.language_model.", "lm_head."),
        *("model.vision_to_text_projector.", "model.text_to_vision_projector."),
    ),
}
TRAINED["unified_again"] = TRAINED["unified"]
ROWS = {"model.language_model.embed_tokens.weight", "lm_head.weight"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_ends_in_a_folder_that_answers(unbroken: Path, drawn_data: Path) -> None:
    prediction = Predictor(unbroken / "model")(next(drawn_data.rglob("0_CT_torso.png")), "Segment the liver.")
    assert prediction.prompt == "Segment the liver."
    assert sorted(path.name for path in unbroken.iterdir()) == [
        *(".lock", "annotations", "data.json", "environment.json", "model", "recipe.yaml", "settings.json", "stages"),
        "training_record.json",
    ]
    assert not list(unbroken.rglob("*.bin")) and not list(unbroken.rglob(".saving*"))


def test_a_model_keeps_how_most_training_images_of_a_group_lay(unbroken: Path) -> None:
    config = json.loads((unbroken / "model" / "config.json").read_text("utf-8"))
    assert config["group_orientations"] == {"CT torso": "LP"}


@pytest.mark.parametrize("number", range(len(STAGES)), ids=STAGES)
def test_a_stage_trains_exactly_its_parameters(unbroken: Path, number: int) -> None:
    stage = STAGES[number]
    before = weights(unbroken / "stages" / (STAGES[number - 1] + "/model" if number else "start"))
    after = weights(unbroken / "stages" / stage / "model")
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    of_stage = {name for name in after if name.startswith(TRAINED[stage])}
    config = json.loads((unbroken / "model" / "config.json").read_text("utf-8"))
    first = config["region_code_start_id"]
    last = first + config["num_groups"] * config["codes_per_group"]
    if stage in ("codebook", "text_to_vision"):  # the codes' rows start, or train; no word's row moves
        assert changed >= ROWS
        for name in ROWS:
            others = torch.ones(len(after[name]), dtype=torch.bool)
            others[first:last] = False
            assert torch.equal(before[name][others], after[name][others])
            assert not torch.equal(before[name][first:last], after[name][first:last])
        changed -= ROWS
    assert changed <= of_stage
    # a row that no loss reaches in six steps may stay; a whole part may not
    assert {name for name in of_stage if not name.endswith(("bias", "codes"))} - changed <= {
        "model.region_perceiver.segmentation_head.class_predictor.weight"
    }


def test_every_stage_scores_itself_and_logs_its_losses_one_by_one(unbroken: Path) -> None:
    expected = {
        "language_model": ({"eval_perplexity"}, {"lm_loss"}),
        "perceiver": ({"eval_dice", "eval_class_accuracy"}, {"perceiver_loss"}),
        "vision_to_text": ({"eval_perplexity"}, {"lm_loss"}),
        "codebook": (
            {"eval_live_codes", "eval_code_perplexity", "eval_reconstruction", "eval_dice_through_codes"},
            {"perceiver_loss", "codebook_loss", "vq_loss", "reconstruction_loss", "group_loss"},
        ),
        "text_to_vision": ({"eval_perplexity", "eval_dice_through_codes"}, {"lm_loss", "mask_loss"}),
        "unified": ({"eval_answer_recall", "eval_dice_through_codes"}, {"lm_loss", "mask_loss"}),
        "unified_again": ({"eval_answer_recall", "eval_dice_through_codes"}, {"lm_loss", "mask_loss"}),
    }
    for stage, (metrics, losses) in expected.items():
        finished = json.loads((unbroken / "stages" / stage / "finished.json").read_text("utf-8"))
        assert metrics <= finished["metrics"].keys() and finished["environment"]["torch"] == torch.__version__
        steps = steps_of(unbroken, stage)
        assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
        assert losses <= steps[0].keys()
        parts = losses - {"vq_loss", "reconstruction_loss"}
        for step in steps:
            assert step["loss"] == pytest.approx(sum(step.get(name, 0) for name in parts), rel=1e-5)


def test_examples_are_drawn_at_every_evaluation(unbroken: Path) -> None:
    for stage in STAGES[1:]:
        pictures = sorted(path.name for path in (unbroken / "stages" / stage / "examples").iterdir())
        assert pictures == ["step-000003-0.png", "step-000006-0.png"]


def test_code_rows_start_as_projected_codes(unbroken: Path) -> None:
    from modeling_medsight import MedSightForConditionalGeneration

    model = MedSightForConditionalGeneration.from_pretrained(unbroken / "stages" / "codebook" / "model")
    core, first = model.model, model.config.region_code_start_id
    rows = core.vision_to_text_projector(core.codebook.decode(core.codebook.code_table())).flatten(0, 1)
    for table in (model.get_input_embeddings().weight, model.lm_head.weight):
        torch.testing.assert_close(table[first : first + len(rows)], rows)


class Stopped(BaseException):
    """As a kill: nothing of the run is told."""


@pytest.mark.parametrize("stop_at", [1, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 5))])
def test_a_run_stopped_in_every_stage_gives_the_losses_of_an_unbroken_one(
    drawn_data: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    stopped: set[str] = set()
    step = StageTrainer.training_step

    def stop_once(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == stop_at and self.stage.name not in stopped:
            stopped.add(self.stage.name)
            raise Stopped
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", stop_once)
    recipe = tiny_recipe(drawn_data, tmp_path / "run")
    for _ in range(len(STAGES)):
        with pytest.raises(Stopped):
            train(recipe)
    train(recipe)
    assert stopped == set(STAGES)
    for stage in STAGES:
        assert steps_of(tmp_path / "run", stage) == steps_of(unbroken, stage)
    expected = weights(unbroken / "model")
    given = weights(tmp_path / "run" / "model")
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())


def test_stages_run_one_by_one_in_their_order(drawn_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(drawn_data, tmp_path / "run", stages=only("language_model", "perceiver"))
    with pytest.raises(ValueError, match="stage language_model comes before perceiver"):
        train(recipe, "perceiver")
    folder = train(recipe, "language_model")
    assert folder == tmp_path / "run" / "stages" / "language_model" / "model" and folder.is_dir()
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(ValueError, match="'perceivr'; did you mean 'perceiver'"):
        train(recipe, "perceivr")


def test_text_is_validated_on_held_out_patients(drawn_data: Path, tmp_path: Path) -> None:
    """What is made of rows, and what has images of its own."""
    turns = [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes."}]
    items = [{"id": f"told-{i}", "image": f"{i // 2}.png", "conversations": turns} for i in range(40)]
    (tmp_path / "lab.json").write_text(json.dumps(items), encoding="utf-8")
    data = {"text": [{"layout": "llava", "path": str(tmp_path / "lab.json")}], "text_rounds": 3}
    corpus = read_corpus(tiny_recipe(drawn_data, tmp_path, data=data))
    told = {}
    for split in ("training", "validation"):
        ids = conversation_rows(corpus, ["text"], tmp_path, split)["id"]
        told[split] = {int(name.removeprefix("told-")) // 2 for name in ids if "told" in name}
        assert sum("text" in name for name in ids) == 2 * 3 * len(getattr(corpus, split))
    assert len(told["validation"]) == 4 and told["training"] == {*range(20)} - told["validation"]


def test_what_a_stage_validates_on_is_in_no_text(drawn_data: Path, tmp_path: Path) -> None:
    """The same conversations as text and for a stage, some of images that the masks' validation holds out."""
    turns = [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes."}]
    images = [str(path) for path in sorted(drawn_data.glob("*/train/*.png"))]
    items = [
        {"id": path, "image": path, "conversations": turns} for path in [*images, *map("{}.png".format, range(20))]
    ]
    (tmp_path / "lab.json").write_text(json.dumps(items), encoding="utf-8")
    source = {"layout": "llava", "path": str(tmp_path / "lab.json")}
    data = {"text": [source], "conversations": {"lab": source, "unused": {"layout": "llava", "path": "/no/such"}}}
    stages = {**only("language_model", "unified"), "unified": {"data": ["lab"]}}
    corpus = read_corpus(tiny_recipe(drawn_data, tmp_path, data=data, stages=stages))
    training, held = corpus.conversations["lab"]
    told = set(corpus_conversations(corpus)["id"])
    assert told >= set(training["id"]) and not told & set(held["id"])
    assert {image["path"] for image in corpus.validation["image"]} < set(held["id"]) and len(training) + len(
        held
    ) == 39


def test_the_result_is_that_of_the_last_stage_also_where_a_run_goes_on(drawn_data: Path, tmp_path: Path) -> None:
    stages, output = only("unified", "unified_again"), tmp_path / "run"
    short = {"max_steps": 1}
    once = {**stages, "unified": short, "unified_again": None}
    result = train(tiny_recipe(drawn_data, output, stages=once))
    (result / "notes.txt").write_text("mine", encoding="utf-8")
    train(tiny_recipe(drawn_data, output, stages=once))
    assert (result / "notes.txt").is_file()  # nothing is written anew where nothing was trained
    train(tiny_recipe(drawn_data, output, stages={**once, "unified_again": short}), "unified_again")
    first, second = (weights(output / "stages" / name / "model") for name in ("unified", "unified_again"))
    again = tiny_recipe(drawn_data, output, stages={**once, "unified_again": short})
    given = weights(train(again))
    assert all(torch.equal(given[name], weight) for name, weight in second.items())
    assert any(not torch.equal(given[name], weight) for name, weight in first.items())
    again.model.save_dtype = "bfloat16"
    with pytest.raises(ValueError, match="model.save_dtype: 'float32' -> 'bfloat16'"):
        train(again)


def test_nothing_need_be_held_out(drawn_data: Path, tmp_path: Path) -> None:
    once = {name: {"max_steps": 1} for name in STAGES}
    output = train(tiny_recipe(drawn_data, tmp_path / "run", data={"validation_fraction": 0}, stages=once))
    described = json.loads((output.parent / "data.json").read_text("utf-8"))
    assert (described["training"]["rows"], described["validation"]["rows"]) == (19, 0)
    for folder in STAGES:
        finished = json.loads((output.parent / "stages" / folder / "finished.json").read_text("utf-8"))
        assert not [name for name in finished["metrics"] if name.startswith("eval_")]


def test_only_the_last_checkpoints_are_kept(drawn_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[str]] = []
    save = StageTrainer._save_checkpoint

    def and_look(self: StageTrainer, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        kept.append([path.name for path in checkpoints(Path(self.args.output_dir))])

    monkeypatch.setattr(StageTrainer, "_save_checkpoint", and_look)
    train(tiny_recipe(drawn_data, tmp_path / "run", stages=only("language_model")))
    assert kept[-1] == ["checkpoint-4", "checkpoint-6"]
    assert not checkpoints(tmp_path / "run" / "stages" / "language_model")  # the finished model takes their place


def started(folder: Path, data: Path, run: Path, stage: str, settings: dict[str, Any]) -> Recipe:
    """A recipe of one stage that starts from a checkpoint."""
    values = tiny_values(data, run / "run", stages={**only(stage), stage: settings})
    return build(Recipe, {**values, "model": {"folder": str(folder)}}, "a test")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["trainer", "sft"])
def test_what_trains_beside_a_quantised_model_is_not_rounded(
    unbroken: Path, drawn_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str
) -> None:
    pytest.importorskip("bitsandbytes")
    seen, step = set(), StageTrainer.training_step

    def watched(self: StageTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update(weight.dtype for weight in model.parameters() if weight.requires_grad)
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", watched)
    settings = {"method": "qlora", "trainer": trainer, "max_steps": 2, "mask_share": 1.0}
    folder = unbroken / "stages" / "text_to_vision" / "model"
    assert (train(started(folder, drawn_data, tmp_path, "unified", settings)) / "model.safetensors").is_file()
    assert seen == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("trainer", ["trainer", "sft"])
def test_stage_4_by_adapters_and_under_trl(
    unbroken: Path, drawn_data: Path, tmp_path: Path, method: str, trainer: str
) -> None:
    settings = {"method": method, "trainer": trainer, "max_steps": 2, "mask_share": 1.0}
    folder = unbroken / "stages" / "text_to_vision" / "model"
    result = train(started(folder, drawn_data, tmp_path, "unified", settings))
    before, after = weights(folder), weights(result)
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert all(name.startswith(TRAINED["unified"]) for name in changed)
    parts = ["q_proj", "down_proj", "text_to_vision_projector.linear_1", "embed_tokens", "lm_head"]
    assert [part for part in parts if not any(part in name for name in changed)] == []
    assert any("norm" in name for name in changed) == (method == "full")
    assert {"lm_loss", "mask_loss"} <= steps_of(tmp_path / "run", "unified")[0].keys()


def test_stage_2_under_trl(unbroken: Path, drawn_data: Path, tmp_path: Path) -> None:
    folder = unbroken / "stages" / "perceiver" / "model"
    recipe = started(folder, drawn_data, tmp_path, "vision_to_text", {"trainer": "sft", "max_steps": 2})
    before, after = weights(folder), weights(train(recipe))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if name.startswith(TRAINED["vision_to_text"])}


def test_a_run_stopped_after_the_last_step_of_a_stage_trains_no_further_one(
    unbroken: Path, drawn_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medsight.training import run_folder

    recipe = tiny_recipe(drawn_data, tmp_path / "run", stages=only("perceiver"))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(run_folder, "finish_stage", lambda *args: (_ for _ in ()).throw(RuntimeError("power cut")))
        train(recipe)
    folder = tmp_path / "run" / "stages" / "perceiver"
    assert checkpoints(folder)[-1].name == "checkpoint-6"
    before = weights(checkpoints(folder)[-1])
    train(recipe)
    after = weights(folder / "model")
    assert len(steps_of(tmp_path / "run", "perceiver")) == 6
    # a checkpoint holds what sees alone
    assert all(torch.equal(after[f"model.{name}"], tensor) for name, tensor in before.items())


def conversations_alone(unbroken: Path, folder: Path, pictures: int = 1) -> Recipe:
    """A recipe of stage 2 that starts from a checkpoint and reads words and pictures of one's own, no masks."""
    for number in range(pictures):
        Image.fromarray(np.full((20, 30), 90 + number, dtype=np.uint8)).save(folder / f"{number}.png")
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A grey square."}]
    items = [
        {"id": str(number), "image": f"{number % pictures}.png", "conversations": turns}
        for number in range(max(4, pictures))
    ]
    (folder / "own.json").write_text(json.dumps(items), encoding="utf-8")
    values = tiny_values(
        folder,
        folder / "run",
        model={"folder": str(unbroken / "model"), "preset": None},
        data={"conversations": {"own": {"layout": "llava", "path": str(folder / "own.json")}}},
        stages={**only("vision_to_text"), "vision_to_text": {"data": ["own"]}},
    )
    return build(Recipe, {**values, "data": {**values["data"], "regions": [], "validation_fraction": 0}}, "a test")


@pytest.mark.parametrize("fraction", [0, 0.25])
def test_conversations_need_no_images_with_masks(unbroken: Path, tmp_path: Path, fraction: float) -> None:
    recipe = conversations_alone(unbroken, tmp_path, pictures=8)
    recipe.data.validation_fraction = fraction
    assert (train(recipe) / "model.safetensors").is_file()


def test_a_share_of_the_validation_items_is_of_all_of_them() -> None:
    trainer = StageTrainer.__new__(StageTrainer)
    trainer.args = SimpleNamespace(
        per_device_eval_batch_size=2,
        world_size=2,
        process_index=0,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )
    trainer.stage = SimpleNamespace(settings=SimpleNamespace(eval_batches=3))
    trainer.data_collator, seen = list, []
    for trainer.args.process_index in range(2):
        seen += [item for batch in trainer.get_eval_dataloader(range(60)) for item in batch]
    assert sorted(set(seen)) == [0, 10, 20, 30, 40, 50]


def test_a_stage_goes_on_only_with_the_conversations_that_it_began_with(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = conversations_alone(unbroken, tmp_path)
    step = StageTrainer.training_step

    def stopped(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StageTrainer, "training_step", stopped)
        train(recipe)
    own = tmp_path / "own.json"
    told = own.read_text("utf-8")
    own.write_text(told.replace("A grey square.", "A grey circle."), encoding="utf-8")
    with pytest.raises(ValueError, match="the data have changed since .*vision_to_text began"):
        train(recipe)
    own.write_text(told, encoding="utf-8")
    train(recipe)


def test_one_process_takes_one_gpu_of_several(
    drawn_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else Trainer divides every batch over them by DataParallel, which leaves lists of masks whole."""
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: self.__dict__.get("_n_gpu") or 4))
    recipe = tiny_recipe(drawn_data, tmp_path / "run", stages=only("perceiver"))
    arguments = training_arguments(tmp_path, resolve_stages(recipe)["perceiver"], recipe)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 3
    assert "one GPU of 4" in caplog.text


def test_a_recipe_trains_in_one_precision_whatever_its_trainer(drawn_data: Path, tmp_path: Path) -> None:
    for trainer in ("trainer", "sft"):
        recipe = tiny_recipe(drawn_data, tmp_path / "run", stages={"unified": {"trainer": trainer}})
        arguments = training_arguments(tmp_path, resolve_stages(recipe)["unified"], recipe)
        assert (arguments.bf16, arguments.fp16, arguments.gradient_checkpointing) == (False, False, False)
