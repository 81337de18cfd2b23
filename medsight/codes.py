"""Says what each region code of a checkpoint stands for: `medsight codes`."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `medsight codes`."""
    parser.epilog = (
        "Each reference mask gets the code that training would give it. What codes stand for is written into the "
        "checkpoint folder (region_codes.json), and a contact sheet a code (PNG) into the output folder."
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--data", required=True, metavar="PATH", help="images with masks")
    parser.add_argument("--output", metavar="DIR", help="folder for the contact sheets, new or empty (default: none)")
    parser.add_argument("--layout", metavar="NAME", help="of the data (default: what it looks like)")
    parser.add_argument("--split", default="train", metavar="NAME", help="split to look at (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images alone")
    parser.add_argument(
        "--groups",
        metavar="FILE",
        help="YAML: code group -> patterns of MODALITY/SITE (default: by the groups' names)",
    )
    parser.add_argument("--examples", type=int, default=8, metavar="N", help="on a sheet (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once (default: %(default)s)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace what the checkpoint folder says already")


def run(args: argparse.Namespace) -> None:
    """Runs `medsight codes`.

    Raises:
        OSError, ValueError: an argument, the checkpoint or the data is bad, or the codes are described already.
    """
    try:
        _run(args)
    except ModuleNotFoundError as error:
        if error.name not in ("datasets", "evaluate", "pyarrow", "tqdm", "yaml"):
            raise
        raise ValueError(f"the package {error.name!r} is not installed: pip install 'medsight[eval]'") from error


def _run(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    from medsight import __version__
    from medsight.checkpoint import check_checkpoint
    from medsight.evaluate import codebook_of
    from medsight.evaluation.codes import CODES_FILE, describe_codes, meanings_to_json
    from medsight.evaluation.runner import RunSettings, checkpoint_fingerprint, load_for_evaluation, write_json
    from medsight.training.data.annotate import load_groups, match_groups
    from medsight.training.data.annotation import check_empty
    from medsight.training.data.sources import Source, detect_layout, kind_of, load_source

    folder = Path(args.model)
    check_checkpoint(folder)
    target = folder / CODES_FILE
    if target.exists() and not args.overwrite:
        raise FileExistsError(f"{target} exists: the codes are described already; add --overwrite to do it again")
    if args.output is not None:
        check_empty(Path(args.output))
    if args.examples < 1:
        raise ValueError(f"--examples {args.examples}: expected at least 1")
    source = Source(args.layout or detect_layout(args.data), args.data, split=args.split, limit=args.limit)
    if kind_of(source) != "regions":
        raise ValueError(f"{args.data}: layout {source.layout} holds conversations; images with masks are needed")
    rows = load_source(source, streaming=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, processor = load_for_evaluation(folder, RunSettings(dtype="float32"), args.device)
    names = list(codebook_of(model.config))
    if args.groups is not None:
        groups = load_groups(args.groups, names)
    else:
        groups = match_groups(names, {(row["modality"], row["site"]) for row in rows})
    found = describe_codes(model, processor, _counted(rows), groups, args.examples, args.batch_size)
    content = meanings_to_json(
        found,
        codebook_of(model.config),
        medsight_version=__version__,
        weights_sha256=checkpoint_fingerprint(folder)["weights_sha256"],
        data=Path(args.data).name,
        split=args.split,
    )
    if args.output is not None:
        write_sheets(Path(args.output), found.examples, content["codes"])
    write_json(target, content)
    print(table(content))
    print(f"\nWritten to {target}" + (f", and {len(found.examples)} sheets to {args.output}/" if args.output else ""))


def _counted(rows: Any) -> Any:
    from tqdm import tqdm

    return tqdm(rows, unit="image", desc="looking")


def write_sheets(output: Path, examples: dict[str, Any], codes: dict[str, Any]) -> None:
    """A contact sheet a code, `C0_16.png`; the folder appears whole or not at all."""
    from medsight.evaluation.codes import contact_sheet
    from medsight.output_folder import staged_folder
    from medsight.training.data.annotation import check_empty

    with staged_folder(output, False, check_empty) as folder:
        for code, some in examples.items():
            meaning = codes[code]
            shares = ", ".join(f"{name} {100 * share:.0f}%" for name, share in meaning["structures"].items())
            title = f"{code}  {meaning['group']}"
            sheet = contact_sheet(title, f"{meaning['n']:,} masks: {shares}", some)
            sheet.save(folder / f"{code.strip('[]')}.png")


def table(content: dict[str, Any]) -> str:
    """Usage by group, for a terminal."""
    from medsight.prediction import align

    lines = [("group", "masks", "codes in use", "perplexity", "purity", "NMI", "the code used most")]
    for name, group in content["groups"].items():
        if not group["citations"]:
            continue
        code = max((code for code, entry in content["codes"].items() if entry["group"] == name), key=_count(content))
        structures = content["codes"][code]["structures"]
        first = next(iter(structures))
        lines.append(
            (
                name,
                f"{group['citations']:,}",
                f"{group['live_codes']} of {round(group['live_codes'] / group['live_share'])}",
                f"{group['perplexity']:.1f}",
                f"{group['purity']:.2f}",
                f"{group['nmi']:.2f}",
                f"{code} {first} {100 * structures[first]:.0f}%",
            )
        )
    return align(lines)


def _count(content: dict[str, Any]) -> Any:
    return lambda code: content["codes"][code]["n"]
