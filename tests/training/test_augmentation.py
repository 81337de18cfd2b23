import math

import pytest
import torch
from datasets import Dataset

from medsight.data.groups import Groups
from medsight.data.wording import POSITIONS
from medsight.training.augmentation import Augmentation, Augmenter, is_sided, names_a_place, sided_groups


STILL = {"rotate": 0, "scale": 0, "shift": 0, "brightness": 0, "contrast": 0, "gamma": 0, "noise": 0, "flip": "none"}
MOVES = {**STILL, "rotate": 15, "scale": 0.15, "shift": 0.08}
GROUPS = Groups({"CT torso": ["CT/*"], "skin": ["dermoscopy/*"], "heart": ["MRI/heart"]})
SIDE = 24


def settings(**changes) -> Augmentation:
    return Augmentation(**{**STILL, **changes})


def drawing() -> torch.Tensor:
    """A picture that no flip and no turn leaves as it is, (1, S, S) of 0 and 1."""
    picture = torch.zeros(1, SIDE, SIDE)
    picture[0, 6:18, 6:10] = 1
    picture[0, 14:18, 6:15] = 1
    return picture


def orientations() -> list[torch.Tensor]:
    return [torch.rot90(one, turns, (-2, -1)) for one in (drawing(), drawing().flip(-1)) for turns in range(4)]


def seen(augmenter: Augmenter, group: int, targets: list[str], draws: int = 80) -> set[int]:
    """Which of the eight orientations come out; the picture and its mask must agree each time."""
    found = set()
    for seed in range(draws):
        pixels, masks = augmenter(
            drawing().repeat(3, 1, 1),
            drawing(),
            group=group,
            targets=targets,
            generator=torch.Generator().manual_seed(seed),
        )
        assert torch.equal(pixels, masks.repeat(3, 1, 1))
        (which,) = [index for index, one in enumerate(orientations()) if torch.equal(one, masks)]
        found.add(which)
    return found


def test_a_picture_that_is_its_own_mask_stays_so_wherever_it_goes() -> None:
    augmenter = Augmenter(settings(**{**MOVES, "flip": "unsided"}), orientation_free_groups={1})
    furthest = 0.0
    for seed in range(20):
        pixels, masks = augmenter(
            drawing().repeat(3, 1, 1),
            drawing(),
            group=1,
            targets=["skin lesion"],
            generator=torch.Generator().manual_seed(seed),
        )
        assert torch.equal(pixels, masks.repeat(3, 1, 1))
        furthest = max(furthest, float((masks - drawing()).abs().max()))
    assert furthest > 0.9


def test_only_groups_without_sides_are_mirrored_and_only_free_ones_turned() -> None:
    augmenter = Augmenter(settings(flip="unsided"), sided_groups={0}, orientation_free_groups={1})
    assert seen(augmenter, 0, ["liver"]) == {0}
    assert seen(augmenter, 2, ["left lung"]) == {0}
    assert seen(augmenter, 1, ["lesion right"]) == {0}
    assert seen(augmenter, 2, ["left ventricle"]) == {0, 4}
    assert seen(augmenter, 1, ["skin lesion"]) == set(range(8))
    assert seen(Augmenter(settings(), orientation_free_groups={1}), 1, ["skin lesion"], 20) == {0}


def test_zero_strengths_change_nothing_at_all() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels, masks = torch.rand(3, SIDE, SIDE, generator=generator), torch.rand(2, SIDE, SIDE, generator=generator)
    out = Augmenter(settings())(pixels, masks, group=0, targets=["a", "b"], generator=generator)
    assert torch.equal(out[0], pixels) and torch.equal(out[1], masks)


def test_all_chance_comes_from_the_generator_and_inputs_stay() -> None:
    augmenter = Augmenter(Augmentation(orientation_free=["skin"]), orientation_free_groups={1})
    pixels, masks = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)), drawing()
    before = pixels.clone(), masks.clone()

    def once(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed + 100)
        return augmenter(pixels, masks, group=1, targets=["x"], generator=torch.Generator().manual_seed(seed))

    first, other = once(0), once(1)
    torch.rand(5)
    again = once(0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(pixels, before[0]) and torch.equal(masks, before[1])


def test_values_stay_between_0_and_1_and_noise_keeps_grey_pictures_grey() -> None:
    strong = Augmentation(brightness=0.9, contrast=0.9, gamma=2, noise=0.5)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        grey = torch.rand(1, SIDE, SIDE, generator=generator).repeat(3, 1, 1)
        pixels, masks = Augmenter(strong)(grey, drawing(), group=0, targets=["x"], generator=generator)
        assert pixels.min() >= 0 and pixels.max() <= 1 and not torch.equal(pixels, grey)
        assert masks.min() >= 0 and masks.max() <= 1
        assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])


def test_values_of_the_masks_are_never_touched() -> None:
    loud = settings(brightness=0.9, contrast=0.9, gamma=2, noise=0.5)
    generator = torch.Generator().manual_seed(0)
    pixels, masks = Augmenter(loud)(drawing().repeat(3, 1, 1), drawing(), group=0, targets=["x"], generator=generator)
    assert torch.equal(masks, drawing()) and not torch.equal(pixels, drawing().repeat(3, 1, 1))


def test_a_mask_never_vanishes_and_an_empty_one_is_let_through() -> None:
    corner = torch.zeros(2, SIDE, SIDE)
    corner[0, 0, 0] = 1
    wild = Augmenter(settings(rotate=180, shift=1.0))
    unmoved = 0
    for seed in range(30):
        _, masks = wild(
            torch.zeros(3, SIDE, SIDE),
            corner,
            group=0,
            targets=["x", "y"],
            generator=torch.Generator().manual_seed(seed),
        )
        assert masks[0].sum() >= 0.1 and masks[1].sum() == 0
        unmoved += torch.equal(masks, corner)
    assert 0 < unmoved < 30


def test_zoom_and_rotation_are_what_they_say() -> None:
    disc = ((torch.arange(SIDE)[:, None] - 11.5) ** 2 + (torch.arange(SIDE)[None] - 11.5) ** 2 < 36).float()[None]
    sizes = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        _, masks = Augmenter(settings(scale=0.3))(
            disc.repeat(3, 1, 1), disc, group=0, targets=["x"], generator=generator
        )
        sizes.append(float(masks.sum() / disc.sum()))
    assert max(sizes) <= math.exp(0.6) * 1.05 and min(sizes) >= math.exp(-0.6) * 0.95
    assert max(sizes) > 1.3 and min(sizes) < 0.8


@pytest.mark.parametrize(
    ("target", "sided"),
    [
        ("left kidney", True),
        ("Right lung", True),
        ("lung, right", True),
        ("left lateral ventricle", True),
        ("left ventricle", False),
        ("right atrium", False),
        ("left ventricular cavity", False),
        ("left lung and left ventricle", True),
        ("liver", False),
        ("bright spot", False),
        ("kidney_left", True),
        ("lung_upper_lobe_right", True),
        ("Left_Ventricle", False),
        ("LeftKidney", True),
        ("kidney_left1", True),
        ("kidney_L", True),
        ("lt lung", True),
        ("vertebrae_L1", False),
    ],
)
def test_is_sided(target: str, sided: bool) -> None:
    assert is_sided(target) is sided


@pytest.mark.parametrize("place", POSITIONS)
def test_words_that_say_where_something_is(place: str) -> None:
    assert names_a_place(f"The left ventricle is in the {place} of the image.")


@pytest.mark.parametrize("text", ["Segment the left kidney.", "The left kidney [C0_1] and right lung.", "A CT image."])
def test_the_name_of_a_structure_is_no_place(text: str) -> None:
    assert not names_a_place(text)


def test_a_group_is_sided_by_any_target_present_or_absent() -> None:
    rows = [
        {"modality": "CT", "site": "torso", "targets": ["liver"], "absent": []},
        {"modality": "CT", "site": "torso", "targets": [], "absent": ["left kidney"]},
        {"modality": "MRI", "site": "heart", "targets": ["left ventricle"], "absent": []},
    ]
    assert sided_groups(Dataset.from_list(rows), GROUPS) == {0}
    assert sided_groups(Dataset.from_list(rows[::2]), GROUPS) == frozenset()


def test_orientation_free_patterns_name_groups() -> None:
    assert Augmentation(orientation_free=["sk*"]).orientation_free_groups(GROUPS) == {1}
    with pytest.raises(ValueError, match="'microscopy'.*CT torso"):
        Augmentation(orientation_free=["microscopy"]).orientation_free_groups(GROUPS)


@pytest.mark.parametrize("wrong", [{"rotate": -1}, {"noise": math.nan}, {"flip": "always"}])
def test_settings_out_of_range_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"augmentation.{next(iter(wrong))}"):
        Augmentation(**wrong)
