"""What each region code stands for: the structures whose masks it gets, and where its mask is hottest."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from medsight.data.groups import Groups
from medsight.export.drawing import heat_map
from medsight.inference.code_assignment import place

from .reference_codes import codes_in_image


TILE = 160  # pixels of the longer side of an example


class Example(NamedTuple):
    """An image in which a code was given to a mask, with the heat map over it, `TILE` pixels at most."""

    score: float  # mean probability of the code's mask inside itself
    target: str
    picture: Image.Image


@dataclass
class CodeMeanings:
    """What `describe_codes` found in a number of images."""

    citations: list[tuple[str, str, str]] = field(default_factory=list)  # code, group's name, structure of every mask
    examples: dict[str, list[Example]] = field(default_factory=dict)  # of each code, the surest first
    images: int = 0


def describe_codes(
    model: Any, processor: Any, rows: Iterable[Mapping[str, Any]], groups: Groups, examples: int, batch_size: int
) -> CodeMeanings:
    """Gives each reference mask its code, as training does, and keeps the surest masks that each code decodes to.

    Args:
        model, processor: of one checkpoint, in evaluation mode.
        rows: of `REGION_FEATURES`.
        groups: the code groups, named and ordered as in the model's configuration.
        examples: how many to keep a code.

    Raises:
        OSError, ValueError: an image or mask is missing or bad, an image has no group, or the model has no codes.
    """
    if not model.config.use_region_codebook:
        raise ValueError("the model has no region codebook: its one code [SEG] stands for anything")
    found = CodeMeanings()
    with_masks = (row for row in rows if row["masks"])
    while batch := list(islice(with_masks, batch_size)):
        pixels, masks = zip(*(place(row, processor, model.config.image_size) for row in batch), strict=True)
        owners = [groups.index(row["modality"], row["site"]) for row in batch]
        with torch.inference_mode():
            regions = model.get_region_features(torch.stack(pixels).to(model.device, model.dtype))
            codes, pairs = [], []
            for i, row in enumerate(batch):
                codes.append(codes_in_image(model, regions, i, masks[i], row["targets"], owners[i]))
                pairs.append(torch.stack([torch.full_like(codes[i], owners[i]), codes[i]], 1))
            logits = model.region_model.decode_codes(code_indices=pairs, features=regions)
        for i, row in enumerate(batch):
            picture, heat = _picture(pixels[i], processor), logits[i].float().sigmoid().cpu().numpy()
            for code, target, probabilities in zip(codes[i].tolist(), row["targets"], heat, strict=True):
                name = model.config.region_code_token(owners[i], code)
                found.citations.append((name, groups.names[owners[i]], target))
                inside = probabilities[probabilities > 0.5]
                score = float(inside.mean()) if inside.size else 0.0
                example = Example(score, target, heat_map(picture, probabilities))
                best = sorted([*found.examples.get(name, []), example], key=lambda shown: -shown.score)
                found.examples[name] = best[:examples]
            found.images += 1
    if not found.citations:
        raise ValueError("no row has a mask, so no code can be described")
    return found


def _picture(pixels: Any, processor: Any) -> Image.Image:
    """What the model saw, as an 8-bit picture."""
    images = processor.image_processor
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (images.image_mean, images.image_std))
    array = ((pixels.numpy() * std + mean).clip(0, 1) * 255).round().astype(np.uint8)
    picture = Image.fromarray(array.transpose(1, 2, 0))
    picture.thumbnail((TILE, TILE))
    return picture


def meanings_to_json(found: CodeMeanings, codes_per_group: Mapping[str, int], **origin: Any) -> dict[str, Any]:
    """The content of region_codes.json: by code its group, count and structures with shares; by group the usage."""
    from medsight.metrics.region_codes.region_codes import code_usage  # needs the extra "eval"

    usage = code_usage(found.citations, dict(codes_per_group))
    groups = usage.pop("groups")
    meanings = {name: group.pop("codes") for name, group in groups.items()}
    codes = {code: {"group": name, **said} for name, codes in meanings.items() for code, said in codes.items()}
    return {**origin, "images": found.images, "overall": usage, "groups": groups, "codes": codes}
