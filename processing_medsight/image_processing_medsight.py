"""Pixels into the model and masks out of it, in Pillow and NumPy: the same numbers with and without torchvision."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import normalize
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack

from configuration_medsight.remote_code_medsight import AUTO_MAP, RemoteCodeMixin

from .geometry_medsight import AxisFit, fit_image, grid_to_masks, mask_to_grid
from .image_loading_medsight import as_numpy, grey_to_pillow, load_picture, to_array


_NOT_USED = ("do_center_crop", "crop_size", "do_pad", "pad_size")


class MedSightImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """The arguments of any image processor, and MedSIGHT's own.

    fit: how an image is brought to the model's fixed input size.
    """

    fit: Literal["pad", "stretch", "crop"] | None


class MedSightImageProcessor(RemoteCodeMixin, BaseImageProcessor):
    r"""Turns images into the model's input, and masks over that input into masks of the images.

    Takes what [`load_image`] reads (picture files, addresses, base64, bytes), .npy files, Pillow images, arrays and
    tensors, or lists of these; a stack of four axes is as many images. Scans are opened by `medsight.open_scan`, and
    handed over slice by slice. Every setting can be given at construction or, for one call, to the call;
    `device` says where tensors go.

    Args:
        size (`int` or `dict`): the model's input, `{"height": h, "width": w}` in pixels (an int: a square).
        fit (`"pad"`, `"stretch"` or `"crop"`): keep the aspect ratio on centred black padding; scale each axis on its
            own; or keep the centre of an image scaled to cover the input (the released checkpoint's own transform).
        resample (`int`): Pillow's filter, bicubic by default.
        do_resize, do_rescale, do_normalize, do_convert_rgb (`bool`): steps to take.
        rescale_factor (`float`): what 8-bit pixels are multiplied by.
        image_mean, image_std (`float` or `list[float]`): CLIP's by default.

    Pictures of more than 8 bits, and floats, are brought to 8 bits by the range rule of `image_loading_medsight`.

    Example:

    ```python
    import numpy as np
    import torch

    from processing_medsight import MedSightImageProcessor

    processor = MedSightImageProcessor(size=224, fit="pad")
    inputs = processor(np.zeros((480, 640, 3), dtype=np.uint8), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 224, 224)
    (masks,) = processor.post_process_masks([torch.zeros(5, 56, 56)], inputs["original_sizes"])
    assert masks.shape == (5, 480, 640)
    ```
    """

    valid_kwargs = MedSightImageProcessorKwargs
    model_input_names = ["pixel_values", "original_sizes"]

    do_convert_rgb = True
    do_resize = True
    size = {"height": 336, "width": 336}
    fit = "pad"
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD

    def __init__(self, **kwargs: Unpack[MedSightImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)
        self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    def fetch_images(self, images: Any, name: str | None = None) -> Any:
        """Read what is named, in lists of any depth; pictures in memory pass through.

        A ValueError names the file, or the position in the list, of what cannot be read; or `name`.
        """
        if isinstance(images, (list, tuple)):
            prefix = "image " if name is None else f"{name}."  # image 0, and image 0.1 where lists are nested
            return [self.fetch_images(image, f"{prefix}{i}") for i, image in enumerate(images)]
        name = name or "image"
        if isinstance(images, (str, os.PathLike, bytes)):
            images = load_picture(images, name if isinstance(images, bytes) else None)
        if isinstance(images, Image.Image):
            return images
        pixels = as_numpy(images, name)
        return grey_to_pillow(pixels, name) if pixels.ndim == 2 else pixels

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
            if logits.ndim != 3 or logits.isnan().any():
                raise ValueError(f"mask_logits[{i}]: expected shape (n, h, w) and no NaN, got {tuple(logits.shape)}")
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
        axes = self._axes(planes[0].shape, fit, size)
        return torch.from_numpy(np.stack([mask_to_grid(plane, *axes, output_size) for plane in planes]))

    def to_dict(self) -> dict[str, Any]:
        # A folder loaded from the Hub carries "repo--module.Class" entries; the files beside a save are plain again.
        return {**super().to_dict(), "auto_map": {"AutoImageProcessor": AUTO_MAP["AutoImageProcessor"]}}

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        if unused := [name for name in _NOT_USED if kwargs.get(name)]:
            raise ValueError(f"{', '.join(unused)}: not used by MedSIGHT; `size` and `fit` say it all")
        fit_image((1, 1), _height_and_width(kwargs["size"]), kwargs["fit"])  # refuses an unknown fit

    def _preprocess_image_like_inputs(self, images: Any, *args: Any, **settings: Any) -> BatchFeature:
        flat = list(flatten_images(self.fetch_images(images)))
        if not flat:
            raise ValueError("images is empty: expected at least one image")
        pixel_values, original_sizes = [], []
        for i, image in enumerate(flat):
            path = getattr(image, "filename", None)
            pixels, original = self._preprocess_one(image, f"image {i} ({path})" if path else f"image {i}", settings)
            pixel_values.append(pixels)
            original_sizes.append(original)
        shapes = {pixels.shape for pixels in pixel_values}
        if len(shapes) > 1 and settings["return_tensors"] is not None:
            raise ValueError(
                f"images of different shapes {sorted(shapes)} make no batch: leave do_resize and do_convert_rgb on"
            )
        data = {"pixel_values": pixel_values, "original_sizes": original_sizes}
        batch = BatchFeature(data, tensor_type=settings["return_tensors"])
        return batch if settings.get("device") is None else batch.to(settings["device"])

    def _preprocess_one(self, image: Any, name: str, settings: dict[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
        """(channels, h, w) float32 for the model, and the image's own (height, width)."""
        given, wanted = settings["input_data_format"], settings["data_format"]
        last = None if given is None else ChannelDimension(given) == ChannelDimension.LAST
        pixels = to_array(image, name, settings["do_convert_rgb"], settings["do_rescale"], last)
        original = pixels.shape[0], pixels.shape[1]
        if settings["do_resize"]:
            axes = fit_image(original, _height_and_width(settings["size"]), settings["fit"])
            pixels = _resize(pixels, *axes, settings["resample"])
        pixels = pixels.astype(np.float32)
        if settings["do_rescale"]:
            pixels = pixels * np.float32(settings["rescale_factor"])
        if settings["do_normalize"]:
            mean, std = settings["image_mean"], settings["image_std"]
            pixels = normalize(pixels, mean, std, input_data_format=ChannelDimension.LAST)
        if wanted is None or ChannelDimension(wanted) == ChannelDimension.FIRST:
            pixels = np.moveaxis(pixels, 2, 0)
        return np.ascontiguousarray(pixels), original

    def _axes(
        self, original: tuple[int, int], fit: str | None, size: int | dict[str, int] | None
    ) -> tuple[AxisFit, AxisFit]:
        """Both axes of an image, as the processor (or this call's `fit` and `size`) places it."""
        fit = fit or (self.fit if self.do_resize else "stretch")
        size = {"height": size, "width": size} if isinstance(size, int) else size or self.size
        return fit_image(original, _height_and_width(size), fit)


def flatten_images(images: Any) -> Iterable[Any]:
    """The single images, in order, of an image, a stack of arrays, or lists of either."""
    if isinstance(images, (list, tuple)):
        for entry in images:
            yield from flatten_images(entry)
    elif isinstance(images, np.ndarray) and images.ndim == 4:
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
    for channel in range(pixels.shape[2]):
        plane = Image.fromarray(pixels[:, :, channel])
        out[top:bottom, left:right, channel] = plane.resize(target, resample, box=box)
    return out


def _height_and_width(size: Any) -> tuple[int, int]:
    size = dict(size) if size is not None else {}
    if set(size) != {"height", "width"} or min(size.values()) < 1:
        raise ValueError(
            f"size={size}: expected positive 'height' and 'width' in pixels: the model's input has a fixed size"
        )
    return size["height"], size["width"]


def _mask_planes(masks: Any) -> list[np.ndarray]:
    """The single masks of one image: (height, width) float32, the share of each pixel that is inside."""
    if not isinstance(masks, (list, tuple)):
        masks = np.asarray(masks)
        masks = masks[None] if masks.ndim == 2 else masks
    planes = [np.asarray(mask) for mask in masks]
    for i, plane in enumerate(planes):
        is_mask = plane.ndim == 2 and plane.size and plane.shape == planes[0].shape and plane.dtype.kind in "biuf"
        if not is_mask or (plane.dtype.kind == "f" and not (plane.min() >= 0 and plane.max() <= 1)):
            raise ValueError(
                f"mask {i}: expected shape (height, width), the same for all masks of an image, of bool, integers, or "
                f"floats in [0, 1], got {plane.shape} of {plane.dtype}"
            )
    return [(plane if plane.dtype.kind == "f" else plane != 0).astype(np.float32) for plane in planes]
