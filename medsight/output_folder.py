"""An output folder that appears whole or not at all."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(output: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Makes sure that a checkpoint folder may be written.

    Raises:
        OSError: it is a file, or a folder that is not empty and may not be replaced.
        ValueError: it is, or holds, one of the inputs.
    """
    for path in inputs:
        if output.resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"output {output} would replace the input {path}; name another folder")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"output {output} is a file; name a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"output folder {output} is not empty; name another one, or add --overwrite")
    if not (output / "config.json").is_file():
        raise FileExistsError(f"output folder {output} holds something else than a checkpoint; name another one")


def check_empty(output: Path, overwrite: bool = False) -> None:
    """Raises OSError, naming it, if the output is anything but a new or empty folder."""
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"output {output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"output folder {output} is not empty; name another one")


@contextmanager
def staged_folder(output: Path, overwrite: bool, check: Callable[[Path, bool], None] = check_output) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when the block ends, or goes away if the block fails.

    Args:
        output, overwrite: for `check`, which raises where the folder may not be written.
    """
    check(output, overwrite)
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        folder, replaced = stage / "new", stage / "old"
        folder.mkdir()
        yield folder
        if output.exists():
            output.rename(replaced)
        try:
            folder.rename(output)
        except OSError:
            if replaced.exists():
                replaced.rename(output)
            raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
