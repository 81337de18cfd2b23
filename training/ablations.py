"""Ablations: a recipe and its variations, trained over several seeds, and how they score side by side.

python -m medsight.training.ablations nano --output runs/ablations --seeds 0 1 2 \\
    --ablations no-region-embeddings seg-token no-unified

An ablation is what its file in `training/configs/ablations/` changes of the recipe. Of each seed the whole recipe runs
first; an ablation takes over those of its finished stages that it does not change, which is the same as training them
again (for seg-token but for chance: its vocabulary has no rows for codes in those stages). All are scored on the
recipe's validation rows, which depend on the seed (so compare within one) unless `data.validation_seed` fixes them, or
with --test on its test rows. A command that was stopped resumes where it was.

Stages that no ablation changes can be left out, if a run that held out the same rows has them:

    --set data.validation_seed=0 --set model.folder=runs/nano/stages/perceiver/model \\
    --set stages.language_model=null --set stages.perceiver=null

OUTPUT/NAME/seed-S/run/              the run, as `medsight train` leaves it; NAME is "full" or an ablation's
OUTPUT/NAME/seed-S/SPLIT/BENCHMARK/  its evaluation, as `medsight evaluate` leaves it
OUTPUT/SPLIT.json, SPLIT.md          all figures, and the table of means and spreads
"""

import argparse
import dataclasses
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from medsight.checkpoint import read_json
from medsight.evaluation.benchmarks import load_benchmark
from medsight.evaluation.cases import Case
from medsight.evaluation.figures import METRICS
from medsight.evaluation.readers import NoRowsError
from medsight.evaluation.runner import RunSettings
from medsight.evaluation.scored_run import answer, protocol_of, score
from medsight.files import staged_folder, write_json, write_text
from medsight.processes import lock
from medsight.text import note

from .corpus import read_corpus
from .held_out import figures, held_out_items
from .recipe import CONFIGS, Recipe, load_recipe
from .run import train
from .run_folder import open_folder, stage_folder
from .settings import ResolvedStage, resolve_stages


FULL = "full"
FOLDER = CONFIGS / "ablations"
BENCHMARKS = ("segmentation", "diagnose-then-segment")
# Which stages a change of the model's configuration reaches; one of any other field reaches all.
REACHED: dict[str, Callable[[ResolvedStage], bool]] = {
    "use_region_embeddings": lambda stage: stage.kind.reads == "conversations" and not stage.settings.text_only,
    "use_region_codebook": lambda stage: "codebook" in stage.settings.trains,
    "mask_decoder": lambda stage: "text_to_vision" in stage.settings.trains,
}


def ablation(recipe: Recipe, name: str) -> Recipe:
    """A recipe with what an ablation changes; a stage that it takes out need not be there.

    Raises:
        ValueError: there is no such ablation.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"ablation {name!r}: choose some of {', '.join(known)}")
    changes = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    changes = {key: value for key, value in changes.items() if key not in ("extends", "output")}
    stages = changes.get("stages", {})
    changes["stages"] = {stage: value for stage, value in stages.items() if value is not None or recipe.stage(stage)}
    return recipe.changed(changes, f"ablation {name}")


def shared_stages(full: Recipe, other: Recipe) -> list[str]:
    """Names of the stages, from the first on, that two recipes train to the same result."""
    before, now = full.model.config, other.model.config
    changed = {name for name in (*before, *now) if before.get(name) != now.get(name)}
    values, other_values = ({**recipe.to_dict(), "output": "", "stages": []} for recipe in (full, other))
    values["model"]["config"] = other_values["model"]["config"] = {}
    if values != other_values or not changed <= REACHED.keys():
        return []
    shared = []
    for resolved, entry, other_entry in zip(resolve_stages(full).values(), full.stages, other.stages, strict=False):
        if entry != other_entry or any(REACHED[name](resolved) for name in changed):
            break
        shared.append(resolved.name)
    return shared


def take_over(full: Recipe, other: Recipe) -> None:
    """Open the folder of another run, and copy the finished stages there that it shares with the full one."""
    open_folder(Path(other.output), other)
    shared = shared_stages(full, other)
    for name in ("start", *shared) if shared else ():
        source, target = (stage_folder(Path(recipe.output), name) for recipe in (full, other))
        if source.is_dir() and not target.exists():
            with staged_folder(target, overwrite=False) as folder:
                shutil.copytree(source, folder, dirs_exist_ok=True)


def evaluate(recipe: Recipe, model: Path, benchmark: str, items: list[Case], output: Path) -> dict[str, Any]:
    """What metrics.json says of a run's result on the items of a benchmark, greedy and in single precision.

    Args:
        output: the evaluation's folder; a finished one is read, a begun one is resumed.
    """
    if (output / METRICS).is_file():
        return read_json(output / METRICS)
    declared, data = load_benchmark(benchmark), Path(recipe.data.regions[0]["path"])
    protocol = protocol_of(declared, None, None, {})
    settings = RunSettings(threshold=protocol.mask_protocol.threshold, dtype="float32")
    options: dict[str, Any] = {"device": "auto", "batch_size": 8, "overwrite": False}
    remark = f"The {output.parent.name} rows of a recipe's own data."
    with lock(output, "evaluating"):
        described, path = answer(str(model), output, declared, data, items, settings, **options)
        return score(output, declared, items, protocol, path, described, [remark], None, 0, accept_problems=False)


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
        of_seed = {
            name: variant.changed({"seed": seed, "output": str(output / name / f"seed-{seed}" / "run")}, "ablations")
            for name, variant in variants.items()
        }
        for name, variant in of_seed.items():
            print(f"{name}, seed {seed}: {variant.output}", flush=True)
            if name != FULL:
                take_over(of_seed[FULL], variant)
            model = train(variant)
            found: dict[str, float | None] = {}
            for benchmark, by_seed in items.items():
                folder = Path(variant.output).with_name(split) / benchmark
                metrics = evaluate(variant, model, benchmark, by_seed[seed], folder)
                found |= {f"{benchmark}: {figure}": value for figure, value in figures(metrics).items()}
            runs[name][seed] = found
    summary = {name: spread(list(by_seed.values())) for name, by_seed in runs.items()}
    ahead = {name: spread([difference(runs[FULL][seed], runs[name][seed]) for seed in seeds]) for name in names}
    result = {"split": split, "seeds": list(seeds), "runs": runs, "summary": summary, "ahead": ahead}
    write_json(output / f"{split}.json", result)
    write_text(output / f"{split}.md", table(result) + "\n")
    return result


def difference(whole: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """How far each figure is above the other's; None where either has none."""
    return {name: None if None in (value, other[name]) else value - other[name] for name, value in whole.items()}


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="recipe (YAML file), or the name of a shipped one, such as nano")
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--ablations", nargs="+", default=["no-region-embeddings", "seg-token", "no-unified"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--test", action="store_true", help="score on the test rows, not the validation rows")
    args = parser.parse_args(arguments)
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        split = "test" if args.test else "validation"
        print(table(run(recipe, args.ablations, args.seeds, args.output, split)))
    except (OSError, ValueError) as error:
        note(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
