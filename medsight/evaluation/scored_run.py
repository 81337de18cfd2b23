"""A benchmark from its rows to its report: by which protocol, and whose answers, a checkpoint's or saved ones."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from medsight import __version__
from medsight.checkpoint import read_json, settings_files, sha256_of, shipped_checkpoint, weights_sha256
from medsight.files import write_json, write_text
from medsight.metrics.mask_dice.mask_counts import choose_protocol
from medsight.processes import LOCK_FILE, gather, on_main
from medsight.text import quiet_transformers

from .benchmarks import Benchmark, check_counts
from .cases import Case, fingerprint
from .figures import METRICS, REPORT, ROWS
from .predictions import Prediction, Problems, match_predictions, read_predictions
from .readers import read_cases
from .report import report_page
from .runner import RUN, RunSettings, answer_cases, load_for_evaluation, prepare_output
from .scoring import Protocol, refuse, score_rows
from .summary import summarise


def rows_to_score(
    benchmark: Benchmark, data: Path, limit: int | None, held_out_prompts: bool, seed: int, allow_row_count: bool
) -> tuple[list[Case], list[Case], list[str]]:
    """The rows of a benchmark to score, those that the limit leaves out, and what the report has to say of them."""
    cases, files = read_cases(benchmark, data, held_out_prompts, seed)
    notes = [*benchmark.notes, *check_counts(benchmark, len(cases), files, allow_row_count)]
    if limit is not None and limit < len(cases):
        notes.append(f"Limited to the first {limit:,} of {len(cases):,} rows: not comparable with the whole set.")
        return cases[:limit], cases[limit:], notes
    return cases, [], notes


def protocol_of(benchmark: Benchmark, answers: str | None, masks: str | None, flags: dict[str, Any]) -> Protocol:
    """The benchmark's protocol, or what the arguments put in its place; ValueError where they do not fit it."""
    if (flags or masks) and not benchmark.has_masks:
        raise ValueError(f"benchmark {benchmark.name} has no masks to score")
    if answers and benchmark.task == "segment":
        raise ValueError(f"benchmark {benchmark.name} has no answers to score")
    answers = answers or benchmark.protocol.get("answers")
    if answers is not None:
        from medsight.metrics.medical_vqa.medical_vqa import PROTOCOLS  # needs the extra "eval"

        if answers not in PROTOCOLS:
            raise ValueError(f"protocol of answers {answers!r}: choose one of {', '.join(PROTOCOLS)}")
    preset = masks or (None if flags else benchmark.protocol.get("masks"))
    return Protocol(answers, preset, choose_protocol(preset, **flags))


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
) -> tuple[dict[str, Any], Path]:
    """Lets the checkpoint answer: what run.json says, which decides on the predictions, and their path."""
    folder, state = shipped_checkpoint() if model is None else Path(model), PartialState()
    if device == "auto" and state.num_processes > 1:
        device = str(state.device)
    with quiet_transformers():
        loaded, processor = load_for_evaluation(folder, settings, device)
        weights, settings_sha256 = on_main(lambda: weights_sha256(folder)), sha256_of(settings_files(folder))
        settings = dataclasses.replace(settings, dtype=str(loaded.dtype).removeprefix("torch."))
        described = {
            "medsight_version": __version__,
            "model": folder.name,
            "checkpoint": {"weights_sha256": weights, "settings_sha256": settings_sha256},
            **questions(benchmark, data, cases),
            **({"codes_per_group": codebook_of(loaded.config)} if loaded.config.use_region_codebook else {}),
            **dataclasses.asdict(settings),
        }
        on_main(lambda: prepare_output(output, described, overwrite))
        path = answer_cases(cases, loaded, processor, output, settings, batch_size)
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
    """What is known of saved predictions, by the run.json beside them and their file's hash; and notes for the report.

    Answers to another benchmark, other data or wordings raise ValueError, unless that is accepted.
    """
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    run = path.parent / RUN
    described: dict[str, Any] = read_json(run) if run.is_file() else {"model": path.stem}
    notes = []
    if "data" in described:
        asked = [*cases, *left_out][: described["data"]["rows"]]  # a limited run has the first ones
        was, now = (described["benchmark"], described["data"]["sha256"]), (benchmark.name, fingerprint(asked))
        if was != now:
            differing = (
                f"its {RUN} is of the benchmark {was[0]} with data and wordings {was[1][:12]}, "
                f"asked for is {now[0]} with {now[1][:12]}"
            )
            if not accept_problems:
                raise ValueError(
                    f"{path}: {differing}; ask as that run did (--benchmark, --data, --held-out-prompts, --seed), or "
                    "add --accept-problems to score them all the same, with a note"
                )
            notes.append(f"The answers were given to other questions: {differing}.")
    on_main(lambda: _make_scores_folder(output, {RUN, LOCK_FILE, path.name}, overwrite))
    return {**described, "predictions_sha256": sha256, **questions(benchmark, data, cases)}, notes


def questions(benchmark: Benchmark, data: Path, cases: list[Case]) -> dict[str, Any]:
    """What run.json says of the rows that are asked about."""
    return {"benchmark": benchmark.name, "data": {"path": data.name, "sha256": fingerprint(cases), "rows": len(cases)}}


def _make_scores_folder(output: Path, beside: set[str], overwrite: bool) -> None:
    """Makes the folder; one that holds more than scores and the files `beside` them is refused."""
    scores = {METRICS, ROWS, REPORT}
    output.mkdir(parents=True, exist_ok=True)
    names = {entry.name for entry in output.iterdir()}
    if foreign := sorted(names - scores - beside):
        raise FileExistsError(f"output folder {output} holds {foreign[0]}; name another one")
    if names & scores and not overwrite:
        raise FileExistsError(f"output folder {output} holds an evaluation; name another one, or add --overwrite")


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

    There may be predictions of rows that are `left_out`. Each process scores a share of the rows; the first writes.
    """
    ids, ignored = [case.id for case in cases], {case.id for case in left_out}
    predictions, problems = match_predictions(ids, read_predictions(path), ignored)
    refuse(problems, accept_problems)
    rows = score_shares(cases, predictions, benchmark, protocol, problems)
    refuse(problems, accept_problems)

    def write() -> dict[str, Any]:
        saved_threshold = described.get("threshold")
        if benchmark.has_masks and saved_threshold not in (None, protocol.mask_protocol.threshold):
            notes.append(
                f"The masks were saved at the threshold {saved_threshold}; that of the protocol, "
                f"{protocol.mask_protocol.threshold}, cannot be applied any more."
            )
        system = described["model"]
        if described.get("masks_from") == "codes":
            system += ", masks of codes alone"
            notes.append("The masks are decoded from the codebook's entries of the cited codes alone.")
        metrics = {
            "system": name or system,
            "benchmark": benchmark.name,
            "title": benchmark.title,
            "task": benchmark.task,
            "protocol": protocol.to_dict(benchmark.has_masks),
            **summarise(rows, benchmark, seed, described.get("codes_per_group")),
            "problems": {kind: {"count": len(ids), "rows": ids} for kind, ids in vars(problems).items() if ids},
            "notes": notes,
            "bootstrap": {"samples": 1000, "level": 0.95, "seed": seed},
            "run": described,
        }
        page = report_page(metrics, rows, cases, predictions)
        write_text(output / ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_text(output / REPORT, page)
        write_json(output / METRICS, metrics)
        return metrics

    return on_main(write)


def score_shares(
    cases: list[Case],
    predictions: Mapping[str, Prediction],
    benchmark: Benchmark,
    protocol: Protocol,
    problems: Problems,
) -> list[dict[str, Any]]:
    """`score_rows`, each process a share of the cases; problems are noted, and all get all rows."""
    state, found = PartialState(), Problems()
    mine = cases[state.process_index :: state.num_processes]
    rows = score_rows(mine, predictions, benchmark, protocol, found, accept_problems=True) if mine else []
    merged: list[dict[str, Any]] = [{}] * len(cases)
    for first, (share, masks) in enumerate(gather((rows, found.masks))):
        merged[first :: state.num_processes] = share
        problems.masks += masks
    problems.masks.sort()
    return merged
