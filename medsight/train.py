"""Trains a model by a recipe: `medsight train`."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `medsight train`."""
    parser.epilog = (
        "A run goes on where it stopped: finished stages are recognised, a killed one resumes from its last "
        "checkpoint. Over several processes: "
        "accelerate launch --config_file training/accelerate/ddp.yaml -m medsight.cli train CONFIG"
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="recipe (YAML file), or the name of a shipped one, such as nano"
    )
    parser.add_argument("--stage", metavar="NAME", help="run this stage alone, such as perceiver")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, such as stages.unified.seed=1"
    )
    parser.add_argument(
        "--plan", action="store_true", help="print parameters, memory and steps of every stage, and train nothing"
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="with --plan: how many devices it is for (default: WORLD_SIZE, or 1)"
    )


def run(args: argparse.Namespace) -> None:
    """Runs `medsight train`.

    Raises:
        OSError, ValueError: see `training.run.train` and `training.recipe.load_recipe`.
    """
    try:
        import accelerate  # noqa: F401
        import datasets  # noqa: F401

        from medsight.training.recipe import load_recipe
    except ImportError as error:
        raise ValueError(f"training needs {error.name}: pip install 'medsight[train]'") from error
    recipe = load_recipe(args.config, args.set)
    if args.plan:
        from medsight.training.plan import plan

        print(plan(recipe, args.devices))
        return
    from medsight.training.run import train

    folder = train(recipe, args.stage)
    print(f"Written to {folder}; try it: medsight predict IMAGE --prompt '...' --model {folder}")
