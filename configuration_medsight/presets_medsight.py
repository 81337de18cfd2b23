"""Named configurations: what `MedSightConfig.from_preset` reads."""

from typing import Any


PRESETS: dict[str, dict[str, Any]] = {
    "8b": {
        "text_config": {
            "model_type": "qwen3",
            "vocab_size": 152256,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
        },
    },
    "tiny": {
        "text_config": {
            "model_type": "qwen3",
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "pad_token_id": 256,
            "eos_token_id": 258,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            "hidden_act": "quick_gelu",
        },
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
}
