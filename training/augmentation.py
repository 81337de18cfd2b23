"""Random changes of a training picture that move its masks with it."""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn.functional as F

from medsight.data.groups import Groups


TRIES = 5  # draws of a geometry, until every mask stays in the picture
KEPT_SHARE = 0.1  # of a mask's area; with less it counts as moved out of the picture

# A chamber of the heart keeps its name in a mirrored picture: what tells it is its wall and neighbours, no side.
_CHAMBERS = re.compile(r"\b(left|right) (?:heart )?(?:ventric(?:le|ular)|atri(?:um|al))\b", flags=re.IGNORECASE)
_SIDE = re.compile(r"\b(left|right|lt|rt|l|r)\b", flags=re.IGNORECASE)
_JOINT = re.compile(r"_|(?<=[a-z])(?=[A-Z])|(?<=[a-z]{2})(?=\d)")  # kidney_left, LeftKidney, left2; L1 is a vertebra
_WHERE = "left|right|upper|lower|top|bottom|middle|centre|center"
_PLACE = re.compile(
    rf"\b(?:{_WHERE})[- ](?:left|right|middle|corner|half|part|side|third|quadrant|portion|edge|panel)\b|"
    rf"\b(?:{_WHERE}) of (?:the|this)\b",
    flags=re.IGNORECASE,
)


@dataclass(frozen=True)
class Augmentation:
    """Strengths; every number is a largest deviation, 0 switches that part off.

    Attributes:
        rotate: degrees, either way.
        scale: natural logarithm of the zoom, in or out.
        shift: share of the picture's side, in either direction of both axes.
        brightness: added to pixels in 0..1.
        contrast: share by which differences from the mean grow or shrink.
        gamma: natural logarithm of the exponent.
        noise: standard deviation of Gaussian noise, the same in all channels.
        flip: "unsided" mirrors half of the pictures of groups that name no target left or right; "none" mirrors none.
        orientation_free: shell patterns of the names of groups whose pictures have no up and down (microscopy, skin):
            where "unsided" mirrors, these are also turned by quarters, so that all eight orientations are as likely.

    Raises:
        ValueError: for a strength that is negative or not finite, or another `flip`.
    """

    rotate: float = 15.0
    scale: float = 0.15
    shift: float = 0.08
    brightness: float = 0.15
    contrast: float = 0.25
    gamma: float = 0.3
    noise: float = 0.03
    flip: Literal["none", "unsided"] = "unsided"
    orientation_free: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name not in ("flip", "orientation_free") and not 0 <= value < math.inf:
                raise ValueError(f"augmentation.{entry.name}={value!r}: expected a number of at least 0")
        if self.flip not in ("none", "unsided"):
            raise ValueError(f"augmentation.flip={self.flip!r}: expected 'none' or 'unsided'")

    def orientation_free_groups(self, groups: Groups) -> frozenset[int]:
        """The groups that a pattern in `orientation_free` matches.

        Raises:
            ValueError: for a pattern that matches none.
        """
        found: set[int] = set()
        for pattern in self.orientation_free:
            matching = {k for k, name in enumerate(groups.names) if fnmatchcase(name, pattern)}
            if not matching:
                raise ValueError(
                    f"augmentation.orientation_free: {pattern!r} matches none of the groups {groups.names}"
                )
            found |= matching
        return frozenset(found)


@dataclass(frozen=True)
class Augmenter:
    """Changes one picture and its masks together; holds no state, all chance comes from the generator of the call.

    Args:
        settings: strengths.
        sided_groups: groups none of whose pictures is ever mirrored, even where it shows no sided target (see
            [`sided_groups`]): else a liver would be learnt on both sides.
        orientation_free_groups: see [`Augmentation.orientation_free_groups`].

    Example:

    ```python
    >>> import torch
    >>> from medsight.training.augmentation import Augmentation, Augmenter
    >>> picture, mask = torch.rand(3, 32, 32), torch.ones(1, 32, 32)
    >>> generator = torch.Generator().manual_seed(0)
    >>> moved, _ = Augmenter(Augmentation())(picture, mask, group=0, targets=["liver"], generator=generator)
    >>> moved.shape
    torch.Size([3, 32, 32])

    ```
    """

    settings: Augmentation
    sided_groups: Collection[int] = frozenset()
    orientation_free_groups: Collection[int] = frozenset()

    def __call__(
        self,
        pixels: torch.Tensor,
        masks: torch.Tensor,
        *,
        group: int,
        targets: Sequence[str],
        generator: torch.Generator,
        stays: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mirror or turn, then rotate, zoom and shift, then change the pixels' values.

        A mask that is not empty stays so: a geometry that leaves any of them less than `KEPT_SHARE` of its area is
        drawn again, and after `TRIES` draws there is none but mirroring and quarter turns.

        Args:
            pixels: (3, S, S) float in 0..1, on the model's canvas, before normalisation.
            masks: (n, S, S) float in 0..1.
            group: the group k of the image.
            targets: what each mask shows; known absent structures need not be named.
            generator: on the CPU; it is advanced.
            stays: whether nothing may move, because words say where it is: then only the pixels' values change.

        Returns:
            Pixels and masks of the same shapes and types, in 0..1; what comes into the picture from outside is 0.
        """
        if stays:
            return self._photometric(pixels, generator), masks
        layers = torch.cat([pixels, masks.to(pixels)])
        layers = self._reoriented(layers, group, targets, generator)
        layers = self._moved(layers, len(pixels), generator)
        return self._photometric(layers[: len(pixels)], generator), layers[len(pixels) :].to(masks)

    def _reoriented(
        self, layers: torch.Tensor, group: int, targets: Sequence[str], generator: torch.Generator
    ) -> torch.Tensor:
        if self.settings.flip == "none" or group in self.sided_groups or any(map(is_sided, targets)):
            return layers
        if bool(torch.rand(1, generator=generator) < 0.5):
            layers = layers.flip(-1)
        if group in self.orientation_free_groups:
            layers = torch.rot90(layers, int(torch.randint(4, (1,), generator=generator)), (-2, -1))
        return layers

    def _moved(self, layers: torch.Tensor, channels: int, generator: torch.Generator) -> torch.Tensor:
        options = self.settings
        if options.rotate == options.scale == options.shift == 0:
            return layers
        areas = layers[channels:].sum((1, 2))
        for _ in range(TRIES):
            angle = _uniform(math.radians(options.rotate), generator)
            zoom = math.exp(_uniform(options.scale, generator))
            across, down = (2 * _uniform(options.shift, generator) for _ in range(2))
            cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
            theta = torch.tensor([[[cos, -sin, across], [sin, cos, down]]], dtype=layers.dtype)
            grid = F.affine_grid(theta.to(layers.device), [1, *layers.shape], align_corners=False)
            moved = F.grid_sample(layers[None], grid, align_corners=False)[0].clamp(0, 1)
            inside = moved[channels:].sum((1, 2)) / zoom**2
            if bool((inside >= KEPT_SHARE * areas).all()):
                return moved
        return layers

    def _photometric(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        options = self.settings
        if options.gamma:
            pixels = pixels.pow(math.exp(_uniform(options.gamma, generator)))
        if options.contrast:
            centre = pixels.mean()
            pixels = (pixels - centre) * (1 + _uniform(options.contrast, generator)) + centre
        if options.brightness:
            pixels = pixels + _uniform(options.brightness, generator)
        if options.noise:
            deviation = float(torch.rand(1, generator=generator)) * options.noise
            noise = torch.randn(1, *pixels.shape[1:], generator=generator)
            pixels = pixels + deviation * noise.to(pixels)
        return pixels.clamp(0, 1)


def is_sided(target: str) -> bool:
    """Whether a name, such as kidney_left, says left or right; the four chambers of the heart do but are not sided."""
    return _SIDE.search(_CHAMBERS.sub("", _JOINT.sub(" ", target))) is not None


def names_a_place(text: str) -> bool:
    """Whether words say where in a picture something is ("in the upper left of the image", "the right half")."""
    return _PLACE.search(text) is not None


def sided_groups(rows: Any, groups: Groups) -> frozenset[int]:
    """Groups in which any target of region rows, present or absent, is named left or right.

    Raises:
        ValueError: for a row that no group matches.
    """
    columns = zip(*(rows[name] for name in ("modality", "site", "targets", "absent")), strict=True)
    return frozenset(
        groups.index(modality, site)
        for modality, site, targets, absent in columns
        if any(map(is_sided, (*targets, *absent)))
    )


def _uniform(extent: float, generator: torch.Generator) -> float:
    return (float(torch.rand(1, generator=generator)) * 2 - 1) * extent
