"""Says what each region code of a checkpoint stands for: `medsight codes`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from medsight.checkpoint import CODES_FILE, check_checkpoint, weights_sha256
from medsight.cli.console import Device, Json, results
from medsight.files import check_empty, staged_folder, write_json
from medsight.text import Table, quiet_transformers


def command(
    model: Annotated[str, typer.Option(metavar="DIR", help="Checkpoint folder.")],
    data: Annotated[str, typer.Option(metavar="PATH", help="Images with masks.")],
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for the contact sheets, new or empty  [default: none].")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the data  [default: what it looks like].")
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to look at.")] = "train",
    limit: Annotated[int | None, typer.Option(metavar="N", help="The first N images alone.")] = None,
    groups: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="YAML: code group: patterns of MODALITY/SITE  [default: the checkpoint's]."),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, metavar="N", help="On a sheet.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images at once.")] = 8,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the description that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Find out which structures each region code stands for.

    Each reference mask gets the code that training would give it. What codes stand for is written into the checkpoint
    folder (region_codes.json), and one contact sheet per code (PNG) into the output folder.
    """
    from tqdm import tqdm

    from medsight import __version__
    from medsight.data.groups import load_groups, match_groups
    from medsight.data.sources import find_source, kind_of, load_source
    from medsight.evaluation.codes import describe_codes, meanings_to_json
    from medsight.evaluation.runner import RunSettings, load_for_evaluation
    from medsight.evaluation.scored_run import codebook_of

    folder = Path(model)
    check_checkpoint(folder)
    target = folder / CODES_FILE
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists: the codes are described already; add --overwrite to do it again")
    if output is not None:
        check_empty(Path(output))
    source = find_source(data, layout, split=split, limit=limit)
    if kind_of(source) != "regions":
        raise ValueError(f"{data}: layout {source.layout} holds conversations; images with masks are needed")
    with results(as_json) as out:
        rows = load_source(source, streaming=True)
        with quiet_transformers():
            loaded, processor = load_for_evaluation(folder, RunSettings(dtype="float32"), device)
        codebook = codebook_of(loaded.config)
        chosen = None if groups is None else load_groups(groups, list(codebook))
        matched = match_groups(loaded.config, {(row["modality"], row["site"]) for row in rows}, chosen)
        seen = tqdm(rows, unit="image", desc="looking")
        found = describe_codes(loaded, processor, seen, matched, examples, batch_size)
        content = meanings_to_json(
            found,
            codebook,
            medsight_version=__version__,
            weights_sha256=weights_sha256(folder),
            data=Path(data).name,
            split=split,
        )
        if output is not None:
            write_sheets(Path(output), found.examples, content["codes"])
        write_json(target, content)
        sheets = f", and {len(found.examples)} sheets to {output}/" if output else ""
        out.show(content, usage_rows(content), f"\nWritten to {target}{sheets}")


def write_sheets(output: Path, examples: dict[str, Any], codes: dict[str, Any]) -> None:
    """A contact sheet a code, `C0_16.png`; the folder appears whole or not at all."""
    from medsight.export.drawing import contact_sheet

    with staged_folder(output, False, check_empty) as folder:
        for code, shown in examples.items():
            meaning = codes[code]
            shares = ", ".join(f"{name} {100 * share:.0f}%" for name, share in meaning["structures"].items())
            tiles = [(example.picture, f"{example.target}  {example.score:.2f}") for example in shown]
            sheet = contact_sheet(f"{code}  {meaning['group']}", f"{meaning['n']:,} masks: {shares}", tiles)
            sheet.save(folder / f"{code.strip('[]')}.png")


def usage_rows(content: dict[str, Any]) -> Table:
    """Usage by group, for a terminal."""
    lines = [("group", "masks", "codes in use", "perplexity", "purity", "NMI", "the code used most")]
    for name, group in content["groups"].items():
        cited = {code: entry for code, entry in content["codes"].items() if entry["group"] == name}
        if cited:
            code, most = max(cited.items(), key=lambda entry: entry[1]["n"])
            structure, share = next(iter(most["structures"].items()))
            in_use = f"{group['live_codes']} of {round(group['live_codes'] / group['live_share'])}"
            figures = (f"{group['perplexity']:.1f}", f"{group['purity']:.2f}", f"{group['nmi']:.2f}")
            lines.append((name, f"{group['citations']:,}", in_use, *figures, f"{code} {structure} {100 * share:.0f}%"))
    return lines
