"""Tiny configurations over every slot and switch, and inputs written as short strings."""

from typing import Any

import torch

from configuration_medsight import MedSightConfig
from configuration_medsight.configuration_medsight import PRESETS
from modeling_medsight import MedSightForConditionalGeneration


QWEN3 = PRESETS["tiny"]["text_config"]
QWEN2 = {**{key: value for key, value in QWEN3.items() if key != "head_dim"}, "model_type": "qwen2"}
LLAMA = {**QWEN3, "model_type": "llama"}
# Knows absolute positions, and has names of its own for what others call embed_tokens.
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 256,
    "tie_word_embeddings": False,
}
GPT2 |= {name: QWEN3[name] for name in ("vocab_size", "pad_token_id")}
CLIP = PRESETS["tiny"]["vision_config"]
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 16,
    "mlp_ratio": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 7,
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "layer_type": "basic",
}
CONVNEXT = {
    "model_type": "convnext",
    "num_stages": 3,
    "hidden_sizes": [8, 16, 32],
    "depths": [1, 1, 1],
    "patch_size": 2,
    "image_size": 16,
}

UNET = {"model_type": "medsight_unet", "hidden_size": 16, "hidden_sizes": [4, 8, 12], "depths": [1, 2]}

CLASS_QUERIES = {"use_class_queries": True, "auxiliary_loss": True}

# Between them: every encoder and language model, with and without a CLS row, and both values of every switch.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "clip-qwen3": {},
    "clip-qwen2-head": {"text_config": QWEN2, "mask_decoder": "head", "vision_feature_layer": -1},
    "siglip-llama-previous-state": {"vision_config": SIGLIP, "text_config": LLAMA, "region_state_offset": -1},
    "dinov2-qwen3-head-previous-state": {
        "vision_config": DINOV2,
        "image_size": 28,
        "mask_decoder": "head",
        "region_state_offset": -1,
    },
    "resnet-qwen2-auxiliary-loss": {
        "vision_config": RESNET,
        "text_config": QWEN2,
        "image_size": 32,
        "vision_feature_layer": 1,
        "auxiliary_loss": True,
    },
    "convnext-llama-tied": {
        "vision_config": CONVNEXT,
        "text_config": {**LLAMA, "tie_word_embeddings": True},
        "image_size": 16,
        "vision_feature_layer": 2,
        "perceiver_num_stages": 1,
    },
    "unet-qwen3-pooled": {
        "vision_config": UNET,
        "image_size": 32,
        "vision_feature_layer": -1,
        "patch_pooling": 4,
        "perceiver_num_stages": 1,
    },
    "clip-qwen3-patches-only": {"use_region_embeddings": False, "mask_projection_init_std": 0.5},
    "clip-qwen3-seg-token": {"use_region_codebook": False, "num_groups": 1, "codes_per_group": 1},
}


# Images and cited codes in rows of unequal length: see `make_batch`.
ROWS = ["ttIttCtCt", "IttCItCCt", "tttItt"]
CLOSE = {"rtol": 1e-4, "atol": 2e-4}


def make_config(name: str, **overrides: Any) -> MedSightConfig:
    """The configuration of this name, its language model with weights large enough for states to differ visibly."""
    settings = {**PRESETS["tiny"], **CONFIGURATIONS[name], **overrides}
    return MedSightConfig(**{**settings, "text_config": {**settings["text_config"], "initializer_range": 0.3}})


def make_model(config: MedSightConfig, seed: int = 0) -> MedSightForConditionalGeneration:
    """A seeded random model that likes to cite region codes."""
    torch.manual_seed(seed)
    model = MedSightForConditionalGeneration(config).eval()
    first = config.region_code_start_id
    with torch.no_grad():
        model.lm_head.weight[first : first + config.num_region_codes] *= 4
    model.generation_config.return_dict_in_generate = True
    return model


def make_batch(config: MedSightConfig, rows: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs for texts such as `"ttItCtC"`: `I` an image block, `C` some region code, anything else some other token.

    Shorter rows are padded on the left, as for generation.
    """
    generator = torch.Generator().manual_seed(seed)

    def some(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def tokens(row: str) -> list[int]:
        ids: list[int] = []
        for letter in row:
            if letter == "I":
                ids += [config.image_token_id] * config.image_seq_length
            elif letter == "C":
                first = config.region_code_start_id
                ids.append(some(first, first + config.num_region_codes))
            else:
                ids.append(some(0, 256))
        return ids

    texts = [tokens(row) for row in rows]
    length = max(map(len, texts))
    pad = config.text_config.pad_token_id
    batch = {
        "input_ids": torch.tensor([[pad] * (length - len(text)) + text for text in texts]),
        "attention_mask": torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts]),
    }
    images = sum(row.count("I") for row in rows)
    if images:
        size = (images, 3, config.image_size, config.image_size)
        batch["pixel_values"] = 2 * torch.randn(size, generator=generator)
    return batch


def row_of_batch(config: MedSightConfig, batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch as a batch of its own, without padding."""
    images = ((batch["input_ids"] == config.image_token_id).sum(1) // config.image_seq_length).tolist()
    first = sum(images[:row])
    real = batch["attention_mask"][row].bool()
    single = {name: batch[name][row : row + 1][:, real] for name in ("input_ids", "attention_mask")}
    if images[row]:
        single["pixel_values"] = batch["pixel_values"][first : first + images[row]]
    return single


def random_masks(counts: list[int], size: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    """A boolean tensor (n, *size) for each n."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, *size, generator=generator) > 0.6 for n in counts]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_pixels(config: MedSightConfig, images: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(images, 3, *[config.image_size] * 2, generator=torch.Generator().manual_seed(seed))


def labelled(config: MedSightConfig, rows: list[str], mask_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """A batch with all labels that training on text takes."""
    batch: dict[str, Any] = make_batch(config, rows)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == config.image_token_id, -100)
    counts = [row.count("C") for row in rows]
    batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
    batch["mask_labels"] = random_masks(counts, mask_size or config.mask_size)
    if config.use_class_queries:
        batch["code_class_labels"] = [torch.arange(n) * 2 % config.num_mask_classes for n in counts]
    return batch


def perceiving(config: MedSightConfig, counts: tuple[int, ...] = (2, 0, 1), groups: bool = True) -> dict[str, Any]:
    """Inputs of perceiver training, and with `groups` of codebook training: images with so many regions."""
    batch: dict[str, Any] = {
        "pixel_values": make_pixels(config, len(counts)),
        "mask_labels": random_masks(list(counts), (40, 40)),
        "class_labels": [(torch.arange(n) * 2 + 1) % config.num_mask_classes for n in counts],
    }
    return {**batch, "group_labels": torch.arange(len(counts)) % config.num_groups} if groups else batch


def gradients(model: Any, *batches: dict[str, Any], **counts: Any) -> dict[str, torch.Tensor]:
    """The sum of the batches' losses, under "loss", and its gradients."""
    model.zero_grad()
    found = {"loss": torch.tensor(0.0)}
    for batch in batches:
        loss = model(**batch, **counts).loss
        loss.backward()
        found["loss"] = found["loss"] + loss.detach()
    return {**found, **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}
