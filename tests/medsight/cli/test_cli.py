"""The `medsight` command: what it promises whatever the verb."""

import io
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from typing import Annotated

import pytest
import typer

from medsight import __version__, cli


RUN = "import sys; from medsight.cli import main; sys.exit(main())"
SUBCOMMANDS = [("data", "check"), ("data", "annotate"), ("benchmark", "build-diagseg")]
COMMANDS = [(), *((name,) for name in cli.VERBS), *SUBCOMMANDS]
LEAVES = [command for command in COMMANDS if command and command not in (("data",), ("benchmark",))]
HELP_SECONDS = 0.5


def run_cli(*arguments: str, code: str = RUN, **environment: str) -> str:
    command, variables = [sys.executable, "-c", code, *arguments], {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=variables).stdout


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Puts a verb `probe` in place that does what it is told."""

    def install(run: Callable[[], None]) -> None:
        def probe(number: Annotated[int, typer.Option()] = 0) -> None:
            run()

        module = types.ModuleType("medsight_probe")
        module.command = probe  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "medsight_probe", module)
        monkeypatch.setitem(cli.VERBS, "probe", cli.Verb("medsight_probe", "Does what a test needs.", "medical"))

    return install


def raising(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_help_loads_neither_torch_nor_transformers(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys; from medsight.cli import main\n"
        "assert main() == 0\n"
        "print('loaded:', sorted({'torch', 'transformers', 'scipy', 'rich', 'gradio'} & set(sys.modules)))"
    )
    out = run_cli(*arguments, "--help", code=code)
    assert out.startswith(f"Usage: {' '.join(['medsight', *arguments])} [OPTIONS]")
    assert out.endswith("loaded: []\n")
    assert arguments not in LEAVES or "--json" in out, "every verb prints JSON on request"


def test_help_names_every_verb_with_its_whole_summary_at_once() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        out = run_cli("--help")
        seconds.append(time.perf_counter() - start)
    assert all(f"{name} " in out and verb.summary in out for name, verb in cli.VERBS.items())
    assert min(seconds) < HELP_SECONDS


def test_version_is_the_packages_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"medsight {__version__}\n"
    done = subprocess.run([sys.executable, "-m", "medsight.cli", "--version"], capture_output=True, text=True)
    assert done.stdout == f"medsight {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ([], "command"),
        (["predct"], "predict"),
        (["probe", "--number", "many"], "--number"),
        (["probe", "--colour"], "--colour"),
        (["probe", "--col\x1b[2Jour"], "--col"),
        (["data"], "command"),
        (["data", "chek"], "check"),
        (["predict", "image.png"], "--prompt"),
        (["predict", "image.png", "--prompt", "?", "--dtype", "int4"], "bfloat16"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], culprit: str, command: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    command(lambda: None)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("medsight: error: ") and captured.err.count("\n") == 1
    assert culprit in captured.err and "\x1b" not in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("size 0: expected at least 1"), "size 0: expected at least 1"),
        (FileNotFoundError(2, "No such file or directory", "scan.png"), "scan.png: No such file or directory"),
        (FileNotFoundError(2, "No such file or directory", "\x1b[2J.png"), "\ufffd[2J.png: No such file or directory"),
        (OSError("disk full"), "disk full"),
        (
            ModuleNotFoundError("No module named 'pydicom'", name="pydicom"),
            'probe needs pydicom: pip install "medsight[medical]"',
        ),
    ],
)
def test_an_error_is_one_message_and_status_1_and_debugging_shows_the_traceback_too(
    error: Exception,
    message: str,
    command: Callable,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command(raising(error))
    assert cli.main(["probe"]) == 1
    assert capsys.readouterr() == ("", f"medsight: error: {message}\n")
    monkeypatch.setenv("MEDSIGHT_DEBUG", "1")
    assert cli.main(["probe"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith(f"medsight: error: {message}\n")


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("a defect"),
        ModuleNotFoundError("No module named 'medsight.nowhere'", name="medsight.nowhere"),
    ],
    ids=["division", "module"],
)
def test_a_defect_of_our_own_keeps_its_traceback(error: Exception, command: Callable) -> None:
    command(raising(error))
    with pytest.raises(type(error)):
        cli.main(["probe"])


def test_control_c_ends_without_traceback(command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        assert cli.main(["probe"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "medsight: interrupted\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "import sys, types; from medsight import cli\n"
        "probe = types.ModuleType('probe')\n"
        "probe.command = lambda: print('line\\n' * 100_000)\n"
        "sys.modules['probe'] = probe; cli.VERBS['probe'] = cli.Verb('probe', 'Prints.')\n"
        "sys.exit(cli.main(['probe']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


def complete(words: str) -> set[str]:
    """What bash is offered after `words`."""
    count = str(len(words.split(" ")) - 1)
    return set(run_cli(_MEDSIGHT_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count).split())


def test_bash_completes_verbs_subcommands_options_and_values() -> None:
    assert complete("medsight ") >= set(cli.VERBS)
    assert complete("medsight co") == {"compare", "codes", "convert"}
    assert complete("medsight data ") >= {"check", "annotate"}
    assert complete("medsight predict --") >= {"--prompt", "--model", "--slices", "--formats", "--json", "--help"}
    assert complete("medsight predict --dtype b") == {"bfloat16"}


def test_the_completion_script_can_be_shown() -> None:
    # A CI job need not run below a shell, by which Typer would know which script to show.
    shown = run_cli("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_MEDSIGHT_COMPLETE" in shown


WIDE = [("", "phrase"), ("1", "a phrase " * 40), ("2", "\x1b[31mred\x07")]


@pytest.mark.parametrize(("is_terminal", "no_color"), [(False, False), (True, False), (True, True)])
def test_tables_are_plain_and_unwrapped_in_a_pipe_and_fit_a_terminal(
    is_terminal: bool, no_color: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medsight.cli.console import Results

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal  # type: ignore[method-assign]
    Results(stream, as_json=False).show({}, "text \x1b[2J", WIDE)
    text = stream.getvalue()
    assert "\x1b[2J" not in text and "\x1b[31mred" not in text and "\x07" not in text
    if is_terminal:
        assert max(map(len, text.split("\n"))) < 200 and "\x1b[3" not in text
    else:
        assert text.split("\n")[2] == "1  " + ("a phrase " * 40).rstrip() and "\x1b" not in text


def test_results_alone_go_to_standard_output(command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    from medsight.cli.console import results

    def run() -> None:
        with results(as_json=True) as out:
            print("a library talks")
            out.write("streamed")
            out.show({"name": "é\x1b\udcff"}, "text")

    command(run)
    assert cli.main(["probe"]) == 0
    captured = capsys.readouterr()
    assert captured.out == '{"name": "\\u00e9\\u001b\\udcff"}\n'
    assert captured.err == "a library talks\n"
