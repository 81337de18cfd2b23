"""The `medsight` command. A verb is a module with a function `command`, or a table `commands` of subcommands.

Only the module of the verb that was asked for is imported, so `medsight --help` is instant.
Exit status: 0 done, 1 the command refused or failed (one message on standard error), 2 wrong usage, 130 interrupted.
MEDSIGHT_DEBUG=1 shows the traceback of an error as well.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import typer
import typer.core
import typer.main

from medsight.text import printable
from medsight.version import __version__


class Verb(NamedTuple):
    """Where a verb is, what the list of verbs says of it, and the extra of the package that it needs."""

    module: str
    summary: str
    extra: str | None = None


VERBS = {
    "predict": Verb("medsight.cli.predict", "Answer a prompt about images, with one mask per region.", "medical"),
    "chat": Verb("medsight.cli.chat", "Talk about an image, turn by turn, with masks as they come.", "medical"),
    "info": Verb("medsight.cli.info", "Say what a checkpoint folder, an image or a volume is.", "medical"),
    "app": Verb("medsight.cli.serve", "Open a web page to ask about images.", "app,medical"),
    "evaluate": Verb("medsight.cli.evaluate", "Score a checkpoint, or saved predictions, on a benchmark.", "eval"),
    "compare": Verb("medsight.cli.compare", "Show paired differences between two evaluations.", "eval"),
    "codes": Verb("medsight.cli.codes", "Find out which structures each region code stands for.", "eval"),
    "benchmark": Verb("medsight.cli.benchmark", "Make a benchmark from images with masks.", "eval"),
    "train": Verb("medsight.cli.train", "Train by a recipe, resuming where a run stopped.", "train"),
    "finetune": Verb("medsight.cli.finetune", "Make a model of your own from images with masks.", "train,eval"),
    "data": Verb("medsight.cli.data", "Read data in any layout: guess, check, convert, annotate.", "train"),
    "init": Verb("medsight.cli.init", "Assemble a fresh model from pretrained parts."),
    "extend": Verb("medsight.cli.extend", "Append structures, groups and codes to a checkpoint.", "train"),
    "convert": Verb("medsight.cli.convert", "Turn published checkpoint files into one folder."),
    "push": Verb("medsight.cli.push", "Put a checkpoint folder on the Hub."),
}
# Packages of the extras: one of them missing is an installation to complete, any other missing module a defect.
OPTIONAL_PACKAGES = frozenset(
    [
        *("accelerate", "datasets", "evaluate", "gradio", "highdicom", "jinja2", "nibabel", "peft", "pyarrow"),
        *("pycocotools", "pydicom", "segmentationmetrics", "tensorboard", "tqdm", "trl", "yaml"),
    ]
)


class LazyVerbs(typer.core.TyperGroup):
    """The verbs: listed by their summaries alone, imported when one of them is resolved."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load_verb(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            # The reader of our output went away (`medsight … | head`): there is nobody left to say anything to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except ImportError as error:
            raise typer.Exit(report(error, missing_package(error, str(ctx.invoked_subcommand)))) from error
        except (ValueError, OSError) as error:
            raise typer.Exit(report(error, describe(error))) from error
        except KeyboardInterrupt:
            print("medsight: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


def load_verb(name: str) -> Any:
    """The command of a verb, or the group of its subcommands; imports its module."""
    module = importlib.import_module(VERBS[name].module)
    app = typer.Typer(help=VERBS[name].summary, add_completion=False, rich_markup_mode=None)
    if hasattr(module, "command"):
        app.command(name)(module.command)
    else:
        app.callback()(lambda: None)  # what makes a group also of a single subcommand
        for subcommand, function in module.commands.items():
            app.command(subcommand)(function)
    return typer.main.get_command(app)


def build() -> Any:
    """The command `medsight` with all its verbs."""
    # Plain help: rich's costs a third of a second and reads [C0_16] as markup.
    app = typer.Typer(cls=LazyVerbs, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})

    @app.callback(epilog="`medsight VERB --help` says more. Not a medical device.")
    def medsight(
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        """MedSIGHT: a medical vision-language model that answers in words and in masks."""

    for name, verb in VERBS.items():
        app.command(name, help=verb.summary)(lambda: None)
    return typer.main.get_command(app)


def show_version(asked: bool) -> None:
    if asked:
        print(f"medsight {__version__}")
        raise typer.Exit()


def report(error: Exception, message: str) -> int:
    """Prints a message on standard error, after the traceback if it was asked for; the exit status of a failure."""
    if os.environ.get("MEDSIGHT_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"medsight: error: {printable(message)}", file=sys.stderr)
    return 1


def describe(error: Exception) -> str:
    """The message of an error; a missing file reads 'FILE: No such file or directory', without an errno."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


def missing_package(error: ImportError, verb: str) -> str:
    """What to install; a defect of our own is raised again."""
    package = (error.name or "").partition(".")[0]
    if package and package not in OPTIONAL_PACKAGES or VERBS[verb].extra is None:
        raise error
    return f'{verb} needs {package or "more packages"}: pip install "medsight[{VERBS[verb].extra}]"'


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb (`sys.argv` by default) and returns the exit status."""
    try:
        status = build().main(arguments, prog_name="medsight", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "medsight"
        message = " ".join(error.format_message().split()).removesuffix(".")
        print(f"medsight: error: {printable(message)} (see {where} --help)", file=sys.stderr)
        return error.exit_code
    return status if isinstance(status, int) else 0
