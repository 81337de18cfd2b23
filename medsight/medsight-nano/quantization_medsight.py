"""Quantisation of the language model's layers alone, which hold nearly all of the weights."""

import copy
from typing import Any

from transformers.quantizers.auto import AutoQuantizationConfig


# What sees, the codes' rows of the head, and what leads from one to the other: a mask needs all of their precision.
KEPT = (
    *("vision_tower", "region_perceiver", "codebook", "group_classifier"),
    *("vision_to_text_projector", "text_to_vision_projector", "lm_head"),
)
# What the quantisation configs of transformers call the modules that they leave alone.
_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")


def of_language_model(quantization_config: Any) -> Any:
    """The same quantisation, of the language model's layers alone.

    Args:
        quantization_config: one of transformers' (`BitsAndBytesConfig`, ...), or its content as a dict; modules that
            it names to be left alone are left alone too. It is not changed.

    Raises:
        ValueError: a method that cannot leave modules alone.
    """
    if isinstance(quantization_config, dict):
        config = AutoQuantizationConfig.from_dict(dict(quantization_config))
    else:
        config = copy.copy(quantization_config)
    for field in _FIELDS:
        if hasattr(config, field):
            # By their names in the whole model and in the one without a head: names match from their beginning.
            kept = [*(getattr(config, field) or []), *KEPT, *(f"model.{name}" for name in KEPT)]
            setattr(config, field, list(dict.fromkeys(kept)))
            return config
    raise ValueError(
        f"{type(config).__name__} has no field for modules to leave alone, and masks need the ones outside of the "
        "language model as they are: use BitsAndBytesConfig, or another that has one"
    )
