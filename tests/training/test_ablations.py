"""Ablations side by side: what they take over from the whole run, that they go on, and the table."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from medsight.training import ablations
from medsight.training.recipe import load_recipe
from medsight.training.run import train
from medsight.training.run_folder import load_folder
from medsight.training.seg_token import CODES_OWN
from processing_medsight.processing_medsight import MedSightProcessor
from tests.training.tiny_run import STAGES, tiny_recipe, tiny_values


SHORT = {"max_steps": 2, "eval_strategy": "no", "example_images": 0}
GROUP_CLASSIFIER = ("group_classifier.weight", "group_classifier.bias")


@pytest.fixture(scope="module")
def recipe_file(drawn_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    values = tiny_values(drawn_data, Path("unused"), stages=dict.fromkeys(STAGES, SHORT))
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def arguments(recipe_file: Path, output: Path) -> list[str]:
    chosen = ["no-region-embeddings", "no-unified"]
    return [str(recipe_file), "--output", str(output), "--seeds", "3", "--ablations", *chosen]


@pytest.fixture(scope="module")
def finished(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("ablations")
    assert ablations.main(arguments(recipe_file, output)) == 0
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("no-region-embeddings", STAGES[:2]),
        ("no-vision-to-text", STAGES[:2]),
        ("no-text-to-vision", STAGES[:4]),
        ("head-decoder", STAGES[:4]),
        ("no-unified", STAGES[:5]),
        ("seg-token", STAGES[:3]),
    ],
)
def test_an_ablation_shares_the_stages_before_its_change(name: str, shared: list[str]) -> None:
    full = load_recipe("nano")
    other = ablations.ablation(full, name)
    assert other == dataclasses.replace(load_recipe(f"ablations/{name}"), output=full.output)
    assert ablations.shared_stages(full, other) == shared
    assert ablations.shared_stages(full, dataclasses.replace(other, seed=1)) == []
    assert ablations.shared_stages(full, full) == STAGES


def test_every_shipped_ablation_is_known() -> None:
    with pytest.raises(ValueError, match="ablation 'nothing': choose some of head-decoder, no-region-embeddings, no-"):
        ablations.ablation(load_recipe("nano"), "nothing")


def test_the_table_has_means_spreads_and_paired_differences() -> None:
    whole = [{"dice": 0.5, "no_mask": None}, {"dice": 0.7, "no_mask": 1.0}]
    other = [{"dice": 0.4, "no_mask": 1.0}, {"dice": 0.6, "no_mask": 0.5}]
    ahead = [ablations.difference(*pair) for pair in zip(whole, other, strict=True)]
    result = {
        "summary": {"full": ablations.spread(whole), "x": ablations.spread(other)},
        "ahead": {"x": ablations.spread(ahead)},
    }
    assert ablations.table(result).splitlines() == [
        "|  | dice | no_mask |",
        "| --- | --- | --- |",
        "| full | 0.600 ± 0.141 | 1.000 |",
        "| x | 0.500 ± 0.141 | 0.750 ± 0.354 |",
        "| full − x | 0.100 ± 0.000 | 0.500 |",
    ]
    assert ablations.cell(ablations.spread([{"dice": None}])["dice"]) == "–"


@pytest.mark.slow
def test_runs_are_scored_and_written(finished: Path, recipe_file: Path) -> None:
    result = json.loads((finished / "validation.json").read_text(encoding="utf-8"))
    assert result["seeds"] == [3] and set(result["runs"]) == {"full", "no-region-embeddings", "no-unified"}
    for name, by_seed in result["runs"].items():
        for figure, value in by_seed["3"].items():
            assert result["summary"][name][figure]["mean"] == value
        for benchmark in ablations.BENCHMARKS:
            metrics = json.loads(
                (finished / name / "seed-3/validation" / benchmark / "metrics.json").read_text("utf-8")
            )
            assert by_seed["3"][f"{benchmark}: dice"] == metrics["scores"]["dice"]["micro"]["value"]
            assert metrics["n"] >= 1
    assert len((finished / "validation.md").read_text(encoding="utf-8").splitlines()) == 2 + 3 + 2
    config = json.loads((finished / "no-region-embeddings/seed-3/run/model/config.json").read_text("utf-8"))
    assert config["use_region_embeddings"] is False


@pytest.mark.slow
def test_what_is_taken_over_is_what_training_again_gives(finished: Path, recipe_file: Path, tmp_path: Path) -> None:
    """Bit for bit: a run of the ablation's recipe from scratch has the same result as one that shared two stages."""
    recipe = ablations.ablation(load_recipe(recipe_file), "no-region-embeddings")
    recipe = dataclasses.replace(recipe, seed=3, output=str(tmp_path / "r"))
    alone, shared = weights(train(recipe)), weights(finished / "no-region-embeddings/seed-3/run/model")
    assert alone.keys() == shared.keys() and all(torch.equal(alone[name], shared[name]) for name in alone)


@pytest.mark.slow
def test_an_ablation_without_a_stage_is_the_run_before_it(finished: Path) -> None:
    before = weights(finished / "full/seed-3/run/stages/text_to_vision/model")
    after = weights(finished / "no-unified/seed-3/run/model")
    assert after.keys() <= before.keys() and all(torch.equal(after[name], before[name]) for name in after)


def test_one_seg_token_goes_on_from_a_checkpoint_with_codes(unbroken: Path, drawn_data: Path) -> None:
    """No row of the language model moves, [SEG] is its only code, and nothing but the codes' own weights is new."""
    folder = unbroken / "stages/perceiver/model"
    recipe = tiny_recipe(drawn_data, Path("unused"), model={"config": {"use_region_codebook": False}})
    model, processor = load_folder(folder, recipe)
    before = MedSightProcessor.from_pretrained(folder).tokenizer
    first = model.config.region_code_start_id
    assert processor.tokenizer.get_added_vocab() == {
        **{token: i for token, i in before.get_added_vocab().items() if i < first},
        "[SEG]": first,
    }
    text = "The liver [SEG], and the left kidney.<|im_end|>"
    assert first in processor.tokenizer(text)["input_ids"]
    assert (
        processor.tokenizer(text.replace("[SEG]", ""))["input_ids"] == before(text.replace("[SEG]", ""))["input_ids"]
    )
    now = model.state_dict()
    new = {name for name, value in weights(folder).items() if not torch.equal(value, now[name])}
    assert new == CODES_OWN == {f"model.{name}" for name in ("codebook.codes", *GROUP_CLASSIFIER)}
    again, _ = load_folder(folder, recipe)
    assert torch.equal(again.model.codebook.codes, model.model.codebook.codes)


def test_nothing_but_the_codes_is_silently_new_with_one_seg_token(unbroken: Path, drawn_data: Path) -> None:
    changes = {"use_region_codebook": False, "perceiver_ffn_multiplier": 3}
    recipe = tiny_recipe(drawn_data, Path("unused"), model={"config": changes})
    with pytest.raises(ValueError, match=r"linear_1\.weight.* do not fit model\.config"):
        load_folder(unbroken / "stages/perceiver/model", recipe)


@pytest.mark.slow
def test_it_goes_on_where_it_was(
    finished: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import medsight.evaluation.scored_run

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished run is evaluated again")

    monkeypatch.setattr(medsight.evaluation.scored_run, "answer", refuse)
    before = (finished / "validation.json").read_text(encoding="utf-8")
    files = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    assert ablations.main(arguments(recipe_file, finished)) == 0
    assert (finished / "validation.json").read_text(encoding="utf-8") == before
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == files
    assert ablations.main([*arguments(recipe_file, finished), "--set", "model.tokenizer_size=257"]) == 1
    assert "holds a run of another recipe" in capsys.readouterr().err


def test_rows_that_are_not_there_are_missed_before_training(drawn_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the recipe's data have no test row"):
        ablations.run(tiny_recipe(drawn_data, Path("unused")), [], [0], tmp_path / "out", "test")
    assert not (tmp_path / "out").exists()
