"""Options of all verbs that read data, and what they say of it."""

from collections.abc import Iterable
from typing import Annotated, Any

import typer


Layout = Annotated[
    str | None, typer.Option(metavar="NAME", help="biomedparse, coco, pairs, ...  [default: by what is there].")
]
Data = Annotated[str, typer.Argument(metavar="PATH", help="File, folder, pattern, or a data entry (.yaml).")]
Images = Annotated[str | None, typer.Option(metavar="DIR", help="Folder that paths of pictures start from.")]
Splits = Annotated[str | None, typer.Option(metavar="NAMES", help="Splits, commas between  [default: all].")]
Modality = Annotated[str | None, typer.Option(metavar="NAME", help="Of all images: CT, ultrasound, ...")]
Site = Annotated[str | None, typer.Option(metavar="NAME", help="Of all images: breast, abdomen, ...")]
Structure = Annotated[str | None, typer.Option(metavar="NAME", help="What all masks show.")]
Names = Annotated[str | None, typer.Option(metavar="FILE", help="Names of a label map's values: YAML, JSON or lines.")]
Patient = Annotated[
    str | None, typer.Option(metavar="REGEX", help="Its group, in an image's file name, is the patient.")
]
Rename = Annotated[
    list[str] | None, typer.Option(metavar="OLD=NEW", help="What the data call OLD is the model's NEW; repeatable.")
]


def described(names: str | None, rename: Iterable[str] | None, **told: Any) -> dict[str, Any]:
    """Settings of a `Source` from the options of the same names."""
    from medsight.data.picture_labels import names_in_file

    return {**told, "rename": pairs("--rename", rename), "names": names_in_file(names) if names else None}


def pairs(option: str, texts: Iterable[str] | None) -> dict[str, str] | None:
    """{OLD: NEW} of texts OLD=NEW; None where there are none.

    Raises:
        ValueError: there is no "=", a name is empty, or one comes twice; it names the option.
    """
    found: dict[str, str] = {}
    for text in texts or ():
        old, sign, new = (part.strip() for part in text.partition("="))
        if not (old and sign and new) or old in found:
            raise ValueError(f"{option} {text!r}: expected OLD=NEW, and each OLD once")
        found[old] = new
    return found or None
