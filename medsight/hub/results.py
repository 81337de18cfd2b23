"""The figures of a card, from metrics.json files of `medsight evaluate`: as Markdown and as the Hub's model index."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from medsight.checkpoint import read_json
from medsight.evaluation import figures


TASKS = {"vqa": "visual-question-answering", "segment": "image-segmentation", "diagnose": "image-segmentation"}


def read_metrics(paths: Iterable[Path], weights_sha256: str) -> list[dict[str, Any]]:
    """The content of metrics.json files, held to be about the weights that they are published with.

    Args:
        paths: files, or output folders of `medsight evaluate`.
        weights_sha256: of `medsight.checkpoint.weights_sha256`.

    Raises:
        OSError: a file is missing.
        ValueError: a file holds something else, figures of other weights, or a benchmark twice.
    """
    found: dict[tuple[str, str | None], dict[str, Any]] = {}
    for path in paths:
        file = path / figures.METRICS if path.is_dir() else path
        metrics = read_json(file)
        if not {"benchmark", "title", "task", "scores", "by", "run"} <= metrics.keys():
            raise ValueError(f"{file} is no {figures.METRICS} of medsight evaluate")
        measured = (metrics["run"].get("checkpoint") or {}).get("weights_sha256")
        if measured != weights_sha256:
            said = "does not say which weights answered" if measured is None else f"is about weights {measured[:12]}…"
            raise ValueError(
                f"{file} {said}, but those to publish are {weights_sha256[:12]}…: run medsight evaluate on this folder"
            )
        name = metrics["benchmark"], (metrics["run"].get("data") or {}).get("sha256")
        if name in found:
            raise ValueError(f"{file}: the benchmark {name[0]} is given twice, on the same rows")
        found[name] = metrics
    return list(found.values())


def results_text(measured: Sequence[Mapping[str, Any]]) -> str | None:
    """Tables of all figures with their intervals, the main ones of all benchmarks first; None where nothing was
    measured."""
    if not measured:
        return None
    head = (
        "Measured with `medsight evaluate` on the weights published here. In percent, but for millimetres; in "
        "brackets 95% bootstrap intervals."
    )
    rows = [("benchmark", "", "mean over rows", "rows")]
    for metrics in measured:
        for score in _main_scores(metrics):
            figure = metrics["scores"][score]["micro"]
            rows.append((metrics["title"], figures.label(metrics, score), _figure(score, figure), f"{figure['n']:,}"))
    overview = [_table(*rows)] if len(measured) > 1 else []
    return "\n\n".join([head, *overview, *map(_section, measured)])


def eval_results(measured: Iterable[Mapping[str, Any]]) -> list[EvalResult]:
    """The main figures as `huggingface_hub.EvalResult`, fractions between 0 and 1, intervals in `metric_args`."""
    return [
        EvalResult(
            task_type=TASKS[metrics["task"]],
            dataset_type=metrics["benchmark"],
            dataset_name=metrics["title"],
            # The Hub tells data sets apart by type and configuration, not by name.
            dataset_config=metrics["title"],
            metric_type=score,
            metric_name=f"{figures.label(metrics, score)}, mean over {over}",
            metric_value=figure["value"],
            metric_args={name: figure[name] for name in ("low", "high", "n")},
        )
        for metrics in measured
        for score in _main_scores(metrics)
        for kind, over in (("micro", "rows"), ("macro", "modalities"))
        for figure in [metrics["scores"][score][kind]]
    ]


def _main_scores(metrics: Mapping[str, Any]) -> list[str]:
    """Those of answers and masks that an index or an overview has room for."""
    return [score for score in ("answer", "dice") if score in metrics["scores"]]


def _section(metrics: Mapping[str, Any]) -> str:
    """Title, conditions, figures and notes of one benchmark."""
    unit, version = metrics.get("interval_unit", "row"), metrics["run"].get("medsight_version")
    rows = [("", "mean over rows", "mean over modalities", "rows")]
    for score, both in metrics["scores"].items():
        micro, macro = both["micro"], both["macro"]
        rows.append((figures.label(metrics, score), _figure(score, micro), _figure(score, macro), f"{micro['n']:,}"))
    rows += [(title, _figure("rate", figure), "", f"{figure['n']:,}") for title, figure in figures.rates(metrics)]
    parts = [
        f"### {metrics['title']}",
        f"{figures.row_count(metrics)}; protocol {figures.protocol_text(metrics)}; intervals drawn by {unit}; "
        f"medsight {version}.",
        _table(*rows),
    ]
    main = figures.main_score(metrics)
    sets = {name: scores[main] for name, scores in metrics["by"].get("dataset", {}).items() if main in scores}
    if len(sets) > 1:
        shown = [(name, _figure(main, figure), f"{figure['n']:,}") for name, figure in sets.items()]
        parts.append(_table(("data set", figures.label(metrics, main), "rows"), *shown))
    parts.append("\n".join(f"* {note}" for note in figures.notes_of(metrics, name_rows=False)))
    return "\n\n".join(parts).rstrip()


def _table(*rows: Sequence[str]) -> str:
    """A table in Markdown; the first row is its head."""
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _figure(score: str, figure: Mapping[str, Any]) -> str:
    number, spread = figures.number_and_range(score, figure)
    return number if spread == "–" else f"{number} ({spread})"
