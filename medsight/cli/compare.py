"""Compares two evaluations over the same rows: `medsight compare`."""

from pathlib import Path
from typing import Annotated

import typer

from medsight.cli.console import Json, results


def command(
    a: Annotated[str, typer.Argument(metavar="A", help="Output folder of medsight evaluate: what was before.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one: what came after.")],
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the differences as JSON too, also by modality and so on.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """Show paired differences between two evaluations of the same benchmark, data, prompts and protocol: B - A."""
    from medsight.evaluation.compare import compare, comparison_text
    from medsight.files import write_json

    with results(as_json) as out:
        result = compare(Path(a), Path(b), seed)
        if output is not None:
            write_json(Path(output), result)
        out.show(result, comparison_text(result))
