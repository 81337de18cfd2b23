"""Reads the published `.pt` files that the tests write, as the converter reads them: no class but tensors' own and the
one that these files hold."""

import argparse
from pathlib import Path
from typing import Any

import torch


def read_published(path: Path) -> dict[str, Any]:
    """The content of a `.pt` file, not mapped into memory as the converter's is: a test may write the file again."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)
