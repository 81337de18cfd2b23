"""What the model is given: counted right whatever stands beside it, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from .configurations import (
    CLOSE,
    GPT2,
    QWEN3,
    labelled,
    make_batch,
    make_config,
    make_model,
    make_pixels,
    perceiving,
    row_of_batch,
)


def test_padding_shifts_no_position_of_text_from_elsewhere() -> None:
    """Of a language model that knows absolute positions."""
    config = make_config("clip-qwen3", text_config=GPT2)
    model, batch = make_model(config), make_batch(config, ["ItC", "ttttttttItC"])
    together = model.decode_regions(**batch).mask_logits
    alone = [model.decode_regions(**row_of_batch(config, batch, row)).mask_logits[0] for row in range(2)]
    torch.testing.assert_close(together, alone, **CLOSE)


@pytest.mark.parametrize(
    ("slot", "setting", "message"),
    [
        *(
            ("text_config", {**QWEN3, name: 30.0}, f"text_config.{name}=.*scales its logits")
            for name in ("logits_scaling", "logit_scale", "final_logit_softcapping")
        ),
        *(
            (
                "vision_config",
                {"model_type": kind},
                f"model_type='{kind}' is not an encoder that yields a feature grid",
            )
            for kind in ("swin", "swinv2", "vit_mae", "siglip2_vision_model", "hiera", "yolos", "pixtral")
        ),
        ("text_config", {"model_type": "mamba", "vocab_size": 320}, "model_type='mamba' is no decoder with attention"),
    ],
)
def test_a_part_that_cannot_fill_its_slot_is_refused(slot: str, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config("clip-qwen3", **{slot: setting})


def test_an_encoder_whose_features_are_no_grid_is_named() -> None:
    """The configuration of this one promises cells of 4 pixels, and it gives one of 32."""
    vision = {"model_type": "mobilevit", "image_size": 32, "patch_size": 4, "hidden_sizes": [16, 16, 16]}
    vision |= {"neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "num_attention_heads": 2}
    config = make_config("clip-qwen3", vision_config=vision, image_size=32, vision_feature_layer=-1)
    with pytest.raises(ValueError, match="model_type='mobilevit' gives features of shape .*use another encoder"):
        make_model(config).get_region_features(torch.zeros(1, 3, 32, 32))


def test_what_the_processor_gives_beside_is_taken_and_not_read() -> None:
    config = make_config("clip-qwen3")
    model, batch = make_model(config), make_batch(config, ["tItt"])
    beside = {"mm_token_type_ids": torch.zeros_like(batch["input_ids"]), "original_sizes": torch.tensor([[9, 9]])}
    expected = model.generate(**batch, max_new_tokens=4).sequences
    assert torch.equal(model.generate(**batch, **beside, max_new_tokens=4).sequences, expected)
    assert torch.equal(model(**batch, **beside).logits, model(**batch).logits)
    assert model.region_model(batch["pixel_values"], with_masks=False).masks_queries_logits is None


@torch.no_grad()
def test_no_images_are_as_none_given() -> None:
    config = make_config("clip-qwen3")
    model, batch = make_model(config), make_batch(config, ["ttt"])
    none = {"pixel_values": make_pixels(config, 0)}
    assert torch.equal(model(**batch, **none).logits, model(**batch).logits)
    assert torch.equal(model.generate(**batch, **none).sequences, model.generate(**batch).sequences)
    with pytest.raises(ValueError, match=r"shape \(0, 3, 28, 28\); expected .* one image at least"):
        model.get_region_features(**none)


def test_a_batch_whose_rows_hold_broken_blocks_is_refused() -> None:
    config = make_config("clip-qwen3")
    model, batch = make_model(config), make_batch(config, ["tIt", "tIt"])
    batch["input_ids"][0, -1], batch["input_ids"][1, -2] = config.image_token_id, 5
    with pytest.raises(ValueError, match=r"2 images need 42 .* the rows of the text have \[22, 20\]"):
        model(**batch)


@torch.no_grad()
@pytest.mark.parametrize("part", ["vision_tower", "region_perceiver", "codebook", "group_classifier", "projectors"])
def test_a_part_may_be_of_another_precision(part: str) -> None:
    model = make_model(make_config("clip-qwen3")).bfloat16()
    for name, module in model.model.named_children():
        if part.rstrip("s") in name:
            module.float()
    batch = make_batch(model.config, ["tIttC"])
    answer = model.generate(**batch, max_new_tokens=3, force_region=True)
    assert len(answer.mask_logits[0]) > 0
    model(**labelled(model.config, ["tIttC"]))
    model.region_model.decode_codes(code_indices=[[(0, 1)]], pixel_values=batch["pixel_values"])


@pytest.mark.parametrize("name", ["resnet-qwen2-auxiliary-loss", "unet-qwen3-pooled"])
def test_batch_statistics_move_only_where_the_encoder_learns(name: str) -> None:
    model = make_model(make_config(name)).train()
    batch, images = make_batch(model.config, ["tIt"]), perceiving(model.config, (2, 1))

    def statistics() -> list[torch.Tensor]:
        return [buffer.clone() for key, buffer in model.named_buffers() if "running_" in key]

    before = statistics()
    model.generate(**batch, max_new_tokens=2)
    model.model.vision_tower.requires_grad_(False)
    model.region_model(**images).loss.backward()
    assert all(map(torch.equal, statistics(), before))
    model.model.vision_tower.requires_grad_(True)
    model.region_model(**images).loss.backward()
    assert not any(map(torch.equal, statistics(), before))


def test_transformers_own_trainer_counts_right(tmp_path: Path) -> None:
    config = make_config("clip-qwen3")
    batch = labelled(config, ["tIttC", "tItCt", "tICtt", "tIttC"])  # a row each has a code, its mask and an image

    def collate(rows: list[int]) -> dict[str, Any]:
        return {
            name: [value[row] for row in rows] if name == "mask_labels" else value[rows]
            for name, value in batch.items()
        }

    norms = []
    for size in (4, 1):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=1,
            logging_steps=1,
            label_names=["labels"],
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(make_model(config), arguments, collate, list(range(4)), list(range(4)))
        assert trainer.evaluate()["eval_loss"] > 0
        assert trainer.predict(list(range(4))).predictions[0].shape == batch["input_ids"].shape + (320,)  # and no map
        trainer.train()
        norms.append([log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log][0])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
