"""What the model sees, reads and decodes, for every slot and switch."""

from typing import Any

import pytest
import torch

from configuration_medsight import MedSightConfig
from modeling_medsight import MedSightModel
from modeling_medsight.region_codes_in_text_medsight import locate_codes

from .configurations import (
    CLOSE,
    CONFIGURATIONS,
    ROWS,
    UNET,
    labelled,
    make_batch,
    make_config,
    make_model,
    make_pixels,
    perceiving,
    row_of_batch,
)


Inputs = dict[str, Any]


@torch.no_grad()
def test_region_features_have_the_shapes_that_the_configuration_tells(model: Any, config: MedSightConfig) -> None:
    pixels = make_pixels(config, 2)
    regions = model.get_region_features(pixels)
    (h, w), (height, width), d, n = config.patch_grid, config.mask_size, config.vision_hidden_size, 5
    assert regions.patch_features.shape == (2, h * w, d)
    assert regions.region_embeddings.shape == (2, n, d)
    assert regions.image_features.shape == (2, height, width, d)
    assert regions.masks_queries_logits.shape == (2, n, height, width)
    assert regions.class_queries_logits.shape == (2, n, config.num_mask_classes + 1)
    assert regions.group_logits.shape == (2, config.num_groups)
    assert len(regions.auxiliary_logits or []) == config.auxiliary_loss * config.perceiver_num_stages
    block = model.get_image_features(pixels).pooler_output
    assert block.shape == (2, config.image_seq_length, config.text_config.hidden_size)
    codes = model.quantize_regions(regions.region_embeddings, torch.zeros(2, dtype=torch.long))
    assert codes.code_indices.shape == (2, n)
    assert codes.reconstructed_regions.shape == (2, n, d)


@torch.no_grad()
def test_without_masks_the_rest_is_the_same(model: Any, config: MedSightConfig) -> None:
    pixels = make_pixels(config, 2)
    full, lean = (model.get_region_features(pixels, with_masks=masks) for masks in (True, False))
    assert full.keys() - lean.keys() == {"image_features", "masks_queries_logits", "class_queries_logits"}
    assert all(torch.equal(value, full[name]) for name, value in lean.items() if name != "auxiliary_logits")


@torch.no_grad()
def test_patch_features_are_the_encoders_own_hidden_state(model: Any, config: MedSightConfig) -> None:
    pixels = make_pixels(config, 2)
    encoder = model.model.vision_tower
    hidden = encoder(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]
    if hidden.ndim == 4:
        grid, summary = hidden.flatten(2).transpose(1, 2), hidden.mean((2, 3))
    elif config.vision_config.model_type == "siglip_vision_model":
        grid, summary = hidden, hidden.mean(1)
    else:
        grid, summary = hidden[:, 1:], hidden[:, 0]
    regions = model.get_region_features(pixels)
    torch.testing.assert_close(regions.patch_features, grid)
    torch.testing.assert_close(regions.group_logits, model.model.group_classifier(summary))


@pytest.mark.parametrize("encoder", ["clip-qwen3", "dinov2-qwen3-head-previous-state", "convnext-llama-tied"])
@torch.no_grad()
def test_every_hidden_state_of_an_encoder_can_be_the_feature_layer(encoder: str) -> None:
    for layer in (-3, -2, -1, 0, 1, 2):
        config = make_config(encoder, vision_feature_layer=layer, image_size=None if encoder[0] != "d" else 28)
        regions = MedSightModel(config).eval().get_region_features(make_pixels(config, 1))
        assert regions.masks_queries_logits.shape[-2:] == config.mask_size


@torch.no_grad()
def test_a_batch_is_its_rows_and_padding_on_the_left_is_not_seen(model: Any, config: Any, batch: Inputs) -> None:
    together = model(**batch)
    decoded = model.decode_regions(**batch)
    for row in range(len(ROWS)):
        single = row_of_batch(config, batch, row)
        alone = model(**single)
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together.logits[row][real], alone.logits[0], **CLOSE)
        own = model.decode_regions(**single)
        torch.testing.assert_close(decoded.mask_logits[row], own.mask_logits[0], **CLOSE)
        torch.testing.assert_close(decoded.region_scores[row], own.region_scores[0], **CLOSE)
        assert torch.equal(decoded.region_code_ids[row], own.region_code_ids[0])
        assert len(own.region_code_ids[0]) == ROWS[row].count("C")


@torch.no_grad()
def test_a_code_belongs_to_the_last_image_before_it(model: Any, config: MedSightConfig) -> None:
    batch = make_batch(config, ["ItCItCC", "ItC"])
    before = model.decode_regions(**batch)

    def changed(image: int) -> list[list[bool]]:
        pixels = batch["pixel_values"].clone()
        pixels[image] = torch.randn(pixels[image].shape, generator=torch.Generator().manual_seed(5))
        # The language model sees the old images, so that only what a mask is drawn on changes.
        seen = {"image": model.get_image_features(batch["pixel_values"])}
        regions = model.get_region_features(pixels)
        hidden = model.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], mm_encoder_outputs=seen
        ).last_hidden_state
        codes = locate_codes(batch["input_ids"], config)
        masks = model.model.decode_states(hidden, codes, regions).split(codes.counts)
        pairs = zip(masks, before.mask_logits, strict=True)
        return [[not torch.allclose(a, b, **CLOSE) for a, b in zip(new, old, strict=True)] for new, old in pairs]

    assert changed(0) == [[True, False, False], [False]]
    assert changed(1) == [[False, True, True], [False]]
    assert changed(2) == [[False, False, False], [True]]


@torch.no_grad()
def test_the_state_that_draws_a_mask_is_the_one_that_the_configuration_names(model: Any, config: Any) -> None:
    batch = make_batch(config, ["IttCtt"])
    position = int((batch["input_ids"][0] >= config.region_code_start_id).nonzero()[0])
    hidden = model.model(**batch).last_hidden_state
    regions = model.get_region_features(batch["pixel_values"])
    state = model.model.text_to_vision_projector(hidden[:, position + config.region_state_offset])
    if config.mask_decoder == "head":
        query = model.model.region_perceiver.segmentation_head.mask_projection(state)[0]
        expected = (regions.image_features[0] * query).sum(-1)[None]
    else:
        grid = regions.patch_features.unflatten(1, config.patch_grid)
        expected = model.model.region_perceiver(grid, queries=state[:, None]).masks_queries_logits[0]
    torch.testing.assert_close(model.decode_regions(**batch).mask_logits[0], expected, **CLOSE)


@torch.no_grad()
def test_the_language_model_reads_patch_rows_and_then_region_rows(model: Any, config: Any, batch: Inputs) -> None:
    regions = model.get_region_features(batch["pixel_values"])
    grid = regions.patch_features.unflatten(1, config.patch_grid)
    squares = grid.unfold(1, config.patch_pooling, config.patch_pooling).unfold(2, *[config.patch_pooling] * 2)
    rows = [squares.mean((-2, -1)).flatten(1, 2)]
    if config.use_region_embeddings:
        rows.append(regions.region_embeddings)
    blocks = model.model.vision_to_text_projector(torch.cat(rows, dim=1))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    embeds[batch["input_ids"] == config.image_token_id] = blocks.flatten(0, 1)
    text = model.model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    torch.testing.assert_close(model(**batch).logits, model.lm_head(text.last_hidden_state), **CLOSE)


@pytest.mark.parametrize("unread", ["ttItt", "Itt", "t"])
@torch.no_grad()
def test_a_forward_on_a_cache_continues_the_one_before(model: Any, config: MedSightConfig, unread: str) -> None:
    batch = make_batch(config, ["ttItCttItt"] * 2)
    expected = model(**batch).logits
    ids, images = batch["input_ids"], batch["pixel_values"]
    columns = len(unread) + unread.count("I") * (config.image_seq_length - 1)
    read_now = images[1::2] if "I" in unread else None
    first = model(input_ids=ids[:, :-columns], pixel_values=images[::2] if "I" in unread else images, use_cache=True)
    second = model(input_ids=ids[:, -columns:], pixel_values=read_now, past_key_values=first.past_key_values)
    torch.testing.assert_close(first.logits, expected[:, :-columns], **CLOSE)
    torch.testing.assert_close(second.logits, expected[:, -columns:], **CLOSE)


@torch.no_grad()
def test_input_embeddings_stand_for_input_ids(model: Any, batch: Inputs) -> None:
    ids = batch.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, **batch).logits, model(input_ids=ids, **batch).logits)


@torch.no_grad()
def test_logits_to_keep(model: Any, batch: Inputs) -> None:
    whole = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("clip-qwen3", "unet-qwen3-pooled") else pytest.mark.slow)
        for name in CONFIGURATIONS
    ],
)
@torch.no_grad()
def test_forward_compiles_into_one_graph(name: str) -> None:
    torch.compiler.reset()
    small = make_config(name)  # depth only costs time here
    text = {**small.text_config.to_dict(), "num_hidden_layers": 1, "layer_types": None}
    config = make_config(name, text_config=text, perceiver_num_stages=1)
    model, inputs = make_model(config), labelled(config, ["ItCtC", "tItCC"])
    expected = model(**inputs)
    given = torch.compile(model, backend="eager", fullgraph=True)(**inputs)
    torch.testing.assert_close(given.loss, expected.loss, **CLOSE)
    torch.testing.assert_close(given.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(given.mask_logits, expected.mask_logits, **CLOSE)


def test_with_group_norm_a_picture_in_training_does_not_see_the_others() -> None:
    torch.manual_seed(0)
    pixels = torch.randn(3, 3, 32, 32)

    def difference(norm_groups: int | None) -> float:
        config = make_config("unet-qwen3-pooled", vision_config={**UNET, "norm_groups": norm_groups})
        tower = make_model(config).model.vision_tower.train()
        return float((tower(pixels).last_hidden_state[:1] - tower(pixels[:1]).last_hidden_state).abs().max())

    assert difference(2) < 1e-5 < difference(None)
    with pytest.raises(ValueError, match="norm_groups=3 does not divide"):
        difference(3)


def test_nothing_is_kept_on_the_modules_between_calls(model: Any, config: MedSightConfig, batch: Inputs) -> None:
    def attributes() -> dict[str, set[str]]:
        return {path: set(vars(module)) for path, module in model.named_modules()}

    model(**labelled(config, ROWS)), model.decode_regions(**batch)
    before, first = attributes(), model.decode_regions(**batch)
    model.decode_regions(**make_batch(config, ["ItCC"], seed=3))
    again = model.decode_regions(**batch)
    assert attributes() == before
    torch.testing.assert_close(again.mask_logits, first.mask_logits, rtol=0, atol=0)


def test_outputs_come_as_tuples_on_request(model: Any, batch: Inputs) -> None:
    output = model(**batch, return_dict=False)
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[0], model(**batch).logits)


def test_what_is_missing_or_does_not_match_is_named(model: Any, config: MedSightConfig) -> None:
    inputs, seen, length = labelled(config, ROWS), perceiving(config), config.image_seq_length
    masks, pixels, classes = inputs["mask_labels"], inputs["pixel_values"], seen["class_labels"]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for change, message in (
        ({"mask_labels": [masks[0], masks[1][:2], masks[2]]}, "sample 1 cites 3 region codes but has 2 mask_labels"),
        ({"mask_labels": [masks[0], masks[1], masks[0]]}, "sample 2 cites 0 region codes but has 2 mask_labels"),
        ({"mask_labels": masks[:2]}, "2 mask_labels for 3 samples"),
        ({"pixel_values": pixels[:3]}, f"3 images need {3 * length}"),
        ({"pixel_values": torch.cat([pixels] * 2)}, f"8 images need {8 * length}"),
        ({"pixel_values": None}, "0 images need 0 image placeholders"),
        ({"pixel_values": torch.zeros(4, 3, 9, 9)}, r"pixel_values has shape \(4, 3, 9, 9\); expected"),
        ({"input_ids": None}, "mask_labels and code_class_labels need input_ids"),
        ({"inputs_embeds": embeds}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": None, "mask_labels": None, "labels": None}, "images alone are for region_model"),
        ({"class_labels": classes}, "class_labels: of no use here; region_model takes"),
        ({"group_labels": seen["group_labels"]}, "group_labels: of no use here; region_model takes"),
        ({"code_class_labels": classes}, "code_class_labels: of no use here"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**inputs, **change})
    for change, message in (
        (
            {"class_labels": [*classes[:2], torch.zeros(3)]},
            r"have \[2, 0, 1\] mask_labels and \[2, 0, 3\] class_labels",
        ),
        ({"class_labels": classes[:2], "mask_labels": seen["mask_labels"][:2]}, r"3 images have \[2, 0\] mask_labels"),
        ({"class_labels": None}, "mask_labels and class_labels together"),
        ({"class_labels": None, "mask_labels": None}, "mask_labels and class_labels together"),
    ):
        with pytest.raises(ValueError, match=message):
            model.region_model(**{**seen, **change})
    early = make_batch(config, ["ttI", "tCIt"])
    code = int(early["input_ids"][1][early["input_ids"][1] >= config.region_code_start_id])
    with pytest.raises(ValueError, match=rf"row 1 has region code {code} .* no image before it"):
        model.decode_regions(**early)
