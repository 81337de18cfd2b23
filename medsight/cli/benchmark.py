"""Makes benchmarks: `medsight benchmark build-diagseg`."""

from pathlib import Path
from typing import Annotated

import typer

from medsight.cli.console import Json, results


def build_diagseg(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Set, or folder of sets, in BiomedParse's layout.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Output folder, new or empty.")],
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Diagnoses: CSV with the columns image and diagnosis, or JSON lines  [default: what the data says].",
        ),
    ] = None,
    question: Annotated[
        str, typer.Option(metavar="TEXT", help="Asked of every item  [default: for the diagnosis and its mask].")
    ] = "",
    as_json: Json = False,
) -> None:
    """Make diagnose-then-segment items from test images with masks and a table of diagnoses.

    Only patients all of whose images are test images. The output folder's README.md says what was made.
    """
    from medsight.evaluation.diagseg import QUESTION, build

    with results(as_json) as out:
        counts = build(path, output, table, question or QUESTION)
        left_out = {reason: count for reason, count in sorted(counts.items()) if reason != "items"}
        lines = [f"left out, {reason}: {count:,}" for reason, count in left_out.items()]
        lines.append(f"Written to {output}/: {counts['items']:,} items, README.md")
        out.show({"folder": str(output), "items": counts["items"], "left_out": left_out}, "\n".join(lines))


commands = {"build-diagseg": build_diagseg}
