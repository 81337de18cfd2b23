"""Pixels, mask labels and mask logits go through one geometry, and back."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from processing_medsight.geometry_medsight import FITS, fit_image
from processing_medsight.image_processing_medsight import MedSightImageProcessor


ORIGINALS = [(1, 1), (2, 3), (1, 90), (90, 1), (7, 150), (150, 7), (97, 64), (112, 112), (61, 200), (333, 250)]
SIZES = [(56, 56), (28, 84), (90, 30)]


def some_masks(height: int, width: int) -> np.ndarray:
    """(6, height, width): nothing, everything, a box, a disc, a corner, a band along the edge."""
    y, x = np.mgrid[:height, :width]
    masks = np.zeros((6, height, width), dtype=bool)
    masks[1] = True
    masks[2, height // 4 : height // 4 + max(1, height // 2), width // 3 : width // 3 + max(1, width // 3)] = True
    masks[3] = ((y - height / 2) / max(height, 2)) ** 2 + ((x - width / 2) / max(width, 2)) ** 2 < 0.09
    masks[4, : max(1, height // 3), : max(1, width // 3)] = True
    masks[5, -max(1, height // 5) :, :] = True
    return masks


def near_edge(masks: np.ndarray, reach: tuple[int, int]) -> np.ndarray:
    """Pixels that have an unlike one within `reach` (rows, columns)."""
    different = np.zeros_like(masks)
    _, height, width = masks.shape
    for dy, dx in itertools.product(range(-reach[0], reach[0] + 1), range(-reach[1], reach[1] + 1)):
        rows = np.clip(np.arange(height) + dy, 0, height - 1)
        columns = np.clip(np.arange(width) + dx, 0, width - 1)
        different |= masks != masks[:, rows][:, :, columns]
    return different


def seen_by(axes: tuple) -> np.ndarray:
    """Which pixels of an image its input shows."""
    centres = [axis.to_input(np.arange(axis.length) + 0.5) for axis in axes]
    return np.logical_and.outer(*((at >= 0) & (at <= axis.size) for at, axis in zip(centres, axes, strict=True)))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("original", ORIGINALS)
def test_a_mask_comes_back_to_within_one_pixel(original: tuple[int, int], size: tuple[int, int], fit: str) -> None:
    processor = MedSightImageProcessor(size=dict(zip(("height", "width"), size, strict=True)), fit=fit)
    axes = fit_image(original, size, fit)
    grid = tuple(axis.size * -(-axis.length // axis.scaled) for axis in axes)  # at least a cell a pixel
    masks = some_masks(*original)
    labels = processor.preprocess_masks(masks, grid)
    assert labels.shape == (6, *grid) and labels.min() >= 0 and labels.max() <= 1
    (back,) = processor.post_process_masks([(labels - 0.5) * 20], [original])
    assert back.dtype == torch.bool and back.shape == (6, *original)
    seen = seen_by(axes)
    assert not back[:, torch.from_numpy(~seen)].any(), "outside a crop there is no mask"
    wrong = (back.numpy() != masks) & seen
    assert not (wrong & ~near_edge(masks, (1, 1))).any()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("original", [(97, 64), (61, 200), (333, 250)])
def test_a_coarse_grid_is_off_by_at_most_one_of_its_cells(original: tuple[int, int], fit: str) -> None:
    size, grid = (56, 56), (24, 24)
    processor = MedSightImageProcessor(size=56, fit=fit)
    axes = fit_image(original, size, fit)
    cell = tuple(
        int(np.ceil(axis.length / axis.scaled * axis.size / cells)) for axis, cells in zip(axes, grid, strict=True)
    )
    masks = some_masks(*original)[[0, 1, 2, 5]]
    (back,) = processor.post_process_masks([processor.preprocess_masks(masks, grid) - 0.5], [original])
    seen = seen_by(axes)
    assert not ((back.numpy() != masks) & seen & ~near_edge(masks, cell)).any()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("original", ORIGINALS)
def test_pixels_and_mask_labels_lie_in_the_same_place(original: tuple[int, int], fit: str) -> None:
    mask = some_masks(*original)[2]
    processor = MedSightImageProcessor(
        size={"height": 40, "width": 60}, fit=fit, do_normalize=False, resample=Image.Resampling.BOX
    )
    pixels = processor(Image.fromarray(mask.astype(np.uint8) * 255), return_tensors="np")["pixel_values"][0, 0]
    labels = processor.preprocess_masks(mask, (40, 60))[0].numpy()
    assert np.abs(pixels - labels).mean() < 0.02
    assert not ((np.abs(pixels - labels) > 0.5) & ~near_edge(labels[None] > 0.5, (1, 1))[0]).any()


@pytest.mark.parametrize("original", [(100, 37), (37, 100), (64, 64), (51, 200), (400, 333), (5, 300)])
def test_crop_is_the_released_checkpoints_transform(original: tuple[int, int]) -> None:
    side, (height, width) = 56, original
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(y / 3 + x / 5), np.cos(x / 4), np.sin(y / 7)], axis=2)
    picture = Image.fromarray((127 + 100 * waves).astype(np.uint8))
    short, long = sorted(original)
    whole = picture.resize(
        (side, int(side * long / short)) if width <= height else (int(side * long / short), side),
        Image.Resampling.BICUBIC,
    )
    left, top = round((whole.width - side) / 2), round((whole.height - side) / 2)
    expected = np.asarray(whole.crop((left, top, left + side, top + side)), dtype=np.float32)
    processor = MedSightImageProcessor(size=side, fit="crop", do_normalize=False, rescale_factor=1.0)
    pixels = processor(picture)["pixel_values"][0]
    assert np.abs(np.moveaxis(pixels, 0, 2) - expected).max() <= 1


@pytest.mark.parametrize("original", ORIGINALS)
def test_pad_keeps_the_aspect_ratio_and_centres(original: tuple[int, int]) -> None:
    vertical, horizontal = fit_image(original, (56, 56), "pad")
    assert max(vertical.scaled, horizontal.scaled) == 56
    for axis in (vertical, horizontal):
        assert abs(axis.offset - (axis.size - axis.scaled - axis.offset)) <= 1
        assert abs(axis.scaled - max(1, axis.length * 56 / max(original))) <= 0.5
    processor = MedSightImageProcessor(size=56, do_normalize=False)
    pixels = processor(Image.new("L", original[::-1], 255))["pixel_values"][0]
    assert pixels.sum() == 3 * vertical.scaled * horizontal.scaled, "padding is black, the image white"


def test_a_crop_of_a_thread_makes_no_giant_on_the_way() -> None:
    processor = MedSightImageProcessor(size=336, fit="crop")
    assert processor(np.zeros((1, 60_000, 3), np.uint8))["pixel_values"][0].shape == (3, 336, 336)


@pytest.mark.parametrize(("threshold", "inside"), [(0.0, 4), (0.3, 3), (0.5, 2), (0.9, 1), (1.0, 0)])
def test_the_threshold_is_a_probability(threshold: float, inside: int) -> None:
    logits = torch.logit(torch.tensor([0.2, 0.4, 0.6, 0.95]))[:, None, None].expand(4, 8, 8)
    (masks,) = MedSightImageProcessor(size=8).post_process_masks([logits], [(8, 8)], threshold=threshold)
    assert masks.flatten(1).all(dim=1).sum() == inside == masks.flatten(1).any(dim=1).sum()
    certain = torch.full((1, 4, 4), -torch.inf)
    certain[:, :, 2:] = torch.inf
    (masks,) = MedSightImageProcessor(size=8).post_process_masks([certain], [(8, 8)], threshold=max(threshold, 0.1))
    assert masks[0, :, 4:].all() == (threshold < 1) and not masks[0, :, :4].any()


def test_masks_of_several_images_come_at_their_own_sizes() -> None:
    processor = MedSightImageProcessor(size=32)
    out = processor([np.zeros((20, 30, 3), np.uint8), np.zeros((300, 40, 3), np.uint8)], return_tensors="pt")
    logits = [torch.randn(2, 16, 16).bfloat16(), torch.randn(0, 16, 16)]
    masks = processor.post_process_masks(logits, out["original_sizes"])
    assert [tuple(mask.shape) for mask in masks] == [(2, 20, 30), (0, 300, 40)]


def test_geometry_of_a_call_can_differ_from_the_processors() -> None:
    processor = MedSightImageProcessor(size=32)
    mask = some_masks(40, 90)[2]
    labels = processor.preprocess_masks(mask, (96, 96), fit="stretch", size=48)
    (back,) = processor.post_process_masks([labels - 0.5], [(40, 90)], fit="stretch", size={"height": 48, "width": 48})
    (astray,) = processor.post_process_masks([labels - 0.5], [(40, 90)])
    assert (back.numpy()[0] == mask).all() and not (astray.numpy()[0] == mask).all()
    unresized = MedSightImageProcessor(size=32, do_resize=False)
    (back,) = unresized.post_process_masks([unresized.preprocess_masks(mask, (40, 90)) - 0.5], [(40, 90)])
    assert (back.numpy()[0] == mask).all()


@pytest.mark.parametrize("kind", ["uint8", "float", "tensor", "pillow", "list"])
def test_mask_labels_from_any_kind_of_mask_and_from_none(kind: str) -> None:
    processor, masks = MedSightImageProcessor(size=16), some_masks(20, 30)
    make = {
        "uint8": lambda masks: masks.astype(np.uint8) * 255,
        "float": lambda masks: masks.astype(np.float32),
        "tensor": torch.from_numpy,
        "pillow": lambda masks: [Image.fromarray(mask) for mask in masks],
        "list": list,
    }[kind]
    assert torch.equal(processor.preprocess_masks(make(masks), (8, 8)), processor.preprocess_masks(masks, (8, 8)))
    assert processor.preprocess_masks(make(masks[:0]), (4, 4)).shape == (0, 4, 4)


def test_a_region_smaller_than_a_cell_leaves_a_trace() -> None:
    mask = np.zeros((400, 400), bool)
    mask[100, 100] = True
    labels = MedSightImageProcessor(size=56).preprocess_masks(mask, (28, 28))
    assert labels.sum() == pytest.approx(28 * 28 / 400**2, rel=1e-3)


@pytest.mark.parametrize(
    ("logits", "sizes", "message"),
    [
        ([torch.zeros(1, 4, 4)], [(8, 8), (8, 8)], "1 entries but original_sizes has 2"),
        ([torch.zeros(4, 4)], [(8, 8)], r"mask_logits\[0\]: expected shape"),
        ([torch.full((1, 4, 4), float("nan"))], [(8, 8)], r"mask_logits\[0\]: .*no NaN"),
        ([torch.zeros(1, 4, 4)], [(0, 8)], "cannot be fitted"),
    ],
)
def test_masks_that_cannot_be_placed_are_refused(logits: list, sizes: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MedSightImageProcessor(size=8).post_process_masks(logits, sizes)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([np.zeros((4, 4)), np.zeros((4, 5))], "mask 1: .*the same for all"),
        (np.full((1, 4, 4), 1.5), "mask 0"),
        (np.full((1, 4, 4), np.nan), "mask 0"),
        (np.zeros((1, 1, 4, 4)), "expected shape"),
        ([np.zeros((0, 4))], "mask 0"),
    ],
)
def test_bad_masks_are_refused(masks: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MedSightImageProcessor(size=8).preprocess_masks(masks, (4, 4))
