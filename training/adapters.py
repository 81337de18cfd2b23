"""LoRA and QLoRA of the language model."""

from typing import Any

import torch
from torch import nn


METHODS = ("full", "lora", "qlora")
ADAPTED = r".*\.language_model\.layers\.\d+\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def add_adapters(model: nn.Module, settings: Any) -> nn.Module:
    """The model with LoRA on the language model's linear layers, by `ConversationSettings`; the codes' rows, and
    projectors of `settings.trains`, train whole."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    config = model.config
    if settings.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # On such CPUs bitsandbytes would re-order the weights in place, and their sums with adapters be wrong.
                module.support_avx512bf16_for_cpu = False
    codes = list(range(config.region_code_start_id, config.region_code_start_id + config.num_region_codes))
    rows = {"embed_tokens": codes}
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        rows["lm_head"] = codes
    projectors = [f"{part}_projector" for part in ("vision_to_text", "text_to_vision") if part in settings.trains]
    adapters = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=ADAPTED,
        modules_to_save=projectors,
        trainable_token_indices=rows,
    )
    return get_peft_model(model, adapters)


@torch.no_grad()
def merge_quantised(model: nn.Module) -> nn.Module:
    """The model in whole numbers, adapters added to what its 4 bits stand for: PEFT would round the sums to 4 bits."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    sums = {
        name.removeprefix("base_model.model."): (
            dequantize_module_weight(layer.base_layer) + layer.get_delta_weight(layer.active_adapters[0])
        ).cpu()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    merged = model.merge_and_unload().dequantize()
    for name, weight in sums.items():
        merged.get_submodule(name).weight.copy_(weight)
    return merged
