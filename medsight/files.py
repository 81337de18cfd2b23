"""Files and folders that appear whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_output(output: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Makes sure that a checkpoint folder may be written.

    Raises:
        OSError: it is a file, or a folder that is not empty and may not be replaced.
        ValueError: it is, or holds, one of the inputs.
    """
    for path in inputs:
        if output.resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"output {output} would replace the input {path}; name another folder")
    if not overwrite:
        check_empty(output, hint=", or add --overwrite")
    elif not (output / "config.json").is_file():
        check_empty(output, hint=": this one holds something else than a checkpoint")


def check_empty(output: Path, overwrite: bool = False, hint: str = "") -> None:
    """Raises OSError, naming it, if the output is anything but a new or empty folder."""
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"output {output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"output folder {output} is not empty; name another one{hint}")


@contextmanager
def staged_folder(output: Path, overwrite: bool, check: Callable[[Path, bool], None] = check_output) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when the block ends, or goes away if the block fails.

    Of an output that is a link, the folder that it leads to is written. An empty mount point, or the folder that the
    process runs in, is filled and not replaced.

    Args:
        output, overwrite: for `check`, which raises where the folder may not be written: before the work and after it,
            so that what came meanwhile is kept.

    Raises:
        OSError: the folder cannot be written, or is not empty and cannot be replaced.
    """
    check(output, overwrite)
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        folder, replaced = stage / "new", stage / "old"
        folder.mkdir()
        yield folder
        check(output, overwrite)
        try:
            if overwrite and output.is_dir() and any(output.iterdir()):
                output.rename(replaced)
            _put(folder, output)
        except BaseException:  # an interrupt too: with the stage goes what was replaced
            if replaced.exists() and not output.exists():
                replaced.rename(output)
            raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _put(folder: Path, output: Path) -> None:
    """Moves a folder to where there is nothing or an empty folder."""
    if not Path.cwd().is_relative_to(output):
        try:
            folder.rename(output)
            return
        except OSError:  # a mount point, if it is an empty folder
            if not output.is_dir() or any(output.iterdir()):
                raise
    fill(folder, output)


def fill(folder: Path, output: Path) -> None:
    """Moves all that is in a folder into another one, which may be on another disk: all of it or, on an error, none.

    Raises:
        FileExistsError: a file of that name is there already.
    """
    moved: list[Path] = []
    try:
        for entry in sorted(folder.iterdir()):
            if os.path.lexists(output / entry.name):
                raise FileExistsError(f"{output / entry.name} is there already; name another folder, or remove it")
            moved.append(output / entry.name)
            shutil.move(entry, moved[-1])
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its place, wait until it is on the disk, and move it there.

    Raises:
        OSError: the file's folder is not there, or the file cannot be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it, or name another file")
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """Names from a file: a JSON list, or a text file with one name per line.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not UTF-8, has no names, an empty one, or the same name twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
        names = json.loads(text) if text.startswith("[") else [line for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is no list of names, in JSON or one per line, in UTF-8 ({error})") from error
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{path}: expected a JSON list of names or one name per line, none of them empty")
    names = [name.strip() for name in names]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"{path} gives the name {repeated[0]!r} more than once")
    return names
