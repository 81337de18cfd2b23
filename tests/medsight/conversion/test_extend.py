"""`medsight extend`: new structures, groups and codes in a trained model, whose old answers stay what they were."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from configuration_medsight import MedSightConfig
from medsight.cli import main
from medsight.conversion.convert import convert
from medsight.conversion.extend import extend
from medsight.conversion.extend_model import extend_model, find_starts, nearest_classes
from medsight.data.additions import Additions, extended_config, find_additions
from medsight.data.groups import Groups, match_groups
from medsight.data.sources import Source, load_source
from medsight.inference.code_assignment import match_queries, place
from modeling_medsight import MedSightForConditionalGeneration
from processing_medsight import MedSightProcessor
from tests.medsight.conversion.published_files import Published
from tests.modeling_medsight.configurations import CONFIGURATIONS, GPT2, make_batch, make_config, make_model
from tests.test_one_folder import answer_as_stranger
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_processor
from tests.training.tiny_run import draw_data


KNOWN = {
    "mask_class_names": ["left ventricle", "breast tumor", "liver", "spleen", "kidney", "brain tumor", "polyp"],
    "group_names": ["MRI heart", "ultrasound breast", "CT torso"],
    "group_patterns": {"MRI heart": ["MRI*/heart"]},
    "group_orientations": {"MRI heart": "LP"},
}
NEW = Additions(["left ventricular cavity", "macula"], {"OCT retina": ["OCT/*"], "fundus retina": ["fundus/retina"]})
FULL = {"vocab_size": 282 + 12}  # of the `tiny` preset: no row is left for a code
TIED = {"tie_word_embeddings": True}
CASES: dict[str, dict[str, Any]] = {
    **{name: {} for name in CONFIGURATIONS if "seg" not in name},
    "class queries": {"use_class_queries": True},
    "tied": {"text_config": TIED},
    "gpt2": {"text_config": GPT2},
    "bfloat16": {},
}


def tiny_model(case: str) -> tuple[MedSightForConditionalGeneration, MedSightProcessor]:
    """A random model that cites codes, and its processor; its vocabulary has no spare rows."""
    name, changes = (case if case in CONFIGURATIONS else "clip-qwen3"), CASES[case]
    text = {**make_config(name).text_config.to_dict(), **FULL, **changes.get("text_config", {})}
    if case == "gpt2":
        text = {**GPT2, **FULL, "eos_token_id": 258}
    config = make_config(name, **{**KNOWN, **changes, "text_config": text})
    model = make_model(config)
    return model.to(torch.bfloat16 if case == "bfloat16" else torch.float32), tiny_processor(config)


def answers(model: Any) -> dict[str, list[torch.Tensor]]:
    """What a model says and shows about a batch, freely and with a region forced, and what it sees."""
    batch = make_batch(model.config, ["ItttI", "ttItt"])
    found: dict[str, list[torch.Tensor]] = {}
    for force in (False, True):
        out = model.generate(**batch, max_new_tokens=12, force_region=force)
        found[f"text, forced {force}"] = [out.sequences]
        found[f"codes, forced {force}"] = [*out.region_code_ids]
        found[f"masks, forced {force}"] = [*out.mask_logits]
    regions = model.get_region_features(batch["pixel_values"])
    found["groups"] = [regions.group_logits.argmax(-1)]
    found["region masks"] = [regions.masks_queries_logits]
    found["classes"] = [regions.class_queries_logits.argmax(-1)]
    return found


def assert_same(before: dict[str, list[torch.Tensor]], after: dict[str, list[torch.Tensor]], classes: int) -> None:
    """Bit for bit; 'no object' is the last class before and after."""
    after = {**after, "classes": [torch.where(found >= classes, classes, found) for found in after["classes"]]}
    for name, tensors in before.items():
        assert len(tensors) == len(after[name]), name
        assert all(map(torch.equal, tensors, after[name])), name


@pytest.mark.parametrize("case", CASES)
def test_old_answers_and_weights_stay(case: str) -> None:
    model, processor = tiny_model(case)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = answers(model)
    assert sum(map(len, before["codes, forced True"])) > 0
    extend_model(model, processor, NEW)
    after = answers(model)
    assert_same(before, after, classes=7)
    for name, tensor in model.state_dict().items():
        old = weights[name]
        if "class_predictor" in name:
            assert torch.equal(tensor[-1], old[-1]), name
            old = old[:-1]
        assert torch.equal(tensor[: len(old)] if old.ndim else tensor, old), name


@pytest.mark.parametrize("case", ["clip-qwen3", "convnext-llama-tied", "class queries", "gpt2"])
def test_all_parts_grow_together_and_the_folder_says_so(case: str, tmp_path: Path) -> None:
    model, processor = tiny_model(case)
    wanted = extended_config(model.config, NEW)
    extend_model(model, processor, NEW)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    config, perceiver = again.config, again.model.region_perceiver
    for saved in (model.config, config):
        expected, got = (json.loads(json.dumps(c.to_dict(), default=str)) for c in (wanted, saved))
        changed = {key for key in expected if expected[key] != got[key]}
        assert changed <= {"dtype", "architectures", "text_config", "vision_config", "_name_or_path"}
        assert saved.text_config.vocab_size == wanted.text_config.vocab_size == 320
    assert config.group_names[3:] == ["OCT retina", "fundus retina"]
    assert MedSightProcessor.from_pretrained(tmp_path).group_names == config.group_names
    assert config.group_patterns == {"MRI heart": ["MRI*/heart"], **NEW.groups}
    assert config.mask_class_names[7:] == NEW.classes
    assert perceiver.segmentation_head.class_predictor.out_features == 7 + 2 + 1
    assert perceiver.class_queries is None or len(perceiver.class_queries) == 9
    assert again.model.group_classifier.out_features == len(again.model.codebook.codes) == 5
    assert len(again.lm_head.weight) == len(again.get_input_embeddings().weight) == 320
    tokens = processor.tokenizer.convert_tokens_to_ids(["[C0_0]", "[C2_3]", "[C3_0]", "[C4_3]"])
    assert tokens == [282, 293, 294, 301]
    tied = again.lm_head.weight is again.get_input_embeddings().weight
    assert tied == (case == "convnext-llama-tied")
    codes = again.model.codebook.code_table()[3:]
    rows = again.model.vision_to_text_projector(again.model.codebook.decode(codes)).flatten(0, 1)
    assert tied or torch.allclose(again.get_input_embeddings().weight[294:302], rows, atol=1e-6)


def test_spare_rows_of_the_vocabulary_are_used_first() -> None:
    config = make_config("clip-qwen3", **KNOWN)  # 320 rows for 294 tokens
    model, processor = make_model(config), tiny_processor(config)
    spare = model.lm_head.weight[302:].clone()
    extend_model(model, processor, NEW)
    assert model.config.text_config.vocab_size == 320
    assert torch.equal(model.lm_head.weight[302:], spare)


def test_a_model_without_a_codebook_takes_classes_alone() -> None:
    config = make_config("clip-qwen3-seg-token")
    model, processor = make_model(config), tiny_processor(config)
    before = answers(model)
    rows = [{"targets": ["macula"], "modality": None, "site": None, "dataset": "x"}]
    extend_model(model, processor, find_additions(config, rows))
    assert_same(before, answers(model), classes=7)
    assert model.config.mask_class_names == [*(f"class {i}" for i in range(7)), "macula"]
    with pytest.raises(ValueError, match="one \\[SEG\\] token in place of a codebook"):
        find_additions(config, rows, Groups({"OCT": ["OCT/*"]}))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("left ventricular cavity", ["left ventricle"]),
        ("right ventricle", ["left ventricle"]),
        ("kidneys", ["kidney"]),
        ("breast tumour", ["breast tumor"]),
        ("left foot", []),
        ("macula", []),
        ("polyp of the stomach wall", []),
    ],
)
def test_a_class_starts_from_the_one_that_shares_most_words(name: str, nearest: list[str]) -> None:
    config = MedSightConfig.from_preset("tiny", **KNOWN)
    assert nearest_classes(name, config) == nearest


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with class queries, names, and what its codes stand for."""
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("known") / "model", use_class_queries=True, **KNOWN)
    code = {"group": "MRI heart", "n": 3, "structures": {"left ventricle": 1.0}}
    content = {"weights_sha256": "old", "groups": {"MRI heart": {"citations": 3}}, "codes": {"[C0_1]": code}}
    (folder / "region_codes.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


SETS = (
    ("camus", "MRI-cine", "heart", ("left ventricular cavity",)),
    ("refuge", "fundus", "retina", ("optic disc", "optic cup")),
)


@pytest.fixture(scope="module")
def new_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six hearts with a new structure, and six images of a new kind."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tests.training.tiny_run.SETS", (*SETS, ("busi", "ultrasound", "breast", ("breast tumor",))))
        return draw_data(tmp_path_factory.mktemp("new"))


def test_a_folder_is_extended_by_what_data_hold(known: Path, new_data: Path, tmp_path: Path, verb: Any) -> None:
    (content,) = verb("extend", known, "--data", new_data, "--output", tmp_path / "out", "--device", "cpu")
    classes = ["left ventricular cavity", "optic cup", "optic disc"]
    assert content["added"] == {"classes": classes, "groups": {"fundus retina": ["fundus/retina"]}}
    assert content["groups"] == 4
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    queries = model.model.region_perceiver.class_queries
    assert torch.equal(queries[7], queries[0])  # the cavity's, from the left ventricle's
    before, after = (load_file(folder / "model.safetensors") for folder in (known, tmp_path / "out"))
    name = "model.codebook.codes"
    assert torch.equal(after[name][:3], before[name]) and torch.isfinite(after[name]).all()
    meanings = processor.region_codes
    assert meanings["codes"] == {"[C0_1]": {"group": "MRI heart", "n": 3, "structures": {"left ventricle": 1.0}}}
    assert meanings["groups"]["fundus retina"]["citations"] == 0 and meanings["weights_sha256"] != "old"
    inputs = processor(images=Image.new("RGB", (40, 30)), text=f"{processor.image_token}Where?", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=4, force_region=True, allowed_groups=["fundus retina"])
    assert processor.post_process_grounded_answer(out, inputs)[0].regions[0].group_name == "fundus retina"


def test_codes_of_a_new_group_stand_where_its_regions_are(known: Path, new_data: Path) -> None:
    model, processor = (kind.from_pretrained(known) for kind in (MedSightForConditionalGeneration, MedSightProcessor))
    rows = load_source(Source("biomedparse", str(new_data)))
    additions = find_additions(model.config, rows)
    groups = match_groups(model.config, {*zip(rows["modality"], rows["site"], strict=True)}, extend=True)
    model.eval()
    starts = find_starts(model, processor, rows, groups, additions)
    assert starts.classes["left ventricular cavity"] == ["left ventricle"]
    assert {*starts.classes} == {*additions.classes} and {*starts.codes} == {"fundus retina"}
    again = find_starts(model, processor, rows, groups, additions)
    assert torch.equal(starts.codes["fundus retina"], again.codes["fundus retina"])
    extend_model(model, processor, additions, starts)
    row = next(row for row in rows if row["modality"] == "fundus")
    pixels, masks = place(row, processor, model.config.image_size)
    with torch.no_grad():
        regions = model.get_region_features(pixels[None])
        (queries,) = match_queries(model.config, regions, [masks])
        vectors = model.model.codebook.encode(regions.region_embeddings[0, queries])
    old, new = model.model.codebook.code_table().split([3, 1])
    assert bool(((vectors @ new[0].T).amax(1) > (vectors @ old.flatten(0, 1).T).amax(1)).all())


def test_where_nothing_is_new_the_folder_is_copied(known: Path, new_data: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["extend", str(known), "--data", str(new_data), "--output", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    assert main(["extend", str(tmp_path / "a"), "--data", str(new_data), "--output", str(tmp_path / "b")]) == 0
    assert "nothing new" in capsys.readouterr().out
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_groups_are_those_of_a_file(known: Path, new_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "groups.yaml"
    file.write_text("CT torso: ['MRI-cine/heart']\neyes: ['fundus/*', 'OCT/*']\nskin: ['dermoscopy/*']", "utf-8")
    config, added = extend(known, Source("biomedparse", str(new_data)), tmp_path / "out", groups=file)
    assert added.groups == {"eyes": ["fundus/*", "OCT/*", "fundus/retina"]}  # no image of the skin is there
    assert config.group_patterns["CT torso"] == ["MRI-cine/heart"]


def test_weights_keep_the_precision_that_they_are_stored_in(new_data: Path, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "half", **KNOWN)
    model = MedSightForConditionalGeneration.from_pretrained(folder)
    stored = {name: t.bfloat16() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=stored)
    extend(folder, Source("biomedparse", str(new_data)), tmp_path / "out")
    dtypes = {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values() if t.is_floating_point()}
    assert dtypes == {torch.bfloat16}
    assert MedSightForConditionalGeneration.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_a_converted_checkpoint_is_extended_and_pushed(
    published: Published, new_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(published.llm, **published.loose(), output=tmp_path / "converted")
    _, added = extend(tmp_path / "converted", Source("biomedparse", str(new_data)), tmp_path / "out")
    assert len(added.classes) == 4 and len(added.groups) == 3
    arguments = ["push", str(tmp_path / "out"), "--repo-id", "a/b", "--license", "mit", "--dry-run"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert "model.safetensors" in capsys.readouterr().out


def damage(folder: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if kind == "quantised":
        config["quantization_config"] = {"quant_method": "bitsandbytes"}
    elif kind == "adapter":
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    elif kind == "a class in capitals":
        config["mask_class_names"][0] = "Optic  Disc"
    elif kind == "a group in capitals":
        config["group_names"][2] = "Fundus  retina"
    elif kind == "tokens after the codes":
        processor = MedSightProcessor.from_pretrained(folder)
        processor.tokenizer.add_tokens(["<later>"])
        processor.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("quantised", "is quantised: extend the checkpoint that it was made from"),
        ("adapter", "holds an adapter: extend the checkpoint that it was trained on"),
        ("a class in capitals", "'optic disc' is 'Optic  Disc' but for case and spaces"),
        ("a group in capitals", "'fundus retina' is 'Fundus  retina' but for case and spaces"),
        ("tokens after the codes", r"1 token\(s\) after its last region code, '<later>' \(id 294\)"),
    ],
)
def test_what_cannot_be_extended_is_refused(
    kind: str, message: str, known: Path, new_data: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(known, tmp_path / "model"))
    damage(folder, kind)
    with pytest.raises(ValueError, match=message):
        extend(folder, Source("biomedparse", str(new_data)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_taken_output_data_without_masks_and_conversations_are_refused(
    known: Path, new_data: Path, tmp_path: Path
) -> None:
    source = Source("biomedparse", str(new_data))
    with pytest.raises(ValueError, match="would replace the input"):
        extend(known, source, known, overwrite=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        extend(known, source, tmp_path / "taken")
    rows = load_source(source)
    with pytest.raises(ValueError, match="the data have no masks"):
        extend(known, [{**row, "masks": [], "targets": []} for row in rows], tmp_path / "out")
    with pytest.raises(ValueError, match="images of modality None and site"):
        extend(known, [{**row, "modality": None} for row in rows], tmp_path / "out")
    spoken = [{"id": "1", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    (tmp_path / "talk.json").write_text(json.dumps(spoken), encoding="utf-8")
    with pytest.raises(ValueError, match="holds conversations; a model is extended by masks"):
        extend(known, Source("llava", str(tmp_path / "talk.json")), tmp_path / "out")


def test_medsight_nano_answers_about_real_images_as_before(shared_data: Path, new_data: Path, tmp_path: Path) -> None:
    nano = Path("medsight/medsight-nano")
    extend(nano, Source("biomedparse", str(new_data)), tmp_path / "out", device="cpu")
    folders = [folder for folder in sorted((shared_data / "segmentation").glob("*/test")) if folder.is_dir()]
    images = [Image.open(next(iter(sorted(folder.glob("*.png"))))) for folder in folders[:6]]
    prompts = ["Segment everything.", "What is seen?", "Segment the liver."] * 2
    found = []
    for folder in (nano, tmp_path / "out"):
        model = MedSightForConditionalGeneration.from_pretrained(folder).eval()
        processor, said = MedSightProcessor.from_pretrained(folder), []
        for image, prompt in zip(images, prompts, strict=True):
            content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
            tensors = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
            inputs = processor.apply_chat_template([{"role": "user", "content": content}], **tensors)
            for force in (False, True):
                out = model.generate(**inputs, max_new_tokens=40, force_region=force)
                answer = processor.post_process_grounded_answer(out, inputs)[0]
                said.append((answer.text, [(region.code, region.mask.numpy()) for region in answer.regions]))
            said.append((str(model.get_region_features(inputs["pixel_values"]).group_logits.argmax(-1)), []))
        found.append(said)
    assert sum(len(regions) for _, regions in found[0]) > 5
    for (text, regions), (text_after, regions_after) in zip(*found, strict=True):
        assert text == text_after and [code for code, _ in regions] == [code for code, _ in regions_after]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(regions, regions_after, strict=True))


@pytest.mark.slow
def test_an_extended_folder_loads_without_this_package(known: Path, new_data: Path, tmp_path: Path) -> None:
    extend(known, Source("biomedparse", str(new_data)), tmp_path / "out")
    assert answer_as_stranger(tmp_path / "out", tmp_path / "saved", tmp_path)
