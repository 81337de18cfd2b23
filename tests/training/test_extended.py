"""A run that starts from an extended checkpoint, and stages that train what is new alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configuration_medsight import MedSightConfig
from medsight.training.plan import stage_plans
from medsight.training.run import train
from tests.training.tiny_run import draw_data, only, tiny_recipe


NEW_SETS = (
    ("busi", "ultrasound", "breast", ("benign breast tumor", "cyst")),
    ("refuge", "fundus", "retina", ("optic disc",)),
)
CODES, ROWS = "model.codebook.codes", "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def new_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new structure of a known group, and a new group."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tests.training.tiny_run.SETS", NEW_SETS)
        return draw_data(tmp_path_factory.mktemp("new"))


def extended(data: Path, output: Path, start: Path, *stages: str, **changes: Any) -> Any:
    changed = {**only(*stages), **changes.pop("stages", {})}
    return tiny_recipe(data, output, model={"folder": str(start), "extend": True}, stages=changed, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_starts_from_the_extended_checkpoint_and_trains_new_codes_alone(
    new_data: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, output = unbroken / "model", tmp_path / "run"
    new = ["fundus retina"]
    stages = {
        "codebook": {"groups": new, "revive_groups": ["ultrasound breast", *new], "max_steps": 4},
        "text_to_vision": {"groups": new, "max_steps": 2},
    }
    recipe = extended(new_data, output, start, "codebook", "text_to_vision", stages=stages)
    plans, notes = stage_plans(recipe, 1)
    assert any(line.startswith("To be added: 2 mask classes: cyst, optic disc") for line in notes)
    assert any("1 code group: fundus retina, with codes [C3_0] to [C3_3]" in line for line in notes)
    train(recipe)
    assert "model.extend: 1 code group: fundus retina" in capsys.readouterr().out
    config = MedSightConfig.from_pretrained(output / "model")
    known = MedSightConfig.from_pretrained(start)
    assert config.group_names == [*known.group_names, *new]
    assert config.mask_class_names == [*known.mask_class_names, "cyst", "optic disc"]
    before, begun, after = map(weights, (start, output / "stages/start", output / "stages/codebook/model"))
    breast = known.group_names.index("ultrasound breast")
    others = [k for k in range(3) if k != breast]
    assert torch.equal(begun[CODES][:3], before[CODES])
    assert torch.equal(after[CODES][others], before[CODES][others])
    moved = (after[CODES][breast] != before[CODES][breast]).any(-1)
    assert bool(moved.any())  # handed by revival
    assert not torch.equal(after[CODES][3], begun[CODES][3])
    for name in begun:
        if "codebook" in name and name != CODES:
            assert torch.equal(after[name], begun[name]), name
    for name in ("model.group_classifier.weight", "model.group_classifier.bias"):
        assert torch.equal(after[name][:3], before[name]) and not torch.equal(after[name][3], begun[name][3])
    rows = (after[ROWS] != begun[ROWS]).any(-1).nonzero()[:, 0] - known.region_code_start_id
    expected = {4 * breast + m for m in moved.nonzero()[:, 0].tolist()} | {*range(12, 16)}
    assert {*rows.tolist()} == expected
    last = weights(output / "stages/text_to_vision/model")
    trained = (last[ROWS] != after[ROWS]).any(-1).nonzero()[:, 0] - known.region_code_start_id
    assert {*trained.tolist()} <= {*range(12, 16)}
    assert plans[0].trained == 4 * config.code_dim + config.vision_hidden_size + 1


def test_where_nothing_is_new_the_run_starts_from_the_folder_as_it_is(
    drawn_data: Path, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {"perceiver": {"max_steps": 1}}
    train(extended(drawn_data, tmp_path / "run", unbroken / "model", "perceiver", stages=stages))
    assert "model.extend: nothing" in capsys.readouterr().out
    assert not (tmp_path / "run/stages/start").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"extend": False}}, "no code group of the model is called 'fundus retina'"),
        (
            {"model": {"extend": False}, "data": {"groups": {"CT torso": ["fundus/*"]}}},
            "'(cyst|optic disc)' is none of the model's",
        ),
        ({"data": {"groups": {"CT  Torso": ["fundus/*"]}}}, "'CT  Torso' is the model's 'CT torso' but for case"),
    ],
)
def test_what_a_folder_does_not_know_is_told_before_anything_runs(
    new_data: Path, unbroken: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    recipe = extended(new_data, tmp_path / "run", unbroken / "model", "perceiver").changed(changes, "a change")
    with pytest.raises(ValueError, match=message):
        stage_plans(recipe, 1)
    with pytest.raises(ValueError, match=message):
        train(recipe)
    assert not [*tmp_path.glob("run/stages/*")]


def test_without_images_with_masks_nothing_can_be_extended(unbroken: Path, tmp_path: Path) -> None:
    recipe = extended(tmp_path, tmp_path / "run", unbroken / "model", "unified")
    recipe = recipe.changed({"data": {"regions": []}}, "a change")
    with pytest.raises(ValueError, match="data.regions is empty, and images with masks are needed for .*model.extend"):
        train(recipe)
    recipe = tiny_recipe(tmp_path, tmp_path / "run", model={"extend": True})
    with pytest.raises(ValueError, match="model.extend=True: name the checkpoint to extend as model.folder"):
        train(recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"perceiver": {}, "codebook": {"groups": ["MRI hart"]}},
            "stages.codebook: groups: unknown key 'MRI hart'; did you mean",
        ),
        ({"codebook": {"groups": ["CT torso"], "weight_decay": 0.1}}, "would shrink the codes of all groups"),
        ({"unified": {"groups": ["CT torso"]}}, "groups chooses among the codes' rows"),
    ],
)
def test_bad_groups_of_a_stage_are_named(
    drawn_data: Path, unbroken: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    stages = {**only(*changes), **changes}
    recipe = tiny_recipe(drawn_data, tmp_path, model={"folder": str(unbroken / "model")}, stages=stages)
    with pytest.raises(ValueError, match=message):
        stage_plans(recipe, 1)
    with pytest.raises(ValueError, match=message):
        train(recipe)
    assert not [*tmp_path.glob("stages/*")]
