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

from .configurations import CONFIGURATIONS, make_config, make_model


CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=list(CONFIGURATIONS), scope="module")
def config(request: pytest.FixtureRequest) -> MedSightConfig:
    return make_config(request.param)


@pytest.fixture(scope="module")
def whole(config: MedSightConfig) -> MedSightForConditionalGeneration:
    return make_model(config)


@pytest.fixture(scope="module")
def folder(whole: MedSightForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    whole.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> MedSightRegionModel:
    return MedSightRegionModel.from_pretrained(folder).eval()


def pixels(config: MedSightConfig, images: int) -> torch.Tensor:
    return torch.randn(images, 3, *[config.image_size] * 2, generator=torch.Generator().manual_seed(3))


def test_it_reads_its_own_tensors_alone_from_the_folder_of_a_whole_model(
    whole: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()

    class Slice:
        """A tensor of a file, which is read when it is indexed."""

        def __init__(self, key: str, lazy: Any) -> None:
            self.key, self.lazy = key, lazy

        def __getitem__(self, index: Any) -> torch.Tensor:
            read.add(self.key)
            return self.lazy[index]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.lazy, name)

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_slice(self, key: str) -> Slice:
            return Slice(key, self.file.get_slice(key))

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", File)
    loaded, report = MedSightRegionModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, of_whole = loaded.state_dict(), whole.model.state_dict()
    assert all(torch.equal(value, of_whole[name]) for name, value in state.items())
    assert len(read) >= len(list(loaded.parameters()))
    assert not [key for key in read if re.search("language_model|lm_head|_to_text_|_to_vision_", key)]


def test_it_comes_back_from_a_folder_of_its_own(model: Any, config: MedSightConfig, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again, report = MedSightRegionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_alone_and_inside_a_whole_model_it_sees_the_same(model: Any, whole: Any, config: MedSightConfig) -> None:
    images = pixels(config, 2)
    expected = whole.get_region_features(images)
    for found in (model(images), model.get_region_features(images), whole.region_model(images)):
        assert found.keys() == expected.keys()
        for name in ("region_embeddings", "masks_queries_logits", "class_queries_logits", "group_logits"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_to_train_it_trains_the_whole_model(config: MedSightConfig) -> None:
    whole = make_model(config)
    region_model = whole.region_model
    before = {name: weight.clone() for name, weight in whole.named_parameters()}
    masks = [torch.ones(1, 9, 9), torch.zeros(0, 9, 9)]
    classes = [torch.tensor([1]), torch.tensor([], dtype=torch.long)]
    region_model(pixels(config, 2), mask_labels=masks, class_labels=classes).loss.backward()
    torch.optim.SGD(region_model.parameters(), lr=0.1).step()
    changed = {name for name, weight in whole.named_parameters() if not torch.equal(weight, before[name])}
    assert any("region_perceiver" in name for name in changed)
    assert not any("language_model" in name or "projector" in name for name in changed)


@torch.no_grad()
def test_masks_of_codes_are_those_of_the_queries_that_the_codebook_gives(model: Any, config: MedSightConfig) -> None:
    """Whether codes are told by ids or by indices, images by pixels or features, alone or in a batch."""
    images = pixels(config, 3)
    last = (config.num_groups - 1, config.codes_per_group - 1)
    indices = [[(0, 0), last, (0, 0)], [], [last]]
    ids = [[config.region_code_start_id + k * config.codes_per_group + m for k, m in pairs] for pairs in indices]
    features = model.get_region_features(images)
    masks = model.decode_codes(ids, images)
    assert [tuple(found.shape) for found in masks] == [(n, *config.mask_size) for n in (3, 0, 1)]
    for i, pairs in enumerate(indices):
        for other in (
            model.decode_codes(code_indices=indices, features=features)[i],
            model.decode_codes([torch.tensor(ids[i], dtype=torch.long)], images[i : i + 1])[0],
        ):
            torch.testing.assert_close(other, masks[i], **CLOSE)
        if not pairs:
            continue
        vectors = torch.stack([torch.nn.functional.normalize(model.codebook.codes[k, m], dim=0) for k, m in pairs])
        queries = model.codebook.from_code(vectors)[None]
        if config.mask_decoder == "head":
            projected = model.region_perceiver.segmentation_head.mask_projection(queries)[0]
            expected = torch.einsum("nd,hwd->nhw", projected, features.image_features[i])
        else:
            grid = features.patch_features[i : i + 1].unflatten(1, config.patch_grid)
            expected = model.region_perceiver(grid, queries=queries).masks_queries_logits[0]
        torch.testing.assert_close(masks[i], expected, **CLOSE)


@torch.no_grad()
def test_entries_decoded_a_few_at_a_time_have_the_same_masks(model: Any, config: Any, monkeypatch: Any) -> None:
    images, codes = pixels(config, 3), [[(0, 0)] * n for n in (1, 2, 1)]
    together, passes = model.decode_codes(code_indices=codes, pixel_values=images), []
    monkeypatch.setattr(region_model_medsight, "MAP_NUMBERS_AT_ONCE", 1)
    features = model.get_region_features(images)
    hook = model.region_perceiver.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    apart = model.decode_codes(code_indices=codes, features=features)
    hook.remove()
    assert passes == ([] if config.mask_decoder == "head" else [1, 1, 1])
    for masks, others in zip(apart, together, strict=True):
        torch.testing.assert_close(masks, others, **CLOSE)


def test_codes_and_images_that_do_not_fit_are_named(model: Any, config: MedSightConfig) -> None:
    images, first = pixels(config, 1), config.region_code_start_id
    features = model.get_region_features(images)
    with pytest.raises(ValueError, match="exactly one of region_code_ids and code_indices"):
        model.decode_codes(pixel_values=images)
    with pytest.raises(ValueError, match="exactly one of pixel_values and features"):
        model.decode_codes([[first]], images, features=features)
    with pytest.raises(ValueError, match="codes for 2 images, but 1 images"):
        model.decode_codes([[first], [first]], images)
    for wrong in (first - 1, first + config.num_region_codes):
        with pytest.raises(ValueError, match=f"image 0: {wrong} is no region code"):
            model.decode_codes([[first, wrong]], images)
    with pytest.raises(ValueError, match=rf"image 0: \[0, {config.codes_per_group}\] is no region code"):
        model.decode_codes(code_indices=[[(0, config.codes_per_group)]], pixel_values=images)
