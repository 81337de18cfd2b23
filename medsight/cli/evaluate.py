"""Scores a checkpoint, or any system's saved predictions, on a benchmark: `medsight evaluate`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from medsight.cli.console import Device, Json, results


# Options without use for saved predictions.
ANSWERING = ("model", "batch_size", "max_new_tokens", "device", "dtype", "masks_from")


def command(
    context: typer.Context,
    benchmark: Annotated[str | None, typer.Option(metavar="NAME", help="A benchmark, or a YAML file of one.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="PATH", help="Folder with the benchmark's data.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Output folder.")] = None,
    list_benchmarks: Annotated[bool, typer.Option("--list", help="List the benchmarks, and do nothing.")] = False,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Checkpoint folder  [default: the small one shipped].")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Score these saved predictions; no model is needed.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What the report calls the system  [default: the folder or file]."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Rows answered at once.")] = 8,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N rows alone; the output says so.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Length limit of an answer.")] = 256,
    held_out_prompts: Annotated[bool, typer.Option("--held-out-prompts", help="Ask in unseen wordings.")] = False,
    device: Device = "auto",
    dtype: Annotated[
        Literal["float64", "float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Precision  [default: float64 on the CPU, float32 on a GPU: with less, answers depend on the batch]."
        ),
    ] = None,
    masks_from: Annotated[
        Literal["states", "codes"],
        typer.Option(help="Decode masks from the language model's states, or the codes' entries in the codebook."),
    ] = "states",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Answer again; replace the output.")] = False,
    answers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Protocol of answers: llava-med, strict, closed-set, multiple-choice or first-letter."
        ),
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(metavar="PRESET", help="Protocol of masks: medsight, medplib, citrus, biomedparse; or by flags:"),
    ] = None,
    threshold: Annotated[float | None, typer.Option(metavar="P", help="Probability that makes a mask.")] = None,
    missing: Annotated[Literal["zero", "skip"] | None, typer.Option(help="An answer without a mask.")] = None,
    multi: Annotated[
        str | None, typer.Option(metavar="RULE", help="Several masks: mean, union, best, order, first or last.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the bootstrap and of held-out prompts.")] = 0,
    allow_row_count: Annotated[bool, typer.Option("--allow-row-count", help="Score a set of another size.")] = False,
    accept_problems: Annotated[
        bool,
        typer.Option(
            "--accept-problems", help="Score predictions with missing, extra or duplicate rows, or of other questions."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Score a checkpoint, or any system's saved predictions, on a benchmark by named protocols.

    Writes predictions.jsonl (row by row: a run goes on where it stopped), scores.jsonl, metrics.json and report.html.
    Over several processes: torchrun --nproc_per_node N -m medsight.cli evaluate ... Not a medical device.
    """
    from medsight.evaluation.benchmarks import load_benchmark, load_declarations
    from medsight.evaluation.figures import METRICS, REPORT, ROWS, figures_text
    from medsight.evaluation.runner import RunSettings, refuse_foreign
    from medsight.evaluation.scored_run import answer, protocol_of, refuse_other_protocol, rows_to_score, saved, score
    from medsight.loading import choose_device
    from medsight.processes import join_processes, lock, on_main

    with results(as_json) as out:
        if list_benchmarks:
            for known, entry in load_declarations().items():
                rows = entry.expected_rows or "any number of"
                content = {"benchmark": known, "title": entry.title, "task": entry.task, "rows": entry.expected_rows}
                out.show(content, f"{known:24}{entry.title} ({entry.task}, {rows} rows)")
            return
        if benchmark is None or data is None or output is None:
            missing_option = "benchmark" if benchmark is None else "data" if data is None else "output"
            raise ValueError(f"--{missing_option} is required (medsight evaluate --list shows the benchmarks)")
        for option in ANSWERING if predictions is not None else ():
            if context.get_parameter_source(option).name != "DEFAULT":  # type: ignore[union-attr]
                raise ValueError(f"--predictions are scored without a model: leave out --{option.replace('_', '-')}")
        declared = load_benchmark(benchmark)
        if held_out_prompts:
            declared = dataclasses.replace(declared, title=f"{declared.title}, in wordings not trained on")
        flags = {"threshold": threshold, "missing": missing, "multi": multi}
        protocol = protocol_of(declared, answers, masks, {key: v for key, v in flags.items() if v is not None})
        cases, left_out, notes = rows_to_score(declared, data, limit, held_out_prompts, seed, allow_row_count)
        processes = join_processes(cpu=choose_device(device).type == "cpu")
        on_main(lambda: refuse_foreign(output))
        with lock(output, "evaluating"):
            on_main(lambda: refuse_other_protocol(output, protocol.to_dict(declared.has_masks), overwrite))
            if predictions is None:
                settings = RunSettings(max_new_tokens, protocol.mask_protocol.threshold, dtype, masks_from)
                asked = (output, declared, data, cases)
                described, path = answer(model, *asked, settings, device, batch_size, overwrite)
            else:
                path = predictions
                described, more = saved(path, output, declared, data, cases, left_out, overwrite, accept_problems)
                notes += more
            metrics = score(
                output, declared, cases, protocol, path, described, notes, name, seed, accept_problems, left_out
            )
        if processes.is_main_process:
            out.show(metrics, figures_text(metrics), f"\nWritten to {output}/: {METRICS}, {ROWS}, {REPORT}")
        processes.destroy_process_group()  # or its threads may be found running at the process' end
