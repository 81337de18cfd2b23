"""What a verb of the command line says: results to standard output, everything else to standard error."""

import io
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Annotated, Any, TextIO

import typer

from medsight.text import Table, align, printable


Json = Annotated[bool, typer.Option("--json", help="Print results as JSON, an object a line, and nothing else.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")]


@dataclass
class Results:
    """Prints results.

    Example:

    ```python
    from medsight.cli.console import results

    with results(as_json=False) as out:
        out.show({"codes": 1}, [["code", "group"], ["[C0_1]", "CT torso"]])
    ```
    """

    stream: TextIO
    as_json: bool

    def show(self, content: Mapping[str, Any], *parts: str | Table) -> None:
        """One result: `content` as a line of JSON, or else `parts`, which are text, and tables with a header row."""
        from tqdm import tqdm

        # A progress bar on the same terminal steps aside.
        with tqdm.external_write_mode(file=self.stream):
            if self.as_json:
                # ASCII only: a pipe may have any encoding, and nothing in it can drive a terminal.
                print(json.dumps(content), file=self.stream, flush=True)
                return
            for part in parts:
                if isinstance(part, str):
                    print(printable(part), file=self.stream, flush=True)
                elif self.stream.isatty():
                    print_rich(part, self.stream)
                else:
                    print(align(part), file=self.stream, flush=True)

    def write(self, text: str) -> None:
        """A piece of a line that appears at once, such as of an answer that is being generated; never JSON."""
        if not self.as_json:
            print(printable(text), end="", file=self.stream, flush=True)


def print_rich(rows: Table, stream: TextIO) -> None:
    """A table that fits the terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    cells = [[Text(printable(cell)) for cell in row] for row in rows]
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for title in cells[0]:
        table.add_column(title)
    for row in cells[1:]:
        table.add_row(*row)
    Console(file=stream).print(table)


@contextmanager
def results(as_json: bool) -> Iterator[Results]:
    """Where results go. While the block runs, whatever else is printed goes to standard error."""
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a name that a pipe's encoding lacks ends no run
    with redirect_stdout(sys.stderr):
        yield Results(stream, as_json)
