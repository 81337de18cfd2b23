"""A configuration holds together, says what it leaves of an image, and comes back from a folder as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from configuration_medsight import MedSightConfig, configuration_medsight
from configuration_medsight.configuration_medsight import PRESETS


RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]}
CLIP = PRESETS["tiny"]["vision_config"]

CONTRADICTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"image_size": 56}, ("image_size=56", "vision_config.image_size=28")),
    ({"vision_config": {**CLIP, "image_size": 30}}, ("image_size=30", "7 pixels")),
    ({"vision_config": RESNET, "image_size": 36, "vision_feature_layer": -1}, ("image_size=36", "8 pixels", "32")),
    *(({"vision_feature_layer": i}, (f"vision_feature_layer={i}", "3 hidden states")) for i in (3, -4)),
    ({"vision_config": {**CLIP, "hidden_size": 18}}, ("18", "4")),
    ({"vision_config": {"model_type": "bert"}}, ("bert", "CLIP")),
    ({"use_region_codebook": False}, ("use_region_codebook=False", "num_groups=3", "codes_per_group=4")),
    ({"group_names": ["CT"]}, ("1 entries", "num_groups=3")),
    ({"group_patterns": {"CT liver": ["CT/*"]}}, ("group_patterns", "'CT liver'", "group 0")),
    ({"group_orientations": {"CT liver": "LP"}}, ("group_orientations", "'CT liver'", "group 0")),
    ({"group_orientations": {"group 0": "LR"}}, ("group_orientations", "'LR'", "'group 0'")),
    ({"mask_class_names": ["liver", "lung"]}, ("2 entries", "num_mask_classes=7")),
    ({"region_code_start_id": 309}, ("309", "320", "vocab_size=320")),
    ({"region_code_start_id": -1}, ("-1", "10", "vocab_size=320")),
    *(({"image_token_id": i}, (f"image_token_id={i}", "vocab_size=320", "282 to 293")) for i in (282, 293, 320)),
    ({"mask_decoder": "mlp"}, ("mlp", "perceiver", "head")),
    ({"region_state_offset": 1}, ("region_state_offset=1", "-1")),
    *(({name: 0}, (f"{name}=0", "1")) for name in configuration_medsight.COUNTS),
]


@pytest.mark.parametrize(("setting", "named"), CONTRADICTIONS, ids=lambda value: str(value)[:60])
def test_a_contradiction_is_refused_and_both_values_are_named(setting: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        MedSightConfig.from_preset("tiny", **setting)
    for value in named:
        assert value in str(error.value)


@pytest.mark.parametrize(
    "setting", [{}, {"region_code_start_id": 308}, {"image_token_id": 319}, {"image_token_id": 0}]
)
def test_what_just_fits_is_accepted(setting: dict[str, Any]) -> None:
    MedSightConfig.from_preset("tiny", **setting)


def test_the_published_model_is_the_default() -> None:
    config = MedSightConfig()
    assert config.to_dict() == MedSightConfig.from_preset("8b").to_dict()
    assert (config.patch_grid, config.mask_size, config.image_seq_length) == ((24, 24), (192, 192), 596)
    assert (config.vision_hidden_size, config.num_region_codes) == (1024, 576)
    assert config.text_config.vocab_size >= config.region_code_start_id + config.num_region_codes
    assert config.text_config.vocab_size % 64 == 0
    assert (config.text_config.model_type, config.vision_config.model_type) == ("qwen3", "clip_vision_model")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_survives_json_and_a_folder(name: str, tmp_path: Path) -> None:
    config = MedSightConfig.from_preset(name, region_state_offset=-1, no_object_weight=0.25)
    config.save_pretrained(tmp_path)
    loaded = MedSightConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert (loaded.region_state_offset, loaded.no_object_weight) == (-1, 0.25)
    assert type(loaded.text_config) is type(config.text_config)
    assert type(AutoConfig.from_pretrained(tmp_path)) is MedSightConfig
    assert MedSightConfig.from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == config.to_dict()


def test_a_preset_is_not_changed_by_its_use_and_an_unknown_one_is_refused_with_the_known_ones() -> None:
    before = MedSightConfig.from_preset("tiny").to_dict()
    config = MedSightConfig.from_preset("tiny", image_token_id=300)
    config.text_config.hidden_size = 1
    config.group_names.append("another")
    assert MedSightConfig.from_preset("tiny").to_dict() == before != config.to_dict()
    with pytest.raises(ValueError, match="'huge'.*8b, laptop, nano, small, tiny"):
        MedSightConfig.from_preset("huge")


def test_sub_configurations_may_be_objects() -> None:
    parts = {name: AutoConfig.for_model(**PRESETS["tiny"][name]) for name in ("text_config", "vision_config")}
    given = MedSightConfig(**{**PRESETS["tiny"], **parts})
    assert given.to_dict() == MedSightConfig.from_preset("tiny").to_dict()


@pytest.mark.parametrize("tied", [True, False])
def test_tying_is_taken_from_the_language_model(tied: bool) -> None:
    text = {**PRESETS["tiny"]["text_config"], "tie_word_embeddings": tied}
    assert MedSightConfig.from_preset("tiny", text_config=text).tie_word_embeddings is tied


def test_region_code_tokens_are_spelled_row_major_from_nought() -> None:
    config = MedSightConfig.from_preset("tiny")
    spelled = [config.region_code_token(k, m) for k in range(3) for m in range(4)]
    assert spelled[:5] == ["[C0_0]", "[C0_1]", "[C0_2]", "[C0_3]", "[C1_0]"]
    assert len(set(spelled)) == config.num_region_codes
    for group, index in ((3, 0), (0, 4), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match=f"no code {index} of group {group}"):
            config.region_code_token(group, index)
    single = MedSightConfig.from_preset("tiny", use_region_codebook=False, num_groups=1, codes_per_group=1)
    assert single.region_code_token(0, 0) == "[SEG]"


@pytest.mark.parametrize("use_region_embeddings", [True, False])
def test_an_image_block_is_the_patch_rows_and_then_the_region_rows(use_region_embeddings: bool) -> None:
    config = MedSightConfig.from_preset("tiny", use_region_embeddings=use_region_embeddings)
    assert (config.patch_grid, config.mask_size) == ((4, 4), (16, 16))
    assert config.image_seq_length == 16 + 5 * use_region_embeddings


@pytest.mark.parametrize("name", ["text_config", "vision_config"])
def test_a_part_without_a_type_is_of_the_default_one(name: str) -> None:
    default = getattr(MedSightConfig(), name)
    changed = {"num_hidden_layers": 3} | ({"vocab_size": default.vocab_size} if name == "text_config" else {})
    part = getattr(MedSightConfig(**{name: changed}), name)
    assert part.model_type == default.model_type and part.num_hidden_layers == 3
