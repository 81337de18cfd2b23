"""Scores a checkpoint, or any system's saved predictions, on a benchmark: `medsight evaluate`."""

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from medsight.evaluation.benchmarks import Benchmark
    from medsight.evaluation.items import Item
    from medsight.evaluation.runner import Processes
    from medsight.evaluation.scoring import Protocol

METRICS, SCORES, REPORT = "metrics.json", "scores.jsonl", "report.html"
LIBRARIES = ("evaluate", "datasets", "pycocotools", "pyarrow", "yaml", "tqdm", "segmentationmetrics", "accelerate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `medsight evaluate`."""
    parser.epilog = (
        "Writes predictions.jsonl (row by row: a run goes on where it stopped), scores.jsonl, metrics.json and "
        "report.html. Over several processes: accelerate launch -m medsight.cli evaluate ... Not a medical device."
    )
    parser.add_argument("--benchmark", metavar="NAME", help="a benchmark, or a YAML file that declares one")
    parser.add_argument("--data", metavar="PATH", help="folder with the benchmark's data")
    parser.add_argument("--output", metavar="DIR", help="output folder")
    parser.add_argument("--list", action="store_true", help="list the benchmarks, and do nothing")
    parser.add_argument("--model", metavar="DIR", help="checkpoint folder (default: the small one in this package)")
    parser.add_argument("--predictions", metavar="FILE", help="score these saved predictions; no model is needed")
    parser.add_argument(
        "--name", metavar="TEXT", help="what the report calls the system (default: the folder or file)"
    )
    answering = parser.add_argument_group("answering")
    answering.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="rows at once (default: %(default)s)"
    )
    answering.add_argument("--limit", type=int, metavar="N", help="the first N rows alone; the output says so")
    answering.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    answering.add_argument("--held-out-prompts", action="store_true", help="ask in wordings that training never saw")
    answering.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: %(default)s)")
    answering.add_argument(
        "--dtype",
        choices=("float64", "float32", "bfloat16", "float16"),
        help="precision (default: float64 on the CPU, float32 on a GPU: with less, answers depend on the batch)",
    )
    answering.add_argument("--overwrite", action="store_true", help="answer all rows again, and replace the output")
    scoring = parser.add_argument_group("scoring (the benchmark names a protocol)")
    scoring.add_argument("--answers", metavar="NAME", help="llava-med, strict, multiple-choice or first-letter")
    scoring.add_argument("--masks", metavar="PRESET", help="medsight, medplib, citrus or biomedparse; or, by flags:")
    scoring.add_argument("--threshold", type=float, metavar="P", help="probability that makes a mask")
    scoring.add_argument("--missing", choices=("zero", "skip"), help="an answer without a mask")
    scoring.add_argument("--multi", metavar="RULE", help="several masks: mean, union, best, order, first or last")
    scoring.add_argument("--average", choices=("micro", "macro"), help="the mean that is put first")
    scoring.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap and of held-out prompts")
    scoring.add_argument("--allow-row-count", action="store_true", help="score a set of another size than is known")
    scoring.add_argument(
        "--accept-problems", action="store_true", help="score predictions with missing, extra or duplicate rows"
    )


def run(args: argparse.Namespace) -> None:
    """Runs `medsight evaluate`.

    Raises:
        OSError, ValueError: an argument is bad, data is missing or not as expected, or predictions do not fit; also if
            a library of the extra `eval` is not installed.
    """
    try:
        _run(args)
    except ImportError as error:
        name = error.name or "a library"
        if error.name is not None and error.name.partition(".")[0] not in LIBRARIES:
            raise
        raise ValueError(f"evaluation needs {name}: pip install 'medsight[eval]'") from error


def _run(args: argparse.Namespace) -> None:
    from medsight.evaluation.benchmarks import check_counts, load_benchmark, load_declarations
    from medsight.evaluation.items import read_items
    from medsight.evaluation.runner import Processes

    if args.list:
        for name, declared in load_declarations().items():
            print(f"{name:24}{declared.title} ({declared.task}, {declared.expected_rows or 'any number of'} rows)")
        return
    for option in ("benchmark", "data", "output"):
        if getattr(args, option) is None:
            raise ValueError(f"--{option} is required (medsight evaluate --list shows the benchmarks)")
    if args.predictions is not None and args.model is not None:
        raise ValueError("--predictions are scored without a model: leave out --model")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: expected at least 1")
    benchmark = load_benchmark(args.benchmark)
    protocol = protocol_of(benchmark, args)
    items, shards = read_items(benchmark, Path(args.data), args.held_out_prompts, args.seed)
    note = check_counts(benchmark, items, shards, args.allow_row_count)
    notes = [*benchmark.notes, *([note] if note else [])]
    if args.limit is not None and args.limit < len(items):
        notes.append(f"Limited to the first {args.limit:,} of {len(items):,} rows: not comparable with the whole set.")
        items = items[: args.limit]
    processes = Processes()
    if args.predictions is None:
        described, path = answer(args, benchmark, items, protocol, processes)
    else:
        described, path = saved(args, benchmark, items)
    if processes.rank == 0:
        score(args, benchmark, items, protocol, path, described, notes)
    processes.wait()


def protocol_of(benchmark: "Benchmark", args: argparse.Namespace) -> "Protocol":
    """The benchmark's protocol, or what the arguments put in its place."""
    from medsight.evaluation.scoring import Protocol
    from medsight.metrics.mask_dice.mask_counts import PRESETS

    flags = {name: getattr(args, name) for name in ("threshold", "missing", "multi", "average")}
    flags = {name: value for name, value in flags.items() if value is not None}
    if (flags or args.masks) and not benchmark.has_masks:
        raise ValueError(f"benchmark {benchmark.name} has no masks to score")
    if args.answers and benchmark.task == "segment":
        raise ValueError(f"benchmark {benchmark.name} has no answers to score")
    masks = args.masks or (None if flags else benchmark.protocol.get("masks"))
    if masks is not None and masks not in PRESETS:
        raise ValueError(f"--masks {masks!r}: choose one of {', '.join(PRESETS)}")
    return Protocol(args.answers or benchmark.protocol.get("answers"), masks, flags)


def answer(
    args: argparse.Namespace,
    benchmark: "Benchmark",
    items: "list[Item]",
    protocol: "Protocol",
    processes: "Processes",
) -> tuple[dict[str, Any], Path]:
    """Lets the checkpoint answer; what run.json says, and the path of the predictions."""
    from transformers.utils import logging

    from medsight.checkpoint import check_checkpoint, shipped_checkpoint
    from medsight.evaluation.items import fingerprint
    from medsight.evaluation.runner import (
        RunSettings,
        answer_items,
        checkpoint_fingerprint,
        describe_run,
        load_for_evaluation,
        prepare_output,
    )

    folder = shipped_checkpoint() if args.model is None else Path(args.model)
    check_checkpoint(folder)
    settings = RunSettings(args.max_new_tokens, protocol.mask_protocol.threshold, args.dtype)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, processor = load_for_evaluation(folder, settings, args.device, processes.device)
    settings = dataclasses.replace(settings, dtype=str(model.dtype).removeprefix("torch."))
    described = describe_run(
        model=folder.name,
        checkpoint=checkpoint_fingerprint(folder),
        benchmark=benchmark.name,
        data={"path": Path(args.data).name, "sha256": fingerprint(items), "rows": len(items)},
        settings=settings,
        **({"codes_per_group": codebook_of(model.config)} if model.config.use_region_codebook else {}),
    )
    output = Path(args.output)
    if processes.rank == 0:
        prepare_output(output, described, args.overwrite)
    processes.wait()
    path = answer_items(items, model, processor, output, settings, args.batch_size, processes)
    return described, path


def codebook_of(config: Any) -> dict[str, int]:
    """The number of codes of each group, by its name."""
    return {str(name): config.codes_per_group for name in config.group_names or range(config.num_groups)}


def saved(args: argparse.Namespace, benchmark: "Benchmark", items: "list[Item]") -> tuple[dict[str, Any], Path]:
    """What is known of saved predictions: their own run.json, if one lies beside them, and their file's hash."""
    from medsight.evaluation.items import fingerprint
    from medsight.evaluation.runner import RUN

    path = Path(args.predictions)
    content = path.read_bytes()
    described: dict[str, Any] = {"model": path.stem}
    if (path.parent / RUN).is_file():
        described = json.loads((path.parent / RUN).read_text(encoding="utf-8"))
    described |= {
        "benchmark": benchmark.name,
        "predictions_sha256": hashlib.sha256(content).hexdigest(),
        "data": {"path": Path(args.data).name, "sha256": fingerprint(items), "rows": len(items)},
    }
    output = Path(args.output)
    known = {METRICS, SCORES, REPORT, RUN, path.name}
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output {output} is a file; name a folder")
    names = sorted(entry.name for entry in output.iterdir()) if output.is_dir() else []
    foreign = [name for name in names if name not in known]
    if foreign or (set(names) & {METRICS, SCORES, REPORT} and not args.overwrite):
        raise FileExistsError(
            f"output folder {output} holds {foreign[0]}; name another one"
            if foreign
            else f"output folder {output} holds an evaluation; name another one, or add --overwrite"
        )
    output.mkdir(parents=True, exist_ok=True)
    return described, path


def score(
    args: argparse.Namespace,
    benchmark: "Benchmark",
    items: "list[Item]",
    protocol: "Protocol",
    path: Path,
    described: dict[str, Any],
    notes: list[str],
) -> None:
    """Scores predictions, writes scores.jsonl, metrics.json and report.html, and prints the main figures."""
    from medsight.evaluation.predictions import match_predictions, read_predictions
    from medsight.evaluation.report import figures_text, write_report
    from medsight.evaluation.runner import write_json
    from medsight.evaluation.scoring import score_rows
    from medsight.evaluation.summary import summarise

    predictions, problems = match_predictions([item.id for item in items], read_predictions(path))
    rows = score_rows(items, predictions, benchmark, protocol, problems, args.accept_problems)
    saved_threshold = described.get("threshold")
    if benchmark.has_masks and saved_threshold not in (None, protocol.mask_protocol.threshold):
        notes.append(
            f"The masks were saved at the threshold {saved_threshold}; that of the protocol, "
            f"{protocol.mask_protocol.threshold}, cannot be applied any more."
        )
    listed = {kind: ids for kind, ids in dataclasses.asdict(problems).items() if ids}
    metrics = {
        "system": args.name or described["model"],
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "task": benchmark.task,
        "protocol": protocol.to_dict(benchmark.has_masks),
        **summarise(rows, benchmark, args.seed, described.get("codes_per_group")),
        "problems": {kind: {"count": len(ids), "rows": ids} for kind, ids in listed.items()},
        "notes": notes,
        "bootstrap": {"samples": 1000, "level": 0.95, "seed": args.seed},
        "run": described,
    }
    output = Path(args.output)
    scratch = output / f".{SCORES}.new"
    with scratch.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    scratch.replace(output / SCORES)
    write_json(output / METRICS, metrics)
    write_report(output / REPORT, metrics, rows, items, predictions)
    print(figures_text(metrics))
    print(f"\nWritten to {output}/: {METRICS}, {SCORES}, {REPORT}")
