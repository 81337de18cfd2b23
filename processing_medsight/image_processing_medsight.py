"""Pixels into the model and masks out of it, in Pillow and NumPy: the same numbers with and without torchvision."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ChannelDimension, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from configuration_medsight.remote_code_medsight import AUTO_MAP, RemoteCodeMixin
from medsight.scans.scan import Picture, open_scan

from .geometry_medsight import FITS, AxisFit, fit_image, grid_to_masks, mask_to_grid
from .image_loading_medsight import as_numpy, grey_to_pillow, is_volume, is_wide, to_array


logger = logging.get_logger(__name__)

_MOST_CHANNELS = 4
_NOT_USED = ("do_center_crop", "crop_size", "do_pad", "pad_size")


class MedSightImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """The arguments of any image processor, and MedSIGHT's own.

    fit: how an image is brought to the model's fixed input size.
    slices: which slices of a volume are taken, see [`Scan.choose_slices`]; each is an image.
    window: which grey levels of a scan are shown, see [`Scan.slice_image`].
    plane: that NIfTI volumes are cut along, see [`open_scan`].
    """

    fit: Literal["pad", "stretch", "crop"] | None
    slices: int | str | list[int] | None
    window: str | list[float | int] | tuple[float | int, float | int] | None
    plane: Literal["axial", "coronal", "sagittal"] | None


class MedSightImageProcessor(RemoteCodeMixin, BaseImageProcessor):
    r"""Turns images into the model's input, and masks over that input into masks of the images.

    Every setting can be given at construction or, for one call, to the call.

    Args:
        size (`int` or `dict`): the model's input, `{"height": h, "width": w}` in pixels (an int: a square).
        fit (`"pad"`, `"stretch"` or `"crop"`): keep the aspect ratio on centred black padding; scale each axis on its
            own; or keep the centre of an image scaled to cover the input (the released checkpoint's own transform).
        resample (`int`): Pillow's filter, bicubic by default.
        slices (`int`, `str` or `list[int]`): which slices of a volume (DICOM, NIfTI, TIFF of several pages, array) are
            taken, each as an image: an index, several, `"middle"` (the default), `"all"`, `"largest-foreground"` or
            `"a-b"`. Given to a call, it makes a volume of an array of three axes, slices first, also where the first
            might hold channels; where the last has 1 to 4 entries these stay channels.
        window (`str` or `(float, float)`): which grey levels of DICOM, NIfTI and of pictures and arrays of more than 8
            bits are shown: `"abdomen"`, `"lung"`, `"bone"`, `"brain"`, `"soft tissue"` (of CT), `"file"` (the one that
            the file states), or (centre, width); by default what suits the modality. Given to a call, it is refused
            by pictures of 8 bits or in colour, which the processor's own leaves as they are.
        plane (`str`): that NIfTI volumes are cut along: `"axial"` (the default), `"coronal"` or `"sagittal"`. Other
            files are refused with one.
        do_resize, do_rescale, do_normalize, do_convert_rgb (`bool`): steps to take.
        rescale_factor (`float`): what 8-bit pixels are multiplied by.
        image_mean, image_std (`float` or `list[float]`): CLIP's by default.

    Without a window, pictures of more than 8 bits, and floats, are brought to 8 bits by the range rule of
    `image_loading_medsight`.
    """

    valid_kwargs = MedSightImageProcessorKwargs
    model_input_names = ["pixel_values", "original_sizes"]

    do_convert_rgb = True
    do_resize = True
    size = {"height": 336, "width": 336}
    fit = "pad"
    slices = "middle"
    window = None
    plane = None
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)
        self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    def fetch_images(
        self,
        images: Any,
        name: str | None = None,
        slices: int | str | Sequence[int] | None = None,
        window: str | Sequence[float] | None = None,
        plane: str | None = None,
    ) -> Any:
        """Read what is named, in lists of any depth: what [`open_scan`] takes. Pictures in memory pass through.

        Args:
            images: paths, http(s) addresses, base64, bytes, Pillow images, arrays or tensors, or lists of these.
            name: what to call it in an error.
            slices, window, plane: as the class has them, for this call.

        Returns:
            As many images in as deep lists; but a volume of which several slices are taken is as many images.

        Raises:
            ValueError: naming the file, or the position in the list, of what cannot be read.
        """
        reading = _Reading(
            slices=self.slices if slices is None else slices,
            window=self.window if window is None else window,
            plane=self.plane if plane is None else plane,
            as_volume=slices is not None,
            window_asked=window is not None,
        )
        return _fetch_all(images, name, reading)

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        # Read here, where a call's own slices can still be told from the processor's.
        choices = {key: kwargs.get(key) for key in ("slices", "window", "plane")}
        return super().preprocess(self.fetch_images(images, **choices), *args, **kwargs)

    def post_process_masks(
        self,
        mask_logits: Iterable[torch.Tensor | np.ndarray],
        original_sizes: Iterable[Sequence[int]] | torch.Tensor | np.ndarray,
        threshold: float = 0.5,
        fit: str | None = None,
        size: int | dict[str, int] | None = None,
    ) -> list[torch.Tensor]:
        """Masks at the images' own sizes, with every resize, crop and pad undone.

        Logits are interpolated bilinearly, once, from the mask grid straight to the original pixels' centres. What a
        centre crop left out of the model's sight is `False`.

        Args:
            mask_logits: an entry an image, (n, h, w) logits over the model's input, any h and w.
            original_sizes: as many (height, width), the processor's `original_sizes`.
            threshold: probability above which a pixel is inside.
            fit, size: what the pixels were made with, where a call set its own.

        Returns:
            An entry an image: (n, height, width) bool.

        Raises:
            ValueError: for counts that differ, NaN logits, other shapes, or a threshold outside [0, 1].
        """
        mask_logits = list(mask_logits)
        sizes = [(int(height), int(width)) for height, width in original_sizes]
        if len(mask_logits) != len(sizes):
            raise ValueError(f"mask_logits has {len(mask_logits)} entries but original_sizes has {len(sizes)}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold}: expected a probability between 0 and 1")
        masks = []
        for i, (logits, original) in enumerate(zip(mask_logits, sizes, strict=True)):
            logits = torch.as_tensor(logits)
            if logits.ndim != 3:
                raise ValueError(f"mask_logits[{i}]: expected shape (n, h, w), got {tuple(logits.shape)}")
            if logits.isnan().any():
                raise ValueError(f"mask_logits[{i}] holds NaN")
            masks.append(grid_to_masks(logits, *self._axes(original, fit, size), threshold))
        return masks

    def preprocess_masks(
        self,
        masks: Any,
        output_size: tuple[int, int],
        fit: str | None = None,
        size: int | dict[str, int] | None = None,
    ) -> torch.Tensor:
        """Carry masks of one image through the geometry of its pixels, for training labels.

        A cell holds the share of its area that is inside (see [`mask_to_grid`]), so small regions survive;
        `>= 0.5` gives a hard mask.

        Args:
            masks: (n, height, width) or one (height, width), at the image's own size: bool, integers (anything but 0
                is inside), or floats in [0, 1]. An array, a tensor, a Pillow image, or a list of these.
            output_size: (h, w) of the model's mask grid.
            fit, size: what the pixels were made with, where a call set its own.

        Returns:
            (n, h, w) float32 in [0, 1].

        Raises:
            ValueError: for masks of different sizes, other shapes, or floats outside [0, 1].
        """
        planes = _mask_planes(masks)
        if not planes:
            return torch.zeros((0, *output_size))
        height, width = planes[0].shape
        axes = self._axes((height, width), fit, size)
        return torch.from_numpy(np.stack([mask_to_grid(_covered(plane), *axes, output_size) for plane in planes]))

    def to_dict(self) -> dict[str, Any]:
        # A folder loaded from the Hub carries "repo--module.Class" entries; the files beside a save are plain again.
        return {**super().to_dict(), "auto_map": {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]}}

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        unused = [name for name in _NOT_USED if kwargs.get(name)]
        if unused:
            raise ValueError(
                f"{', '.join(unused)}: not used by MedSIGHT; `size` and `fit` ({', '.join(FITS)}) say it all"
            )
        if kwargs.get("fit") not in FITS:
            raise ValueError(f"fit={kwargs.get('fit')!r}: choose one of {', '.join(FITS)}")
        if kwargs.get("do_resize"):
            _height_and_width(kwargs.get("size"))

    def _preprocess_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        flat = list(flatten_images(images))
        if not flat:
            raise ValueError("images is empty: expected at least one image")
        pixel_values, original_sizes = [], []
        for i, image in enumerate(flat):
            path = getattr(image, "filename", None)
            pixels, original = self._preprocess_one(
                image, name=f"image {i} ({path})" if path else f"image {i}", **kwargs
            )
            pixel_values.append(pixels)
            original_sizes.append(original)
        shapes = {pixels.shape for pixels in pixel_values}
        if len(shapes) > 1 and kwargs["return_tensors"] is not None:
            raise ValueError(
                f"images of different shapes {sorted(shapes)} make no batch: leave do_resize and do_convert_rgb on"
            )
        data = {"pixel_values": pixel_values, "original_sizes": original_sizes}
        return BatchFeature(data, tensor_type=kwargs["return_tensors"])

    def _preprocess_one(
        self,
        image: Any,
        name: str,
        *,
        do_convert_rgb: bool,
        do_resize: bool,
        size: SizeDict,
        fit: str,
        resample: int,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        data_format: str | ChannelDimension | None,
        input_data_format: str | ChannelDimension | None,
        **_: Any,
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """(channels, h, w) float32 for the model, and the image's own (height, width)."""
        last = None if input_data_format is None else ChannelDimension(input_data_format) == ChannelDimension.LAST
        pixels = to_array(image, name, do_convert_rgb, do_rescale, last)
        original = pixels.shape[0], pixels.shape[1]
        if do_resize:
            pixels = _resize(pixels, *fit_image(original, _height_and_width(size), fit), resample)
        pixels = pixels.astype(np.float32)
        if do_rescale:
            pixels = pixels * np.float32(rescale_factor)
        if do_normalize:
            mean, std = _per_channel(image_mean, "image_mean", pixels), _per_channel(image_std, "image_std", pixels)
            pixels = (pixels - mean) / std
        if data_format is None or ChannelDimension(data_format) == ChannelDimension.FIRST:
            pixels = np.moveaxis(pixels, 2, 0)
        return np.ascontiguousarray(pixels), original

    def _axes(
        self, original: tuple[int, int], fit: str | None, size: int | dict[str, int] | None
    ) -> tuple[AxisFit, AxisFit]:
        """Both axes of an image, as the processor (or this call's `fit` and `size`) places it."""
        if fit is None:
            fit = self.fit if self.do_resize else "stretch"
        if size is None:
            size = self.size
        return fit_image(
            original, _height_and_width({"height": size, "width": size} if isinstance(size, int) else size), fit
        )


class _Reading(NamedTuple):
    """How images are read: as the processor's arguments say, `as_volume` as [`open_scan`] takes `volume`."""

    slices: int | str | Sequence[int]
    window: str | Sequence[float] | None
    plane: str | None
    as_volume: bool
    window_asked: bool

    def windows(self, wide: bool) -> bool:
        """Whether the window is for what has such levels: the processor's own passes over 8 bits and colours, which
        refuse a call's."""
        return self.window is not None and (self.window_asked or wide)


def _fetch_all(images: Any, name: str | None, reading: _Reading) -> Any:
    if not isinstance(images, (list, tuple)):
        found = _fetch(images, name or "image", reading)
        return found[0] if len(found) == 1 else found
    fetched: list[Any] = []
    for i, image in enumerate(images):
        place = f"image {i}" if name is None else f"{name}.{i}"  # image 0, and image 0.1 where lists are nested
        if isinstance(image, (list, tuple)):
            fetched.append(_fetch_all(image, place, reading))
        else:
            fetched.extend(_fetch(image, place, reading))
    return fetched


def _fetch(image: Any, name: str, reading: _Reading) -> list[Any]:
    """The slices of a volume, or the one image of anything else."""
    if isinstance(image, (np.ndarray, torch.Tensor)):
        pixels = as_numpy(image, name)
        if not is_volume(pixels, reading.as_volume):
            if reading.windows(is_wide(pixels)):
                return [Picture(one, name).slice_image(0, reading.window) for one in flatten_images(pixels)]
            return [grey_to_pillow(image, name) if image.ndim == 2 else image]
        scan = open_scan(pixels, name, volume=True)
    elif isinstance(image, Image.Image):
        return [Picture(image, name).slice_image(0, reading.window) if reading.windows(is_wide(image)) else image]
    elif isinstance(image, (str, os.PathLike, bytes)):
        called = name if isinstance(image, bytes) else None
        scan = open_scan(image, called, reading.plane, reading.as_volume)
        if isinstance(scan, Picture) and not reading.windows(scan.is_wide):
            return [scan.original]
    else:
        kind = type(image).__name__
        raise ValueError(f"{name}: expected a Pillow image, an array, a tensor, bytes or a path, got {kind}")
    if scan.kind == "array" and scan.num_slices <= _MOST_CHANNELS:
        logger.warning(
            f"{scan.name} is read as {scan.num_slices} slices, because slices= is given: leave it out for a picture "
            f"of {scan.num_slices} channels"
        )
    window = reading.window if reading.windows(scan.is_wide) else None
    return [scan.slice_image(index, window) for index in scan.choose_slices(reading.slices)]


def flatten_images(images: Any) -> Iterable[Any]:
    """The single images, in order, of an image, a stack of arrays, or lists of either."""
    if isinstance(images, (list, tuple)):
        for entry in images:
            yield from flatten_images(entry)
    elif isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        yield from images
    else:
        yield images


def _resize(pixels: np.ndarray, vertical: AxisFit, horizontal: AxisFit, resample: int) -> np.ndarray:
    """Resize the part that the input shows and put it in its place on black."""
    (top, bottom), (left, right) = vertical.visible, horizontal.visible
    # Pillow's box resamples as a resize of the whole image would, without ever making a crop's invisible part.
    corner = horizontal.to_original(float(left)), vertical.to_original(float(top))
    box = (*corner, horizontal.to_original(float(right)), vertical.to_original(float(bottom)))
    target = (right - left, bottom - top)
    out = np.zeros((vertical.size, horizontal.size, pixels.shape[2]), dtype=pixels.dtype)
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        out[top:bottom, left:right] = Image.fromarray(pixels).resize(target, resample, box=box)
    else:
        for channel in range(pixels.shape[2]):
            plane = Image.fromarray(np.ascontiguousarray(pixels[:, :, channel]))
            out[top:bottom, left:right, channel] = plane.resize(target, resample, box=box)
    return out


def _height_and_width(size: Any) -> tuple[int, int]:
    size = dict(size) if size is not None else {}
    if set(size) != {"height", "width"} or min(size.values()) < 1:
        raise ValueError(
            f"size={size}: expected positive 'height' and 'width' in pixels: the model's input has a fixed size"
        )
    return size["height"], size["width"]


def _per_channel(value: float | Sequence[float], name: str, pixels: np.ndarray) -> np.ndarray:
    values = np.asarray(value, dtype=np.float32)
    if values.ndim and len(values) != pixels.shape[2]:
        raise ValueError(f"{name} has {len(values)} values but the image has {pixels.shape[2]} channels")
    return values


def _mask_planes(masks: Any) -> list[np.ndarray]:
    """The single (height, width) masks of one image."""
    if not isinstance(masks, (list, tuple)):
        masks = masks.detach().cpu().numpy() if isinstance(masks, torch.Tensor) else np.asarray(masks)
        masks = masks[None] if masks.ndim == 2 else masks
    planes = [mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask) for mask in masks]
    for i, plane in enumerate(planes):
        if plane.ndim != 2 or 0 in plane.shape:
            raise ValueError(f"mask {i}: expected shape (height, width), got {plane.shape}")
        if plane.shape != planes[0].shape:
            raise ValueError(f"masks of one image must have one size: mask 0 has {planes[0].shape}, {i} {plane.shape}")
        if plane.dtype.kind not in "biuf" or (plane.dtype.kind == "f" and not (plane.min() >= 0 and plane.max() <= 1)):
            raise ValueError(
                f"mask {i}: expected bool, integers, or floats in [0, 1], got {plane.dtype} values outside"
            )
    return planes


def _covered(plane: np.ndarray) -> np.ndarray:
    """(height, width) float32, the share of each pixel that is inside."""
    return (plane if plane.dtype.kind == "f" else plane != 0).astype(np.float32)
