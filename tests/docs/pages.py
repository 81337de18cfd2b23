"""The blocks of a Markdown page that can be run, and how its marks say that a test runs them.

Before a block, `<!-- test: skip REASON -->` says that it cannot run in a test, and `<!-- test: append ARGUMENTS -->`
that the test adds these arguments to each of its commands, to shorten a training run, say.
"""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^( *)```(\w*)\s*$")
MARK = re.compile(r"^<!-- test: (skip|append) (.+) -->$")
FILE_NAME = re.compile(r"^# ([\w-]+\.yaml)$")
RUNNABLE = ("console", "python")


@dataclass
class Command:
    """A command of a console block, and the lines that the page shows as its output."""

    text: str
    output: list[str]


@dataclass
class Block:
    """A fenced block.

    Attributes:
        language: as the fence names it.
        line: where it stands in the page, from 1.
        lines: between the fences.
        skip: why a test cannot run it.
        append: what a test adds to its commands.
    """

    language: str
    line: int
    lines: list[str]
    skip: str | None = None
    append: str | None = None

    @property
    def text(self) -> str:
        return textwrap.dedent("\n".join(self.lines)) + "\n"

    @property
    def file_name(self) -> str | None:
        """The file that a YAML block is to be saved as, which its first line says."""
        match = FILE_NAME.match(self.lines[0].strip()) if self.language == "yaml" and self.lines else None
        return match[1] if match else None

    def commands(self) -> list[Command]:
        """The commands of a console block: a `$ ` each, and what a backslash continues.

        Raises:
            ValueError: the block does not begin with a command.
        """
        commands: list[Command] = []
        continues = False
        for line in self.text.splitlines():
            if continues:
                commands[-1].text += "\n" + line
            elif line.startswith("$ "):
                commands.append(Command(line.removeprefix("$ "), []))
            elif commands:
                commands[-1].output.append(line)
            else:
                raise ValueError(f"line {self.line}: a console block begins with '$ ', not with {line!r}")
            continues = line.endswith("\\")
        return commands

    def count(self) -> int:
        """Commands of a console block; 1 of a Python block."""
        return len(self.commands()) if self.language == "console" else 1


def read_blocks(text: str) -> list[Block]:
    """All fenced blocks of a page, in order.

    Raises:
        ValueError: a fence is not closed, or a mark stands before no block that runs.
    """
    blocks: list[Block] = []
    marks: dict[str, str] = {}
    lines = iter(enumerate(text.splitlines(), 1))
    number = 0
    for number, line in lines:
        if match := MARK.match(line):
            marks[match[1]] = match[2]
        elif match := FENCE.match(line):
            block = Block(match[2], number, list(_until_closed(lines, number)), **marks)
            blocks.append(block)
            if marks and block.language not in RUNNABLE:
                raise ValueError(f"line {number}: a mark for tests before a block that no test runs")
            marks = {}
        elif line.strip() and marks or line.startswith("<!-- test:"):
            raise ValueError(f"line {number}: expected a block after the mark for tests, or a mark of a known form")
    if marks:
        raise ValueError(f"line {number}: a mark for tests before no block")
    return blocks


def _until_closed(lines: Iterator[tuple[int, str]], start: int) -> Iterator[str]:
    for _, line in lines:
        if FENCE.match(line):
            return
        yield line
    raise ValueError(f"line {start}: the block is not closed")


def first_line_not_printed(shown: list[str], printed: str) -> str | None:
    """The first line that a page shows and a command did not print, in this order; None where there is none.

    Runs of spaces count as one. `…` stands for anything; a line of it alone, for any lines.
    """
    lines = iter([" ".join(line.split()) for line in printed.splitlines()])
    for line in shown:
        wanted = " ".join(line.split())
        pattern = ".*".join(re.escape(part) for part in wanted.split("…"))
        if wanted not in ("", "…") and not any(re.fullmatch(pattern, candidate) for candidate in lines):
            return line
    return None
