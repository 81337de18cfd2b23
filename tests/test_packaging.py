"""What an installation contains and asks for."""

import ast
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configuration_medsight", "modeling_medsight", "processing_medsight", "medsight", "training")
NOT_CODE = {".css", ".yaml", ".jinja", ".md", ".txt"}  # styles, wordings, recipes, templates, cards
SHIPPED = ROOT / "medsight" / "medsight-nano"
# What the files of a checkpoint folder may import at their top: those of our runtime dependencies that they can use.
RUNTIME_MODULES = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "scipy", "numpy", "PIL"}
COMMAND_LINE_MODULES = {
    "jinja2",
    "rich",
    "tqdm",
    "typer",
}  # of medsight/ alone; a checkpoint folder needs none of them


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this tree, built in a copy so that the tree stays as it is."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(source / "dist")]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, timeout=300)
    return zipfile.ZipFile(next((source / "dist").glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def requirements(metadata: Message) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def top_level_imports(path: Path) -> set[str]:
    """Absolute modules that a file always imports: not inside functions, `try:` or `if TYPE_CHECKING:`."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts]
    shipped = {path for path in files if SHIPPED in path.parents}
    wanted = {path for path in files if path.suffix in {".py", *NOT_CODE}} | shipped
    # `training/` is installed under the name that it is imported by.
    names = {path.relative_to(ROOT).as_posix() for path in wanted}
    expected = {f"medsight/{name}" if name.startswith("training/") else name for name in names}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_the_licence_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith("/LICENSE"))
    text = wheel.read(name).decode()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "medsight = medsight.cli:main" in wheel.read(name).decode()


def test_python_3_10_is_the_oldest(metadata: Message) -> None:
    assert metadata["Requires-Python"] == ">=3.10"


def test_the_version_is_the_packages_own(metadata: Message) -> None:
    import medsight

    assert metadata["Version"] == medsight.__version__


def test_an_installation_needs_the_runtime_dependencies_and_no_others(metadata: Message) -> None:
    runtime = {requirement.name for requirement in requirements(metadata) if requirement.marker is None}
    assert runtime == (RUNTIME_MODULES - {"PIL"}) | COMMAND_LINE_MODULES | {"pillow"}


def test_nothing_asks_for_what_pulls_a_cuda_build(metadata: Message) -> None:
    for requirement in requirements(metadata):
        assert requirement.name not in {"torchvision", "torchaudio", "timm"}
        assert not (requirement.name == "trl" and requirement.extras)


def test_every_extra_exists(metadata: Message) -> None:
    assert {"train", "eval", "medical", "app", "demo", "dev"} <= set(metadata.get_all("Provides-Extra", []))


@pytest.mark.parametrize("folder", FOLDERS[:3])
def test_a_checkpoint_folders_files_import_only_runtime_dependencies(folder: str) -> None:
    allowed = RUNTIME_MODULES | set(FOLDERS[:3]) | set(sys.stdlib_module_names)
    offending = {path.name: top_level_imports(path) - allowed for path in (ROOT / folder).glob("*.py")}
    assert not {name: modules for name, modules in offending.items() if modules}


def test_the_shipped_checkpoint_is_small_and_free_of_pickles() -> None:
    if not SHIPPED.is_dir():
        pytest.skip(f"this tree has no {SHIPPED.name}")
    files = list(SHIPPED.iterdir())
    assert all(path.is_file() for path in files)
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    assert not [path.name for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
