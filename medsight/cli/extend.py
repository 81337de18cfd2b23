"""Appends structures, groups and codes to a trained checkpoint: `medsight extend`."""

from typing import Annotated

import typer

from medsight.cli.console import Device, Json, results
from medsight.cli.convert import OverwriteCheckpoint
from medsight.cli.data_options import Layout, Rename, pairs
from medsight.text import quiet_transformers


GROUPS = "YAML: code group -> [MODALITY/SITE, ...], known groups or new ones  [default: one per new pair]."


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder.")],
    data: Annotated[str, typer.Option(metavar="PATH", help="Images with masks, or a data entry (.yaml).")],
    output: Annotated[str, typer.Option(metavar="DIR", help="The folder to write.")],
    layout: Layout = None,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Split to look at  [default: train].")] = None,
    groups: Annotated[str | None, typer.Option(metavar="FILE", help=GROUPS)] = None,
    rename: Rename = None,
    images: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images with something new to look at, about.")
    ] = 4096,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the new codes' k-means.")] = 0,
    device: Device = "auto",
    overwrite: OverwriteCheckpoint = False,
    as_json: Json = False,
) -> None:
    """Append what data hold and a checkpoint does not know: mask classes, code groups, their codes.

    All old ids, names and weights stay, and old answers stay what they were. What is new has still to be trained.
    """
    from medsight.conversion.convert import sizes
    from medsight.conversion.extend import extend
    from medsight.data.sources import find_source

    source = find_source(data, layout, split=split, rename=pairs("--rename", rename))
    with results(as_json) as out:
        with quiet_transformers():
            config, added = extend(
                model, source, output, groups=groups, images=images, seed=seed, device=device, overwrite=overwrite
            )
        lines = [f"new {line}" for line in added.describe(config)]
        lines = lines or [f"nothing new: {model} knows all structures and groups of {data}; copied as it is"]
        content = {"folder": output, "added": added.to_dict(), **sizes(config)}
        out.show(content, "\n".join([*lines, f"Written to {output}"]))
