from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.data import (
    GROUP_NAMES,
    Augmentation,
    Augmenter,
    group_of,
    is_sided,
    load_samples,
    read_image,
    read_manifest,
    read_mask,
    sampling_weights,
    sided_groups,
    split_validation,
    unaugmented,
)


def test_a_record_gathers_the_rows_of_its_image(records: list) -> None:
    torso = [record for record in records if record.dataset == "totalsegmentator"]
    assert len(records) == 19 and len(torso) == 6
    assert torso[0].targets == ["left kidney", "liver"]
    assert [record.absent for record in records if not record.masks] == [("breast tumor",)]


def test_every_pair_of_modality_and_site_has_one_group_and_an_unknown_one_is_refused() -> None:
    assert GROUP_NAMES[group_of("MRI-T1Gd", "brain")] == GROUP_NAMES[group_of("MRI-T1", "brain")] == "MRI brain"
    with pytest.raises(ValueError, match="PET.*elbow"):
        group_of("PET", "elbow")


def test_the_split_keeps_each_patient_on_one_side(records: list) -> None:
    training, held_out = split_validation(records, 0.2, seed=0)
    assert len(training) + len(held_out) == len(records) and held_out
    assert not {r.patient for r in training} & {r.patient for r in held_out}
    assert {r.dataset for r in held_out} == {r.dataset for r in records}
    assert split_validation(records, 0.0, seed=0) == (records, [])


@pytest.mark.parametrize(("content", "message"), [(b"", "broken.png"), (b"\x89PNG\r\n\x1a\n12", "broken.png")])
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / "broken.png")


def test_a_mask_of_another_size_or_without_a_pixel_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 6), dtype=bool)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="mask.png.*6x4.*9x9"):
        read_mask(tmp_path / "mask.png", (9, 9))
    with pytest.raises(ValueError, match="mask.png.*empty"):
        read_mask(tmp_path / "mask.png", (6, 4))


def test_a_bad_manifest_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"split": "train"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1"):
        read_manifest(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="manifest.jsonl"):
        read_manifest(tmp_path / "nowhere", "train")


def test_augmentation_moves_image_and_mask_together(records: list, image_processor) -> None:
    samples = load_samples([record for record in records if record.masks], image_processor)
    for sample in samples:  # a picture that is its own mask stays so, wherever it goes
        sample.pixels = sample.masks[:1].repeat(3, 1, 1)
    still = Augmentation(brightness=0, contrast=0, gamma=0, noise=0)
    augmenter = Augmenter(still, sided_groups(records), torch.Generator().manual_seed(1))
    pixels, masks = augmenter(samples)
    moved = False
    for picture, mask, sample in zip(pixels, masks, samples, strict=True):
        assert (picture[0] - mask[0]).abs().max() < 0.02
        moved |= bool(((mask[0] * 255) - sample.masks[0]).abs().max() > 100)
    assert moved


def test_images_of_a_group_with_a_left_or_right_target_are_never_flipped(records: list, image_processor) -> None:
    samples = load_samples([record for record in records if record.masks], image_processor)
    only_flips = Augmentation(0, 0, 0, 0, 0, 0, 0, flip=True)
    sided = sided_groups(records)
    assert [GROUP_NAMES[group] for group in sided] == ["CT torso"]
    assert is_sided("right lung") and not is_sided("left ventricle")
    augmenter, flipped = Augmenter(only_flips, sided, torch.Generator().manual_seed(0)), set()
    for _ in range(8):
        for mask, original, sample in zip(augmenter(samples)[1], unaugmented(samples)[1], samples, strict=True):
            if not torch.allclose(mask, original, atol=0.02):
                assert torch.allclose(mask, original.flip(-1), atol=0.02)
                flipped.add(sample.record.dataset)
    assert flipped == {"busi", "sunnybrook"}


def test_smaller_sets_are_drawn_more_often_an_image(records: list) -> None:
    weights = sampling_weights(records, 0.0)
    share = sum(w for w, record in zip(weights, records, strict=True) if record.dataset == "busi")
    assert share == pytest.approx(1 / 3) and weights.sum() == pytest.approx(1)
