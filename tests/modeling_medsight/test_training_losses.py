"""The losses of training: parts of a batch add up to the whole, and what each switch leaves in or out."""

from typing import Any

import pytest
import torch

from configuration_medsight import MedSightConfig
from modeling_medsight.loss_medsight import masks_of_classes
from tests.modeling_medsight.configurations import make_batch, make_config, make_model, random_masks


CLASS_QUERIES = {"use_class_queries": True, "auxiliary_loss": True}
COUNTS = [2, 0, 3, 1]


def perceiving(config: MedSightConfig, counts: list[int] = COUNTS) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(len(counts), 3, config.image_size, config.image_size, generator=generator),
        "mask_labels": random_masks(counts, config.mask_size),
        "class_labels": [(torch.arange(n) * 2 + 1) % config.num_mask_classes for n in counts],
    }


def grounded(config: MedSightConfig) -> dict[str, Any]:
    rows = ["ttIttCtCt", "IttttttCt", "ttItttttt"]
    batch = make_batch(config, rows)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == config.image_token_id, -100)
    counts = [row.count("C") for row in rows]
    batch |= {
        "labels": labels.masked_fill(batch["attention_mask"] == 0, -100),
        "mask_labels": random_masks(counts, config.mask_size),
    }
    if config.use_class_queries:
        batch["code_class_labels"] = [torch.tensor([3, -1]), torch.tensor([2]), torch.tensor([], dtype=torch.long)]
    return batch


def rows_of(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some samples of a batch with an image a sample."""
    return {
        name: value[rows] if isinstance(value, torch.Tensor) else [value[row] for row in rows]
        for name, value in batch.items()
    }


def gradients(model: Any, batches: list[dict[str, Any]], **counts: Any) -> tuple[dict[str, torch.Tensor], float]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, **counts).loss
        loss.backward()
        total += float(loss.detach())
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, total


@pytest.mark.parametrize("parts", [[[0], [1], [2], [3]], [[0, 1, 2], [3]], [[1], [0, 2, 3]]], ids=str)
@pytest.mark.parametrize("groups", [False, True], ids=["perceiver", "codebook"])
@pytest.mark.parametrize("unmatched", [True, False])
def test_perception_losses_of_parts_add_up_to_that_of_the_whole(
    parts: list[list[int]], groups: bool, unmatched: bool
) -> None:
    config = make_config("clip-qwen3", quantize_unmatched_regions=unmatched, **CLASS_QUERIES)
    model = make_model(config).train().region_model
    batch = perceiving(config)
    if groups:
        batch["group_labels"] = torch.tensor([0, 1, 2, 0])
    counts = {"masks": 6, "images": 4, "asked": 6}
    expected, whole = gradients(model, [batch])
    given, total = gradients(model, [rows_of(batch, part) for part in parts], loss_counts=counts)
    assert total == pytest.approx(whole, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [[[0], [1], [2]], [[0, 2], [1]], [[2], [0, 1]]], ids=str)
def test_grounding_losses_of_parts_add_up_to_that_of_the_whole(parts: list[list[int]]) -> None:
    config = make_config("clip-qwen3", **CLASS_QUERIES)
    model = make_model(config).train()
    batch = grounded(config)
    expected, whole = gradients(model, [batch])
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    counts = {"loss_counts": {"masks": 3, "codes": 2}, "num_items_in_batch": tokens}
    given, total = gradients(model, [rows_of(batch, part) for part in parts], **counts)
    assert total == pytest.approx(whole, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_matched_loss_are_those_of_a_slow_reference() -> None:
    """Against differences of the loss itself, in float64, with the pairs held."""
    config = make_config("clip-qwen3")
    loss = make_model(config).region_model.perceiver_loss
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(2, 5, 4, 4, generator=generator).requires_grad_()
    classes = torch.randn(2, 5, config.num_mask_classes + 1, generator=generator).requires_grad_()
    targets, labels = random_masks([2, 1], (4, 4)), [torch.tensor([1, 4]), torch.tensor([0])]
    value, pairs = loss(masks, classes, targets, labels)
    value.backward()
    for tensor in (masks, classes):
        flat, step = tensor.detach().flatten(), 1e-2
        for index in range(0, len(flat), 7):
            ends = []
            for sign in (1, -1):
                moved = flat.clone()
                moved[index] += sign * step
                arguments = [moved.view_as(tensor) if t is tensor else t.detach() for t in (masks, classes)]
                ends.append(float(loss(*arguments, targets, labels, pairs)[0]))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert float(tensor.grad.flatten()[index]) == pytest.approx(slope, rel=0.02, abs=2e-4)


def test_class_queries_are_learnt_without_matching() -> None:
    config = make_config("clip-qwen3", **CLASS_QUERIES)
    model = make_model(config).train().region_model
    batch = perceiving(config, [2, 1])
    output = model(**batch)
    assert output.loss == output.perceiver_loss + output.class_query_loss
    output.class_query_loss.backward()
    asked = {int(label) for labels in batch["class_labels"] for label in labels}
    rows = model.region_perceiver.class_queries.grad.abs().sum(1)
    assert {i for i, value in enumerate(rows.tolist()) if value > 0} == asked
    assert not model.region_perceiver.region_queries.grad is not None
    second = batch["class_labels"][0][1:]
    fewer = model(**batch, asked_classes=[second, torch.tensor([], dtype=torch.long)])
    alone = model(
        **{
            **rows_of(batch, [0]),
            "mask_labels": [batch["mask_labels"][0][1:]],
            "class_labels": [batch["class_labels"][0][1:]],
        }
    )
    torch.testing.assert_close(fewer.class_query_loss, alone.class_query_loss)


def test_a_model_without_class_queries_has_neither_weights_nor_losses_of_them() -> None:
    model = make_model(make_config("clip-qwen3"))
    assert not [name for name, _ in model.named_parameters() if "class_queries" in name]
    output = model.region_model(**perceiving(model.config))
    assert output.class_query_loss is None
    batch = grounded(model.config)
    assert model(**batch).alignment_loss is None
    with pytest.raises(ValueError, match="code_class_labels: of no use here"):
        model(**batch, code_class_labels=[torch.tensor([3, -1]), torch.tensor([2]), torch.tensor([])])


def test_region_queries_can_be_trained_on_some_images_alone() -> None:
    config = make_config("clip-qwen3", **CLASS_QUERIES)
    model = make_model(config).region_model
    batch = perceiving(config)
    given = model(**batch, matched_images=torch.tensor([0, 2]))
    torch.testing.assert_close(given.perceiver_loss, model(**rows_of(batch, [0, 2])).perceiver_loss)
    torch.testing.assert_close(given.class_query_loss, model(**batch).class_query_loss)
    assert len(given.region_embeddings) == 2


def test_states_of_codes_are_drawn_to_the_queries_of_their_classes() -> None:
    config = make_config("clip-qwen3", **CLASS_QUERIES)
    model = make_model(config)
    batch = grounded(config)
    core = model.model
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
    batch = grounded(config)
    given = model(**{**batch, "mask_labels": [None, *batch["mask_labels"][1:]]})
    assert [len(masks) for masks in given.mask_logits] == [0, 1, 0]
    torch.testing.assert_close(given.mask_loss, model(**rows_of(batch, [1])).mask_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given.lm_loss, model(**batch).lm_loss)


def test_unmatched_regions_can_be_kept_out_of_the_codebook() -> None:
    config = make_config("clip-qwen3", quantize_unmatched_regions=False)
    model = make_model(config).train().region_model
    batch = {**perceiving(config), "group_labels": torch.tensor([0, 1, 2, 0])}
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
    batch = perceiving(config)
    batch["pixel_values"][0, 0, 0, 0] = float("nan")
    assert not torch.isfinite(model(**batch).loss)


def test_an_asked_class_that_is_not_there_has_an_empty_mask_and_one_twice_there_has_both() -> None:
    masks = torch.zeros(3, 2, 2)
    masks[0, 0, 0] = masks[1, 1, 1] = masks[2, 0, 1] = 1
    found = masks_of_classes(masks, torch.tensor([4, 4, 1]), torch.tensor([4, 0, 1]))
    assert found.tolist() == [[[1, 0], [0, 1]], [[0, 0], [0, 0]], [[0, 1], [0, 0]]]
    assert masks_of_classes(masks[:0], torch.tensor([]), torch.tensor([2])).tolist() == [[[0, 0], [0, 0]]]
