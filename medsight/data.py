"""Training data: `medsight data check` and `medsight data annotate`."""

import argparse
import importlib
from typing import Any

from medsight.cli import OneLineParser


COMMANDS = {
    "check": ("medsight.training.data.check", "read training data once, report all that is wrong with it, and count"),
    "annotate": ("medsight.training.data.annotate", "give masks their region codes and write grounded conversations"),
}
TRAINING_LIBRARIES = ("accelerate", "datasets", "peft", "pyarrow", "tqdm", "trl", "yaml")


class LazyParser(OneLineParser):
    """The parser of a subcommand whose module is imported, and adds its arguments, when it is the one asked for."""

    def __init__(self, *args: Any, module: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._module: str | None = module

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._module is not None:
            importlib.import_module(self._module).add_arguments(self)
            self._module = None
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands of `medsight data`."""
    subparsers = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True, parser_class=LazyParser)
    for name, (module, summary) in COMMANDS.items():
        subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", module=module)


def run(args: argparse.Namespace) -> None:
    """Runs a subcommand of `medsight data`.

    Raises:
        OSError, ValueError: see the subcommand's module; also if the libraries for training are not installed.
    """
    module = importlib.import_module(COMMANDS[args.data_command][0])
    try:
        module.run(args)
    except ModuleNotFoundError as error:
        if error.name not in TRAINING_LIBRARIES:
            raise
        raise ValueError(f"the package {error.name!r} is not installed: pip install 'medsight[train]'") from error
