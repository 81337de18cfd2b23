"""Bring your own masks: gives each mask its region code and writes grounded conversations about the images.

medsight data annotate my-masks --model my-model --output my-conversations
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .annotation import annotate, check_empty
from .groups import Groups


if TYPE_CHECKING:
    from .annotation_output import AnnotationCounts

__all__ = ["add_arguments", "annotate", "load_groups", "match_groups", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `medsight data annotate`."""
    parser.epilog = (
        "Each mask gets the region code that the model's region queries match it with, and conversations that cite "
        "the codes are drawn from templates. The output folder (parquet files, README.md, annotation.json) appears "
        "complete or not at all."
    )
    parser.add_argument("path", metavar="PATH", help="images with masks")
    parser.add_argument(
        "--layout", metavar="NAME", help="biomedparse, parquet or webdataset (default: what it looks like)"
    )
    parser.add_argument("--split", default="train", metavar="NAME", help="split to annotate (default: %(default)s)")
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint with trained perceiver and codebook")
    parser.add_argument("--output", required=True, metavar="DIR", help="output folder, new or empty")
    parser.add_argument(
        "--groups",
        metavar="FILE",
        help="YAML: code group of the model -> patterns of MODALITY/SITE (default: by the groups' names)",
    )
    parser.add_argument("--templates", metavar="FILE", help="YAML file of wordings (default: the one in this package)")
    parser.add_argument("--per-image", type=int, default=8, metavar="N", help="conversations an image (default: 8)")
    parser.add_argument(
        "--plain-share", type=float, default=0.0, metavar="P", help="share that needs no region (default: %(default)s)"
    )
    parser.add_argument("--max-regions", type=int, default=5, metavar="N", help="most codes in an answer (default: 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all choices (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once (default: %(default)s)")
    parser.add_argument("--on-error", default="stop", choices=("stop", "skip"), help="at an unreadable image or mask")
    parser.add_argument("--embed-images", action="store_true", help="put pictures into the files, not their paths")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Runs `medsight data annotate`.

    Raises:
        OSError, ValueError: see `annotate`; nothing is written then.
    """
    from transformers.utils import logging as transformers_logging

    from medsight.checkpoint import check_checkpoint
    from medsight.predict import choose_device, load_checkpoint

    from .sources import Source, detect_layout, kind_of, load_source
    from .wording import Wordings

    check_empty(Path(args.output))
    wordings = Wordings.load(args.templates)
    source = Source(layout=args.layout or detect_layout(args.path), path=args.path, split=args.split)
    if kind_of(source) != "regions":
        raise ValueError(
            f"{args.path}: layout {source.layout} holds conversations; images with masks are what can be annotated"
        )
    check_checkpoint(Path(args.model))
    device = choose_device(args.device)
    rows = load_source(source, streaming=True)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model, processor = load_checkpoint(Path(args.model), "auto")
    names = list(model.config.group_names) if model.config.use_region_codebook else None
    if args.groups is not None:
        groups = load_groups(args.groups, names)
    else:
        pairs = {(row["modality"], row["site"]) for row in rows.select_columns(["modality", "site"])}
        groups = Groups.of_pairs(pairs) if names is None else match_groups(names, pairs)
    counts = annotate(
        rows,
        model.to(device),
        processor,
        groups,
        args.output,
        per_image=args.per_image,
        plain_share=args.plain_share,
        seed=args.seed,
        batch_size=args.batch_size,
        max_regions=args.max_regions,
        on_error=args.on_error,
        embed_images=args.embed_images,
        wordings=wordings,
        progress=True,
    )
    print(summary(counts))
    print(f"\nWritten to {args.output}/: {counts.conversations} conversations, README.md, annotation.json")


def summary(counts: "AnnotationCounts") -> str:
    """A table of what was made, for a terminal."""
    lines = [f"{counts.images} images, {counts.conversations} conversations", ""]
    lines += [f"{name:<24}{count:>8}" for name, count in sorted(counts.intents.items())]
    lines += ["", f"{'group':<24}{'masks':>8}{'codes in use':>14}{'perplexity':>12}"]
    for name, usage in counts.code_usage().items():
        used = f"{usage['used']} of {usage['codes']}"
        lines.append(f"{name:<24}{usage['masks']:>8}{used:>14}{usage['perplexity']:>12}")
    if counts.masks_beyond_queries:
        lines.append(f"\n{counts.masks_beyond_queries} masks beyond the number of region queries of their image")
    if counts.skipped:
        lines.append(f"\n{len(counts.skipped)} images left out, each named in README.md")
    return "\n".join(lines)


def match_groups(names: Sequence[str], pairs: Iterable[tuple[str, str]]) -> Groups:
    """The model's groups with the patterns of the data's pairs of modality and site.

    A pair belongs to the group called "MODALITY SITE", whatever the case, or else to that of its modality up to the
    first hyphen ("MRI-T1", "brain" to "MRI brain").

    Raises:
        ValueError: for a pair without such a group, naming it and the groups.
    """
    by_name = {name.lower(): name for name in names}
    patterns: dict[str, list[str]] = {name: [] for name in names}
    for modality, site in sorted(set(pairs)):
        spellings = (f"{modality} {site}".lower(), f"{modality.split('-')[0]} {site}".lower())
        found = next((by_name[spelling] for spelling in spellings if spelling in by_name), None)
        if found is None:
            raise ValueError(
                f"no code group of the model is called '{modality} {site}': its groups are {', '.join(names)}. Say "
                f"which of them it belongs to with --groups FILE, e.g. {names[0]!r}: ['{modality}/{site}']"
            )
        patterns[found].append(f"{modality}/{site}")
    return Groups(patterns)


def load_groups(path: str | Path, names: Sequence[str] | None) -> Groups:
    """Groups from a YAML file, group name -> patterns of "modality/site".

    Args:
        names: the model's groups, whose order counts; `None` takes the file's.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a mapping, or names a group that the model has not.
    """
    import difflib

    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or not all(
        isinstance(some, list) and all(isinstance(pattern, str) for pattern in some) for some in content.values()
    ):
        raise ValueError(f"{path}: expected group names, each with a list of patterns of 'modality/site'")
    if names is None:
        return Groups({str(name): some for name, some in content.items()})
    for name in content:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"they are {', '.join(names)}"
            raise ValueError(f"{path}: the model has no code group {name!r}; {hint}")
    return Groups({name: content.get(name, []) for name in names})
