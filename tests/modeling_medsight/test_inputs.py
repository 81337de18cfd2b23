"""What the model is given: counted right whatever stands beside it, or refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from medsight.checkpoint import shipped_checkpoint
from modeling_medsight import MedSightForConditionalGeneration
from tests.modeling_medsight.configurations import QWEN3, make_batch, make_config, make_model, row_of_batch


GPT2 = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 256,
    "tie_word_embeddings": False,
    "vocab_size": QWEN3["vocab_size"],
    "pad_token_id": QWEN3["pad_token_id"],
}


def test_codes_of_turns_without_an_image_are_no_regions() -> None:
    config = make_config("clip-qwen3")
    model = make_model(config)
    batch = make_batch(config, ["tCt", "tItt", "tCtIt"])
    with torch.no_grad():
        together = model.generate(**batch, max_new_tokens=4, do_sample=False)
        alone = [
            model.generate(**row_of_batch(config, batch, row), max_new_tokens=4, do_sample=False) for row in range(3)
        ]
    assert [bool(len(codes)) for codes in together["region_code_ids"]] == [False, True, True]
    for row, one in enumerate(alone):
        assert torch.equal(together["region_code_ids"][row], one["region_code_ids"][0])
        torch.testing.assert_close(together["mask_logits"][row], one["mask_logits"][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_chosen_for_what_has_any(implementation: str) -> None:
    config = make_config("unet-qwen3-pooled")
    for model in (make_model(config), make_model(config).model):
        model.set_attn_implementation(implementation)
        assert model.config.text_config._attn_implementation == implementation
        assert model.config.vision_config._attn_implementation == "eager"


def test_padding_shifts_no_position_of_text_from_elsewhere() -> None:
    """Of a language model that knows absolute positions."""
    config = make_config("clip-qwen3", text_config=GPT2)
    model = make_model(config)
    batch = make_batch(config, ["ItC", "ttttttttItC"])
    with torch.no_grad():
        together = model.decode_regions(**batch)
        alone = [model.decode_regions(**row_of_batch(config, batch, row)) for row in range(2)]
    for row, one in enumerate(alone):
        torch.testing.assert_close(together.mask_logits[row], one.mask_logits[0], rtol=1e-4, atol=1e-4)


def test_rows_of_words_are_tied_whatever_the_language_model_calls_them() -> None:
    model = make_model(make_config("clip-qwen3", text_config={**GPT2, "tie_word_embeddings": True}))
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    "scaling", [{"logits_scaling": 8.0}, {"logit_scale": 0.0625}, {"final_logit_softcapping": 30.0}]
)
def test_a_head_that_scales_its_logits_is_refused(scaling: dict[str, float]) -> None:
    (name,) = scaling
    with pytest.raises(ValueError, match=f"text_config.{name}=.*scales its logits"):
        make_config("clip-qwen3", text_config={**QWEN3, **scaling})


@pytest.mark.parametrize("kind", ["swin", "swinv2", "vit_mae", "siglip2_vision_model", "hiera", "yolos", "pixtral"])
def test_an_encoder_without_a_grid_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"model_type='{kind}' is not an encoder that yields a feature grid"):
        make_config("clip-qwen3", vision_config={"model_type": kind})


def test_an_encoder_whose_features_are_no_grid_is_named() -> None:
    """The configuration of this one promises cells of 4 pixels, and it gives one of 32."""
    vision = {"model_type": "mobilevit", "image_size": 32, "patch_size": 4, "hidden_sizes": [16, 16, 16]}
    vision |= {"neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "num_attention_heads": 2}
    config = make_config("clip-qwen3", vision_config=vision, image_size=32, vision_feature_layer=-1)
    with pytest.raises(ValueError, match="model_type='mobilevit' gives features of shape .*use another encoder"):
        make_model(config).get_region_features(torch.zeros(1, 3, 32, 32))


def test_a_language_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type='mamba' is no decoder with attention"):
        make_config("clip-qwen3", text_config={"model_type": "mamba", "vocab_size": QWEN3["vocab_size"]})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mask_decoder": "heads"}, "mask_decoder='heads': choose one of"),
        ({"region_state_offset": 1}, "region_state_offset=1: choose 0"),
        ({"image_size": 40}, "image_size=40 contradicts vision_config.image_size"),
    ],
)
def test_settings_given_to_loading_are_checked_as_those_of_a_configuration(
    setting: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_model(make_config("clip-qwen3")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForImageTextToText.from_pretrained(tmp_path, **setting)


def test_what_the_processor_gives_beside_is_taken_and_not_read() -> None:
    config = make_config("clip-qwen3")
    model, batch = make_model(config), make_batch(config, ["tItt"])
    beside = {"mm_token_type_ids": torch.zeros_like(batch["input_ids"]), "original_sizes": torch.tensor([[9, 9]])}
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**batch, **settings)["sequences"]
    assert torch.equal(model.generate(**batch, **beside, **settings)["sequences"], expected)
    assert torch.equal(model(**batch, **beside).logits, model(**batch).logits)


def test_a_prompt_that_is_padded_on_the_right_is_refused() -> None:
    config = make_config("clip-qwen3")
    model, batch = make_model(config), make_batch(config, ["tItt", "tIt"])
    batch = {**batch, **{name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}}
    with pytest.raises(ValueError, match="row 1 of the prompt is padded on the right"):
        model.generate(**batch, max_new_tokens=4)


def test_images_without_regions_cost_nothing_where_no_object_has_no_weight() -> None:
    config = make_config("clip-qwen3", no_object_weight=0.0)
    pixels = torch.zeros(2, 3, config.image_size, config.image_size)
    none = {"mask_labels": [torch.zeros(0, 20, 20)] * 2, "class_labels": [torch.zeros(0, dtype=torch.long)] * 2}
    assert make_model(config).train().region_model(pixels, **none).loss.item() == 0


@pytest.mark.parametrize(
    "one", [1, np.int64(1), [np.int64(1)], np.array([1]), np.array([1, 1]), torch.tensor([1]), torch.tensor(1)]
)
def test_groups_are_numbers_of_any_kind(one: Any) -> None:
    config = make_config("clip-qwen3")
    model, batch = make_model(config), make_batch(config, ["tItt"])
    settings = {"max_new_tokens": 6, "force_region": True, "do_sample": False}
    expected = model.generate(**batch, **settings, allowed_groups=[config.group_names[1]])
    assert torch.equal(model.generate(**batch, **settings, allowed_groups=one)["sequences"], expected["sequences"])
    for wrong in (True, [True], [], 99, [1.5]):
        with pytest.raises(ValueError, match="allowed_groups=.*the groups are"):
            model.generate(**batch, **settings, allowed_groups=wrong)


def test_labels_that_would_be_passed_over_are_refused() -> None:
    config = make_config("clip-qwen3")
    model, batch = make_model(config), make_batch(config, ["tIttC"])
    for name in ("class_labels", "group_labels"):
        with pytest.raises(ValueError, match=f"{name}: of no use here; region_model takes"):
            model(**batch, labels=batch["input_ids"], **{name: torch.tensor([0])})
    shifted = torch.nn.functional.pad(batch["input_ids"], (0, 1), value=-100)[:, 1:]
    by_labels = model(**batch, labels=batch["input_ids"]).lm_loss
    torch.testing.assert_close(model(**batch, shift_labels=shifted).lm_loss, by_labels)


class Samples(Dataset):
    """Four samples of one length, each with a code and its mask."""

    def __init__(self, config: Any) -> None:
        self.batch = make_batch(config, ["tIttC", "tItCt", "tICtt", "tIttC"])
        self.masks = torch.rand(4, 1, 20, 20, generator=torch.Generator().manual_seed(0)).round()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, rows: list[int]) -> dict[str, Any]:
        batch = {name: value[rows] for name, value in self.batch.items()}
        return {**batch, "labels": batch["input_ids"], "mask_labels": [self.masks[row] for row in rows]}


def test_transformers_own_trainer_counts_right(tmp_path: Any) -> None:
    config = make_config("clip-qwen3")
    samples, norms = Samples(config), []
    for size in (4, 1):
        arguments = TrainingArguments(
            **{
                "output_dir": str(tmp_path),
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": 4 // size,
            },
            **{
                "max_steps": 1,
                "report_to": "none",
                "remove_unused_columns": False,
                "use_cpu": True,
                "save_strategy": "no",
            },
            **{"label_names": ["labels"], "logging_steps": 1, "disable_tqdm": True},
        )
        model: MedSightForConditionalGeneration = make_model(config)
        trainer = Trainer(model, arguments, samples.collate, samples, samples)
        assert trainer.evaluate()["eval_loss"] > 0
        trainer.train()
        norms.append([log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log][0])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_the_shipped_model_changes_its_attention() -> None:
    model = AutoModelForImageTextToText.from_pretrained(shipped_checkpoint(), trust_remote_code=True)
    model.set_attn_implementation("sdpa")
    assert model.config.text_config._attn_implementation == "sdpa"
