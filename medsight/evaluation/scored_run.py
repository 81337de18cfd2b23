"""A benchmark from its rows to its report: by which protocol, and whose answers, a checkpoint's or saved ones."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medsight import __version__
from medsight.checkpoint import check_checkpoint, read_json, shipped_checkpoint
from medsight.files import write_json, write_text
from medsight.metrics.mask_dice.mask_counts import PRESETS
from medsight.text import quiet_transformers

from .benchmarks import Benchmark, check_counts
from .cases import Case, fingerprint
from .figures import METRICS, REPORT, ROWS
from .predictions import match_predictions, read_predictions
from .readers import read_cases
from .report import report_page
from .runner import (
    RUN,
    Processes,
    RunSettings,
    answer_cases,
    checkpoint_fingerprint,
    load_for_evaluation,
    prepare_output,
)
from .scoring import Protocol, score_rows
from .summary import summarise


def rows_to_score(
    benchmark: Benchmark, data: Path, limit: int | None, held_out_prompts: bool, seed: int, allow_row_count: bool
) -> tuple[list[Case], list[Case], list[str]]:
    """The rows of a benchmark to score, those that the limit leaves out, and what the report has to say of them.

    Raises:
        OSError, ValueError: see `read_cases` and `check_counts`; or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: expected at least 1")
    cases, files = read_cases(benchmark, data, held_out_prompts, seed)
    counted = check_counts(benchmark, len(cases), files, allow_row_count)
    notes = [*benchmark.notes, *([counted] if counted else [])]
    if limit is not None and limit < len(cases):
        notes.append(f"Limited to the first {limit:,} of {len(cases):,} rows: not comparable with the whole set.")
    count = len(cases) if limit is None else limit
    return cases[:count], cases[count:], notes


def protocol_of(benchmark: Benchmark, answers: str | None, masks: str | None, flags: dict[str, Any]) -> Protocol:
    """The benchmark's protocol, or what the arguments put in its place.

    Raises:
        ValueError: an argument is unknown, or is about what the benchmark does not score.
    """
    if (flags or masks) and not benchmark.has_masks:
        raise ValueError(f"benchmark {benchmark.name} has no masks to score")
    if answers and benchmark.task == "segment":
        raise ValueError(f"benchmark {benchmark.name} has no answers to score")
    masks = masks or (None if flags else benchmark.protocol.get("masks"))
    if masks is not None and masks not in PRESETS:
        raise ValueError(f"--masks {masks!r}: choose one of {', '.join(PRESETS)}")
    return Protocol(answers or benchmark.protocol.get("answers"), masks, flags)


def refuse_other_protocol(output: Path, protocol: dict[str, Any], overwrite: bool) -> None:
    """Raises FileExistsError where the folder holds figures by another protocol, which would be replaced."""
    if overwrite or not (output / METRICS).is_file():
        return
    before = read_json(output / METRICS).get("protocol")
    if before != protocol:
        raise FileExistsError(
            f"output folder {output} holds figures by another protocol ({before}): score its predictions into another "
            "folder with --predictions, or add --overwrite to start again"
        )


def answer(
    model: str | None,
    output: Path,
    benchmark: Benchmark,
    data: Path,
    cases: list[Case],
    settings: RunSettings,
    device: str,
    batch_size: int,
    overwrite: bool,
    processes: Processes,
) -> tuple[dict[str, Any], Path]:
    """Lets the checkpoint answer; what run.json says, and the path of the predictions.

    Two runs of which run.json says the same give the same predictions.

    Raises:
        OSError, ValueError: see `check_checkpoint`, `load_for_evaluation`, `prepare_output` and `answer_cases`.
    """
    folder = shipped_checkpoint() if model is None else Path(model)
    check_checkpoint(folder)
    with quiet_transformers():
        loaded, processor = load_for_evaluation(folder, settings, device, processes.device)
        settings = dataclasses.replace(settings, dtype=str(loaded.dtype).removeprefix("torch."))
        described = {
            "medsight_version": __version__,
            "model": folder.name,
            "checkpoint": checkpoint_fingerprint(folder),
            **questions(benchmark, data, cases),
            **({"codes_per_group": codebook_of(loaded.config)} if loaded.config.use_region_codebook else {}),
            **dataclasses.asdict(settings),
        }
        if processes.rank == 0:
            prepare_output(output, described, overwrite)
            for name in (METRICS, ROWS, REPORT) if overwrite else ():
                (output / name).unlink(missing_ok=True)
        processes.wait()
        path = answer_cases(cases, loaded, processor, output, settings, batch_size, processes)
    return described, path


def codebook_of(config: Any) -> dict[str, int]:
    """The number of codes of each group, by its name."""
    return {str(name): config.codes_per_group for name in config.group_names or range(config.num_groups)}


def saved(
    path: Path,
    output: Path,
    benchmark: Benchmark,
    data: Path,
    cases: list[Case],
    left_out: list[Case],
    overwrite: bool,
    accept_problems: bool,
) -> tuple[dict[str, Any], list[str]]:
    """What is known of saved predictions: their own run.json, if one lies beside them, and their file's hash.

    Args:
        cases, left_out: see `rows_to_score`.
        accept_problems: score answers to other questions too.

    Returns:
        What run.json is to say; and notes for the report.

    Raises:
        OSError: a file cannot be read, or the output folder holds something else.
        ValueError: their run.json is damaged, or says that they answer another benchmark, other data or wordings,
            which is not accepted.
    """
    content = path.read_bytes()
    described: dict[str, Any] = {"model": path.stem}
    if (path.parent / RUN).is_file():
        described = read_json(path.parent / RUN)
    differing = _other_questions(described, benchmark, [*cases, *left_out])
    if differing is not None and not accept_problems:
        raise ValueError(
            f"{path}: {differing}; ask as that run did (--benchmark, --data, --held-out-prompts, --seed), or add "
            "--accept-problems to score them all the same, with a note"
        )
    described |= {"predictions_sha256": hashlib.sha256(content).hexdigest(), **questions(benchmark, data, cases)}
    _make_scores_folder(output, {RUN, path.name}, overwrite)
    return described, [] if differing is None else [f"The answers were given to other questions: {differing}."]


def _other_questions(described: dict[str, Any], benchmark: Benchmark, rows: list[Case]) -> str | None:
    """In what a run's questions differ from the benchmark's rows, of which a limited run has the first; None if in
    nothing, or if the run does not say."""
    before = described.get("data")
    if "benchmark" not in described or not isinstance(before, dict) or "sha256" not in before:
        return None
    now = fingerprint(rows[: before.get("rows")])
    if (described["benchmark"], before["sha256"]) == (benchmark.name, now):
        return None
    return (
        f"its {RUN} is of the benchmark {described['benchmark']} with data and wordings {before['sha256'][:12]}, "
        f"asked for is {benchmark.name} with {now[:12]}"
    )


def questions(benchmark: Benchmark, data: Path, cases: list[Case]) -> dict[str, Any]:
    """What run.json says of the rows that are asked about."""
    return {
        "benchmark": benchmark.name,
        "data": {"path": data.name, "sha256": fingerprint(cases), "rows": len(cases)},
    }


def _make_scores_folder(output: Path, beside: set[str], overwrite: bool) -> None:
    """Makes the folder; one that holds more than scores and the files `beside` them is refused."""
    scores = {METRICS, ROWS, REPORT}
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
    benchmark: Benchmark,
    cases: list[Case],
    protocol: Protocol,
    path: Path,
    described: dict[str, Any],
    notes: list[str],
    name: str | None,
    seed: int,
    accept_problems: bool,
    left_out: Sequence[Case] = (),
) -> dict[str, Any]:
    """Scores predictions, and writes scores.jsonl, report.html and, last, metrics.json, whose content it returns.

    Args:
        left_out: rows of the benchmark that are not scored, of which there may be predictions.
    """
    ids, others = [case.id for case in cases], {case.id for case in left_out}
    predictions, problems = match_predictions(ids, read_predictions(path), others)
    rows = score_rows(cases, predictions, benchmark, protocol, problems, accept_problems)
    saved_threshold = described.get("threshold")
    if benchmark.has_masks and saved_threshold not in (None, protocol.mask_protocol.threshold):
        notes.append(
            f"The masks were saved at the threshold {saved_threshold}; that of the protocol, "
            f"{protocol.mask_protocol.threshold}, cannot be applied any more."
        )
    from_codes = described.get("masks_from") == "codes"
    if from_codes:
        notes.append("The masks are decoded from the codebook's entries of the cited codes alone.")
    listed = {kind: ids for kind, ids in dataclasses.asdict(problems).items() if ids}
    metrics = {
        "system": name or f"{described['model']}{', masks of codes alone' if from_codes else ''}",
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
    page = report_page(metrics, rows, cases, predictions)
    write_text(output / ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(output / REPORT, page)
    write_json(output / METRICS, metrics)
    return metrics
