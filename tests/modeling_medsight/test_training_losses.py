"""The losses of training: formulas and gradients, parts of a batch that add up to the whole, and the switches."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from configuration_medsight import MedSightConfig
from modeling_medsight.loss_medsight import code_mask_loss, masks_of_classes

from .configurations import CLASS_QUERIES, CLOSE, ROWS, gradients, labelled, make_config, make_model, perceiving


COUNTS = (2, 0, 3, 1)
TEXTS = ["ttIttCtCt", "IttttttCt", "ttItttttt"]


def rows_of(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some samples of a batch with an image a sample."""
    return {
        name: value[rows] if isinstance(value, torch.Tensor) else [value[row] for row in rows]
        for name, value in batch.items()
    }


def test_losses_of_a_half_precision_model_are_float32(config: MedSightConfig) -> None:
    half = make_model(config).bfloat16().train()
    text, images = half(**labelled(config, ROWS)), half.region_model(**perceiving(config))
    of_images = [images[loss] for loss in ("perceiver_loss", "codebook_loss", "group_loss", "loss")]
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in (text.mask_loss, *of_images))
    (text.loss + images.loss).backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in half.parameters())


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
    torch.testing.assert_close(output.mask_logits, decoded.mask_logits, **CLOSE)
    torch.testing.assert_close(output.mask_loss, code_mask_loss(decoded.mask_logits, inputs["mask_labels"]))
    torch.testing.assert_close(output.loss, output.lm_loss + output.mask_loss)
    in_place = {**inputs, "labels": None, "shift_labels": F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)}
    torch.testing.assert_close(model(**in_place).lm_loss, expected)
    averaged = model(**inputs, num_items_in_batch=torch.tensor(100))
    torch.testing.assert_close(averaged.lm_loss, expected * (shifted != -100).sum() / 100)


def test_perceiver_losses_are_what_they_say(config: MedSightConfig) -> None:
    model, inputs = make_model(config).train().region_model, perceiving(config)
    torch.manual_seed(0)
    regions = model(**inputs)
    targets = inputs["mask_labels"], inputs["class_labels"]
    stages = [*(regions.auxiliary_logits or []), regions]
    pairs = model.perceiver_loss(regions.masks_queries_logits, regions.class_queries_logits, *targets)[1]
    losses = [
        model.perceiver_loss(stage["masks_queries_logits"], stage["class_queries_logits"], *targets, pairs)
        for stage in stages
    ]
    torch.testing.assert_close(regions.perceiver_loss, torch.stack([loss for loss, _ in losses]).mean())
    expected = F.cross_entropy(regions.group_logits, inputs["group_labels"])
    torch.testing.assert_close(regions.group_loss, expected)
    codes = model.quantize_regions(regions.region_embeddings, inputs["group_labels"])
    head = model.region_perceiver.segmentation_head
    masks, classes = head(codes.reconstructed_regions, regions.image_features)
    through, _ = model.perceiver_loss(masks, classes, *targets, losses[-1][1])
    torch.testing.assert_close(regions.codebook_loss, codes.vq_loss + codes.reconstruction_loss + through)
    torch.testing.assert_close(regions.loss, regions.perceiver_loss + regions.codebook_loss + regions.group_loss)


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


@pytest.mark.parametrize("parts", [[[0], [1], [2], [3]], [[0, 1, 2], [3]], [[1], [0, 2, 3]]], ids=str)
@pytest.mark.parametrize("groups", [False, True], ids=["perceiver", "codebook"])
@pytest.mark.parametrize("unmatched", [True, False])
def test_perception_losses_of_parts_add_up_to_that_of_the_whole(
    parts: list[list[int]], groups: bool, unmatched: bool
) -> None:
    config = make_config("clip-qwen3", quantize_unmatched_regions=unmatched, **CLASS_QUERIES)
    model = make_model(config).train().region_model
    batch = perceiving(config, COUNTS, groups)
    counts = {"masks": 6, "images": 4, "asked": 6}
    given = gradients(model, *(rows_of(batch, part) for part in parts), loss_counts=counts)
    torch.testing.assert_close(given, gradients(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [[[0], [1], [2]], [[0, 2], [1]], [[2], [0, 1]]], ids=str)
def test_grounding_losses_of_parts_add_up_to_that_of_the_whole(parts: list[list[int]]) -> None:
    config = make_config("clip-qwen3", **CLASS_QUERIES)
    model = make_model(config).train()
    batch = labelled(config, TEXTS)
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    batch["code_class_labels"][0][1] = -1
    counts = {"loss_counts": {"masks": 3, "codes": 2}, "num_items_in_batch": tokens}
    given = gradients(model, *(rows_of(batch, part) for part in parts), **counts)
    torch.testing.assert_close(given, gradients(model, batch), rtol=1e-4, atol=1e-5)


def test_class_queries_are_learnt_without_matching() -> None:
    config = make_config("clip-qwen3", **CLASS_QUERIES)
    model = make_model(config).train().region_model
    batch = perceiving(config, (2, 1), groups=False)
    output = model(**batch)
    assert output.loss == output.perceiver_loss + output.class_query_loss
    output.class_query_loss.backward()
    asked = {int(label) for labels in batch["class_labels"] for label in labels}
    rows = model.region_perceiver.class_queries.grad.abs().sum(1)
    assert {i for i, value in enumerate(rows.tolist()) if value > 0} == asked
    assert not model.region_perceiver.region_queries.grad is not None
    second = batch["class_labels"][0][1:]
    fewer = model(**batch, asked_classes=[second, torch.tensor([], dtype=torch.long)])
    labels = {name: [batch[name][0][1:]] for name in ("mask_labels", "class_labels")}
    alone = model(**{**rows_of(batch, [0]), **labels})
    torch.testing.assert_close(fewer.class_query_loss, alone.class_query_loss)


def test_a_model_without_class_queries_has_neither_weights_nor_losses_of_them() -> None:
    model = make_model(make_config("clip-qwen3"))
    assert not [name for name, _ in model.named_parameters() if "class_queries" in name]
    assert model.region_model(**perceiving(model.config, groups=False)).class_query_loss is None
    assert model(**labelled(model.config, TEXTS)).alignment_loss is None


def test_region_queries_can_be_trained_on_some_images_alone() -> None:
    config = make_config("clip-qwen3", **CLASS_QUERIES)
    model = make_model(config).region_model
    batch = perceiving(config, COUNTS, groups=False)
    given = model(**batch, matched_images=torch.tensor([0, 2]))
    torch.testing.assert_close(given.perceiver_loss, model(**rows_of(batch, [0, 2])).perceiver_loss)
    torch.testing.assert_close(given.class_query_loss, model(**batch).class_query_loss)
    assert len(given.region_embeddings) == 2


def test_states_of_codes_are_drawn_to_the_queries_of_their_classes() -> None:
    config = make_config("clip-qwen3", **CLASS_QUERIES)
    model = make_model(config)
    batch, core = labelled(config, TEXTS), model.model
    batch["code_class_labels"] = [torch.tensor([3, -1]), torch.tensor([2]), torch.tensor([], dtype=torch.long)]
    first, last = config.region_code_start_id, config.region_code_start_id + config.num_region_codes
    hidden = core(batch["input_ids"], batch["pixel_values"], batch["attention_mask"]).last_hidden_state
    states = core.text_to_vision_projector(hidden[(batch["input_ids"] >= first) & (batch["input_ids"] < last)])
    aims = core.region_perceiver.class_queries
    expected = ((states[0] - aims[3]).square().mean() + (states[2] - aims[2]).square().mean()) / 2 / aims.var()
    torch.testing.assert_close(model(**batch).alignment_loss, expected)
    with pytest.raises(ValueError, match="1 code_class_labels for 3 cited region codes"):
        model(**{**batch, "code_class_labels": [torch.tensor([1])]})
    nothing = [torch.full_like(labels, -1) for labels in batch["code_class_labels"]]
    assert float(model(**{**batch, "code_class_labels": nothing}).alignment_loss.detach()) == 0


def test_masks_of_a_sample_can_be_left_undecoded() -> None:
    config = make_config("clip-qwen3")
    model = make_model(config)
    batch = labelled(config, TEXTS)
    given = model(**{**batch, "mask_labels": [None, *batch["mask_labels"][1:]]})
    assert [len(masks) for masks in given.mask_logits] == [0, 1, 0]
    torch.testing.assert_close(given.mask_loss, model(**rows_of(batch, [1])).mask_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given.lm_loss, model(**batch).lm_loss)


def test_unmatched_regions_can_be_kept_out_of_the_codebook() -> None:
    config = make_config("clip-qwen3", quantize_unmatched_regions=False)
    model = make_model(config).train().region_model
    batch = perceiving(config, COUNTS)
    codes = model(**batch).quantized_codes
    assert codes[:, 0].tolist() == [0, 0, 2, 2, 2, 0]
    everything = make_model(make_config("clip-qwen3")).train().region_model
    assert len(everything(**batch).quantized_codes) == 4 * config.num_region_queries
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(**batch).codebook_loss)
    none = model(**rows_of(batch, [1]))
    assert len(none.quantized_codes) == 0 and float(none.vq_loss.detach()) == 0


def test_the_matcher_lets_the_loss_say_that_logits_are_not_finite() -> None:
    config = make_config("clip-qwen3")
    model = make_model(config).region_model
    batch = perceiving(config, groups=False)
    batch["pixel_values"][0, 0, 0, 0] = float("nan")
    assert not torch.isfinite(model(**batch).loss)


def test_an_asked_class_that_is_not_there_has_an_empty_mask_and_one_twice_there_has_both() -> None:
    masks = torch.zeros(3, 2, 2)
    masks[0, 0, 0] = masks[1, 1, 1] = masks[2, 0, 1] = 1
    found = masks_of_classes(masks, torch.tensor([4, 4, 1]), torch.tensor([4, 0, 1]))
    assert found.tolist() == [[[1, 0], [0, 1]], [[0, 0], [0, 0]], [[0, 1], [0, 0]]]
    assert masks_of_classes(masks[:0], torch.tensor([]), torch.tensor([2])).tolist() == [[[0, 0], [0, 0]]]
