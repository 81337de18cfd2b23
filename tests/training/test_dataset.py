"""Samples and batches: as in inference, a pure function of row, seed and draw."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from configuration_medsight import MedSightConfig
from medsight.data.groups import Groups
from medsight.data.schema import CONVERSATION_FEATURES
from medsight.data.sources import Source, load_source
from medsight.training.augmentation import Augmentation, Augmenter
from medsight.training.canvas import Canvas
from medsight.training.collators import ConversationCollator, RegionCollator
from medsight.training.dataset import ConversationDataset, RegionDataset, Skipped
from medsight.training.stage_conversations import first_answer
from tests.tiny_checkpoint import tiny_processor


GROUPS = {"MRI": ["MRI*/*"], "ultrasound": ["ultrasound/*"], "CT": ["CT/*"]}
CLASSES = ["left ventricle", "benign breast tumor", "left kidney", "liver", "a", "b", "c"]
UNKNOWN = [
    {"role": "user", "content": "<image>Segment."},
    {"role": "assistant", "content": "liver [C2_1], left kidney [C7_3]."},
]


@pytest.fixture
def canvas() -> Canvas:
    config = MedSightConfig.from_preset("tiny", group_names=list(GROUPS), mask_class_names=CLASSES)
    return Canvas(tiny_processor(config), config, Groups(GROUPS))


@pytest.fixture
def regions(drawn_data: Path) -> Any:
    return load_source(Source("biomedparse", str(drawn_data)))


def conversation(drawn_data: Path, **changes: Any) -> Any:
    image = drawn_data / "totalsegmentator/train/2_CT_torso.png"
    masks = [drawn_data / f"totalsegmentator/train_mask/2_CT_torso_{t}.png" for t in ("liver", "left+kidney")]
    row = {
        "id": "1",
        "images": [{"path": str(image), "bytes": None}],
        "messages": [
            {"role": "user", "content": "<image>Segment the liver <|im_end|> [C0_0]."},
            {"role": "assistant", "content": "liver [C2_1], left kidney [C2_3]."},
        ],
        "masks": [{"path": str(mask), "bytes": None} for mask in masks],
        "targets": ["liver", "left kidney"],
        **dict.fromkeys(("dataset", "modality", "site", "split", "patient")),
        **changes,
    }
    return Dataset.from_list([row], features=CONVERSATION_FEATURES)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def test_a_sample_is_what_inference_sees(canvas: Canvas, regions: Any) -> None:
    row = next(row for row in regions if row["image"]["path"].endswith("3_CT_torso.png"))
    sample = RegionDataset(Dataset.from_list([row], features=regions.features), canvas)[0]
    picture = Image.open(row["image"]["path"])
    expected = canvas.processor.image_processor(images=picture, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(sample["pixel_values"], expected)
    assert sample["group"] == 2 and [CLASSES[i] for i in sample["class_labels"]] == row["targets"]
    assert sample["mask_labels"].shape == (2, *canvas.config.mask_size)
    for mask, entry in zip(sample["mask_labels"], row["masks"], strict=True):  # covered area is kept
        share = np.asarray(Image.open(entry["path"])).sum() / (32 * 32)
        assert mask.mean().item() == pytest.approx(share, rel=0.02)


@pytest.mark.parametrize("keep", [False, True])
def test_a_sample_depends_on_its_draw_alone(canvas: Canvas, regions: Any, keep: bool) -> None:
    canvas = Canvas(canvas.processor, canvas.config, canvas.groups, keep_in_memory=keep)
    items = RegionDataset(regions, canvas, augmenter=Augmenter(Augmentation()), seed=1)
    draws = [5, 5 + len(items), 3, 5]
    one, later, _, again = [items[draw] for draw in draws]
    assert all(same(value, again[key]) for key, value in one.items())
    assert not torch.equal(one["pixel_values"], later["pixel_values"])
    fresh = RegionDataset(
        regions, Canvas(canvas.processor, canvas.config, canvas.groups), augmenter=items.augmenter, seed=1
    )
    assert all(same(value, fresh[5][key]) for key, value in one.items())
    other = RegionDataset(regions, canvas, augmenter=items.augmenter, seed=2)
    assert not torch.equal(other[5]["pixel_values"], one["pixel_values"])


def test_workers_share_what_is_kept_in_memory(canvas: Canvas, regions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = RegionDataset(regions, canvas)
    kept = RegionDataset(regions, Canvas(canvas.processor, canvas.config, canvas.groups, keep_in_memory=True))
    expected = [plain[draw] for draw in range(len(plain))]
    kept.preload()
    for name in ("read_picture", "read_mask"):
        monkeypatch.setattr(f"medsight.training.canvas.{name}", None)  # nothing is decoded any more
    loader = DataLoader(kept, batch_size=None, num_workers=1, multiprocessing_context="fork")
    for given, sample in zip(loader, expected, strict=True):
        assert all(same(value, given[key]) for key, value in sample.items())
    masks = sum(sample["mask_labels"].nbytes for sample in expected)
    assert sum(len(packed) for packed in kept.canvas.loaded.values() if isinstance(packed, bytes)) < masks / 2


def test_an_embedded_picture_is_decoded_once_and_told_by_its_bytes(
    canvas: Canvas, regions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embedded(entry: dict[str, Any], name: str) -> dict[str, Any]:
        return {"path": name, "bytes": Path(entry["path"]).read_bytes()}

    first, second = [row["image"] for row in regions][:2]
    masks = next(row["masks"] for row in regions if row["masks"])
    kept = Canvas(canvas.processor, canvas.config, canvas.groups, keep_in_memory=True)
    one, other = embedded(first, "a.nii, slice 1"), embedded(second, "a.nii, slice 1")
    seen = [kept.load_image(entry)[0] for entry in (one, other)]
    assert not torch.equal(*seen)
    size = Image.open(masks[0]["path"]).size
    mask = embedded(masks[0], "labels.nii, liver, slice 1")
    drawn = kept.load_masks([mask], [size])
    for name in ("read_picture", "read_mask"):
        monkeypatch.setattr(f"medsight.training.canvas.{name}", None)  # nothing is decoded any more
    assert all(torch.equal(kept.load_image(dict(e))[0], s) for e, s in zip((one, other), seen, strict=True))
    assert torch.equal(kept.load_masks([dict(mask)], [size]), drawn)


def test_a_conversations_ids_and_labels_are_the_processors_own(canvas: Canvas, drawn_data: Path) -> None:
    rows = conversation(drawn_data)
    batch = ConversationCollator(canvas.processor)([ConversationDataset(rows, canvas)[0]])
    image = Image.open(rows[0]["images"][0]["path"])
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Segment the liver <|im_end|> [C0_0]."}]
    chat = [{"role": "user", "content": content}, dict(rows[0]["messages"][1])]
    expected = canvas.processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    spoken = torch.as_tensor(expected["assistant_masks"]).bool()
    assert torch.equal(batch["labels"] != -100, spoken) and bool(spoken.any())
    first, codes = canvas.config.region_code_start_id, canvas.config.num_region_codes
    cited = batch["input_ids"][(batch["input_ids"] >= first) & (batch["input_ids"] < first + codes)]
    assert cited.tolist() == [first + 2 * 4 + 1, first + 2 * 4 + 3]  # what the user spelled is no code
    assert len(batch["mask_labels"][0]) == 2


def test_a_mask_that_the_model_does_not_see_is_named(canvas: Canvas, drawn_data: Path) -> None:
    rows = conversation(drawn_data)
    canvas.image_processor.fit = "crop"
    edge = drawn_data.parent / "edge.png"
    pixels = np.zeros((24, 32), dtype=bool)
    pixels[:, :3] = True  # of 32 columns the model sees the 24 in the middle
    Image.fromarray(pixels).save(edge)
    masks = [{"path": str(edge), "bytes": None}, rows[0]["masks"][1]]
    with pytest.raises(ValueError, match=r"edge\.png: the mask lies outside what the model sees.*fit='crop'"):
        ConversationDataset(conversation(drawn_data, masks=masks), canvas)[0]


def test_uneven_conversations_are_padded_and_keep_their_own_masks(canvas: Canvas, drawn_data: Path) -> None:
    plain = [{"role": "user", "content": "<image>Hello?"}, {"role": "assistant", "content": "Hi."}]
    samples = [
        ConversationDataset(conversation(drawn_data), canvas)[0],
        ConversationDataset(conversation(drawn_data, messages=plain, masks=[], targets=[]), canvas)[0],
    ]
    both = ConversationCollator(canvas.processor, class_labels=True)(samples)
    for row, sample in enumerate(samples):
        alone = ConversationCollator(canvas.processor, class_labels=True)([sample])
        length = alone["input_ids"].shape[1]
        assert torch.equal(both["input_ids"][row, :length], alone["input_ids"][0])
        assert both["attention_mask"][row].tolist() == [1] * length + [0] * (both["labels"].shape[1] - length)
        assert (both["labels"][row, length:] == -100).all()
        assert torch.equal(both["mask_labels"][row], alone["mask_labels"][0])
    assert [len(masks) for masks in both["mask_labels"]] == [2, 0]
    assert [labels.tolist() for labels in both["code_class_labels"]] == [[3, 2], []]


def test_nothing_moves_where_the_text_says_its_place(canvas: Canvas, drawn_data: Path) -> None:
    moves = Augmenter(Augmentation(rotate=15, scale=0.1, shift=0.1))
    asked = {"role": "user", "content": "<image>Where are they?"}
    for words, moved in (("of the torso", True), ("in the upper left of the image", False)):
        turns = [asked, {"role": "assistant", "content": f"liver [C2_1], left kidney [C2_3] {words}."}]
        rows = conversation(drawn_data, messages=turns)
        masks = [ConversationDataset(rows, canvas, augmenter)[0]["mask_labels"] for augmenter in (None, moves)]
        assert torch.equal(*masks) is not moved


def test_several_images_keep_their_masks_apart(canvas: Canvas, drawn_data: Path) -> None:
    other = drawn_data / "sunnybrook/train/1_MRI-cine_heart.png"
    small = drawn_data / "other.png"
    Image.open(other).resize((20, 10)).save(small)
    mask = drawn_data / "other_mask.png"
    Image.fromarray(np.ones((10, 20), dtype=bool)).save(mask)
    turns = [
        {"role": "user", "content": "<image>First."},
        {"role": "assistant", "content": "liver [C2_1]."},
        {"role": "user", "content": "<image>Second."},
        {"role": "assistant", "content": "ventricle [C0_1]."},
    ]
    rows = conversation(drawn_data)
    row = dict(rows[0])
    row |= {"images": [*row["images"], {"path": str(small), "bytes": None}], "messages": turns}
    row |= {"masks": [row["masks"][0], {"path": str(mask), "bytes": None}], "targets": ["liver", "left ventricle"]}
    sample = ConversationDataset(Dataset.from_list([row], features=rows.features), canvas)[0]
    batch = ConversationCollator(canvas.processor)([sample])
    assert batch["pixel_values"].shape[0] == 2
    assert (batch["input_ids"] == canvas.config.image_token_id).sum() == 2 * canvas.config.image_seq_length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": UNKNOWN}, r"2_CT_torso\.png: conversation 1 cites \[C7_3\], which is none of the"),
        ({"masks": [], "targets": []}, r"2_CT_torso\.png.* cites 2 codes, has 0 masks"),
    ],
)
def test_codes_without_masks_or_that_the_model_lacks_are_named_or_left_out(
    canvas: Canvas, drawn_data: Path, changes: dict[str, Any], message: str
) -> None:
    rows = conversation(drawn_data, **changes)
    with pytest.raises(ValueError, match=message):
        ConversationDataset(rows, canvas)[0]
    skipped = ConversationDataset(rows, canvas, skip_errors=True)[0]
    assert isinstance(skipped, Skipped) and re.match(f".*{message}", skipped.reason)
    assert ConversationCollator(canvas.processor)([skipped]) == {"files": [], "skipped": 1}


def test_region_batches_ask_classes_and_match_at_least_one_image(canvas: Canvas, regions: Any) -> None:
    items = RegionDataset(regions, canvas, most_asked=1, matched_share=0.0)
    samples = [items[draw] for draw in range(4)]
    batch = RegionCollator(class_queries=True)(samples)
    assert len(batch["matched_images"]) == 1
    assert all(len(asked) <= 1 for asked in batch["asked_classes"])
    grouped = RegionCollator(class_queries=True, groups=True)(samples)
    assert grouped["group_labels"].tolist() == [sample["group"] for sample in samples]
    assert "asked_classes" not in grouped and "matched_images" not in grouped


def test_text_only_conversations_have_no_image(canvas: Canvas, drawn_data: Path) -> None:
    sample = ConversationDataset(conversation(drawn_data), canvas, text_only=True)[0]
    batch = ConversationCollator(canvas.processor, label_prompts=True)([sample])
    assert "pixel_values" not in batch and "mask_labels" not in batch
    assert (batch["input_ids"] != canvas.config.image_token_id).all()
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_pictures_are_moved_alike_with_and_without_a_codebook(canvas: Canvas, regions: Any) -> None:
    """So that an ablation of the codebook changes nothing else: which groups are sided does not depend on it."""
    config = copy.deepcopy(canvas.config)
    config.use_region_codebook = False
    without = Canvas(canvas.processor, config, canvas.groups)
    augmenter = Augmenter(Augmentation(), sided_groups={0})
    one, other = (RegionDataset(regions, some, augmenter=augmenter) for some in (canvas, without))
    for draw in range(2 * len(regions)):
        assert torch.equal(one[draw]["pixel_values"], other[draw]["pixel_values"])
    assert {one[draw]["group"] for draw in range(len(regions))} == {0, 1, 2}
    assert {other[draw]["group"] for draw in range(len(regions))} == {0}


def test_the_first_answer_ends_where_the_user_speaks_again() -> None:
    labels = torch.tensor([-100, -100, 5, 6, -100, 7, 8, -100])
    assert first_answer(labels).tolist() == [5, 6]
    assert first_answer(labels[:4]).tolist() == [5, 6]
