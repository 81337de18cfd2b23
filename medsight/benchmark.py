"""Makes benchmarks: `medsight benchmark build-diagseg`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands of `medsight benchmark`."""
    from medsight.evaluation.diagseg import QUESTION

    subparsers = parser.add_subparsers(dest="benchmark_command", metavar="COMMAND", required=True)
    summary = "make diagnose-then-segment items from test images with masks and a table of diagnoses"
    build = subparsers.add_parser("build-diagseg", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    build.epilog = (
        "Only patients all of whose images are test images. The output folder's README.md says what was made."
    )
    build.add_argument("path", metavar="PATH", help="set, or folder of sets, in BiomedParse's layout")
    build.add_argument("--output", required=True, metavar="DIR", help="output folder, new or empty")
    build.add_argument(
        "--table",
        metavar="FILE",
        help="diagnoses: CSV with the columns image and diagnosis, or JSON lines (default: what the data itself says)",
    )
    build.add_argument("--question", default=QUESTION, metavar="TEXT", help="asked of every item")


def run(args: argparse.Namespace) -> None:
    """Runs a subcommand of `medsight benchmark`.

    Raises:
        OSError, ValueError: see `medsight.evaluation.diagseg.build`; nothing is written then.
    """
    from pathlib import Path

    from medsight.evaluation.diagseg import build

    if not args.question.strip():
        raise ValueError("--question is empty; ask for a diagnosis")
    table = None if args.table is None else Path(args.table)
    try:
        counts = build(Path(args.path), Path(args.output), table, args.question)
    except ModuleNotFoundError as error:
        if error.name not in ("datasets", "yaml", "pyarrow"):
            raise
        raise ValueError(f"the package {error.name!r} is not installed: pip install 'medsight[eval]'") from error
    for reason, count in sorted(counts.items()):
        if reason != "items":
            print(f"left out, {reason}: {count:,}")
    print(f"Written to {args.output}/: {counts['items']:,} items, README.md")
