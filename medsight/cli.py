"""The `medsight` command: one subcommand a module, each with `add_arguments(parser)` and `run(args)`.

Only the module of the subcommand that was asked for is imported, so `medsight --help` is instant.
Exit status: 0 done, 1 the command refused or failed (one message on standard error), 2 wrong usage, 130 interrupted.
MEDSIGHT_DEBUG=1 shows the traceback of an error as well.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from medsight import __version__


COMMANDS = {
    "predict": ("medsight.predict", "answer a prompt about an image, with a mask for every region the answer cites"),
    "evaluate": ("medsight.evaluate", "score a checkpoint, or saved predictions, on a benchmark by named protocols"),
    "compare": ("medsight.compare", "paired differences between two evaluations over the same rows"),
    "codes": ("medsight.codes", "which structures each region code stands for, with a contact sheet a code"),
    "benchmark": ("medsight.benchmark", "make a benchmark from images with masks"),
    "train": ("medsight.train", "train a model by a recipe, through all stages, going on where a run stopped"),
    "convert": ("medsight.convert", "turn published checkpoint files into one folder that loads anywhere"),
    "init": ("medsight.init", "assemble a fresh model from a language model, an image encoder and a groups file"),
    "data": ("medsight.data", "check training data, or write grounded conversations from images with masks"),
}


class OneLineParser(argparse.ArgumentParser):
    """Reports wrong usage in one line, as every other error is reported."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"medsight: error: {message} (see {self.prog} --help)\n")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all subcommands; only `command`, where given, is imported and gets its arguments."""
    parser = OneLineParser(
        prog="medsight", description="MedSIGHT: a medical vision-language model that answers in words and in masks."
    )
    parser.add_argument("--version", action="version", version=f"medsight {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == command:
            importlib.import_module(module_name).add_arguments(subparser)
    return parser


def describe(error: Exception) -> str:
    """The message of an error; a missing file reads 'FILE: No such file or directory', without an errno."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand (`sys.argv` by default) and returns the exit status; wrong usage raises SystemExit(2)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        args = build_parser(command).parse_args(arguments)
        importlib.import_module(COMMANDS[args.command][0]).run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output went away (`medsight … | head`): nothing is left to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if os.environ.get("MEDSIGHT_DEBUG") == "1":
            traceback.print_exc()
        print(f"medsight: error: {describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("medsight: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
