"""Assembles a fresh model from pretrained parts: `medsight init`."""

from typing import Annotated, Literal

import typer

from medsight.cli.console import Json, results
from medsight.cli.convert import GROUPS, Dtype, OverwriteCheckpoint


def command(
    llm: Annotated[str, typer.Option(metavar="DIR|NAME", help="A Qwen3, Qwen2 or Llama language model.")],
    image_encoder: Annotated[
        str,
        typer.Option(
            metavar="DIR|NAME|FILE",
            help="A CLIP, SigLIP, DINOv2, ResNet or ConvNeXt model, or an OpenAI- or OpenCLIP-layout CLIP file (.pt).",
        ),
    ],
    groups: Annotated[str, typer.Option(metavar="FILE", help=GROUPS)],
    output: Annotated[str, typer.Option(metavar="DIR", help="The folder to write.")],
    codes_per_group: Annotated[int, typer.Option(metavar="M", help="Codes per group.")] = 32,
    code_dim: Annotated[int, typer.Option(metavar="N", help="Width of a code.")] = 64,
    num_queries: Annotated[int, typer.Option(metavar="N", help="Region queries.")] = 20,
    num_stages: Annotated[int, typer.Option(metavar="L", help="Perceiver stages; each doubles the grid.")] = 3,
    mask_classes: Annotated[str | None, typer.Option(metavar="FILE", help="Mask classes, as in --groups.")] = None,
    class_queries: Annotated[
        bool, typer.Option("--class-queries", help="Learn a query for each mask class, too: for small data.")
    ] = False,
    vision_feature_layer: Annotated[
        int, typer.Option(metavar="N", help="Hidden state of the encoder to read; of a convolutional one, the stage.")
    ] = -2,
    image_size: Annotated[int | None, typer.Option(metavar="PX", help="Input side  [default: the encoder's].")] = None,
    activation: Annotated[
        Literal["quick_gelu", "gelu"],
        typer.Option(help="Activation of an encoder read from a .pt file, which does not tell."),
    ] = "quick_gelu",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the random weights.")] = 0,
    overwrite: OverwriteCheckpoint = False,
    as_json: Json = False,
) -> None:
    """Assemble a fresh model from a language model, an image encoder and a groups file.

    Language model and encoder keep their weights, and the language model its chat template; region perceiver,
    codebook, projectors and group classifier are random. At the end the model is asked a question without an image.
    """
    from medsight.conversion.convert import describe, sizes
    from medsight.conversion.init import QUESTION, ask, init

    with results(as_json) as out:
        config = init(
            llm,
            image_encoder,
            groups,
            output,
            mask_classes=mask_classes,
            activation=activation,
            dtype=dtype,
            seed=seed,
            overwrite=overwrite,
            codes_per_group=codes_per_group,
            code_dim=code_dim,
            num_region_queries=num_queries,
            perceiver_num_stages=num_stages,
            use_class_queries=class_queries,
            vision_feature_layer=vision_feature_layer,
            image_size=image_size,
        )
        said = {"question": QUESTION, "answer": ask(output)}
        out.show(
            {"folder": output, **sizes(config), **said},
            f"{output}: {describe(config)}",
            f"Asked {QUESTION!r}, it says: {said['answer'] or 'nothing'}",
        )
