"""The MedSIGHT model; importing it registers the classes with transformers' Auto classes."""

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from configuration_medsight import MedSightConfig

from .modeling_medsight import MedSightForConditionalGeneration, MedSightModel, MedSightPreTrainedModel


for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(MedSightConfig, MedSightForConditionalGeneration, exist_ok=True)

__all__ = ["MedSightForConditionalGeneration", "MedSightModel", "MedSightPreTrainedModel"]
