"""Compares two evaluations over the same rows: `medsight compare`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `medsight compare`."""
    parser.epilog = "Both folders must come from the same benchmark, data, prompts and protocol."
    parser.add_argument("a", metavar="A", help="output folder of medsight evaluate")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument(
        "--output", metavar="FILE", help="write the differences as JSON too, also by modality and so on"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Runs `medsight compare`.

    Raises:
        OSError, ValueError: see `medsight.evaluation.compare.compare`.
    """
    from medsight.evaluation.compare import compare, comparison_text
    from medsight.evaluation.runner import write_json

    result = compare(Path(args.a), Path(args.b), args.seed)
    if args.output is not None:
        write_json(Path(args.output), result)
    print(comparison_text(result))
