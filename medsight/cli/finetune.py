"""Fine-tunes a checkpoint on a folder of images with masks: `medsight finetune`."""

from pathlib import Path
from typing import Annotated

import typer

from medsight.cli.console import Json, results
from medsight.cli.data_options import Data, Layout, Modality, Names, Patient, Rename, Site, Structure, described


def command(
    data: Data,
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder of the run; one that was begun is resumed.")],
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Checkpoint to start from  [default: medsight-nano].")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, metavar="N", help="What all of it may take, about.")] = 30.0,
    replay: Annotated[
        str | None, typer.Option(metavar="PATH", help="Data that the model should not forget, in any layout.")
    ] = None,
    layout: Layout = None,
    modality: Modality = None,
    site: Site = None,
    structure: Structure = None,
    names: Names = None,
    patient: Patient = None,
    groups: Annotated[
        str | None, typer.Option(metavar="FILE", help="YAML: code group -> [MODALITY/SITE, ...].")
    ] = None,
    rename: Rename = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all chance.")] = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Write the recipe, DIR/finetune.yaml, and stop.")] = False,
    accept_problems: Annotated[
        bool, typer.Option("--accept-problems", help="Train though the data promise little.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a model of your own from images with masks: check, extend, train, evaluate before and after, report.

    Structures and groups that the checkpoint does not know are added to it. DIR gets finetune.yaml (the recipe), model
    and report.html. A run that was killed goes on with the same command.
    """
    from medsight.checkpoint import shipped_checkpoint
    from medsight.data.sources import find_source
    from medsight.training.finetune import REPORT, finetune

    told = described(names, rename, modality=modality, site=site, structure=structure, patient=patient)
    with results(as_json) as out:
        done = finetune(
            find_source(data, layout, **told),
            Path(output),
            shipped_checkpoint() if model is None else Path(model),
            replay=None if replay is None else find_source(replay),
            minutes=minutes,
            groups=groups,
            seed=seed,
            accept_problems=accept_problems,
            plan_only=plan,
            say=lambda line: typer.echo(line, err=True),
        )
        report = Path(output) / REPORT
        text = f"Written to {done}" if plan else f"Written to {done}; what came of it: {report}"
        out.show({"written": str(done), "report": None if plan else str(report)}, text)
