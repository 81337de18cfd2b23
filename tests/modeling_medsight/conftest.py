"""The model that tests of generate() ask."""

import pytest

from configuration_medsight import MedSightConfig
from modeling_medsight import MedSightForConditionalGeneration

from .configurations import make_config, make_model


@pytest.fixture(scope="module")
def config() -> MedSightConfig:
    return make_config("clip-qwen3")


@pytest.fixture(scope="module")
def model(config: MedSightConfig) -> MedSightForConditionalGeneration:
    return make_model(config)
