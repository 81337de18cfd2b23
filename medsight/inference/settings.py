"""How to answer. Loads nothing, so that the command line can show its defaults at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


BATCH_SIZE = 8


@dataclass(frozen=True)
class AnswerSettings:
    """How to answer. Decoding is greedy.

    Example:

    ```python
    from medsight.inference.settings import AnswerSettings

    settings = AnswerSettings(max_new_tokens=64, allowed_groups=["CT torso"], force_region=True)
    assert settings.decoding()["max_new_tokens"] == 64
    ```

    Attributes:
        max_new_tokens: the answer is cut there.
        allowed_groups: names or numbers of the groups whose region codes may be cited, or "predicted" for the group
            that the model sees in the image; any group by default.
        force_region: cite at least one region code.
        threshold: probability from which on a pixel belongs to a mask.

    Raises:
        ValueError: a value is out of range.
    """

    max_new_tokens: int = 256
    allowed_groups: str | Sequence[int | str] | None = None
    force_region: bool = False
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens}: expected at least 1")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold {self.threshold}: expected a probability between 0 and 1")

    def decoding(self) -> dict[str, Any]:
        """The arguments of `generate` among the settings."""
        return {name: value for name, value in vars(self).items() if name != "threshold"}
