"""Ablations: a recipe and its variations, trained over several seeds, and how they score side by side.

python -m medsight.training.ablations nano --output runs/ablations --seeds 0 1 2 --share 0.2 \\
    --ablations no-region-embeddings seg-token no-unified

An ablation is what its file in `training/configs/ablations/` changes of the recipe. Of each seed the whole recipe runs
first; an ablation takes over those of its finished stages that it does not change, which is the same as training them
again (for seg-token but for chance: its vocabulary has no rows for codes in those stages). All are scored on the
recipe's validation rows, which depend on the seed (so compare within one) unless `data.validation_seed` fixes them, or
with --test on its test rows. A command that was stopped goes on where it was.

Stages that no ablation changes can be left out, if a run that held out the same rows has them:

    --set data.validation_seed=0 --set model.folder=runs/nano/stages/1_perceiver/model \\
    --set stages.language_model=null --set stages.perceiver=null

OUTPUT/NAME/seed-S/run/              the run, as `medsight train` leaves it; NAME is "full" or an ablation's
OUTPUT/NAME/seed-S/SPLIT/BENCHMARK/  its evaluation, as `medsight evaluate` leaves it
OUTPUT/SPLIT.json, SPLIT.md          all figures, and the table of means and spreads
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .recipe import CONFIGS, Recipe, build, load_recipe, merge


if TYPE_CHECKING:
    from medsight.evaluation.cases import Case

FULL = "full"
FOLDER = CONFIGS / "ablations"
BENCHMARKS = ("segmentation", "diagnose-then-segment")
# Lengths of a schedule, which --share shortens.
LENGTHS = ("max_steps", "num_train_epochs", "warmup_steps", "eval_steps")
# The first stage that a change of the model's configuration reaches; others change the weights' shapes, or all stages.
FIRST_STAGE = {
    "use_region_embeddings": "vision_to_text",
    "use_region_codebook": "codebook",
    "mask_decoder": "text_to_vision",
}


def ablation(recipe: Recipe, name: str) -> Recipe:
    """A recipe with what an ablation changes.

    Raises:
        ValueError: there is no such ablation.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"ablation {name!r}: choose some of {', '.join(known)}")
    changes = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    changes = {key: value for key, value in changes.items() if key not in ("extends", "output")}
    return build(Recipe, merge(recipe.to_dict(), changes), f"ablation {name}")


def shortened(recipe: Recipe, share: float) -> Recipe:
    """A recipe whose stages all take a share of their steps.

    Raises:
        ValueError: the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"--share {share}: expected a share above 0, at most 1")

    def cut(values: Mapping[str, Any] | None) -> Any:
        if values is None or share == 1:
            return values
        return {name: scaled(value) if name in LENGTHS else value for name, value in values.items()}

    def scaled(value: Any) -> Any:
        if isinstance(value, float):
            return value if value < 1 else share * value  # below 1, a share already
        return max(1, round(share * value)) if value > 0 else value

    stages = {key: cut(values) for key, values in recipe.stages.items()}
    return dataclasses.replace(recipe, training=cut(recipe.training), stages=stages)


def shared_stages(full: Recipe, other: Recipe) -> list[str]:
    """Keys of the stages, from the first on, that two recipes train to the same result."""
    from .run import STAGES

    order = list(STAGES)
    before, now = full.model.config, other.model.config
    changed = {name for name in (*before, *now) if before.get(name) != now.get(name)}
    same_model = dataclasses.replace(full.model, config={}) == dataclasses.replace(other.model, config={})
    same_rest = all(
        getattr(full, name) == getattr(other, name)
        for name in ("seed", "data", "annotations", "augmentation", "training")
    )
    if not (same_model and same_rest and changed <= FIRST_STAGE.keys()):
        return []
    ends = [order.index(FIRST_STAGE[name]) for name in changed]
    ends += [order.index(key) for key in order if full.stages.get(key) != other.stages.get(key)]
    return [key for key in order[: min(ends, default=len(order))] if full.stages.get(key) is not None]


def take_over(full: Recipe, other: Recipe) -> None:
    """Open the folder of another run, and copy the finished stages there that it shares with the full one."""
    from .run import STAGES
    from .run_folder import open_folder

    open_folder(Path(other.output), other)
    shared = shared_stages(full, other)
    for name in ("start", *(STAGES[key].folder for key in shared)) if shared else ():
        source, target = (Path(recipe.output) / "stages" / name for recipe in (full, other))
        if source.is_dir() and not target.exists():
            scratch = target.with_name(f".copying-{name}")
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(source, scratch)
            os.replace(scratch, target)


def evaluate(
    recipe: Recipe, model: Path, benchmark: str, items: list["Case"], output: Path, note: str
) -> dict[str, Any]:
    """What metrics.json says of a run's result on the items of a benchmark, greedy and in single precision.

    Args:
        output: the evaluation's folder; a finished one is read, a begun one goes on.
        note: for its report.
    """
    from medsight.evaluation.benchmarks import load_benchmark
    from medsight.evaluation.figures import METRICS
    from medsight.evaluation.runner import Processes, RunSettings
    from medsight.evaluation.scored_run import answer, protocol_of, score

    if (output / METRICS).is_file():
        return json.loads((output / METRICS).read_text(encoding="utf-8"))
    declared, data = load_benchmark(benchmark), Path(recipe.data.regions[0]["path"])
    protocol = protocol_of(declared, None, None, {})
    settings = RunSettings(threshold=protocol.mask_protocol.threshold, dtype="float32")
    described, path = answer(
        *(str(model), output, declared, data, items, settings),
        device="auto",
        batch_size=8,
        overwrite=False,
        processes=Processes(),
    )
    return score(output, declared, items, protocol, path, described, [note], None, 0, accept_problems=False)


def run(
    recipe: Recipe, names: Sequence[str], seeds: Sequence[int], output: Path, split: str = "validation"
) -> dict[str, Any]:
    """Train and score the recipe and its ablations, seed by seed; what is finished is read.

    Args:
        names: of ablations; the whole recipe runs besides.
        split: "validation" or "test".

    Returns:
        What SPLIT.json says: `runs` {name: {seed: {figure: value}}}, `summary` and `ahead`, how far the full model is
        ahead of each ablation, paired by seed: {name: {figure: {mean, spread, n}}}; the spread is the sample standard
        deviation, None of a single seed.

    Raises:
        OSError, ValueError: see `medsight.training.run.train`.
    """
    from medsight.evaluation.readers import NoRowsError
    from medsight.files import write_json, write_text

    from .corpus import read_corpus
    from .held_out import figures, held_out_items
    from .run import train

    variants = {FULL: recipe, **{name: ablation(recipe, name) for name in names}}
    corpora = {seed: read_corpus(dataclasses.replace(recipe, seed=seed)) for seed in seeds}
    items: dict[str, dict[int, list[Case]]] = {}
    for benchmark in BENCHMARKS:
        try:
            items[benchmark] = {seed: held_out_items(corpora[seed], benchmark, split) for seed in seeds}
        except NoRowsError as error:
            if benchmark == BENCHMARKS[0]:
                raise
            print(f"left out: {error}", flush=True)
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in variants}
    for seed in seeds:
        own = {
            name: dataclasses.replace(variant, seed=seed, output=str(output / name / f"seed-{seed}" / "run"))
            for name, variant in variants.items()
        }
        for name, variant in own.items():
            print(f"{name}, seed {seed}: {variant.output}", flush=True)
            if name != FULL:
                take_over(own[FULL], variant)
            model = train(variant)
            found: dict[str, float | None] = {}
            for benchmark, by_seed in items.items():
                folder = Path(variant.output).with_name(split) / benchmark
                note = f"The {split} rows of a recipe's own data."
                metrics = evaluate(variant, model, benchmark, by_seed[seed], folder, note)
                found |= {f"{benchmark}: {figure}": value for figure, value in figures(metrics).items()}
            runs[name][seed] = found
    whole = runs[FULL]
    summary = {name: spread(list(by_seed.values())) for name, by_seed in runs.items()}
    ahead = {
        name: spread([difference(whole[seed], found) for seed, found in by_seed.items()])
        for name, by_seed in runs.items()
        if name != FULL
    }
    result = {"split": split, "seeds": list(seeds), "runs": runs, "summary": summary, "ahead": ahead}
    write_json(output / f"{split}.json", result)
    write_text(output / f"{split}.md", table(result) + "\n")
    return result


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Each figure of one over the other's; None where either has none."""
    return {name: None if one[name] is None or other[name] is None else one[name] - other[name] for name in one.keys()}


def spread(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of each figure."""
    result = {}
    for name in found[0]:
        values = [entry[name] for entry in found if entry[name] is not None]
        result[name] = {
            "mean": statistics.fmean(values) if values else None,
            "spread": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values),
        }
    return result


def table(result: Mapping[str, Any]) -> str:
    """Means ± spreads as Markdown, and how far the full model is ahead."""
    names = list(result["summary"][FULL])
    rows = [["", *names], ["---"] * (len(names) + 1)]
    for title, by_name in (("{}", result["summary"]), (f"{FULL} − {{}}", result["ahead"])):
        rows += [[title.format(name), *(cell(entry[n]) for n in names)] for name, entry in by_name.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(entry: Mapping[str, Any]) -> str:
    """0.712 ± 0.008, or 0.712 of a single seed."""
    if entry["mean"] is None:
        return "–"
    return f"{entry['mean']:.3f}" + (f" ± {entry['spread']:.3f}" if entry["spread"] is not None else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from medsight.cli import describe, report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="recipe (YAML file), or the name of a shipped one, such as nano")
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--ablations", nargs="+", default=["no-region-embeddings", "seg-token", "no-unified"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--share", type=float, default=1.0, help="of every stage's steps (default: all)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--test", action="store_true", help="score on the test rows, not the validation rows")
    args = parser.parse_args(arguments)
    try:
        recipe = shortened(load_recipe(args.recipe, args.overrides), args.share)
        split = "test" if args.test else "validation"
        print(table(run(recipe, args.ablations, args.seeds, args.output, split)))
    except (OSError, ValueError) as error:
        return report(error, describe(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
