import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
from datasets import Dataset, Features, load_dataset
from PIL import Image

from configuration_medsight import MedSightConfig
from medsight.cli import main
from medsight.data import shards
from medsight.data.groups import Groups, load_groups, match_groups
from medsight.data.schema import CONVERSATION_FEATURES, REGION_FEATURES
from medsight.inference.code_assignment import assign_codes
from medsight.training.annotation import annotate, weights_sha256
from modeling_medsight import MedSightForConditionalGeneration
from processing_medsight import MedSightProcessor
from processing_medsight.region_codes_medsight import parse_region_code
from tests.tiny_checkpoint import save_tiny_checkpoint


GROUPS = Groups({"CT torso": ["CT/torso"], "ultrasound breast": ["ultrasound/breast"], "skin": ["dermoscopy/*"]})
CLASSES = ["liver", "left kidney", "spleen", "lung nodule", "benign breast tumor", "skin lesion", "unused"]
SIZE = (40, 30)


def row(folder: Path, number: int, modality: str, site: str, targets: list[str], **rest) -> dict:
    """A picture and its masks on disk: mask i is a square in the i-th place of a 3 x 2 raster."""
    generator = np.random.default_rng(number)
    pixels = generator.integers(0, 80, (SIZE[1], SIZE[0]), dtype=np.uint8)
    masks = []
    for index in range(len(targets)):
        mask = np.zeros((SIZE[1], SIZE[0]), dtype=bool)
        y, x = index // 3 % 2 * 15 + 3, index % 3 * 13 + 2
        mask[y : y + 8, x : x + 8] = True
        pixels[mask] = 120 + 20 * index
        masks.append({"path": str(folder / f"{number}_{index}.png"), "bytes": None})
        Image.fromarray(mask).save(masks[-1]["path"])
    image = {"path": str(folder / f"{number}.png"), "bytes": None}
    Image.fromarray(pixels).save(image["path"])
    fixed = {
        "absent": [],
        "finding": None,
        "label_origin": "expert",
        "orientation": None,
        "dataset": "drawn",
        "split": "train",
    }
    return {
        "image": image,
        "masks": masks,
        "targets": targets,
        "modality": modality,
        "site": site,
        "patient": f"p{number}",
        **fixed,
        **rest,
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("pictures")
    torso = ("CT", "torso")
    drawn = [
        row(folder, 0, *torso, ["liver", "left kidney", "spleen"]),
        row(folder, 1, *torso, ["lung nodule"] * 3 + ["liver"]),
        row(folder, 2, "ultrasound", "breast", ["benign breast tumor"], finding="benign"),
        row(folder, 3, "ultrasound", "breast", [], absent=["benign breast tumor"], finding="normal"),
        row(folder, 4, "dermoscopy", "skin", ["skin lesion"], split="validation"),
        row(folder, 5, *torso, ["lung nodule"] * 6 + ["liver"]),
        row(folder, 6, *torso, ["spleen"]),
    ]
    return Dataset.from_list(drawn, features=REGION_FEATURES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return save_tiny_checkpoint(folder, mask_class_names=CLASSES, group_names=GROUPS.names)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> MedSightForConditionalGeneration:
    return MedSightForConditionalGeneration.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> MedSightProcessor:
    return MedSightProcessor.from_pretrained(checkpoint)


def read(folder: Path, split: str = "train") -> list[dict]:
    files = sorted(folder.glob(f"{split}-*.parquet"))
    return [one for file in files for one in pyarrow.parquet.read_table(file).to_pylist()]


def text_of(conversation: dict) -> tuple[str, str]:
    user, assistant = conversation["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant") and user["content"].startswith("<image>")
    return user["content"].removeprefix("<image>"), assistant["content"]


def codes_of(answer: str) -> list[tuple[int, int]]:
    return [parse_region_code(f"[C{part.split(']')[0]}]") for part in answer.split("[C")[1:]]


@pytest.fixture(scope="module")
def written(rows, model, processor, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("out") / "conversations"
    annotate(rows, model, processor, GROUPS, output, per_image=12, plain_share=0.25, seed=3)
    return output


def test_every_conversation_has_a_mask_a_code_and_reads_back_in_the_schema(written: Path, rows: Dataset) -> None:
    conversations = read(written)
    schema = pyarrow.parquet.read_schema(next(written.glob("train-*")))
    assert Features.from_arrow_schema(schema) == CONVERSATION_FEATURES
    assert len(conversations) == 6 * 12 and len({one["id"] for one in conversations}) == 6 * 12
    grounded = 0
    for one in conversations:
        prompt, answer = text_of(one)
        codes = codes_of(answer)
        assert prompt and len(codes) == len(one["masks"]) == len(one["targets"]) <= 5
        source = rows[int(one["id"].split("-")[1])]
        assert one["images"] == [source["image"]]
        by_path = {mask["path"]: target for mask, target in zip(source["masks"], source["targets"], strict=True)}
        assert [by_path[mask["path"]] for mask in one["masks"]] == one["targets"]
        group = GROUPS.index(one["modality"], one["site"])
        assert all(k == group and 0 <= m < 4 for k, m in codes)
        assert all(target in answer for target in one["targets"])
        assert {one[name] == source[name] for name in ("dataset", "patient", "split", "site")} == {True}
        grounded += bool(codes)
    assert grounded > 20
    assert {one["split"] for one in read(written, "validation")} == {"validation"}


def test_a_mask_has_the_same_code_in_all_its_answers_and_it_is_that_of_its_query(
    written: Path, rows: Dataset, model, processor
) -> None:
    cited: dict[str, set[tuple[int, int]]] = {}
    for one in read(written):
        for mask, code in zip(one["masks"], codes_of(text_of(one)[1]), strict=True):
            cited.setdefault(mask["path"], set()).add(code)
    assert len(cited) > 6 and {len(codes) for codes in cited.values()} == {1}
    source = rows[0]
    image = Image.open(source["image"]["path"])
    pixels = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
    masks = np.stack([np.asarray(Image.open(mask["path"])) for mask in source["masks"]])
    labels = processor.image_processor.preprocess_masks(masks, output_size=model.config.mask_size)
    classes = torch.tensor([CLASSES.index(target) for target in source["targets"]])
    with torch.no_grad():
        regions = model.get_region_features(pixels)
        (codes,) = assign_codes(model, regions, [labels], [classes], torch.tensor([0]))
    for mask, code in zip(source["masks"], codes.tolist(), strict=True):
        assert cited[mask["path"]] == {(0, code)}


def test_the_words_and_codes_depend_on_seed_and_row_alone(
    rows: Dataset, model, processor, written: Path, tmp_path: Path
) -> None:
    settings = {"per_image": 12, "plain_share": 0.25}
    counts = annotate(rows, model, processor, GROUPS, tmp_path / "one", seed=3, batch_size=1, **settings)
    streamed = rows.to_iterable_dataset()
    annotate(streamed, model, processor, GROUPS, tmp_path / "all", seed=3, batch_size=64, **settings)
    annotate(rows, model, processor, GROUPS, tmp_path / "other", seed=4, **settings)
    assert read(tmp_path / "one") == read(tmp_path / "all") == read(written) != read(tmp_path / "other")
    assert json.loads((written / "annotation.json").read_text())["counts"] == json.loads(json.dumps(counts.to_dict()))


def test_the_card_and_the_json_count_what_was_written(written: Path, model) -> None:
    content = json.loads((written / "annotation.json").read_text("utf-8"))
    counts, provenance = content["counts"], content["provenance"]
    conversations = read(written) + read(written, "validation")
    assert counts["images"] == 7 and counts["conversations"] == len(conversations) == 84
    for table in ("intents", "groups", "splits", "datasets"):
        assert sum(counts[table].values()) == 84
    assert counts["splits"] == {"train": 72, "validation": 12}
    said = sum("here is no " in text_of(one)[1] for one in conversations)
    assert sum(counts["absent"].values()) == said > 0
    assert counts["not_asked"] == {"lung nodule": 1} and counts["masks_beyond_queries"] == 2
    assert sum(counts["codes"]["CT torso"]) == 3 + 4 + 7 + 1
    usage = counts["code_usage"]["CT torso"]
    assert usage["masks"] == 15 and 1 <= usage["perplexity"] <= usage["used"] <= 4
    assert provenance["weights_sha256"] == weights_sha256(model) and len(provenance["templates_sha256"]) == 64
    assert provenance["model"] == "tiny"
    card = (written / "README.md").read_text("utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["configs"][0]["data_files"] == [
        {"split": "train", "path": "train-*.parquet"},
        {"split": "validation", "path": "validation-*.parquet"},
    ]
    assert "84 conversations about 7 images" in card and provenance["weights_sha256"] in card
    assert f"| CT torso | 15 | {usage['used']} of 4 | {usage['perplexity']} |" in card


def test_datasets_loads_the_folder_by_its_card(written: Path, tmp_path: Path) -> None:
    loaded = load_dataset(str(written), cache_dir=str(tmp_path))
    assert {split: len(part) for split, part in loaded.items()} == {"train": 72, "validation": 12}


def test_pictures_are_named_by_path_or_embedded(rows: Dataset, model, processor, tmp_path: Path) -> None:
    few = rows.select([0])
    annotate(few, model, processor, GROUPS, tmp_path / "bytes", embed_images=True)
    annotate(few, model, processor, GROUPS, tmp_path / "paths")
    for embedded, outside in zip(read(tmp_path / "bytes"), read(tmp_path / "paths"), strict=True):
        for name in ("images", "masks"):
            paths = [Path(entry["path"]) for entry in outside[name]]
            assert [entry["bytes"] for entry in outside[name]] == [None] * len(paths)
            assert embedded[name] == [{"path": path.name, "bytes": path.read_bytes()} for path in paths]


def test_shards_are_cut_by_size(rows, model, processor, tmp_path, monkeypatch, written) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", 10)
    monkeypatch.setattr(shards, "SHARD_BYTES", 0)
    annotate(rows, model, processor, GROUPS, tmp_path / "cut", per_image=12, plain_share=0.25, seed=3)
    names = sorted(path.name for path in (tmp_path / "cut").glob("train*"))
    assert names == [f"train-{number:05d}.parquet" for number in range(8)]
    assert read(tmp_path / "cut") == read(written)


def test_a_failure_leaves_nothing_behind(rows: Dataset, model, processor, tmp_path: Path) -> None:
    def disk_full(self, row: dict) -> None:
        if row["id"] == "drawn-4-0":
            raise OSError(28, "No space left on device")
        return write(self, row)

    write = shards.SplitWriter.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.SplitWriter, "write", disk_full)
        with pytest.raises(OSError, match="No space"):
            annotate(rows, model, processor, GROUPS, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_mask_stops_or_is_counted_and_named(rows: Dataset, model, processor, tmp_path: Path, caplog) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    some = [dict(one) for one in rows.select([0, 1, 2])]
    some[1]["masks"] = [*some[1]["masks"][:3], {"path": str(broken), "bytes": None}]
    with pytest.raises(ValueError, match="broken.png"):
        annotate(some, model, processor, GROUPS, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    counts = annotate(some, model, processor, GROUPS, tmp_path / "out", on_error="skip", per_image=2)
    assert counts.images == 2 and len(counts.skipped) == 1 and "broken.png" in counts.skipped[0]
    assert "broken.png" in caplog.text and "broken.png" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert {one["id"].split("-")[1] for one in read(tmp_path / "out")} == {"0", "2"}
    with pytest.raises(ValueError, match="no image to annotate: 1 could not be read"):
        annotate(some[1:2], model, processor, GROUPS, tmp_path / "none", on_error="skip")


def test_a_mask_that_a_crop_cuts_off_is_named(model, processor, tmp_path: Path) -> None:
    one = row(tmp_path, 0, "CT", "torso", ["liver"])
    edge = np.zeros((SIZE[1], SIZE[0]), dtype=bool)
    edge[:, 0] = True
    Image.fromarray(edge).save(one["masks"][0]["path"])
    image_processor = processor.image_processor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_processor, "fit", "crop")
        with pytest.raises(ValueError, match="0_0.png: the mask lies outside.*crop"):
            annotate([one], model, processor, GROUPS, tmp_path / "out")
    annotate([one], model, processor, GROUPS, tmp_path / "out")


def test_plain_conversations_need_no_model_and_no_masks(rows: Dataset, processor, model, tmp_path: Path) -> None:
    class Blind:
        config, training, name_or_path = model.config, False, ""

        def eval(self) -> None: ...

        def train(self, mode: bool) -> None: ...

        def state_dict(self) -> dict:
            return {}

    some = [dict(one) for one in rows.select([0])]
    some[0]["masks"] = [{"path": "gone.png", "bytes": None}] * 3
    annotate(some, Blind(), processor, GROUPS, tmp_path / "out", plain_share=1, per_image=20)
    assert all(one["masks"] == [] and not codes_of(text_of(one)[1]) for one in read(tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_image": 0}, "per_image=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"plain_share": 1.5}, "plain_share=1.5"),
        ({"max_regions": 0}, "max_regions=0"),
        ({"groups": Groups({"CT torso": ["*"]})}, "expected those of the model"),
    ],
)
def test_settings_that_cannot_work_are_named(rows, model, processor, tmp_path, changes: dict, message: str) -> None:
    arguments = {"groups": GROUPS, **changes}
    with pytest.raises(ValueError, match=message):
        annotate(rows, model, processor, output=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_unknown_targets_and_groups_are_named(rows: Dataset, model, processor, tmp_path: Path) -> None:
    unknown = {**rows[0], "targets": ["liver", "pancreas", "spleen"]}
    with pytest.raises(ValueError, match="target 'pancreas'"):
        annotate([unknown], model, processor, GROUPS, tmp_path / "out")
    with pytest.raises(ValueError, match="PET/knee"):
        annotate([{**rows[0], "modality": "PET", "site": "knee"}], model, processor, GROUPS, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(OSError, match="full is not empty"):
        annotate(rows, model, processor, GROUPS, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "x"


def seen(masks: torch.Tensor, classes: torch.Tensor | None = None) -> SimpleNamespace:
    """Region features in which query i has mask i, certain, and its own embedding."""
    queries = len(masks)
    return SimpleNamespace(
        masks_queries_logits=(masks * 20 - 10)[None],
        class_queries_logits=torch.zeros(1, queries, 8) if classes is None else classes[None],
        region_embeddings=torch.randn(1, queries, 16, generator=torch.Generator().manual_seed(0)),
    )


def squares(count: int) -> torch.Tensor:
    masks = torch.zeros(count, 12, 12)
    for index in range(count):
        masks[index, index // 4 * 4 : index // 4 * 4 + 3, index % 4 * 3 : index % 4 * 3 + 3] = 1
    return masks


def test_masks_get_the_codes_of_the_queries_that_show_them(model) -> None:
    masks = squares(5)
    regions = seen(masks)
    with torch.no_grad():
        expected = model.quantize_regions(regions.region_embeddings, torch.tensor([2])).code_indices[0]
    order = torch.tensor([3, 0, 4])
    (codes,) = assign_codes(model, regions, [masks[order]], [torch.tensor([0, 1, 2])], torch.tensor([2]))
    assert torch.equal(codes, expected[order]) and len(expected.unique()) > 1
    (larger,) = assign_codes(
        model, regions, [masks[order].repeat_interleave(2, 1).repeat_interleave(2, 2)], None, torch.tensor([2])
    )
    assert torch.equal(larger, codes)


def test_masks_beyond_the_queries_get_the_code_of_the_query_that_overlaps_most(model) -> None:
    masks = squares(5)
    regions = seen(masks)
    with torch.no_grad():
        expected = model.quantize_regions(regions.region_embeddings, torch.tensor([0])).code_indices[0]
    eight = torch.cat([masks, masks[[4, 2, 4]]])
    (codes,) = assign_codes(model, regions, [eight], [torch.zeros(8, dtype=torch.long)], torch.tensor([0]))
    assert torch.equal(codes, expected[torch.tensor([0, 1, 2, 3, 4, 4, 2, 4])])


def test_classes_decide_between_queries_that_show_the_same_unless_there_are_none(model) -> None:
    twins = squares(1).repeat(5, 1, 1)
    classes = torch.full((5, 8), -5.0)
    classes[3, 6] = classes[1, 2] = 5.0
    regions = seen(twins, classes)
    with torch.no_grad():
        expected = model.quantize_regions(regions.region_embeddings, torch.tensor([1])).code_indices[0]
    for wanted, query in ((6, 3), (2, 1)):
        (codes,) = assign_codes(model, regions, [twins[:1]], [torch.tensor([wanted])], torch.tensor([1]))
        assert codes.tolist() == [int(expected[query])]
    (without,) = assign_codes(model, regions, [twins[:1]], None, torch.tensor([1]))
    assert without.tolist() == [int(expected[0])]


def test_images_without_masks_bad_logits_and_no_codebook(model) -> None:
    regions = seen(squares(5))
    (none,) = assign_codes(model, regions, [torch.zeros(0, 12, 12)], None, torch.tensor([0]))
    assert none.shape == (0,) and none.dtype == torch.long
    single = SimpleNamespace(config=SimpleNamespace(use_region_codebook=False))
    (codes,) = assign_codes(single, regions, [squares(3)], None, torch.tensor([0]))
    assert codes.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="2 mask_labels"):
        assign_codes(model, regions, [squares(1)] * 2, None, torch.tensor([0]))
    regions.masks_queries_logits[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        assign_codes(model, regions, [squares(1)], None, torch.tensor([0]))


def test_one_seg_token_without_a_codebook(rows: Dataset, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(
        tmp_path / "seg", num_groups=1, codes_per_group=1, use_region_codebook=False, mask_class_names=CLASSES
    )
    model = MedSightForConditionalGeneration.from_pretrained(folder)
    annotate(rows, model, MedSightProcessor.from_pretrained(folder), GROUPS, tmp_path / "out")
    answers = [(text_of(one)[1], len(one["masks"])) for one in read(tmp_path / "out")]
    assert all(answer.count("[SEG]") == masks and "[C" not in answer for answer, masks in answers)
    assert max(masks for _, masks in answers) > 1


def test_groups_of_the_model_are_found_by_pattern_or_by_name() -> None:
    names = ["MRI brain", "CT torso", "X-ray chest"]
    config = MedSightConfig.from_preset("tiny", group_names=names)
    groups = match_groups(config, [("MRI-T1", "brain"), ("MRI", "brain"), ("X-Ray", "chest"), ("CT", "torso")])
    assert groups.names == names
    assert [groups.index(*pair) for pair in (("MRI-T1", "brain"), ("CT", "torso"), ("X-Ray", "chest"))] == [0, 1, 2]
    with pytest.raises(ValueError, match="'PET knee'.*MRI brain.*--groups"):
        match_groups(config, [("PET", "knee")])
    config.group_patterns = {"CT torso": ["PET/*"], "X-ray chest": ["P?T/knee", "MRI/brain"]}
    groups = match_groups(config, [("PET", "knee"), ("MRI", "brain"), ("CT", "torso")])
    assert [groups.index(*pair) for pair in (("PET", "knee"), ("MRI", "brain"), ("CT", "torso"))] == [1, 2, 1]


def test_a_groups_file_keeps_the_models_order_and_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "groups.yaml"
    path.write_text("CT torso: ['CT*/*']\n", encoding="utf-8")
    config = MedSightConfig.from_preset("tiny", group_names=["MRI brain", "CT torso", "X-ray chest"])
    config.group_patterns = {"MRI brain": ["*/brain", "CT*/chest"]}
    told = load_groups(path, config.group_names)
    assert told.names == load_groups(path, None).names == ["CT torso"]
    pairs = [("CT-LD", "chest"), ("PET", "brain"), ("CT", "torso")]
    groups = match_groups(config, pairs, told)
    assert groups.names == list(config.group_names) and [groups.index(*pair) for pair in pairs] == [1, 0, 1]
    path.write_text("CT tors: ['CT*/*']\n", encoding="utf-8")
    with pytest.raises(ValueError, match="groups.yaml.*'CT tors': did you mean 'CT torso'"):
        load_groups(path, ["MRI brain", "CT torso"])
    for wrong in ("- CT torso", "CT torso: CT/torso", "a: [1]", "a: ["):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match="groups.yaml"):
            load_groups(path, ["CT torso"])


def command(*arguments: str) -> int:
    return main(["data", "annotate", *arguments])


def test_the_command_annotates_a_folder(checkpoint: Path, tmp_path: Path, capsys) -> None:
    masks = tmp_path / "mine" / "train_mask"
    (tmp_path / "mine" / "train").mkdir(parents=True)
    masks.mkdir()
    for number in range(3):
        pixels = np.full((30, 40), 10 * number, dtype=np.uint8)
        mask = np.zeros((30, 40), dtype=bool)
        mask[5:15, 5 + number : 20] = True
        Image.fromarray(pixels).save(tmp_path / "mine" / "train" / f"{number}_CT_torso.png")
        Image.fromarray(mask).save(masks / f"{number}_CT_torso_left+kidney.png")
    output = tmp_path / "out"
    assert (
        command(str(tmp_path / "mine"), "--model", str(checkpoint), "--output", str(output), "--per-image", "4") == 0
    )
    printed = capsys.readouterr()
    assert "3 images, 12 conversations" in printed.out and "CT torso" in printed.out
    assert "annotate" in printed.err and "annotate:" not in printed.out
    conversations = read(output)
    assert len(conversations) == 12
    assert main(["data", "check", str(output)]) == 0 and "(parquet)" in capsys.readouterr().out
    assert any("left kidney [C0_" in text_of(one)[1] for one in conversations)
    assert command(str(tmp_path / "mine"), "--model", str(checkpoint), "--output", str(output)) == 1
    assert "out is not empty" in capsys.readouterr().err
    (tmp_path / "groups.yaml").write_text("skin: ['CT/*']\n", encoding="utf-8")
    other = [str(tmp_path / "mine"), "--model", str(checkpoint), "--output", str(tmp_path / "other")]
    assert command(*other, "--groups", str(tmp_path / "groups.yaml"), "--embed-images") == 0
    assert any("left kidney [C2_" in text_of(one)[1] for one in read(tmp_path / "other"))


def test_places_in_answers_are_those_of_the_masks(rows: Dataset, model, processor, tmp_path: Path) -> None:
    annotate(rows.select([0]), model, processor, GROUPS, tmp_path / "out", per_image=100)
    places = {
        (one["targets"][0], text_of(one)[1].split(" is in the ")[1])
        for one in read(tmp_path / "out")
        if " is in the " in text_of(one)[1]
    }
    where = (("liver", "upper left"), ("left kidney", "upper middle"), ("spleen", "upper right"))
    assert places == {(target, f"{place} of the image.") for target, place in where}
