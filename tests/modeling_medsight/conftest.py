"""Every configuration, its model and a batch for it; a module whose tests need one alone gives its own `config`."""

from typing import Any

import pytest

from configuration_medsight import MedSightConfig
from modeling_medsight import MedSightForConditionalGeneration

from .configurations import CONFIGURATIONS, ROWS, make_batch, make_config, make_model


@pytest.fixture(params=list(CONFIGURATIONS), scope="module")
def config(request: pytest.FixtureRequest) -> MedSightConfig:
    return make_config(request.param)


@pytest.fixture(scope="module")
def model(config: MedSightConfig) -> MedSightForConditionalGeneration:
    """Shared by the tests of one configuration, which leave it as it is."""
    return make_model(config)


@pytest.fixture
def batch(config: MedSightConfig) -> dict[str, Any]:
    return make_batch(config, ROWS)
