"""The MedSIGHT model; importing it registers the classes with transformers' Auto classes."""

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskGeneration,
    AutoModelForMultimodalLM,
)

from configuration_medsight import MedSightConfig

from .modeling_medsight import MedSightForConditionalGeneration, MedSightModel
from .pretrained_medsight import MedSightPreTrainedModel
from .region_model_medsight import MedSightRegionModel


for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(MedSightConfig, MedSightForConditionalGeneration, exist_ok=True)
AutoModelForMaskGeneration.register(MedSightConfig, MedSightRegionModel, exist_ok=True)

__all__ = ["MedSightForConditionalGeneration", "MedSightModel", "MedSightPreTrainedModel", "MedSightRegionModel"]
