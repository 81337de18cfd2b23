"""What all models of the family share: initial weights, what transformers needs to know, and quantisation."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.quantizers.auto import AutoQuantizationConfig

from configuration_medsight.configuration_medsight import MedSightConfig
from configuration_medsight.remote_code_medsight import RemoteCodeMixin

from .codebook_medsight import RegionCodebook
from .loss_medsight import total
from .region_perceiver_medsight import RegionPerceiver


# What sees, the codes' rows of the head, and what leads from one to the other: a mask needs all of their precision.
NOT_QUANTIZED = (
    *("vision_tower", "region_perceiver", "codebook", "group_classifier"),
    *("vision_to_text_projector", "text_to_vision_projector", "lm_head"),
)
# What the quantisation configs of transformers call the modules that they leave alone.
_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")


class MedSightPreTrainedModel(RemoteCodeMixin, PreTrainedModel):
    """Weight initialisation and what transformers needs to know about the family. Abstract: load one of its models."""

    config: MedSightConfig
    config_class = MedSightConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["RegionPerceiverStage"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that transformers also initialises modules without parameters of their own (projectors, CLIP's
        blocks); it may, since `_init_weights` leaves loaded weights alone."""
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """As [`PreTrainedModel.from_pretrained`]; a `quantization_config` is applied to the language model alone."""
        if quantization_config is not None:
            kwargs["quantization_config"] = of_language_model(quantization_config)
        return super().from_pretrained(*args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """As [`PreTrainedModel.set_attn_implementation`]; convolutions have no attention that a name could be for."""
        if isinstance(attn_implementation, str) and not has_attention(self.config.vision_config):
            attn_implementation = {
                "": attn_implementation,
                "text_config": attn_implementation,
                "vision_config": "eager",
            }
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def _is_sharded(self) -> bool:
        """Whether parameters are spread over processes (FSDP, DeepSpeed's ZeRO-3). They must then all pass through the
        same modules, in the same order: each waits there for the others' shares."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return False
        from torch.distributed.fsdp import FSDPModule

        return (
            is_deepspeed_zero3_enabled()
            or is_fsdp_managed_module(self)
            or any(isinstance(module, FSDPModule) for module in self.modules())
        )

    def _in_graph(self, loss: torch.Tensor | None, modules: Iterable[nn.Module]) -> torch.Tensor | None:
        """The same loss, and a gradient, of zeros if need be, for every weight of `modules` that is trained by several
        processes: plain data parallelism waits for the gradients of all."""
        if loss is None or not (self.training and torch.is_grad_enabled()):
            return loss
        if not torch.distributed.is_available() or not torch.distributed.is_initialized() or self._is_sharded():
            return loss
        trained = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
        return total([loss, *(weight.flatten()[:0].sum() for weight in trained)])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (RegionPerceiver, RegionCodebook)):
            for parameter in module.parameters(recurse=False):  # the queries, the codes
                init.normal_(parameter)
            self._init_layers(module)
        if isinstance(module, RegionPerceiver) and self.config.mask_projection_init_std is not None:
            init.normal_(module.segmentation_head.mask_projection.weight, std=self.config.mask_projection_init_std)

    @staticmethod
    def _init_layers(module: nn.Module) -> None:
        """Xavier-uniform linear layers and Kaiming-normal convolutions, as published."""
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                init.xavier_uniform_(layer.weight)
            elif isinstance(layer, nn.Conv2d):
                init.kaiming_normal_(layer.weight)


def has_attention(vision_config: Any) -> bool:
    """Whether an encoder has attention to choose an implementation of."""
    return hasattr(vision_config, "num_attention_heads")


def of_language_model(quantization_config: Any) -> Any:
    """The same quantisation, of the language model's layers alone.

    Args:
        quantization_config: one of transformers' (`BitsAndBytesConfig`, ...), or its content as a dict. It is not
            changed; modules that it leaves alone are left alone too.

    Raises:
        ValueError: a method that cannot leave modules alone.
    """
    config = copy.copy(quantization_config)
    if isinstance(config, dict):
        config = AutoQuantizationConfig.from_dict(config)
    field = next((field for field in _FIELDS if hasattr(config, field)), None)
    if field is None:
        raise ValueError(
            f"{type(config).__name__} has no field for modules to leave alone, and masks need the ones outside of the "
            "language model as they are: use BitsAndBytesConfig, or another that has one"
        )
    # By their names in the whole model and in the one without a head: names match from their beginning.
    names = [*(getattr(config, field) or []), *NOT_QUANTIZED, *(f"model.{name}" for name in NOT_QUANTIZED)]
    setattr(config, field, list(dict.fromkeys(names)))
    return config
