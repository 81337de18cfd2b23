"""Images and text into MedSIGHT, grounded answers out of it; importing this registers them with transformers."""

from transformers import AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from configuration_medsight import MedSightConfig

from .chat_medsight import CHAT_TEMPLATE, IMAGE_BLOCK, PLAIN_CHAT_TEMPLATE, PUBLISHED_CHAT_TEMPLATE, own_chat_template
from .grounded_answer_medsight import GroundedAnswer, GroundedRegion
from .image_loading_medsight import load_image
from .image_processing_medsight import MedSightImageProcessor
from .processing_medsight import MedSightProcessor
from .region_codes_medsight import QWEN3_ADDED_TOKENS, add_region_codes, parse_region_code


AutoImageProcessor.register(MedSightConfig, image_processor_classes={"pil": MedSightImageProcessor}, exist_ok=True)
AutoProcessor.register(MedSightConfig, MedSightProcessor, exist_ok=True)

__all__ = [
    "CHAT_TEMPLATE",
    "IMAGE_BLOCK",
    "PLAIN_CHAT_TEMPLATE",
    "PUBLISHED_CHAT_TEMPLATE",
    "QWEN3_ADDED_TOKENS",
    "GroundedAnswer",
    "GroundedRegion",
    "MedSightImageProcessor",
    "MedSightProcessor",
    "add_region_codes",
    "load_image",
    "own_chat_template",
    "parse_region_code",
]
