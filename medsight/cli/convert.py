"""Turns published checkpoint files into one folder: `medsight convert`."""

from typing import Annotated, Literal

import typer

from medsight.cli.console import Json, results


GROUPS = "Names of the code groups: a JSON list, or one line per group."
IN_LLM = "[default: the copy in the language model's folder]"
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Precision of all weights; auto takes the language model's."),
]
OverwriteCheckpoint = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output folder if it holds a checkpoint.")
]


def command(
    llm: Annotated[str, typer.Option(metavar="DIR", help="The published language model's folder.")],
    output: Annotated[str, typer.Option(metavar="DIR", help="The folder to write.")],
    region_perceiver: Annotated[
        str | None, typer.Option(metavar="FILE", help=f"region_perceiver.pt  {IN_LLM}.")
    ] = None,
    codebook: Annotated[str | None, typer.Option(metavar="FILE", help=f"codebook.pt  {IN_LLM}.")] = None,
    image_encoder: Annotated[str | None, typer.Option(metavar="FILE", help=f"CLIP weights, .pt  {IN_LLM}.")] = None,
    groups: Annotated[str | None, typer.Option(metavar="FILE", help=GROUPS)] = None,
    vision_feature_layer: Annotated[
        int | None,
        typer.Option(metavar="N", help="Hidden state of the encoder to read  [default: what config.json says]."),
    ] = None,
    dtype: Dtype = "auto",
    overwrite: OverwriteCheckpoint = False,
    as_json: Json = False,
) -> None:
    """Turn published checkpoint files into one folder that loads anywhere.

    Nothing in the files is executed, every tensor is accounted for, and the output folder appears whole or not at all.
    """
    from medsight.conversion.convert import convert, describe, sizes

    with results(as_json) as out:
        config = convert(
            *(llm, region_perceiver, codebook, image_encoder, output),
            groups=groups,
            vision_feature_layer=vision_feature_layer,
            dtype=dtype,
            overwrite=overwrite,
        )
        out.show({"folder": output, **sizes(config)}, f"{output}: {describe(config)}")
