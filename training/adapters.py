"""Stage 4: unified grounded instruction tuning; whole, or by LoRA or QLoRA; and 4b, the same on other conversations.

medsight train CONFIG.yaml --stage unified
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .items import Places
from .language import AnsweringStage, LanguageSettings


ADAPTED = r".*\.language_model\.layers\.\d+\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
PROJECTORS = ["vision_to_text_projector", "text_to_vision_projector"]


@dataclass
class UnifiedSettings(LanguageSettings):
    """Settings of stage 4.

    Attributes:
        method: `full`, `lora`, or `qlora` (the language model's weights in 4 bits, by bitsandbytes, on a GPU).
        lora_rank, lora_alpha, lora_dropout: of the adapters.
    """

    method: str = "full"
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in ("full", "lora", "qlora"):
            raise ValueError(f"stages.unified: method={self.method!r}: choose full, lora or qlora")


class UnifiedStage(AnsweringStage):
    """Trains the language model (or adapters on it), the codes' rows and both projectors."""

    key, folder, Settings = "unified", "4_unified", UnifiedSettings

    def __init__(self, settings: Any, places: Places, seed: int) -> None:
        super().__init__(settings, places, seed)
        self.shardable = settings.method == "full"  # adapters are merged into whole weights at the end

    def trains(self) -> tuple[str, ...]:
        return ("model.language_model.", "lm_head.", *(f"model.{name}." for name in PROJECTORS))

    def prepare(self, model: nn.Module) -> nn.Module:
        if self.settings.method == "full":
            return super().prepare(model)
        return add_adapters(model, self.settings)

    def finish(self, model: nn.Module) -> nn.Module:
        if self.settings.method == "full":
            return model
        return merge_quantised(model) if self.settings.method == "qlora" else model.merge_and_unload()


class UnifiedAgainStage(UnifiedStage):
    """Stage 4 once more, from where it ended, on conversations of its own: such as long answers after short ones."""

    key, folder = "unified_again", "4b_unified_again"


def add_adapters(model: nn.Module, settings: Any) -> nn.Module:
    """The model with LoRA on the language model's linear layers; code rows and projectors train whole."""
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
    adapters = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=ADAPTED,
        modules_to_save=PROJECTORS,
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
