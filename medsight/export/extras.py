"""Optional packages, imported where a format needs them."""

import importlib
from typing import Any


def load(module: str, purpose: str) -> Any:
    """The module, imported.

    Raises:
        ValueError: its package is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ValueError(f'{purpose}: {package} is missing; install it: pip install "medsight[medical]"') from error
