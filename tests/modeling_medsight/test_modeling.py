"""Promises of the model that hold for every slot and switch."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from configuration_medsight import MedSightConfig
from configuration_medsight.remote_code_medsight import AUTO_MAP
from modeling_medsight import MedSightForConditionalGeneration, MedSightModel, MedSightRegionModel
from modeling_medsight.loss_medsight import code_mask_loss
from modeling_medsight.region_codes_in_text_medsight import locate_codes

from .configurations import CONFIGURATIONS, UNET, make_batch, make_config, make_model, random_masks, row_of_batch


ROWS = ["ttIttCtCt", "IttCItCCt", "tttItt"]
CLOSE = {"rtol": 1e-4, "atol": 2e-4}
Inputs = dict[str, Any]


@pytest.fixture(params=list(CONFIGURATIONS), scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def config(name: str) -> MedSightConfig:
    return make_config(name)


@pytest.fixture(scope="module")
def model(config: MedSightConfig) -> MedSightForConditionalGeneration:
    """Shared by the tests of one configuration, which leave it as it is."""
    return make_model(config)


@pytest.fixture
def batch(config: MedSightConfig) -> Inputs:
    return make_batch(config, ROWS)


def labelled(config: MedSightConfig, rows: list[str], mask_size: tuple[int, int] | None = None) -> Inputs:
    """A batch with all labels that training on text takes."""
    batch = make_batch(config, rows)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == config.image_token_id, -100)
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    counts = [row.count("C") for row in rows]
    return {**batch, "labels": labels, "mask_labels": random_masks(counts, mask_size or config.mask_size)}


def perceiving(config: MedSightConfig) -> Inputs:
    """Inputs of perceiver and codebook training: three images with two, no and one region."""
    generator = torch.Generator().manual_seed(0)
    counts = [2, 0, 1]
    return {
        "pixel_values": torch.randn(3, 3, config.image_size, config.image_size, generator=generator),
        "mask_labels": random_masks(counts, (40, 40)),
        "class_labels": [torch.arange(n) + 1 for n in counts],
        "group_labels": torch.tensor([0, config.num_groups - 1, 0]),
    }


@torch.no_grad()
def test_region_features_have_the_shapes_that_the_configuration_tells(model: Any, config: MedSightConfig) -> None:
    regions = model.get_region_features(torch.randn(2, 3, config.image_size, config.image_size))
    (h, w), (height, width), d, n = config.patch_grid, config.mask_size, config.vision_hidden_size, 5
    assert regions.patch_features.shape == (2, h * w, d)
    assert regions.region_embeddings.shape == (2, n, d)
    assert regions.image_features.shape == (2, height, width, d)
    assert regions.masks_queries_logits.shape == (2, n, height, width)
    assert regions.class_queries_logits.shape == (2, n, config.num_mask_classes + 1)
    assert regions.group_logits.shape == (2, config.num_groups)
    assert len(regions.auxiliary_logits or []) == config.auxiliary_loss * config.perceiver_num_stages
    block = model.get_image_features(torch.randn(2, 3, config.image_size, config.image_size)).pooler_output
    assert block.shape == (2, config.image_seq_length, config.text_config.hidden_size)
    codes = model.quantize_regions(regions.region_embeddings, torch.zeros(2, dtype=torch.long))
    assert codes.code_indices.shape == (2, n)
    assert codes.reconstructed_regions.shape == (2, n, d)


@torch.no_grad()
def test_without_masks_the_rest_is_the_same(model: Any, config: MedSightConfig) -> None:
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    full, lean = (model.get_region_features(pixels, with_masks=masks) for masks in (True, False))
    assert full.keys() - lean.keys() == {"image_features", "masks_queries_logits", "class_queries_logits"}
    for name, value in lean.items():
        torch.testing.assert_close(value, full[name], rtol=0, atol=0)


def test_weights_start_as_the_architecture_says(config: MedSightConfig) -> None:
    """Also where a checkpoint lacks them: linear layers Xavier-uniform, convolutions Kaiming-normal."""
    empty = MedSightForConditionalGeneration.from_pretrained(None, config=config, state_dict={})
    for model in (MedSightForConditionalGeneration(config), empty):
        parts = [model.model.region_perceiver, model.model.codebook]
        parts += [model.model.vision_to_text_projector, model.model.text_to_vision_projector]
        for part in parts:
            for path, layer in part.named_modules():
                if isinstance(layer, torch.nn.Linear) and not path.endswith("mask_projection"):
                    bound = (6 / sum(layer.weight.shape)) ** 0.5
                    assert 0.8 * bound < layer.weight.abs().max() <= bound, path
                elif isinstance(layer, torch.nn.Conv2d):
                    expected = (2 / layer.weight[0].numel()) ** 0.5
                    assert layer.weight.std().item() == pytest.approx(expected, rel=0.2), path
        projection = model.model.region_perceiver.segmentation_head.mask_projection.weight
        std = config.mask_projection_init_std or (2 / sum(projection.shape)) ** 0.5
        assert projection.std().item() == pytest.approx(std, rel=0.25)
        assert (
            0.5 < model.model.codebook.codes.std() < 2 and 0.5 < model.model.region_perceiver.region_queries.std() < 2
        )


@torch.no_grad()
def test_patch_features_are_the_encoders_own_hidden_state(model: Any, config: MedSightConfig) -> None:
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
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
        regions = MedSightModel(config).eval().get_region_features(torch.randn(1, 3, *[config.image_size] * 2))
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
        blocks = model.get_image_features(batch["pixel_values"]).pooler_output
        regions = model.get_region_features(pixels)
        hidden = model.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], image_embeds=blocks
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
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=ids, inputs_embeds=embeds, **batch)


@torch.no_grad()
def test_logits_to_keep(model: Any, batch: Inputs) -> None:
    whole = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])


def test_a_model_comes_back_from_its_folder(model: Any, config: MedSightConfig, batch: Inputs, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    expected = model.decode_regions(**batch)
    for auto_class in (MedSightForConditionalGeneration, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(loaded) is MedSightForConditionalGeneration and not loaded.training
        state = loaded.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    given = loaded.decode_regions(**batch)
    for masks, others in zip(given.mask_logits, expected.mask_logits, strict=True):
        torch.testing.assert_close(masks, others)
    tied = config.text_config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied


def test_a_model_is_built_without_memory_and_filled_later(model: Any, config: MedSightConfig) -> None:
    with torch.device("meta"):
        empty = MedSightForConditionalGeneration(config)
    assert {weight.device.type for weight in empty.state_dict().values()} == {"meta"}
    assert set(empty.state_dict()) == set(model.state_dict())
    loaded = MedSightForConditionalGeneration.from_pretrained(None, config=config, state_dict=model.state_dict())
    assert {weight.device.type for weight in loaded.state_dict().values()} == {"cpu"}
    batch = make_batch(config, ["ItCt"])
    given, expected = loaded.decode_regions(**batch), model.decode_regions(**batch)
    torch.testing.assert_close(given.mask_logits[0], expected.mask_logits[0])


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_model_loads_onto_a_device_map(model: Any, config: Any, tmp_path: Path, device_map: str) -> None:
    pytest.importorskip("accelerate", reason="a device map needs accelerate, which is in the extra `train`")
    model.save_pretrained(tmp_path)
    placed = MedSightForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
    batch = make_batch(config, ["ItCt"])
    given, expected = placed.decode_regions(**batch), model.decode_regions(**batch)
    torch.testing.assert_close(given.mask_logits[0], expected.mask_logits[0])


@torch.no_grad()
def test_bfloat16_is_close_to_float32(model: Any, config: MedSightConfig, batch: Inputs, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    half = MedSightForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    regions, expected = (
        half.get_region_features(batch["pixel_values"]),
        model.get_region_features(batch["pixel_values"]),
    )
    assert regions.masks_queries_logits.dtype == torch.bfloat16
    for key in ("patch_features", "group_logits"):
        torch.testing.assert_close(regions[key].float(), expected[key], rtol=0.1, atol=0.1)
    # Masked attention cuts at one half, where rounding may turn a pixel; most of the map must agree all the same.
    for key in ("masks_queries_logits", "image_features"):
        assert F.cosine_similarity(regions[key].float().flatten(), expected[key].flatten(), dim=0) > 0.97
    output, wanted = half(**batch), model(**batch)
    real = batch["attention_mask"].bool()
    assert F.cosine_similarity(output.logits[real].float().flatten(), wanted.logits[real].flatten(), dim=0) > 0.97
    decoded = half.decode_regions(**batch)
    assert all(scores.dtype == torch.float32 for scores in decoded.region_scores)


def test_losses_of_a_half_precision_model_are_float32(config: MedSightConfig) -> None:
    half = make_model(config).bfloat16().train()
    text, images = half(**labelled(config, ROWS)), half.region_model(**perceiving(config))
    for output, names in (
        (text, ("mask_loss",)),
        (images, ("perceiver_loss", "codebook_loss", "group_loss", "loss")),
    ):
        for loss in names:
            assert output[loss].dtype == torch.float32 and output[loss].isfinite()
    (text.loss + images.loss).backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in half.parameters())


def assert_attention_agrees(model: Any, tmp_path: Path, implementations: tuple[str, ...]) -> None:
    inputs = labelled(model.config, ROWS)
    real = inputs["attention_mask"].bool()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs)
        for attention in implementations:
            other = MedSightForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
            text = other.model.language_model.config
            assert other.config._attn_implementation == text._attn_implementation == attention
            given = other(**inputs)
            torch.testing.assert_close(given.logits[real], expected.logits[real], **CLOSE)
            for masks, others in zip(given.mask_logits, expected.mask_logits, strict=True):
                torch.testing.assert_close(masks, others, **CLOSE)


def test_eager_attention_and_sdpa_agree(model: Any, tmp_path: Path) -> None:
    """Also where the encoder is of convolutions, which have no attention to choose."""
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert_attention_agrees(model, tmp_path, ("eager", "sdpa"))
    switched = copy.deepcopy(model)
    switched.set_attn_implementation("eager")
    assert switched.model.language_model.config._attn_implementation == "eager"


@pytest.mark.slow
def test_flex_attention_agrees_too(tmp_path: Path) -> None:
    assert_attention_agrees(make_model(make_config("clip-qwen3")), tmp_path, ("flex_attention",))


def gradients(model: Any, inputs: Inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(config: MedSightConfig, use_reentrant: bool) -> None:
    model = make_model(config).double().train()  # float32 rounds some gradients by more than a mistake might change
    runs: list[int] = []
    for stage in model.model.region_perceiver.stages:
        stage.adapter.register_forward_hook(lambda *_: runs.append(1))
    for trained, inputs in ((model, labelled(config, ROWS)), (model.region_model, perceiving(config))):
        inputs["pixel_values"] = inputs["pixel_values"].double()
        runs.clear()
        expected, plain = gradients(trained, inputs), len(runs)
        trained.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        trained.enable_input_require_grads()
        runs.clear()
        given = gradients(trained, inputs)
        trained.gradient_checkpointing_disable()
        trained.disable_input_require_grads()
        assert len(runs) > plain > 0, "no stage of the perceiver was run again"
        for key, gradient in expected.items():
            torch.testing.assert_close(given.get(key, torch.zeros_like(gradient)), gradient, rtol=1e-6, atol=1e-9)


def test_every_weight_that_a_loss_needs_gets_a_gradient(config: MedSightConfig) -> None:
    model = make_model(config).train()
    text = {key for key, gradient in gradients(model, labelled(config, ROWS)).items() if gradient.any()}
    images = {key for key, gradient in gradients(model.region_model, perceiving(config)).items() if gradient.any()}
    for part in ("language_model", "vision_to_text_projector", "text_to_vision_projector", "region_perceiver"):
        assert any(part in key for key in text), part
    for part in ("region_perceiver", "codebook.codes", "codebook.to_code", "codebook.from_code"):
        assert any(part in key for key in images), part
    assert any("group_classifier" in key for key in images) == (config.num_groups > 1)
    assert not any("language_model" in key or "projector" in key for key in images)
    assert not any("codebook" in key or "group_classifier" in key for key in text)


def test_a_batch_without_codes_keeps_every_trained_parameter_in_the_graph(config: MedSightConfig) -> None:
    """So that data-parallel training needs no search for unused parameters."""
    model = make_model(config).train()
    with_codes = set(gradients(model, labelled(config, ["ItC"])))
    without = gradients(model, labelled(config, ["Itt"]))
    trained = {key for key in with_codes if "text_to_vision_projector" in key}
    assert trained and trained <= set(without)
    assert not any(without[key].any() for key in trained)


def test_text_losses_are_what_they_say(model: Any, config: MedSightConfig) -> None:
    inputs = labelled(config, ROWS, mask_size=(37, 50))
    output = model(**inputs)
    shifted = inputs["labels"][:, 1:].flatten()
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), shifted, ignore_index=-100)
    torch.testing.assert_close(output.lm_loss, expected)
    decoded = model.decode_regions(**{key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")})
    for masks, others in zip(output.mask_logits, decoded.mask_logits, strict=True):
        torch.testing.assert_close(masks, others, **CLOSE)
    torch.testing.assert_close(output.mask_loss, code_mask_loss(decoded.mask_logits, inputs["mask_labels"]))
    torch.testing.assert_close(output.loss, output.lm_loss + output.mask_loss)
    averaged = model(**inputs, num_items_in_batch=torch.tensor(100))
    torch.testing.assert_close(averaged.lm_loss, expected * (shifted != -100).sum() / 100)


def test_labels_already_shifted_take_the_place_of_labels(model: Any, config: MedSightConfig) -> None:
    inputs = labelled(config, ["tItt"])
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    expected = model(**inputs).lm_loss
    inputs["labels"] = torch.zeros_like(inputs["labels"])
    torch.testing.assert_close(model(**inputs, shift_labels=shifted).lm_loss, expected)


def test_perceiver_losses_are_what_they_say(config: MedSightConfig) -> None:
    model, inputs = make_model(config).train().region_model, perceiving(config)
    torch.manual_seed(0)
    regions = output = model(**inputs)
    targets = inputs["mask_labels"], inputs["class_labels"]
    stages = [*(regions.auxiliary_logits or []), regions]
    pairs = model.perceiver_loss(regions.masks_queries_logits, regions.class_queries_logits, *targets)[1]
    losses = [
        model.perceiver_loss(stage["masks_queries_logits"], stage["class_queries_logits"], *targets, pairs)
        for stage in stages
    ]
    torch.testing.assert_close(output.perceiver_loss, torch.stack([loss for loss, _ in losses]).mean())
    expected = F.cross_entropy(regions.group_logits, inputs["group_labels"])
    torch.testing.assert_close(output.group_loss, expected)
    codes = model.quantize_regions(regions.region_embeddings, inputs["group_labels"])
    head = model.region_perceiver.segmentation_head
    masks, classes = head(codes.reconstructed_regions, regions.image_features)
    through, _ = model.perceiver_loss(masks, classes, *targets, losses[-1][1])
    torch.testing.assert_close(output.codebook_loss, codes.vq_loss + codes.reconstruction_loss + through)
    torch.testing.assert_close(output.loss, output.perceiver_loss + output.codebook_loss + output.group_loss)


def test_what_is_missing_or_does_not_match_is_named(model: Any, config: MedSightConfig) -> None:
    inputs = labelled(config, ROWS)
    masks = inputs["mask_labels"]
    with pytest.raises(ValueError, match="sample 1 cites 3 region codes but has 2 mask_labels"):
        model(**{**inputs, "mask_labels": [masks[0], masks[1][:2], masks[2]]})
    with pytest.raises(ValueError, match="sample 2 cites 0 region codes but has 2 mask_labels"):
        model(**{**inputs, "mask_labels": [masks[0], masks[1], masks[0]]})
    with pytest.raises(ValueError, match="2 mask_labels for 3 samples"):
        model(**{**inputs, "mask_labels": masks[:2]})
    for change in (inputs["pixel_values"][:3], torch.cat([inputs["pixel_values"]] * 2)):
        with pytest.raises(ValueError, match=rf"{len(change)} images need {len(change) * config.image_seq_length}"):
            model(**{**inputs, "pixel_values": change})
    with pytest.raises(ValueError, match="0 images need 0 image placeholders"):
        model(**{**inputs, "pixel_values": None})
    with pytest.raises(ValueError, match=r"pixel_values has shape \(4, 3, 9, 9\); expected"):
        model(**{**inputs, "pixel_values": torch.zeros(4, 3, 9, 9)})
    early = make_batch(config, ["ttI", "tCIt"])
    code = int(early["input_ids"][1][early["input_ids"][1] >= config.region_code_start_id])
    with pytest.raises(ValueError, match=rf"row 1 has region code {code} .* no image before it"):
        model.decode_regions(**early)
    seen, region_model = perceiving(config), model.region_model
    with pytest.raises(ValueError, match=r"3 images have \[2, 0, 1\] mask_labels and \[2, 0, 3\] class_labels"):
        region_model(**{**seen, "class_labels": [*seen["class_labels"][:2], torch.zeros(3, dtype=torch.long)]})
    with pytest.raises(ValueError, match=r"3 images have \[2, 0\] mask_labels and \[2, 0\] class_labels"):
        region_model(**{**seen, "class_labels": seen["class_labels"][:2], "mask_labels": seen["mask_labels"][:2]})
    with pytest.raises(ValueError, match="mask_labels and class_labels together"):
        region_model(**{**seen, "class_labels": None})
    with pytest.raises(ValueError, match="mask_labels and class_labels together"):
        region_model(seen["pixel_values"], group_labels=seen["group_labels"])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds; images alone are for region_model"):
        model(pixel_values=seen["pixel_values"])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


COMPILED_ALWAYS = ("clip-qwen3", "unet-qwen3-pooled")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in COMPILED_ALWAYS else pytest.mark.slow) for name in CONFIGURATIONS],
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
    for masks, others in zip(given.mask_logits, expected.mask_logits, strict=True):
        torch.testing.assert_close(masks, others, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("training", ["text", "perceiver"])
def test_forward_and_backward_compile(training: str) -> None:
    config = make_config("clip-qwen3")
    model = make_model(config).train()
    # The matcher solves an assignment on the CPU: a graph of its own.
    inputs = labelled(config, ROWS[:2])
    if training == "perceiver":
        model, inputs = model.region_model, perceiving(config)
    expected = gradients(model, inputs)
    torch.compiler.reset()
    given = gradients(torch.compile(model, backend="aot_eager", fullgraph=training == "text"), inputs)
    for key, gradient in given.items():
        wanted = expected.get(key.removeprefix("_orig_mod."), torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
    assert set(expected) <= {key.removeprefix("_orig_mod.") for key in given}


def test_embeddings_can_be_resized(config: MedSightConfig) -> None:
    model, batch = make_model(copy.deepcopy(config)), make_batch(config, ROWS)
    expected = model.decode_regions(**batch)
    size = config.text_config.vocab_size
    model.resize_token_embeddings(size + 5, pad_to_multiple_of=64)
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 384
    assert model.config.text_config.vocab_size == 384
    given = model.decode_regions(**batch)
    for masks, others in zip(given.mask_logits, expected.mask_logits, strict=True):
        torch.testing.assert_close(masks, others)
    assert model(**labelled(config, ROWS)).loss.isfinite()


def test_with_group_norm_a_picture_in_training_does_not_see_the_others() -> None:
    torch.manual_seed(0)
    pixels = torch.randn(3, 3, 32, 32)

    def difference(norm_groups: int | None) -> float:
        config = make_config("unet-qwen3-pooled", vision_config={**UNET, "norm_groups": norm_groups})
        tower = make_model(config).model.vision_tower.train()
        return float((tower(pixels).last_hidden_state[:1] - tower(pixels[:1]).last_hidden_state).abs().max())

    assert difference(2) < 1e-5 < difference(None)
    with pytest.raises(ValueError, match="norm_groups=3 does not divide"):
        make_config("unet-qwen3-pooled", vision_config={**UNET, "norm_groups": 3})


def test_nothing_is_kept_on_the_modules_between_calls(model: Any, config: MedSightConfig) -> None:
    def attributes() -> dict[str, set[str]]:
        return {path: set(vars(module)) for path, module in model.named_modules()}

    batch = make_batch(config, ROWS)
    model(**labelled(config, ROWS)), model.decode_regions(**batch)
    before, first = attributes(), model.decode_regions(**batch)
    model.decode_regions(**make_batch(config, ["ItCC"], seed=3))
    again = model.decode_regions(**batch)
    assert attributes() == before
    for masks, others in zip(first.mask_logits, again.mask_logits, strict=True):
        assert torch.equal(masks, others)


def test_outputs_come_as_tuples_on_request(model: Any, batch: Inputs) -> None:
    output = model(**batch, return_dict=False)
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[0], model(**batch).logits)


@pytest.mark.parametrize("auto_class", [name for name in AUTO_MAP if name.startswith("AutoModel")])
def test_the_installed_model_is_known_to_every_auto_class_of_a_checkpoint(auto_class: str) -> None:
    """Else transformers asks whether to run the checkpoint's own code."""
    config = MedSightConfig.from_preset("tiny", auto_map=AUTO_MAP)
    kind = MedSightRegionModel if auto_class == "AutoModelForMaskGeneration" else MedSightForConditionalGeneration
    assert type(getattr(transformers, auto_class).from_config(config)) is kind
