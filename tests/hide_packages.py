"""Hides the packages of this repository from a process, also where they are installed.

Scripts that act as somebody without this package run this file by its path, for they cannot import it.
"""

import sys
from typing import Any


PACKAGES = ("configuration_medsight", "modeling_medsight", "processing_medsight", "medsight", "training")


class NotInstalled:
    """Finds none of the packages."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def hide_packages() -> None:
    """From now on, importing one of them fails."""
    sys.meta_path.insert(0, NotInstalled())


def assert_hidden() -> None:
    """None of them was imported all the same."""
    assert not any(name in sys.modules for name in PACKAGES)
