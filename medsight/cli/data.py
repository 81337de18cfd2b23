"""Training data: `medsight data guess`, `check`, `convert` and `annotate`."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer

from medsight.cli.console import Device, Json, results
from medsight.cli.data_options import (
    Data,
    Images,
    Layout,
    Modality,
    Names,
    Patient,
    Rename,
    Site,
    Splits,
    Structure,
    described,
    pairs,
)
from medsight.files import check_empty, read_names, write_bytes
from medsight.text import quiet_transformers


def guess(
    path: Annotated[str, typer.Argument(metavar="PATH", help="File, folder, pattern, or hf://OWNER/NAME.")],
    output: Annotated[str | None, typer.Option(metavar="FILE", help="Write the data entry there (.yaml).")] = None,
    sheet: Annotated[str | None, typer.Option(metavar="FILE", help="Draw a contact sheet there (.png).")] = None,
    layout: Layout = None,
    images: Images = None,
    modality: Modality = None,
    site: Site = None,
    structure: Structure = None,
    names: Names = None,
    patient: Patient = None,
    columns: Annotated[
        str | None, typer.Option(metavar="OURS=THEIRS,...", help="Columns of a table: image=file,mask=label.")
    ] = None,
    rename: Rename = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Say which layout data have and what would be read of them, and write their entry.

    The entry goes into `data check`, `convert`, `annotate`, `codes`, `evaluate --data`, and a recipe's data.
    """
    from medsight.data.guess import guess as look
    from medsight.data.guess import write_entry
    from medsight.data.pictures import encode_picture
    from medsight.export.sheet import sheet_of_rows

    if sheet is not None and Path(sheet).exists() and not overwrite:
        raise FileExistsError(f"{sheet} is there already; name another file, or add --overwrite")
    told = {"modality": modality, "site": site, "structure": structure, "patient": patient, "images": images}
    known = described(names, rename, columns=pairs("--columns", columns.split(",") if columns else None), **told)
    with results(as_json) as out:
        found = look(path, layout, progress=True, **known)
        lines = [f"\n{found.to_yaml()}" if output is None else f"\nWritten to {output}"]
        if sheet is not None:
            rows = [row for row in found.rows if "image" in row]
            drawn = encode_picture(sheet_of_rows(found.source.name, found.reason, rows), sheet)
            write_bytes(Path(sheet), drawn["bytes"])
            lines.append(f"Drawn to {sheet}")
        if output is not None:
            write_entry(found, output, overwrite)
        out.show(found.to_dict(), f"{path}\n\n{found.to_text()}", *lines)


def check(
    path: Data,
    layout: Layout = None,
    split: Splits = None,
    images: Images = None,
    rename: Rename = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=VALUE", help="Just rows with this value, as in a recipe; repeatable."),
    ] = None,
    targets: Annotated[str | None, typer.Option(metavar="FILE", help="All targets: JSON list, or one a line.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Checkpoint to train from: its classes are all targets.")
    ] = None,
    extend: Annotated[
        bool,
        typer.Option("--extend", help="With --model: what it lacks is no problem, but what would be added to it."),
    ] = False,
    groups: Annotated[
        str | None, typer.Option(metavar="FILE", help="With --model: YAML, code group -> [MODALITY/SITE, ...].")
    ] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Threads  [default: a core each].")] = None,
    as_json: Json = False,
) -> None:
    """Read training data once, report all that is wrong with it, and count.

    Exit status: 0 if training may start, 1 if there is a problem. Warnings are no problems.
    """
    from configuration_medsight.configuration_medsight import MedSightConfig
    from medsight.checkpoint import check_checkpoint
    from medsight.data.check import check as read_and_check
    from medsight.data.check import parse_condition
    from medsight.data.groups import load_groups
    from medsight.data.sources import find_source

    splits = [name.strip() for name in split.split(",")] if split else [None]
    conditions = dict(map(parse_condition, where or [])) or None
    known, config = read_names(targets) if targets else None, None
    if model is not None:
        if known is not None:
            raise ValueError("--targets and --model both say which targets there are: give one of them")
        check_checkpoint(Path(model))
        config = MedSightConfig.from_pretrained(model, local_files_only=True)
        known = None if extend else config.mask_class_names or []
    elif extend or groups:
        raise ValueError("--extend and --groups are about a checkpoint: name it by --model")
    chosen = load_groups(groups, None) if groups else None
    source = find_source(path, layout, images=images, where=conditions, rename=pairs("--rename", rename))
    sources = [dataclasses.replace(source, split=name) for name in splits]
    with results(as_json) as out:
        report = read_and_check(sources, targets=known, workers=workers)
        lines = report.compare(config, chosen, extend) if config is not None else []
        added = "\n".join(["", f"to be added to {model}:", *(f"  {line}" for line in lines or ["nothing"])])
        content = {**report.to_dict(), **({"additions": lines} if extend else {})}
        out.show(content, f"{path} ({source.layout})\n\n{report.to_text()}", *([added] if extend else []))
    if not report.ok:
        kinds = Counter(problem.kind for problem in report.problems)
        found = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        raise ValueError(f"{path}: training cannot start on it: {found}")


def annotate(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Images with masks.")],
    model: Annotated[str, typer.Option(metavar="DIR", help="Checkpoint with trained perceiver and codebook.")],
    output: Annotated[str, typer.Option(metavar="DIR", help="Output folder, new or empty.")],
    layout: Layout = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to annotate.")] = "train",
    groups: Annotated[
        str | None, typer.Option(metavar="FILE", help="YAML: group -> [MODALITY/SITE, ...]  [default: checkpoint's].")
    ] = None,
    templates: Annotated[str | None, typer.Option(metavar="FILE", help="Wordings  [default: those shipped].")] = None,
    per_image: Annotated[int, typer.Option(metavar="N", help="Conversations an image.")] = 8,
    plain_share: Annotated[float, typer.Option(metavar="P", help="Share that needs no region.")] = 0.0,
    max_regions: Annotated[int, typer.Option(metavar="N", help="Most codes in an answer.")] = 5,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all choices.")] = 0,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images at once.")] = 8,
    on_error: Annotated[Literal["stop", "skip"], typer.Option(help="At an unreadable image or mask.")] = "stop",
    embed_images: Annotated[bool, typer.Option("--embed-images", help="Write pictures, not their paths.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Give masks their region codes and write grounded conversations about the images.

    Each mask gets the region code that the model's region queries match it with, and conversations that cite the codes
    are drawn from templates. The output folder (parquet files, README.md, annotation.json) appears whole or not.
    """
    from medsight.checkpoint import check_checkpoint
    from medsight.data.groups import Groups, load_groups, match_groups
    from medsight.data.sources import find_source, kind_of, load_source
    from medsight.data.wording import Wordings
    from medsight.loading import choose_device, load_checkpoint
    from medsight.training.annotation import annotate as write_conversations
    from medsight.training.annotation_output import summary

    check_empty(Path(output))
    wordings = Wordings.load(templates)
    source = find_source(path, layout, split=split)
    if kind_of(source) != "regions":
        raise ValueError(f"{path}: layout {source.layout} holds conversations; images with masks are annotated")
    check_checkpoint(Path(model))
    place = choose_device(device)
    with results(as_json) as out:
        rows = load_source(source, streaming=True)
        with quiet_transformers():
            loaded, processor = load_checkpoint(Path(model), "auto")
        config, pairs = loaded.config, {(row["modality"], row["site"]) for row in rows}
        chosen = load_groups(groups, config.group_names if config.use_region_codebook else None) if groups else None
        if config.use_region_codebook:
            chosen = match_groups(config, pairs, chosen)
        counts = write_conversations(
            rows,
            loaded.to(place),
            processor,
            chosen or Groups.of_pairs(pairs),
            output,
            per_image=per_image,
            plain_share=plain_share,
            seed=seed,
            batch_size=batch_size,
            max_regions=max_regions,
            on_error=on_error,
            embed_images=embed_images,
            wordings=wordings,
            region_codes=processor.region_codes,
            progress=True,
        )
        counted = {name: getattr(counts, name) for name in ("images", "conversations", "intents")}
        content = {"folder": output, **counted, "code_usage": counts.code_usage(), "skipped": counts.skipped}
        written = f"\nWritten to {output}/: {counts.conversations} conversations, README.md, annotation.json"
        out.show(content, summary(counts), written)


def convert(
    path: Data,
    output: Annotated[str, typer.Option(metavar="DIR", help="Output folder, new or empty.")],
    layout: Layout = None,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Just this split  [default: all].")] = None,
    images: Images = None,
    rename: Rename = None,
    as_json: Json = False,
) -> None:
    """Write data of any layout as parquet shards of MedSIGHT's own rows, pictures in them.

    The output folder (SPLIT-00000.parquet, ..., README.md) appears whole or not; the layout `parquet` reads it.
    """
    from medsight.data.packing import pack
    from medsight.data.sources import find_source

    check_empty(Path(output))
    source = find_source(path, layout, images=images, rename=pairs("--rename", rename))
    with results(as_json) as out:
        report = pack(dataclasses.replace(source, split=split), output)
        written = f"\nWritten to {output}/: parquet shards and README.md"
        out.show({"folder": output, **report.to_dict()}, f"{path} ({source.layout})\n\n{report.to_text()}", written)


commands = {"guess": guess, "check": check, "convert": convert, "annotate": annotate}
