"""A model spread over several devices gives what it gives on one."""

import subprocess
import sys

import pytest
from torch.utils import backend_registration


def test_a_model_spread_over_devices_answers_as_on_one() -> None:
    """Encoder, perceiver, layers, projectors and head; in a process of its own, which gets to know another device."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch knows no devices made in Python")
    command = [sys.executable, "-m", "tests.modeling_medsight.pretended_devices"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
