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

from medsight import __version__
from tests.test_one_folder import answer_as_stranger


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configuration_medsight", "modeling_medsight", "processing_medsight", "medsight", "training")
NOT_CODE = {".css", ".yaml", ".jinja", ".md", ".txt"}  # styles, wordings, recipes, templates, cards
SHIPPED = "medsight/medsight-nano"
# What the files of a checkpoint folder may import at their top: those of our runtime dependencies that they can use.
RUNTIME_MODULES = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "scipy", "numpy", "PIL"}
# Of medsight/ alone; a checkpoint folder needs none of them.
COMMAND_LINE_MODULES = {"jinja2", "rich", "tqdm", "typer"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree as git has it, in a copy, so that the tree stays as it is; one file is left from an older version."""
    copy = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (copy / SHIPPED).glob("*.py"):
        path.unlink()
    (copy / SHIPPED / "left_medsight.py").touch()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path) -> zipfile.ZipFile:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(source / "dist")]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, timeout=300)
    return zipfile.ZipFile(next((source / "dist").glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def top_level_imports(path: Path) -> set[str]:
    """Absolute modules that a file always imports: not inside functions, `try:` or `if TYPE_CHECKING:`."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def model_code() -> set[str]:
    """The modules that a checkpoint folder carries."""
    return {path.name for name in FOLDERS[:3] for path in (ROOT / name).glob("*_medsight.py")}


def test_the_wheel_holds_every_source_file_the_shipped_models_code_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = [path.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
    shipped = {path.as_posix() for path in files if path.is_relative_to(SHIPPED) and path.suffix != ".py"}
    code = {f"{SHIPPED}/{name}" for name in model_code()}
    # `training/` is installed under the name that it is imported by.
    names = {
        f"medsight/{path.as_posix()}" if path.parts[0] == "training" else path.as_posix()
        for path in files
        if path.suffix in {".py", *NOT_CODE} and not path.is_relative_to(SHIPPED)
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == names | shipped | code


def test_the_shipped_model_copied_out_of_an_installation_answers_where_the_package_is_not(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path, [name for name in wheel.namelist() if name.startswith(SHIPPED)])
    folder = (tmp_path / SHIPPED).rename(tmp_path / "copied")
    assert answer_as_stranger(folder, tmp_path / "saved", tmp_path)


def test_an_editable_install_writes_the_code_in_place(source: Path, tmp_path: Path) -> None:
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=300)
    assert {path.name for path in (source / SHIPPED).glob("*.py")} == model_code()


def test_a_bare_checkout_writes_the_code_without_any_package(source: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", source)
    (source / SHIPPED / "left_medsight.py").touch()
    subprocess.run(
        [shutil.which("make") or "make", "nano-code", f"PYTHON={sys.executable} -I -S"],
        cwd=source,
        check=True,
        timeout=60,
    )
    assert {path.name for path in (source / SHIPPED).glob("*.py")} == model_code()


def test_the_wheel_holds_the_licence_and_the_command(wheel: zipfile.ZipFile) -> None:
    texts = {name.rpartition("/")[2]: wheel.read(name) for name in wheel.namelist() if ".dist-info/" in name}
    assert b"Apache License" in texts["LICENSE"] and b"END OF TERMS AND CONDITIONS" in texts["LICENSE"]
    assert b"medsight = medsight.cli:main" in texts["entry_points.txt"]


def test_an_installation_needs_the_runtime_dependencies_and_no_others(metadata: Message) -> None:
    wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    runtime = {requirement.name for requirement in wanted if requirement.marker is None}
    assert runtime == (RUNTIME_MODULES - {"PIL"}) | COMMAND_LINE_MODULES | {"pillow"}
    # What pulls a CUDA build is in no extra either.
    assert not {"torchvision", "torchaudio", "timm"} & {requirement.name for requirement in wanted}
    assert not [requirement for requirement in wanted if requirement.name == "trl" and requirement.extras]


def test_the_metadata_name_the_version_the_oldest_python_and_every_extra(metadata: Message) -> None:
    assert (metadata["Version"], metadata["Requires-Python"]) == (__version__, ">=3.10")
    assert {"train", "eval", "medical", "app", "demo", "dev"} <= set(metadata.get_all("Provides-Extra", []))


@pytest.mark.parametrize("folder", FOLDERS[:3])
def test_a_checkpoint_folders_files_import_only_runtime_dependencies(folder: str) -> None:
    allowed = RUNTIME_MODULES | set(FOLDERS[:3]) | set(sys.stdlib_module_names)
    offending = {path.name: top_level_imports(path) - allowed for path in (ROOT / folder).glob("*.py")}
    assert not {name: modules for name, modules in offending.items() if modules}
