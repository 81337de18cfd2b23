"""Says what a checkpoint folder, an image or a volume is: `medsight info`."""

from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from medsight.checkpoint import CODES_FILE, check_checkpoint, read_json, shipped_checkpoint, weight_files
from medsight.text import Table

from .console import Json, results


ADAPTER_FILE = "adapter_config.json"


def command(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH",
            help="Checkpoint or adapter folder, picture, DICOM or NIfTI file, folder of a DICOM series.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a checkpoint folder is, by default the one shipped, or what an image is.

    Of a checkpoint: parameters, groups, codes with what they usually stand for, stages it was trained in, versions,
    sizes. Of an image: kind, slices, spacing, modality; nothing about a patient.
    """
    what = shipped_checkpoint() if path is None else Path(path)
    if not what.exists():
        raise FileNotFoundError(f"{what}: there is no such file or folder")
    with results(as_json) as out:
        if (what / ADAPTER_FILE).is_file():
            content = describe_adapter(what)
            out.show(content, as_lines(content))
        elif (what / "config.json").is_file():
            content = describe_checkpoint(what)
            out.show(content, as_lines({**content, "codes": None}), *code_parts(content["codes"]))
        else:
            content = describe_image(what)
            out.show(content, as_lines(content))


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """What a complete checkpoint folder is, without loading its weights."""
    from configuration_medsight import MedSightConfig
    from medsight.conversion.convert import sizes
    from processing_medsight.region_codes_medsight import read_region_codes

    check_checkpoint(folder)
    config = MedSightConfig.from_pretrained(folder, local_files_only=True)
    parts = count_parameters(config)
    weights = weight_files(folder)
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "dtypes": sorted({dtype for dtype, _ in tensor_headers(weights)}),
        "bytes": sum(file.stat().st_size for file in weights),
        **sizes(config),
        "group_names": list(config.group_names or ()),
        "mask_class_names": list(config.mask_class_names or ()),
        "stages_trained": stages_trained(folder),
        "transformers_version": read_json(folder / "config.json").get("transformers_version"),
        "codes": read_region_codes(folder / CODES_FILE)["codes"] if (folder / CODES_FILE).is_file() else {},
    }


def describe_adapter(folder: Path) -> dict[str, Any]:
    """What a folder that peft saved an adapter to is."""
    config = read_json(folder / ADAPTER_FILE)
    weights = folder / "adapter_model.safetensors"
    headers = list(tensor_headers([weights]))
    return {
        "kind": "adapter",
        "path": str(folder),
        "parameters": sum(count for _, count in headers),
        "dtypes": sorted({dtype for dtype, _ in headers}),
        "bytes": weights.stat().st_size,
        "base_model": config.get("base_model_name_or_path"),
        "peft_type": config.get("peft_type"),
        "rank": config.get("r"),
    }


def describe_image(path: Path) -> dict[str, Any]:
    """What a picture or scan is; nothing about a patient."""
    from medsight.inference.image_files import image_content
    from medsight.scans import open_scan

    scan = open_scan(path)
    facts = scan.facts()
    del facts["plane"], facts["orientation"]  # the default ones: nobody chose them
    return {
        "kind": facts.pop("kind"),
        "path": str(path),
        **facts,
        "window_of_its_own": scan.has_window,
        "files": len(scan.files) or 1,
        "bytes": sum(file.stat().st_size for file in scan.files or image_content(path)),
    }


def count_parameters(config: Any) -> dict[str, int]:
    """Parameters by part of the model, shared ones once; nothing is loaded."""
    import torch

    from modeling_medsight import MedSightForConditionalGeneration

    parts: Counter[str] = Counter()
    with torch.device("meta"):
        for name, parameter in MedSightForConditionalGeneration(config).named_parameters():
            parts[name.removeprefix("model.").partition(".")[0]] += parameter.numel()
    return dict(parts)


def tensor_headers(files: Iterable[Path]) -> Iterator[tuple[str, int]]:
    """Dtype and number of entries of each stored tensor."""
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, framework="np") as weights:
                for name in weights.keys():
                    tensor = weights.get_slice(name)
                    yield tensor.get_dtype(), prod(tensor.get_shape())
        except SafetensorError as error:
            raise ValueError(f"weights file {path} is damaged or incomplete ({error}); copy it again") from error


def stages_trained(folder: Path) -> list[str] | None:
    """The stages of the run that a folder is the result of, or a stage's; None where it does not lie in a run."""
    import yaml

    model = folder.absolute()
    inside = model.parent.parent.name == "stages"
    stages = model.parent.parent if inside else model.parent / "stages"
    if model.name != "model" or not (stages.parent / "recipe.yaml").is_file():
        return None
    finished = sorted(path.parent.name for path in stages.glob("*/finished.json"))
    planned = yaml.safe_load((stages.parent / "recipe.yaml").read_text(encoding="utf-8"))["stages"]
    if isinstance(planned, list):  # in an earlier version's recipe they are none, and their folders are numbered
        finished = [stage["name"] for stage in planned if stage["name"] in finished]
    return finished[: finished.index(model.parent.name) + 1] if inside and model.parent.name in finished else finished


def as_lines(content: dict[str, Any]) -> str:
    """A line an entry, for a terminal; what is not known is left out."""
    names = [name for name, value in content.items() if value not in (None, [], {})]
    width = max(map(len, names)) + 2
    return "\n".join(f"{name.replace('_', ' '):{width}}{_as_text(content[name])}" for name in names)


def code_parts(codes: dict[str, Any]) -> list[str | Table]:
    """What codes usually stand for, as a table for a terminal."""
    if not codes:
        return [f"\nWhat its codes stand for is not written down: there is no {CODES_FILE} (see medsight codes)"]
    rows = [
        (code, entry["group"], ", ".join(f"{name} {100 * share:.0f}%" for name, share in entry["structures"].items()))
        for code, entry in codes.items()
    ]
    return ["", [("code", "group", "usually"), *rows]]


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_as_text(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_as_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
