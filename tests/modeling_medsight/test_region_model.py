"""The region model: loaded alone or seen inside a whole model, and masks of region codes from the codebook alone."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from safetensors import safe_open

from configuration_medsight import MedSightConfig
from modeling_medsight import MedSightForConditionalGeneration, MedSightRegionModel, region_model_medsight

from .configurations import CLOSE, make_model, make_pixels, perceiving


@pytest.fixture(scope="module")
def folder(model: MedSightForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def region_model(folder: Path) -> MedSightRegionModel:
    return MedSightRegionModel.from_pretrained(folder).eval()


def test_it_reads_its_own_tensors_alone_from_the_folder_of_a_whole_model(
    model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()

    class Recorder:
        """A file of tensors, or a tensor of it, which is read when it is indexed."""

        def __init__(self, lazy: Any, key: str = "") -> None:
            self.lazy, self.key = lazy, key

        def __getattr__(self, name: str) -> Any:
            return getattr(self.lazy, name)

        def get_slice(self, key: str) -> "Recorder":
            return Recorder(self.lazy.get_slice(key), key)

        def __getitem__(self, index: Any) -> torch.Tensor:
            read.add(self.key)
            return self.lazy[index]

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", lambda *a, **k: Recorder(safe_open(*a, **k)))
    loaded, report = MedSightRegionModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, of_whole = loaded.state_dict(), model.region_model.state_dict()
    assert all(torch.equal(value, of_whole[name]) for name, value in state.items())
    assert len(read) >= len(list(loaded.parameters()))
    assert not [key for key in read if re.search("language_model|lm_head|_to_text_|_to_vision_", key)]


def test_it_comes_back_from_a_folder_of_its_own(region_model: Any, config: MedSightConfig, tmp_path: Path) -> None:
    region_model.save_pretrained(tmp_path)
    again, report = MedSightRegionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in region_model.state_dict().items())


@torch.no_grad()
def test_alone_and_inside_a_whole_model_it_sees_the_same(
    region_model: Any, model: Any, config: MedSightConfig
) -> None:
    images = make_pixels(config, 2)
    expected = model.get_region_features(images)
    for found in (region_model(images), region_model.get_region_features(images), model.region_model(images)):
        assert found.keys() == expected.keys()
        for name in ("region_embeddings", "masks_queries_logits", "class_queries_logits", "group_logits"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_to_train_it_trains_the_whole_model(config: MedSightConfig) -> None:
    whole = make_model(config)
    region_model = whole.region_model
    before = {name: weight.clone() for name, weight in whole.named_parameters()}
    region_model(**perceiving(config, groups=False)).loss.backward()
    torch.optim.SGD(region_model.parameters(), lr=0.1).step()
    changed = {name for name, weight in whole.named_parameters() if not torch.equal(weight, before[name])}
    assert any("region_perceiver" in name for name in changed)
    assert not any("language_model" in name or "projector" in name for name in changed)


@torch.no_grad()
def test_masks_of_codes_are_those_of_the_queries_that_the_codebook_gives(
    region_model: Any, config: MedSightConfig
) -> None:
    """Whether codes are told by ids or by indices, images by pixels or features, alone or in a batch."""
    images = make_pixels(config, 3)
    last = (config.num_groups - 1, config.codes_per_group - 1)
    indices = [[(0, 0), last, (0, 0)], [], [last]]
    ids = [[config.region_code_start_id + k * config.codes_per_group + m for k, m in pairs] for pairs in indices]
    features = region_model.get_region_features(images)
    masks = region_model.decode_codes(ids, images)
    assert [tuple(found.shape) for found in masks] == [(n, *config.mask_size) for n in (3, 0, 1)]
    for i, pairs in enumerate(indices):
        for other in (
            region_model.decode_codes(code_indices=indices, features=features)[i],
            region_model.decode_codes([torch.tensor(ids[i], dtype=torch.long)], images[i : i + 1])[0],
        ):
            torch.testing.assert_close(other, masks[i], **CLOSE)
        if not pairs:
            continue
        vectors = torch.stack(
            [torch.nn.functional.normalize(region_model.codebook.codes[k, m], dim=0) for k, m in pairs]
        )
        queries = region_model.codebook.from_code(vectors)[None]
        if config.mask_decoder == "head":
            projected = region_model.region_perceiver.segmentation_head.mask_projection(queries)[0]
            expected = torch.einsum("nd,hwd->nhw", projected, features.image_features[i])
        else:
            grid = features.patch_features[i : i + 1].unflatten(1, config.patch_grid)
            expected = region_model.region_perceiver(grid, queries=queries).masks_queries_logits[0]
        torch.testing.assert_close(masks[i], expected, **CLOSE)


@torch.no_grad()
def test_entries_decoded_a_few_at_a_time_have_the_same_masks(region_model: Any, config: Any, monkeypatch: Any) -> None:
    images, codes = make_pixels(config, 3), [[(0, 0)] * n for n in (1, 2, 1)]
    together, passes = region_model.decode_codes(code_indices=codes, pixel_values=images), []
    monkeypatch.setattr(region_model_medsight, "MAP_NUMBERS_AT_ONCE", 1)
    features = region_model.get_region_features(images)
    hook = region_model.region_perceiver.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    apart = region_model.decode_codes(code_indices=codes, features=features)
    hook.remove()
    assert passes == ([] if config.mask_decoder == "head" else [1, 1, 1])
    torch.testing.assert_close(apart, together, **CLOSE)


def test_codes_and_images_that_do_not_fit_are_named(region_model: Any, config: MedSightConfig) -> None:
    images, first = make_pixels(config, 1), config.region_code_start_id
    features = region_model.get_region_features(images)
    after, codes = first + config.num_region_codes, config.codes_per_group
    for given, message in (
        ({"pixel_values": images}, "exactly one of region_code_ids and code_indices"),
        (
            {"region_code_ids": [[first]], "pixel_values": images, "features": features},
            "exactly one of pixel_values and features",
        ),
        ({"region_code_ids": [[first], [first]], "features": features}, "codes for 2 images, but 1 images"),
        ({"region_code_ids": [[first, first - 1]], "features": features}, f"image 0: {first - 1} is no region code"),
        ({"region_code_ids": [[first, after]], "features": features}, f"image 0: {after} is no region code"),
        ({"code_indices": [[(0, codes)]], "features": features}, rf"image 0: \[0, {codes}\] is no region code"),
    ):
        with pytest.raises(ValueError, match=message):
            region_model.decode_codes(**given)
