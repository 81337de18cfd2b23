"""Fine-tunes a checkpoint on a lab's images with masks, from the folder to a report: `medsight finetune`.

Each part of the output folder appears when it is done, so that a run that was killed goes on: data.yaml and
replay.yaml (entries of data), `start` (the checkpoint, extended by what is new in the data), `before` and `after`
(evaluations on the test rows of `new` data and, where there are any, `old`), finetune.yaml (the recipe), `training`
(its run), `model` and report.html.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml
from datasets import concatenate_datasets

from configuration_medsight.configuration_medsight import MedSightConfig
from medsight import __version__
from medsight.checkpoint import check_checkpoint, weights_sha256
from medsight.conversion.extend import extend
from medsight.data.groups import match_groups
from medsight.data.sources import Source, find_source, iterate, load_source
from medsight.evaluation.benchmarks import load_benchmark
from medsight.evaluation.codes import CodeMeanings, describe_codes, meanings_to_json
from medsight.evaluation.figures import METRICS
from medsight.evaluation.runner import RunSettings, load_for_evaluation
from medsight.evaluation.scored_run import answer, codebook_of, protocol_of, rows_to_score, score
from medsight.files import staged_folder, write_text
from medsight.hub.card import CardFacts, write_card
from medsight.processes import LOCK_FILE, lock
from medsight.text import quiet_transformers
from processing_medsight.region_codes_medsight import find_region_codes, write_region_codes

from .finetune_checks import problems_of
from .finetune_recipe import Budget, choose_recipe
from .finetune_report import write_report
from .recipe import load_recipe
from .run import train


DATA, REPLAY, RECIPE, REPORT = "data.yaml", "replay.yaml", "finetune.yaml", "report.html"
TEST_SHARE = 0.2  # of the patients, where the data name no test split
BENCHMARK = "segmentation"


def finetune(
    data: Source,
    output: Path,
    model: Path,
    *,
    replay: Source | None = None,
    minutes: float = 30.0,
    groups: str | None = None,
    seed: int = 0,
    accept_problems: bool = False,
    plan_only: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Checks data, extends a checkpoint by what is new in them, trains, evaluates before and after, and reports.

    Args:
        data: images with masks. Where no row is of the split test, a fifth of the patients is.
        output: folder; one that an earlier call with the same data and model began is gone on with.
        model: checkpoint folder.
        replay: data that the model should go on knowing: they are trained on besides, and their test rows are scored.
        minutes: what all of it may take on this machine, about.
        groups: YAML file, code group -> patterns of "MODALITY/SITE", for pairs that are new to the model.
        seed: of all chance.
        accept_problems: train all the same where the data promise nothing.
        plan_only: stop when the recipe is written.
        say: gets a line on each step.

    Returns:
        The folder of the model, or with `plan_only` the recipe.

    Raises:
        OSError: files are missing, or the disk is full.
        ValueError: the data are bad, or promise nothing; or the output folder holds something else.
    """
    check_checkpoint(model)
    with lock(output, "fine-tuning"):
        _refuse_foreign(output, replay)
        data, replay = _kept(data, output / DATA), replay and _kept(replay, output / REPLAY)
        parts = {"new": DATA, **({"old": REPLAY} if replay else {})}
        if not (output / "start").is_dir():
            _check(data, accept_problems, say)
            _extend(model, data, output / "start", groups, seed, say)
        began = perf_counter()
        _evaluate(model, output, "before", parts)
        recipe = output / RECIPE
        if not recipe.is_file():
            budget = Budget(60 * minutes, evaluation=perf_counter() - began, seed=seed)
            known = MedSightConfig.from_pretrained(model, local_files_only=True)
            write_text(recipe, choose_recipe(output / "start", known, data, replay, output / "training", budget))
        say(f"recipe: {recipe}")
        if plan_only:
            return recipe
        trained, result = train(load_recipe(recipe)), output / "model"
        if not result.is_dir():
            _keep_result(trained, result, output / "start", [data, *([replay] if replay else [])])
        _evaluate(result, output, "after", parts)
        if not (result / "README.md").is_file():
            metrics = (output / "after" / "new",)
            write_card(result, f"your-name/{output.name}", CardFacts(metrics=metrics, run=output / "training"))
        write_report(output, [*parts])
    return result


def _check(data: Source, accept_problems: bool, say: Callable[[str], None]) -> None:
    """Tell problems of the data; raise ValueError where there are any, unless they are accepted."""
    found = problems_of(data)
    for problem in found:
        say(f"problem: {problem}")
    if found and not accept_problems:
        raise ValueError(f"{data.path}: {len(found)} problem(s), see above; --accept-problems trains all the same")


def _extend(model: Path, data: Source, start: Path, groups: str | None, seed: int, say: Callable[[str], None]) -> None:
    """Write the checkpoint to train from: the model, with what is new in the data."""
    known = MedSightConfig.from_pretrained(model, local_files_only=True)
    with quiet_transformers():
        _, added = extend(model, data, start, groups=groups, seed=seed)
    for line in added.describe(known) or ["nothing: the model knows all structures and groups"]:
        say(f"new {line}")


def _evaluate(model: Path, output: Path, when: str, parts: Mapping[str, str]) -> None:
    """Score a checkpoint on the test rows of each entry of data in the output folder."""
    for name, file in parts.items():
        evaluate_on(model, output / file, output / when / name)


def _kept(source: Source, file: Path) -> Source:
    """A source as its file in the output folder has it, which is written where it is not there.

    Raises:
        ValueError: the file names other data.
    """
    source = dataclasses.replace(source, path=str(Path(source.path).absolute()), split="train")
    tests = dataclasses.replace(source, split="test")
    if source.test_share is None and not any(entry.row for entry in iterate(tests)):
        source = dataclasses.replace(source, test_share=TEST_SHARE)
    if not file.is_file():
        write_text(file, yaml.safe_dump(source.to_mapping(), sort_keys=False, allow_unicode=True))
    elif find_source(file) != source:
        raise ValueError(f"{file} names other data than are asked for: go on with these, or choose another output")
    return source


def _refuse_foreign(output: Path, replay: Source | None) -> None:
    """Raise ValueError where the folder holds something else, or a fine-tuning with, or without, replayed data."""
    holds = {path.name for path in output.iterdir()} - {LOCK_FILE}
    if holds and DATA not in holds:
        raise ValueError(f"{output} is not empty and holds no fine-tuning: choose another output")
    if "start" in holds and (REPLAY in holds) != (replay is not None):
        raise ValueError(f"{output}: fine-tuning began {'with' if REPLAY in holds else 'without'} --replay: go on so")


def evaluate_on(model: Path, data: Path, output: Path) -> None:
    """Score a checkpoint on the test rows of data by the benchmark segmentation, unless it was done before."""
    if (output / METRICS).is_file():
        return
    declared = load_benchmark(BENCHMARK)
    protocol = protocol_of(declared, None, None, {})
    cases, left_out, notes = rows_to_score(declared, data, None, False, 0, allow_row_count=True)
    settings = RunSettings(256, protocol.mask_protocol.threshold, "float32", "states")
    with lock(output, "evaluating"):
        described, path = answer(str(model), output, declared, data, cases, settings, "auto", 8, overwrite=False)
        score(output, declared, cases, protocol, path, described, notes, None, 0, False, left_out)


def _keep_result(trained: Path, result: Path, start: Path, sources: Sequence[Source]) -> None:
    """The folder of the model with what its codes stand for now, whole or not at all.

    What the checkpoint's codes stood for before stays true of structures that the data do not show.
    """
    rows = concatenate_datasets([load_source(source) for source in sources])
    with quiet_transformers():
        model, processor = load_for_evaluation(trained, RunSettings(dtype="float32"), "auto")
    with staged_folder(result, overwrite=False) as folder:
        shutil.copytree(trained, folder, dirs_exist_ok=True)
        if model.config.use_region_codebook:
            matched = match_groups(model.config, zip(rows["modality"], rows["site"], strict=True))
            found = describe_codes(model, processor, rows, matched, examples=1, batch_size=8)
            add_known(found, find_region_codes(start, local_files_only=True))
            names = ", ".join(Path(source.path).name for source in sources)
            origin = {"medsight_version": __version__, "weights_sha256": weights_sha256(trained)}
            codebook = codebook_of(model.config)
            write_region_codes(meanings_to_json(found, codebook, **origin, data=names, split="train"), folder)


def add_known(found: CodeMeanings, before: dict[str, Any] | None) -> None:
    """Add to what was found now what an earlier region_codes.json says of other structures, by group."""
    seen = {(group, structure) for _, group, structure in found.citations}
    for code, entry in ({} if before is None else before["codes"]).items():
        for structure, share in entry["structures"].items():
            if (entry["group"], structure) not in seen:
                found.citations += [(code, entry["group"], structure)] * round(share * entry["n"])
