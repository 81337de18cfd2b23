"""The codes that a model's own codebook gives to reference masks, and the code group that it takes an image for."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from medsight.data.groups import match_groups
from medsight.data.pictures import read_mask, read_picture
from medsight.inference.code_assignment import assign_codes

from .cases import Case


class ReferenceCodes:
    """Codes of reference masks by `assign_codes`, as training gives them: all masks of an image are matched together,
    in whatever batches and cases of the benchmark they come."""

    def __init__(self, cases: Sequence[Case], model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.names = [str(name) for name in model.config.group_names or range(model.config.num_groups)]
        self._masks: dict[str, dict[str, tuple[Mapping[str, Any], str | None]]] = defaultdict(dict)
        for case in cases:
            if len(case.images) == 1:
                targets = case.mask_targets or [case.target] * len(case.masks)
                named = {_key(mask): (mask, target) for mask, target in zip(case.masks, targets, strict=True)}
                self._masks[_key(case.images[0])].update(named)
        self._codes: dict[str, dict[str, str]] = {}

    def of(self, cases: Sequence[Case], pixel_values: Any) -> list[tuple[str | None, tuple[str, ...] | None]]:
        """For each case the group that the model takes its (last) image for, and the codes of its reference masks.

        The codes are None where the image's group is not known (no group of the model holds its modality and site),
        the case has several images, or the model has no codebook. `pixel_values` are of all images, in order.
        """
        if not self.model.config.use_region_codebook:
            return [(None, None)] * len(cases)
        with torch.inference_mode():
            regions = self.model.get_region_features(pixel_values)
        predicted = regions.group_logits.argmax(-1).tolist()
        last = [place - 1 for place in accumulate(len(case.images) for case in cases)]
        return [
            (self.names[predicted[place]], self._codes_of(case, regions, place))
            for case, place in zip(cases, last, strict=True)
        ]

    def _codes_of(self, case: Case, regions: Any, place: int) -> tuple[str, ...] | None:
        config = self.model.config
        try:
            group = match_groups(config, [(case.modality, case.site)]).index(case.modality, case.site)
        except ValueError:
            return None
        if len(case.images) != 1:
            return None
        image = _key(case.images[0])
        if case.masks and image not in self._codes:  # all masks of the image, whichever case they are of
            known = self._masks[image]
            size = read_picture(case.images[0]).size
            masks = np.stack([read_mask(mask, size) for mask, _ in known.values()])
            placed = self.processor.image_processor.preprocess_masks(masks, output_size=(config.image_size,) * 2)
            codes = codes_in_image(self.model, regions, place, placed, [target for _, target in known.values()], group)
            tokens = (config.region_code_token(group, code) for code in codes.tolist())
            self._codes[image] = dict(zip(known, tokens, strict=True))
        return tuple(self._codes[image][_key(mask)] for mask in case.masks)


def codes_in_image(
    model: Any, regions: Any, place: int, masks: Any, targets: Sequence[str | None], group: int
) -> torch.Tensor:
    """What `assign_codes` gives to all masks of one image of a batch, so that the rest of the batch does not show.

    Args:
        regions: the model's `get_region_features` of the batch.
        place: of the image in it.
        masks: (n, H, W), on the model's canvas.
        targets: what each mask shows. Where one is no class of the model, masks are matched by their shape alone.

    Returns:
        (n,) long, indices within the group.
    """
    needed = ("masks_queries_logits", "class_queries_logits", "region_embeddings")
    alone = SimpleNamespace(**{name: getattr(regions, name)[place : place + 1] for name in needed})
    named = {name: index for index, name in enumerate(model.config.mask_class_names or [])}
    known = all(target in named for target in targets)
    classes = [torch.tensor([named[str(target)] for target in targets])] if known else None
    return assign_codes(model, alone, [masks], classes, torch.tensor([group]))[0]


def _key(picture: Mapping[str, Any]) -> str:
    """What tells a picture from others: its path, or its content where that is in memory."""
    if picture.get("bytes") is None:
        return str(picture["path"])
    return hashlib.sha256(picture["bytes"]).hexdigest()
