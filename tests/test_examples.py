"""The examples in docstrings run, and every class that a package offers has one."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("configuration_medsight", "modeling_medsight", "processing_medsight", "medsight", "training")
FILES = [
    path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py")) if "medsight-nano" not in path.parts
]
OFFERING = ("configuration_medsight", "modeling_medsight", "processing_medsight", "medsight")
OFFERING += tuple(f"medsight.{name}" for name in ("export", "hub", "scans"))


def examples(path: Path) -> list[str]:
    """The Python blocks without prompts in the docstrings of a module, its classes and functions."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, documented)]
    blocks = [
        block for node in nodes for block in re.findall(r"```python\n(.*?)```", ast.get_docstring(node) or "", re.S)
    ]
    return [block for block in blocks if ">>>" not in block]


@pytest.mark.parametrize("path", [path for path in FILES if examples(path)], ids=lambda path: path.stem)
def test_the_examples_of_a_module_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "medsight").symlink_to(ROOT / "medsight")  # of a checkout
    monkeypatch.chdir(tmp_path)
    for block in examples(path):
        exec(block, {"__name__": "example"})


@pytest.mark.parametrize(
    "path", [path for path in FILES if ">>> " in path.read_text("utf-8")], ids=lambda path: path.stem
)
def test_the_examples_with_prompts_of_a_module_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(f"medsight.{name}" if name.startswith("training") else name)
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted and not found.failed


@pytest.mark.parametrize("package", OFFERING)
def test_every_class_that_a_package_offers_has_an_example(package: str) -> None:
    module = importlib.import_module(package)
    classes = [value for name in module.__all__ if inspect.isclass(value := getattr(module, name))]
    words = re.compile(r">>> |```python|Abstract|example stands at")
    assert not [each.__name__ for each in classes if not words.search(each.__doc__ or "")]
