"""What README.md and docs/ tell a reader to run does run, and prints what they show; links lead somewhere."""

import io
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from medsight import cli
from tests.docs.pages import ROOT, Block, Command, first_line_not_printed, read_blocks


for needed in ("mahotas", "pydicom", "nibabel", "highdicom", "datasets", "evaluate", "accelerate"):
    pytest.importorskip(needed)

from tests.docs.inputs import environment, prepare  # noqa: E402


PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
SLOW = ("docs/fine-tune.md", "docs/training.md")  # more than half a minute on one core
# Commands and Python blocks that a page marks as not to be run here, each with its reason in the page.
SKIPPED = {"README.md": 1, "docs/start.md": 3, "docs/serve.md": 1, "docs/hub.md": 2, "docs/training.md": 4}
SKIPPED["docs/fine-tune.md"] = 1
COMMENT = re.compile(r"\s+# .*$")
FOR_A_SHELL = set("|<>&;`$*\n")
TIMEOUT = 300


def blocks_of(page: str) -> list[Block]:
    return read_blocks((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in PAGES])
def test_what_a_page_says_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    blocks = blocks_of(page)
    if not any(block.language in ("console", "python") for block in blocks):
        return
    checkout = prepare(tmp_path)
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for block in blocks:
        where = f"{page}, line {block.line}"
        if block.skip:
            continue
        if block.file_name is not None:
            (checkout / block.file_name).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            status, printed = run_process([sys.executable, "-c", block.text], checkout)
            assert status == 0, f"{where}:\n{printed}"
        elif block.language == "console":
            for command in block.commands():
                check_command(command, block.append, checkout, where)


def check_command(command: Command, append: str, checkout: Path, where: str) -> None:
    """Runs a command; it succeeds, unless the page shows an error, and prints what the page shows."""
    text = f"{COMMENT.sub('', command.text)} {append}" if append else command.text
    status, printed = run(text, checkout)
    refused = any(line.startswith("medsight: error:") for line in command.output)
    assert (status != 0) == refused, f"{where}: $ {text}\nended with status {status}:\n{printed}"
    missing = first_line_not_printed(command.output, printed)
    assert missing is None, f"{where}: $ {text}\nthe page shows:\n{missing}\nbut it printed:\n{printed}"


def run(text: str, checkout: Path) -> tuple[int, str]:
    """Exit status and output of a command; `medsight` by itself runs in this process, which has torch loaded."""
    if not text.startswith("medsight ") or set(text) & FOR_A_SHELL:
        return run_process(["bash", "-c", text], checkout)
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        status = cli.main(shlex.split(text, comments=True)[1:])
    return status, output.getvalue()


def run_process(arguments: list[str], checkout: Path) -> tuple[int, str]:
    done = subprocess.run(
        arguments,
        cwd=checkout,
        env=environment(checkout),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    return done.returncode, done.stdout


def test_as_many_commands_are_skipped_as_this_file_says() -> None:
    skipped = {page: [block for block in blocks_of(page) if block.skip] for page in PAGES}
    assert all(block.language == "console" for blocks in skipped.values() for block in blocks)
    counts = {page: sum(len(block.commands()) for block in blocks) for page, blocks in skipped.items() if blocks}
    assert counts == SKIPPED


@pytest.mark.parametrize("page", SKIPPED)
def test_a_command_that_is_skipped_still_has_known_options(page: str) -> None:
    for block in blocks_of(page):
        for command in block.commands() if block.skip else ():
            words = shlex.split(command.text, comments=True)
            if words[0] == "accelerate":
                words = words[words.index("medsight.cli") :]
            if words[0] in ("medsight", "medsight.cli"):
                cli.load_verb(words[1]).make_context(words[1], words[2:])


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files_and_headings(page: str) -> None:
    path = ROOT / page
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{page}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}: {link}"


def test_every_page_is_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page for page in PAGES[1:] if f"({page})" not in readme] == []


@pytest.mark.parametrize(
    ("shown", "printed", "missing"),
    [
        (["a  b", "", "d"], "a b\nc\nd\n", None),
        (["score …", "…", "end"], "score 0.45\nmore\nend", None),
        (["d", "a"], "a\nd\n", "a"),
        (["a … c"], "a b\n", "a … c"),
        (["a.c"], "abc\n", "a.c"),
    ],
)
def test_shown_output_is_held_to_what_is_printed(shown: list[str], printed: str, missing: str | None) -> None:
    assert first_line_not_printed(shown, printed) == missing


@pytest.mark.parametrize(
    "text", ["```console\n$ a\n", "<!-- test: skip long -->\ntext\n", "<!-- test: skipped -->\n", "```console\na\n```"]
)
def test_a_page_that_cannot_be_read_as_meant_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="block"):
        [block.commands() for block in read_blocks(text)]
