"""Named configurations: what `MedSightConfig.from_preset` reads."""

from typing import Any


def _layers(count: int, *, width: int, inner: int, heads: int) -> dict[str, int]:
    """The sizes that a language model and a vision transformer both have."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads}
    return {**sizes, "num_hidden_layers": count}


QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 152256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
}
CLIP = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
PRESETS: dict[str, dict[str, Any]] = {
    "8b": {
        "text_config": {**QWEN3, **_layers(36, width=4096, inner=12288, heads=32)},
        "vision_config": {
            **CLIP,
            **_layers(24, width=1024, inner=4096, heads=16),
            "image_size": 336,
            "patch_size": 14,
        },
    },
    "small": {
        "text_config": {**QWEN3, **_layers(28, width=1024, inner=3072, heads=16), "tie_word_embeddings": True},
        "vision_config": {**CLIP, **_layers(12, width=768, inner=3072, heads=12), "image_size": 224, "patch_size": 16},
    },
    "tiny": {
        "text_config": {
            "model_type": "qwen3",
            "vocab_size": 320,
            **_layers(2, width=32, inner=64, heads=4),
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "pad_token_id": 256,
            "eos_token_id": 258,
        },
        "vision_config": {**CLIP, **_layers(2, width=16, inner=32, heads=2), "image_size": 28, "patch_size": 7},
        "image_token_id": 268,
        "num_region_queries": 5,
        "perceiver_num_stages": 2,
        "perceiver_num_heads": 2,
        "perceiver_head_dim": 8,
        "num_mask_classes": 7,
        "num_groups": 3,
        "codes_per_group": 4,
        "code_dim": 8,
        "region_code_start_id": 282,
    },
    "nano": {
        "text_config": {
            "model_type": "qwen3",
            "vocab_size": 1792,
            **_layers(4, width=192, inner=512, heads=4),
            "num_key_value_heads": 2,
            "head_dim": 48,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "pad_token_id": 1510,
            "eos_token_id": 1512,
        },
        "vision_config": {
            "model_type": "medsight_unet",
            "hidden_size": 48,
            "patch_size": 4,
            "hidden_sizes": [24, 48, 96, 144, 192],
            "depths": [1, 1, 2, 2],
        },
        "image_size": 224,
        "image_token_id": 1522,
        "vision_feature_layer": -1,
        "patch_pooling": 8,
        "num_region_queries": 16,
        "perceiver_num_stages": 1,
        "perceiver_num_heads": 1,
        "perceiver_head_dim": 48,
        "perceiver_ffn_multiplier": 1,
        "mask_projection_init_std": 0.02,
        "num_mask_classes": 55,
        "class_loss_weight": 0.5,
        "num_groups": 16,
        "codes_per_group": 16,
        "code_dim": 32,
        "region_code_start_id": 1536,
    },
}
