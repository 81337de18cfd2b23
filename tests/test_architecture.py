"""The house's rules that hold in every room; `make contracts` checks its layers."""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
CARRIED = ("configuration_medsight", "modeling_medsight", "processing_medsight")
PACKAGES = (*CARRIED, "medsight")
SOURCES = (*PACKAGES, "training", "benchmarks", "space")
MOST_LINES = 500
MOST_CHECKPOINT_FILES = 20  # of Python
SCANNER_MODULES = ("pydicom", "nibabel")
# `medsight --help` and `import medsight` load neither torch nor transformers: these import ours when they are used.
IMPORTING_LATE = ("medsight/__init__.py", "medsight/cli/")
# grimp counts an import wherever it stands: in functions and under `if TYPE_CHECKING:` as well.
GRAPH = """
import json, sys
sys.path.insert(0, ".")
import grimp
graph = grimp.build_graph(*sys.argv[1:], cache_dir=None)
print(json.dumps({name: sorted(graph.find_modules_directly_imported_by(name)) for name in graph.modules}))
"""


def python_files(*folders: str) -> Iterator[Path]:
    """The Python files of folders of the repository, without the copies that a checkpoint folder carries."""
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            if "medsight-nano" not in path.parts:
                yield path


def own_imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """The statements that import modules of this project."""
    own = {*PACKAGES, "benchmarks"}
    found: list[ast.Import | ast.ImportFrom] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level or (node.module or "").partition(".")[0] in own:
                found.append(node)
        elif isinstance(node, ast.Import) and any(alias.name.partition(".")[0] in own for alias in node.names):
            found.append(node)
    return found


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Which file imports which, in the layout that is installed: there `training/` is `medsight.training`."""
    layout = tmp_path_factory.mktemp("layout")
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(layout)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (layout / "benchmarks").symlink_to(ROOT / "benchmarks")
    command = [sys.executable, "-c", GRAPH, *PACKAGES, "benchmarks"]
    done = subprocess.run(command, cwd=layout, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_files_import_each_other_in_no_circle(imports: dict[str, list[str]]) -> None:
    assert {"medsight.training.trainer", "benchmarks.page"} <= set(imports)
    circle: list[str] = []
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][::-1]
    assert not circle, " -> ".join(circle)


def test_only_the_command_line_imports_our_modules_late() -> None:
    """But for the metrics: each needs an extra, which a caller may do without."""
    late = []
    for path in python_files(*SOURCES):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(IMPORTING_LATE):
            continue
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                nodes = own_imports(function)
                late += [f"{name}:{node.lineno}" for node in nodes if "medsight.metrics." not in ast.unparse(node)]
    assert not late, "\n".join(sorted(set(late)))


def test_no_file_is_longer_than_a_reader_takes_in() -> None:
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in python_files(*SOURCES, "tests")}
    long = [f"{path.relative_to(ROOT)}: {count}" for path, count in lines.items() if count > MOST_LINES]
    assert not long, "\n".join(long)


def test_a_checkpoint_folder_carries_what_the_model_needs_and_no_scanner(tiny_checkpoint: Path) -> None:
    files = sorted(tiny_checkpoint.glob("*.py"))
    assert 0 < len(files) <= MOST_CHECKPOINT_FILES, [path.name for path in files]
    texts = {path.name: path.read_text("utf-8") for path in files}
    reading = [name for name, text in texts.items() if any(module in text for module in SCANNER_MODULES)]
    assert not reading, ", ".join(reading)
