"""What holds forgetting back: the old model's own masks, weight interpolation, replayed data; and no background where
nobody looked."""

from pathlib import Path
from typing import Any

import pytest
import torch

from configuration_medsight import MedSightConfig
from medsight.data.groups import Groups
from medsight.data.sources import Source, load_source
from medsight.training.canvas import Canvas
from medsight.training.corpus import read_corpus
from medsight.training.stage_regions import RegionSettings, RegionStage, ask_classes
from modeling_medsight import MedSightForConditionalGeneration
from tests.tiny_checkpoint import tiny_processor
from tests.training.tiny_run import tiny_recipe


GROUPS = {"MRI": ["MRI*/*"], "ultrasound": ["ultrasound/*"], "CT": ["CT/*"]}
CLASSES = ["left ventricle", "benign breast tumor", "left kidney", "liver", "spleen", "pancreas", "breast tumor"]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    names = {"group_names": list(GROUPS), "mask_class_names": CLASSES, "use_class_queries": True}
    return MedSightForConditionalGeneration(MedSightConfig.from_preset("tiny", **names))


def stage(model: Any, known: list[set[str]] | None = None, **settings: Any) -> RegionStage:
    elsewhere = [{"liver"}, {"liver"}, {"left ventricle"}]
    canvas = Canvas(tiny_processor(model.config), model.config, Groups(GROUPS), False, elsewhere, known)
    return RegionStage("perceiver", RegionSettings(**settings), canvas, 0)


@pytest.fixture
def rows(drawn_data: Path) -> Any:
    return load_source(Source("biomedparse", str(drawn_data)))


def test_what_nobody_looked_for_is_neither_shown_nor_absent_nor_of_other_images(model: Any, rows: Any) -> None:
    canvas = stage(model).canvas
    found = {row["image"]["path"].split("/")[-1]: canvas.unlabelled_classes(row) for row in rows}

    def names(image: str) -> set[str]:
        return {name for name, flag in zip(CLASSES, found[image].tolist(), strict=True) if flag}

    assert names("1_CT_torso.png") == {"benign breast tumor", "spleen", "pancreas", "breast tumor"}
    assert names("normal_ultrasound_breast.png") == {"left ventricle", "left kidney", "spleen", "pancreas"}


def test_the_old_model_s_masks_are_learnt_beside_those_of_the_data(model: Any, rows: Any) -> None:
    learning = stage(model, [set(), set(), {"liver", "spleen", "pancreas"}], recalled=1)
    learning.prepare(model)
    torso = rows.filter(lambda row: row["modality"] == "CT")
    dataset, collate = learning.dataset(torso, True), learning.collator()
    batch = collate([dataset[0], dataset[1], dataset[2]])
    recalled = batch["recalled_classes"]
    assert {CLASSES[int(classes)] for classes in recalled} <= {"spleen", "pancreas"}
    assert all(classes[0] in asked for classes, asked in zip(recalled, batch["asked_classes"], strict=True))
    with torch.no_grad():
        regions = learning.teacher.get_region_features(batch["pixel_values"])
        expected = ask_classes(learning.teacher, regions, recalled)
        for weight in model.parameters():  # what the model learns afterwards changes nothing
            weight.add_(1.0)
    given = learning.before_forward({key: batch[key] for key in batch if key != "files"}, 0.0)
    assert "recalled_classes" not in given
    for row, logits in enumerate(expected):
        masks, before = given["mask_labels"][row], batch["mask_labels"][row]
        found = bool((logits > 0).any())
        assert len(masks) == len(before) + found and torch.equal(masks[: len(before)], before)
        if found:
            assert torch.allclose(masks[-1], logits[0].sigmoid(), atol=1e-6)
            assert given["class_labels"][row][-1] == recalled[row][0]
    assert not [key for key in collate([learning.dataset(torso, False)[0]]) if "recalled" in key]


def test_without_a_word_on_what_codes_stand_for_nothing_can_be_recalled(model: Any) -> None:
    with pytest.raises(ValueError, match="recalled=2 needs a checkpoint with class queries that says what its codes"):
        stage(model, recalled=2).prepare(model)
    with pytest.raises(ValueError, match="coarse_size=14 and recalled=2: give one of them"):
        RegionStage.check(RegionSettings(recalled=2, coarse_size=14, coarse_share=0.5), {})


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_weights_end_between_those_before_and_those_learnt(model: Any, share: float) -> None:
    learning = stage(model, keep_share=share)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learning.prepare(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(1.0)
    after = learning.finish(model).state_dict()
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    by_class = {name for name in before if "class_queries" in name or "class_predictor" in name}
    for name, distance in moved.items():
        trained = name.startswith("model.region_perceiver.")
        expected = 1.0 if name in by_class else (1 - share) * trained
        assert distance == pytest.approx(expected, abs=1e-5), name


@pytest.mark.parametrize(("name", "value"), [("keep_share", 1.0), ("keep_share", -0.1), ("replay_share", 1.5)])
def test_a_share_that_is_none_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}: expected a share"):
        RegionStage.check(RegionSettings(**{name: value}), {})


def test_replayed_data_are_told_from_new_ones_by_their_data_sets(drawn_data: Path, tmp_path: Path) -> None:
    new, old = ({"layout": "biomedparse", "path": str(drawn_data / name)} for name in ("totalsegmentator", "busi"))
    corpus = read_corpus(tiny_recipe(drawn_data, tmp_path, data={"regions": [new], "replay": [old]}))
    assert corpus.replayed == {"busi"}
    assert {*corpus.training["dataset"]} == {"busi", "totalsegmentator"}
    both = tiny_recipe(drawn_data, tmp_path, data={"regions": [new, old], "replay": [old]})
    with pytest.raises(ValueError, match="data.replay: the data set 'busi' is in data.regions too"):
        read_corpus(both)
