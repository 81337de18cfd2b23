"""JSON as this package writes it."""

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> Path:
    """Writes `content`, readable, UTF-8; NaN and infinities, which JSON does not have, are refused."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return path
