"""The `medsight` command: what it promises whatever the subcommand."""

import importlib
import os
import signal
import subprocess
import sys
import types
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import pytest

from medsight import __version__, cli


def run_cli(*arguments: str, code: str = "import sys; from medsight.cli import main; sys.exit(main())") -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Namespace], None]], None]:
    """Puts a subcommand `probe` in place that does what it is told."""

    def install(run: Callable[[Namespace], None]) -> None:
        module = types.ModuleType("medsight_probe")
        module.add_arguments = lambda parser: parser.add_argument("--number", type=int)  # type: ignore[attr-defined]
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "medsight_probe", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", ("medsight_probe", "does what a test needs"))

    return install


def raising(error: BaseException) -> Callable[[Namespace], None]:
    def run(args: Namespace) -> None:
        raise error

    return run


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_can_be_mounted_and_describes_itself(name: str) -> None:
    module = importlib.import_module(cli.COMMANDS[name][0])
    module.add_arguments(ArgumentParser())
    assert callable(module.run)


@pytest.mark.parametrize(
    "arguments", [[], *([name] for name in cli.COMMANDS)], ids=lambda names: names[0] if names else "-"
)
def test_help_loads_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = (
        "import sys; from medsight.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('loaded:', sorted({'torch', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    out = run_cli(*arguments, "--help", code=code)
    assert "usage: medsight" in out
    assert out.endswith("loaded: []\n")


def test_help_names_every_subcommand() -> None:
    out = run_cli("--help")
    assert all(name in out for name in cli.COMMANDS)


def test_version_is_the_packages_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"medsight {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ([], "COMMAND"),
        (["predct"], "predct"),
        (["probe", "--number", "many"], "many"),
        (["probe", "--colour"], "--colour"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], culprit: str, command: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    command(lambda args: None)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("medsight: error: ") and error.count("\n") == 1
    assert culprit in error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("size 0: expected at least 1"), "size 0: expected at least 1"),
        (FileNotFoundError(2, "No such file or directory", "scan.png"), "scan.png: No such file or directory"),
        (OSError("disk full"), "disk full"),
    ],
)
def test_an_error_is_one_message_without_traceback_and_status_1(
    error: Exception, message: str, command: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    command(raising(error))
    assert cli.main(["probe"]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"medsight: error: {message}\n"
    assert captured.out == ""


def test_the_debug_variable_shows_the_traceback_too(
    command: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSIGHT_DEBUG", "1")
    command(raising(ValueError("bad")))
    assert cli.main(["probe"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and error.endswith("medsight: error: bad\n")


def test_a_defect_of_our_own_keeps_its_traceback(command: Callable) -> None:
    command(raising(ZeroDivisionError("a defect")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_control_c_ends_without_traceback(command: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    command(lambda args: os.kill(os.getpid(), signal.SIGINT))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "medsight: interrupted\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "import sys, types; from medsight import cli\n"
        "probe = types.ModuleType('probe')\n"
        "probe.add_arguments = lambda parser: None\n"
        "probe.run = lambda args: print('line\\n' * 100_000)\n"
        "sys.modules['probe'] = probe; cli.COMMANDS['probe'] = ('probe', 'prints')\n"
        "sys.exit(cli.main(['probe']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(timeout=60)
