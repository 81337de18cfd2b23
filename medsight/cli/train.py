"""Trains a model by a recipe: `medsight train`."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from medsight.cli.console import Json, results


def command(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="Recipe (YAML file), or the name of a shipped one, such as nano.")
    ],
    stage: Annotated[str | None, typer.Option(metavar="NAME", help="Run this stage alone, such as perceiver.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as stages.perceiver=null; repeatable."),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print parameters, memory and steps of every stage, and train nothing.")
    ] = False,
    show: Annotated[
        bool,
        typer.Option(
            "--show", help="Print every value in force, where it comes from, and the topology; train nothing."
        ),
    ] = False,
    devices: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --plan: how many devices it is for  [default: WORLD_SIZE, or 1]."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a model by a recipe, through all stages.

    A run resumes where it stopped: finished stages are recognised, a killed one goes on from its last checkpoint. Over
    several processes: accelerate launch --config_file training/accelerate/ddp.yaml -m medsight.cli train CONFIG
    """
    import accelerate
    import datasets  # noqa: F401

    from medsight.training.recipe import load_recipe

    with results(as_json) as out:
        recipe = load_recipe(config, overrides or [])
        if show:
            from medsight.training.settings import settings_in_force, shown, topology

            settings, spread = settings_in_force(recipe), topology(recipe)
            out.show({"settings": settings, "topology": spread}, shown(settings, spread))
            return
        if plan:
            from medsight.training.plan import stage_plans, table

            devices = devices if devices is not None else int(os.environ.get("WORLD_SIZE", "1"))
            stages, notes = stage_plans(recipe, devices)
            described = [{**asdict(planned), "bytes_a_device": planned.whole} for planned in stages]
            content = {"devices": devices, "stages": described, "notes": notes}
            out.show(content, "\n".join([*table(stages, devices), *notes]))
            return
        from medsight.training.run import train

        folder = Path(train(recipe, stage))
        state = accelerate.PartialState()
        state.destroy_process_group()  # or its threads may be found running at the process' end
        if state.is_main_process:
            text = f"Written to {folder}; try it: medsight predict IMAGE --prompt '...' --model {folder}"
            out.show({"folder": str(folder), "stage": stage}, text)
