"""Text for a terminal: lines, tables, names. Its libraries are imported on use, so that `--help` is instant."""

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


Table = Sequence[Sequence[str]]


def note(text: str) -> None:
    """A line on standard error that is no result."""
    from tqdm import tqdm

    tqdm.write(f"medsight: {printable(text)}", file=sys.stderr)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own warnings and bars off the terminal while a model is loaded; loading bars stay off."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def printable(text: str) -> str:
    """`text` with control characters, which could drive a terminal, replaced; line ends and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def align(rows: Table) -> str:
    """Rows as text, columns two spaces apart; wide (East Asian) characters count as two cells."""
    from rich.cells import cell_len, set_cell_size

    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(set_cell_size, row, widths)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def nearest(name: str, known: Iterable[Any]) -> str:
    """What to say of a name that is not among the known ones: the closest of them, and all."""
    names = [str(entry) for entry in known]
    close = difflib.get_close_matches(str(name), names, n=1)
    return f"{f'did you mean {close[0]!r}? ' if close else ''}Known are {', '.join(sorted(names))}"


def first_few(names: Sequence[str], count: int = 3, separator: str = ", ") -> str:
    """The first of the names, and an ellipsis where there are more."""
    return separator.join([*names[:count], *(["…"] if len(names) > count else [])])
