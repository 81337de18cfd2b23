"""The blocks of a Markdown page that can be run, and how its marks say that a test runs them.

Before a block, `<!-- test: skip REASON -->` says that it cannot run in a test, and `<!-- test: append ARGUMENTS -->`
that the test adds these arguments to each of its commands, to shorten a training run, say.
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"(?:^<!-- test: (?P<mark>skip|append) (?P<value>[^\n]+) -->\n)?"
    r"^ *```(?P<language>\w*) *\n(?P<text>.*?)^ *``` *$",
    re.MULTILINE | re.DOTALL,
)
FILE_NAME = re.compile(r"# ([\w-]+\.yaml)\n")
COMMAND = re.compile(r"(?:.*\\\n)*.*")


@dataclass
class Command:
    """A command of a console block, and the lines that the page shows as its output."""

    text: str
    output: list[str]


@dataclass
class Block:
    """A fenced block: its language, its line in the page, whether a test cannot run it, and what a test appends."""

    language: str
    line: int
    text: str
    skip: bool
    append: str

    @property
    def file_name(self) -> str | None:
        """The file that a YAML block is to be saved as, which its first line says."""
        match = FILE_NAME.match(self.text) if self.language == "yaml" else None
        return match[1] if match else None

    def commands(self) -> list[Command]:
        """The commands of a console block: a `$ ` each, and what a backslash continues."""
        before, *parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)
        if before:
            raise ValueError(f"line {self.line}: a console block begins with '$ '")
        ends = [(part, match.end()) for part in parts if (match := COMMAND.match(part))]
        return [Command(part[:end], part[end:].splitlines()) for part, end in ends]


def read_blocks(text: str) -> list[Block]:
    """All fenced blocks of a page, in order.

    Raises:
        ValueError: a fence is not closed, or a mark stands before no block that runs.
    """
    blocks = []
    marks, fences = text.count("<!-- test:"), len(re.findall(r"^ *```", text, re.MULTILINE))
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        content, value = textwrap.dedent(found["text"]), found["value"] or ""
        append = value if found["mark"] == "append" else ""
        blocks.append(Block(found["language"], line, content, found["mark"] == "skip", append))
        marks -= found["language"] in ("console", "python") and found["mark"] is not None
    if marks or fences != 2 * len(blocks):
        raise ValueError("a block is not closed, or a mark for tests stands before none that a test runs")
    return blocks


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
