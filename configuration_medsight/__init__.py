"""Configuration of MedSIGHT; importing it registers the class with `AutoConfig`."""

from transformers import AutoConfig

from .configuration_medsight import MedSightConfig


AutoConfig.register("medsight", MedSightConfig, exist_ok=True)

__all__ = ["MedSightConfig"]
