"""Scores a checkpoint, or any system's saved predictions, on a benchmark: `medsight evaluate`."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from medsight.console import Device, Json, Results, quiet_transformers, results


if TYPE_CHECKING:
    from medsight.evaluation.benchmarks import Benchmark
    from medsight.evaluation.items import Item
    from medsight.evaluation.runner import Processes, RunSettings
    from medsight.evaluation.scoring import Protocol

METRICS, SCORES, REPORT = "metrics.json", "scores.jsonl", "report.html"


def command(
    benchmark: Annotated[
        str | None, typer.Option(metavar="NAME", help="A benchmark, or a YAML file that declares one.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Folder with the benchmark's data.")] = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="Output folder.")] = None,
    list_benchmarks: Annotated[bool, typer.Option("--list", help="List the benchmarks, and do nothing.")] = False,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Checkpoint folder  [default: the small one shipped].")
    ] = None,
    predictions: Annotated[
        str | None, typer.Option(metavar="FILE", help="Score these saved predictions; no model is needed.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What the report calls the system  [default: the folder or file]."),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Rows answered at once.")] = 8,
    limit: Annotated[int | None, typer.Option(metavar="N", help="The first N rows alone; the output says so.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Length limit of an answer.")] = 64,
    held_out_prompts: Annotated[
        bool, typer.Option("--held-out-prompts", help="Ask in wordings that training never saw.")
    ] = False,
    device: Device = "auto",
    dtype: Annotated[
        Literal["float64", "float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Precision  [default: float64 on the CPU, float32 on a GPU: with less, answers depend on the batch]."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Answer all rows again, and replace the output.")
    ] = False,
    answers: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Protocol of answers: llava-med, strict, multiple-choice or first-letter."),
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET", help="Protocol of masks: medsight, medplib, citrus or biomedparse; or, by flags:"
        ),
    ] = None,
    threshold: Annotated[float | None, typer.Option(metavar="P", help="Probability that makes a mask.")] = None,
    missing: Annotated[Literal["zero", "skip"] | None, typer.Option(help="An answer without a mask.")] = None,
    multi: Annotated[
        str | None,
        typer.Option(metavar="RULE", help="Several masks: mean, union, best, order, first or last."),
    ] = None,
    average: Annotated[Literal["micro", "macro"] | None, typer.Option(help="The mean that is put first.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the bootstrap and of held-out prompts.")] = 0,
    allow_row_count: Annotated[
        bool, typer.Option("--allow-row-count", help="Score a set of another size than is known.")
    ] = False,
    accept_problems: Annotated[
        bool,
        typer.Option("--accept-problems", help="Score predictions with missing, extra or duplicate rows."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Score a checkpoint, or any system's saved predictions, on a benchmark by named protocols.

    Writes predictions.jsonl (row by row: a run goes on where it stopped), scores.jsonl, metrics.json and report.html.
    Over several processes: accelerate launch -m medsight.cli evaluate ... Not a medical device.
    """
    from medsight.evaluation.benchmarks import load_benchmark
    from medsight.evaluation.figures import figures_text
    from medsight.evaluation.runner import Processes, RunSettings

    with results(as_json) as out:
        if list_benchmarks:
            show_benchmarks(out)
            return
        if benchmark is None or data is None or output is None:
            missing_option = "benchmark" if benchmark is None else "data" if data is None else "output"
            raise ValueError(f"--{missing_option} is required (medsight evaluate --list shows the benchmarks)")
        if predictions is not None and model is not None:
            raise ValueError("--predictions are scored without a model: leave out --model")
        declared = load_benchmark(benchmark)
        if held_out_prompts:
            declared = dataclasses.replace(declared, title=f"{declared.title}, in wordings not trained on")
        flags = {"threshold": threshold, "missing": missing, "multi": multi, "average": average}
        protocol = protocol_of(declared, answers, masks, {key: v for key, v in flags.items() if v is not None})
        items, notes = rows_to_score(declared, Path(data), limit, held_out_prompts, seed, allow_row_count)
        processes, folder = Processes(), Path(output)
        if predictions is None:
            settings = RunSettings(max_new_tokens, protocol.mask_protocol.threshold, dtype)
            described, path = answer(
                model, folder, declared, Path(data), items, settings, device, batch_size, overwrite, processes
            )
        else:
            path = Path(predictions)
            described = saved(path, folder, declared, Path(data), items, overwrite)
        if processes.rank == 0:
            metrics = score(folder, declared, items, protocol, path, described, notes, name, seed, accept_problems)
            out.show(metrics, figures_text(metrics), f"\nWritten to {folder}/: {METRICS}, {SCORES}, {REPORT}")
        processes.wait()


def show_benchmarks(out: Results) -> None:
    """A line a shipped benchmark."""
    from medsight.evaluation.benchmarks import load_declarations

    for name, entry in load_declarations().items():
        rows = entry.expected_rows or "any number of"
        content = {"benchmark": name, "title": entry.title, "task": entry.task, "rows": entry.expected_rows}
        out.show(content, f"{name:24}{entry.title} ({entry.task}, {rows} rows)")


def rows_to_score(
    benchmark: "Benchmark", data: Path, limit: int | None, held_out_prompts: bool, seed: int, allow_row_count: bool
) -> tuple[list["Item"], list[str]]:
    """The rows of a benchmark, and what the report has to say of them.

    Raises:
        OSError, ValueError: see `read_items` and `check_counts`; or the limit is below 1.
    """
    from medsight.evaluation.benchmarks import check_counts
    from medsight.evaluation.items import read_items

    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: expected at least 1")
    items, shards = read_items(benchmark, data, held_out_prompts, seed)
    counted = check_counts(benchmark, items, shards, allow_row_count)
    notes = [*benchmark.notes, *([counted] if counted else [])]
    if limit is not None and limit < len(items):
        notes.append(f"Limited to the first {limit:,} of {len(items):,} rows: not comparable with the whole set.")
    return items[:limit], notes


def protocol_of(benchmark: "Benchmark", answers: str | None, masks: str | None, flags: dict[str, Any]) -> "Protocol":
    """The benchmark's protocol, or what the arguments put in its place.

    Raises:
        ValueError: an argument is unknown, or is about what the benchmark does not score.
    """
    from medsight.evaluation.scoring import Protocol
    from medsight.metrics.mask_dice.mask_counts import PRESETS

    if (flags or masks) and not benchmark.has_masks:
        raise ValueError(f"benchmark {benchmark.name} has no masks to score")
    if answers and benchmark.task == "segment":
        raise ValueError(f"benchmark {benchmark.name} has no answers to score")
    masks = masks or (None if flags else benchmark.protocol.get("masks"))
    if masks is not None and masks not in PRESETS:
        raise ValueError(f"--masks {masks!r}: choose one of {', '.join(PRESETS)}")
    return Protocol(answers or benchmark.protocol.get("answers"), masks, flags)


def answer(
    model: str | None,
    output: Path,
    benchmark: "Benchmark",
    data: Path,
    items: "list[Item]",
    settings: "RunSettings",
    device: str,
    batch_size: int,
    overwrite: bool,
    processes: "Processes",
) -> tuple[dict[str, Any], Path]:
    """Lets the checkpoint answer; what run.json says, and the path of the predictions.

    Raises:
        OSError, ValueError: see `check_checkpoint`, `load_for_evaluation`, `prepare_output` and `answer_items`.
    """
    from medsight.checkpoint import check_checkpoint, shipped_checkpoint
    from medsight.evaluation.runner import (
        answer_items,
        checkpoint_fingerprint,
        describe_run,
        load_for_evaluation,
        prepare_output,
    )

    folder = shipped_checkpoint() if model is None else Path(model)
    check_checkpoint(folder)
    with quiet_transformers():
        loaded, processor = load_for_evaluation(folder, settings, device, processes.device)
        settings = dataclasses.replace(settings, dtype=str(loaded.dtype).removeprefix("torch."))
        described = describe_run(
            settings,
            model=folder.name,
            checkpoint=checkpoint_fingerprint(folder),
            **questions(benchmark, data, items),
            **({"codes_per_group": codebook_of(loaded.config)} if loaded.config.use_region_codebook else {}),
        )
        if processes.rank == 0:
            prepare_output(output, described, overwrite)
        processes.wait()
        path = answer_items(items, loaded, processor, output, settings, batch_size, processes)
    return described, path


def codebook_of(config: Any) -> dict[str, int]:
    """The number of codes of each group, by its name."""
    return {str(name): config.codes_per_group for name in config.group_names or range(config.num_groups)}


def saved(
    path: Path, output: Path, benchmark: "Benchmark", data: Path, items: "list[Item]", overwrite: bool
) -> dict[str, Any]:
    """What is known of saved predictions: their own run.json, if one lies beside them, and their file's hash.

    Raises:
        OSError: a file cannot be read, or the output folder holds something else.
        ValueError: their run.json is damaged.
    """
    from medsight.checkpoint import read_json
    from medsight.evaluation.runner import RUN

    content = path.read_bytes()
    described: dict[str, Any] = {"model": path.stem}
    if (path.parent / RUN).is_file():
        described = read_json(path.parent / RUN)
    described |= {"predictions_sha256": hashlib.sha256(content).hexdigest(), **questions(benchmark, data, items)}
    _make_scores_folder(output, {RUN, path.name}, overwrite)
    return described


def questions(benchmark: "Benchmark", data: Path, items: "list[Item]") -> dict[str, Any]:
    """What run.json says of the rows that are asked about."""
    from medsight.evaluation.items import fingerprint

    return {
        "benchmark": benchmark.name,
        "data": {"path": data.name, "sha256": fingerprint(items), "rows": len(items)},
    }


def _make_scores_folder(output: Path, beside: set[str], overwrite: bool) -> None:
    """Makes the folder; one that holds more than scores and the files `beside` them is refused."""
    scores = {METRICS, SCORES, REPORT}
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output {output} is a file; name a folder")
    names = {entry.name for entry in output.iterdir()} if output.is_dir() else set()
    foreign = sorted(names - scores - beside)
    if foreign:
        raise FileExistsError(f"output folder {output} holds {foreign[0]}; name another one")
    if names & scores and not overwrite:
        raise FileExistsError(f"output folder {output} holds an evaluation; name another one, or add --overwrite")
    output.mkdir(parents=True, exist_ok=True)


def score(
    output: Path,
    benchmark: "Benchmark",
    items: "list[Item]",
    protocol: "Protocol",
    path: Path,
    described: dict[str, Any],
    notes: list[str],
    name: str | None,
    seed: int,
    accept_problems: bool,
) -> dict[str, Any]:
    """Scores predictions, and writes scores.jsonl, metrics.json, whose content it returns, and report.html."""
    from medsight.evaluation.predictions import match_predictions, read_predictions
    from medsight.evaluation.report import write_report
    from medsight.evaluation.runner import write_json
    from medsight.evaluation.scoring import score_rows
    from medsight.evaluation.summary import summarise

    predictions, problems = match_predictions([item.id for item in items], read_predictions(path))
    rows = score_rows(items, predictions, benchmark, protocol, problems, accept_problems)
    saved_threshold = described.get("threshold")
    if benchmark.has_masks and saved_threshold not in (None, protocol.mask_protocol.threshold):
        notes.append(
            f"The masks were saved at the threshold {saved_threshold}; that of the protocol, "
            f"{protocol.mask_protocol.threshold}, cannot be applied any more."
        )
    listed = {kind: ids for kind, ids in dataclasses.asdict(problems).items() if ids}
    metrics = {
        "system": name or described["model"],
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "task": benchmark.task,
        "protocol": protocol.to_dict(benchmark.has_masks),
        **summarise(rows, benchmark, seed, described.get("codes_per_group")),
        "problems": {kind: {"count": len(ids), "rows": ids} for kind, ids in listed.items()},
        "notes": notes,
        "bootstrap": {"samples": 1000, "level": 0.95, "seed": seed},
        "run": described,
    }
    scratch = output / f".{SCORES}.new"
    with scratch.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    scratch.replace(output / SCORES)
    write_json(output / METRICS, metrics)
    write_report(output / REPORT, metrics, rows, items, predictions)
    return metrics
