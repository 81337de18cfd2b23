"""The examples in docstrings run."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("processing_medsight", "medsight/scans", "medsight/inference", "medsight/export")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))


def examples(path: Path) -> list[str]:
    """The Python blocks in the docstrings of a module, its classes and functions."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, documented)]
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)]


@pytest.mark.parametrize("path", [path for path in FILES if examples(path)], ids=lambda path: path.stem)
def test_the_examples_of_a_module_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "medsight").symlink_to(ROOT / "medsight")  # of a checkout
    monkeypatch.chdir(tmp_path)
    for block in examples(path):
        exec(block, {"__name__": "example"})
