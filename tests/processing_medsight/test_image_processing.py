"""The image processor's settings, at construction and per call, and what it puts out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from processing_medsight.image_processing_medsight import MedSightImageProcessor


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        *[("pillow", 1), ("numpy", 1), ("torch", 1), ("path", 1), ("string", 1), ("bytes", 1)],
        *[("list", 3), ("nested", 3), ("ragged", 3), ("stack", 3)],
    ],
)
def test_every_kind_of_image_gives_the_same_pixels_alone_in_lists_and_in_stacks(
    kind: str, count: int, image: Image.Image, tmp_path: Path
) -> None:
    pixels, path = np.array(image), tmp_path / "image.png"
    image.save(path)
    given = {
        "pillow": image,
        "numpy": pixels,
        "torch": torch.from_numpy(pixels).permute(2, 0, 1),
        "path": path,
        "string": str(path),
        "bytes": path.read_bytes(),
        "list": [image, pixels, path],
        "nested": [[image], [path, image]],
        "ragged": [[image, image, str(path)], []],
        "stack": np.stack([pixels] * 3),
    }[kind]
    expected = MedSightImageProcessor(size=28)(image, return_tensors="pt")["pixel_values"]
    out = MedSightImageProcessor(size=28)(given, return_tensors="pt")
    assert out["pixel_values"].dtype == torch.float32
    assert torch.equal(out["pixel_values"], expected.expand(count, -1, -1, -1))
    assert out["original_sizes"].tolist() == [[30, 50]] * count


def test_normalisation_is_clips_by_default() -> None:
    white = MedSightImageProcessor(size=4)(Image.new("RGB", (4, 4), "white"))["pixel_values"][0]
    expected = (1 - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD)
    assert np.allclose(white, expected[:, None, None], atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 40},
        {"size": {"height": 20, "width": 36}},
        {"fit": "stretch"},
        {"fit": "crop"},
        {"do_resize": False},
        {"do_rescale": False},
        {"rescale_factor": -1.0},
        {"do_normalize": False},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": (0.5, 0.6, 0.7)},
        {"image_mean": 0.5, "image_std": 0.5},
        {"resample": Image.Resampling.NEAREST},
        {"data_format": "channels_last"},
    ],
)
def test_a_setting_of_a_call_is_that_of_construction(settings: dict, image: Image.Image) -> None:
    per_call = MedSightImageProcessor(size=28)(image, return_tensors="np", **settings)["pixel_values"]
    constructed = MedSightImageProcessor(**{"size": 28, **settings})(image, return_tensors="np")["pixel_values"]
    default = MedSightImageProcessor(size=28)(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(per_call, constructed)
    assert per_call.shape != default.shape or not np.array_equal(per_call, default)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"shortest_edge": 28}}, "'height' and 'width'"),
        ({"size": 0}, "positive|size"),
        ({"do_center_crop": True, "crop_size": 20}, "do_center_crop, crop_size.*fit"),
        ({"do_pad": True, "pad_size": 20}, "do_pad, pad_size.*fit"),
        ({"image_mean": [0.5, 0.5]}, "mean must have 3 elements"),
        ({"fit": "squeeze"}, "fit"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str, image: Image.Image) -> None:
    with pytest.raises(Exception, match=message):
        MedSightImageProcessor(size=28)(image, **settings)
    with pytest.raises(ValueError, match=message):
        MedSightImageProcessor(**{"size": 28, **settings})(image)


def test_tensors_come_on_the_device_that_is_asked_for(image: Image.Image) -> None:
    inputs = MedSightImageProcessor(size=8)(image, return_tensors="pt", device="meta")
    assert {tensor.device.type for tensor in inputs.values()} == {"meta"}


def test_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="images is empty"):
        MedSightImageProcessor()([])


def test_unequal_images_make_no_batch_without_a_resize(image: Image.Image) -> None:
    unresized = MedSightImageProcessor(do_resize=False)
    with pytest.raises(ValueError, match="different shapes"):
        unresized([image, image.crop((0, 0, 9, 9))], return_tensors="pt")
    assert [p.shape for p in unresized([image, image.crop((0, 0, 9, 8))])["pixel_values"]] == [(3, 30, 50), (3, 8, 9)]


def test_grey_images_may_stay_grey(image: Image.Image) -> None:
    processor = MedSightImageProcessor(size=28, do_convert_rgb=False, image_mean=0.5, image_std=0.5)
    assert processor(image.convert("L"), return_tensors="np")["pixel_values"].shape == (1, 1, 28, 28)


def test_settings_survive_saving(tmp_path: Path, image: Image.Image) -> None:
    processor = MedSightImageProcessor(size={"height": 20, "width": 36}, fit="crop", image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    again = MedSightImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict() and repr(again) == repr(processor)
    assert np.array_equal(again(image)["pixel_values"][0], processor(image)["pixel_values"][0])
    other = MedSightImageProcessor.from_pretrained(tmp_path, fit="stretch")
    assert other.fit == "stretch" and dict(other.size) == {"height": 20, "width": 36}
