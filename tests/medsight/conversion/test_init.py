"""`medsight init`: a fresh model from any of the supported parts, whose given weights stay as they were."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from medsight.cli import main
from medsight.conversion.init import QUESTION, init, length_of
from processing_medsight import CHAT_TEMPLATE
from processing_medsight.region_codes_medsight import QWEN3_ADDED_TOKENS
from tests.tiny_checkpoint import byte_tokenizer


NAMES = ["CT abdomen", "MRI brain", "breast ultrasound"]
VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"image_size": 28, "patch_size": 7}
BOTH_SIDES = {"text_config": {**VIT, "vocab_size": 30}, "vision_config": {**VIT, **IMAGE}}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
ENCODERS: dict[str, dict[str, Any]] = {
    "clip": {**BOTH_SIDES, "projection_dim": 8},
    "clip_vision_model": {**VIT, **IMAGE},
    "siglip": BOTH_SIDES,
    "dinov2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **IMAGE},
    "resnet": {"embedding_size": 8, "layer_type": "basic", **STAGES},
    "convnext": {"image_size": 64, **STAGES},
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8},
    "qwen2": {},
    "llama": {"bos_token_id": 0, "eos_token_id": 1},
}
SMALL = {"codes_per_group": 4, "code_dim": 6, "num_region_queries": 5, "perceiver_num_stages": 1}
BASE = 256 + len(QWEN3_ADDED_TOKENS)


def language_model(kind: str, vocab_size: int, **settings: Any) -> PreTrainedModel:
    set_seed(1)
    settings |= {**VIT, "num_key_value_heads": 2, "max_position_embeddings": 512, **LANGUAGE_MODELS[kind]}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=vocab_size, **settings))


def image_encoder(kind: str) -> PreTrainedModel:
    set_seed(2)
    return AutoModel.from_config(AutoConfig.for_model(kind, **ENCODERS[kind]))


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Of another family: its own ends, none of Qwen3's tokens, and no padding."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *characters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    path = tmp_path / "groups.txt"
    path.write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    """A language model's folder with spare rows for 18 codes."""
    language_model("qwen3", BASE + 18).save_pretrained(tmp_path / "qwen3")
    byte_tokenizer().save_pretrained(tmp_path / "qwen3")
    return tmp_path / "qwen3"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    image_encoder("clip_vision_model").save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def answer(folder: Path) -> Any:
    """What the model in `folder` generates about a grey picture, with at least one region."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    content = [{"type": "image", "image": Image.new("RGB", (40, 30), "grey")}, {"type": "text", "text": "Where?"}]
    tensors = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **tensors)
    out = model.generate(**inputs, max_new_tokens=4, force_region=True)
    return out, processor.post_process_masks(out.mask_logits, inputs["original_sizes"])


def assert_given_weights_stay(folder: Path, given: PreTrainedModel, prefix: str, words: int | None = None) -> None:
    """Weights of `given` are in the folder, bit for bit; embeddings may have grown, and the 12 rows or more
    after so many `words` are the mean of these."""
    weights = load_file(folder / "model.safetensors")
    found = 0
    for name, tensor in given.state_dict().items():
        ours = weights.get(prefix + name.removeprefix("vision_model."))
        if ours is not None and "embed_tokens" in name:
            assert torch.equal(ours[:words], tensor[:words]), name
            new = ours[words : words + 12]
            assert new.allclose(tensor[:words].mean(0).expand_as(new), atol=1e-6), name
            found += 1
        elif ours is not None:
            assert torch.equal(ours, tensor), name
            found += 1
    assert found == sum(name.startswith(prefix) for name in weights)


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder_keeps_its_weights_and_answers(kind: str, qwen3: Path, groups: Path, tmp_path: Path) -> None:
    encoder = image_encoder(kind)
    encoder.save_pretrained(tmp_path / "encoder")
    size = {"image_size": 64} if kind in ("resnet", "convnext") else {}
    config = init(qwen3, tmp_path / "encoder", groups, tmp_path / "out", **SMALL, **size)
    assert config.group_names == NAMES and config.num_groups == 3
    assert_given_weights_stay(tmp_path / "out", encoder, "model.vision_tower.")
    language_model = AutoModelForCausalLM.from_pretrained(qwen3).model
    assert_given_weights_stay(tmp_path / "out", language_model, "model.language_model.", words=BASE)
    out, (masks,) = answer(tmp_path / "out")
    assert masks.shape == (len(out.region_code_ids[0]), 30, 40) and len(masks) >= 1
    # Pixels are normalised as the encoder's family was trained.
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    family = {"clip": 0.48145466, "clip_vision_model": 0.48145466, "siglip": 0.5}
    assert processor.image_processor.image_mean[0] == family.get(kind, 0.485)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_other_language_models_get_the_tokens_that_they_lack(
    kind: str, tied: bool, clip: Path, groups: Path, tmp_path: Path
) -> None:
    model = language_model(kind, 260, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "llm")
    tokenizer = byte_tokenizer() if kind == "qwen2" else llama_tokenizer()
    tokenizer.save_pretrained(tmp_path / "llm")
    config = init(tmp_path / "llm", clip, groups, tmp_path / "out", **SMALL)
    assert config.text_config.model_type == kind and config.tie_word_embeddings == tied
    assert config.text_config.vocab_size == 320
    assert_given_weights_stay(tmp_path / "out", model.model, "model.language_model.", words=min(len(tokenizer), 260))

    ours = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    before = tokenizer.get_vocab()
    after = ours.get_vocab()
    assert all(after[token] == index for token, index in before.items())
    new = sorted(after[token] for token in after if token not in before)
    assert new == list(range(len(before), len(before) + len(new)))
    assert [ours.convert_tokens_to_ids(f"[C{k}_{m}]") for k in range(3) for m in range(4)] == new[-12:]
    assert config.region_code_start_id == new[-12]
    assert config.image_token_id == after["<|image_pad|>"]
    assert ours.added_tokens_decoder[config.image_token_id].special
    assert (ours.eos_token, ours.pad_token) == ("<|im_end|>", "<|endoftext|>" if kind == "qwen2" else "<|pad|>")
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert ends[0] == ours.eos_token_id and {*ends[1:]} <= {before.get("</s>")} and ours.pad_token_id not in ends
    text = "Liver [C0_1], spleen [C2_3]."
    assert ours.decode(ours(text, add_special_tokens=False).input_ids, skip_special_tokens=True) == text
    assert answer(tmp_path / "out")[1][0].shape[1:] == (30, 40)


def test_spare_rows_are_used_before_the_embedding_grows(qwen3: Path, clip: Path, groups: Path, tmp_path: Path) -> None:
    config = init(qwen3, clip, groups, tmp_path / "fits", **SMALL)
    assert (config.region_code_start_id, config.text_config.vocab_size) == (BASE, BASE + 18)
    config = init(qwen3, clip, groups, tmp_path / "grows", **{**SMALL, "codes_per_group": 7})
    assert (config.region_code_start_id, config.text_config.vocab_size) == (BASE, 320)
    weights = load_file(tmp_path / "grows" / "model.safetensors")
    assert weights["lm_head.weight"].shape[0] == 320
    assert weights["lm_head.weight"].isfinite().all()


def test_new_weights_follow_from_the_seed(qwen3: Path, clip: Path, groups: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        torch.manual_seed(99)
        init(qwen3, clip, groups, folder, seed=seed, **{**SMALL, "codes_per_group": 7})
        assert torch.initial_seed() == 99
    a, b, c = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in ("model.codebook.codes", "model.region_perceiver.region_queries"):
        assert a[name].std() > 0 and not torch.equal(a[name], c[name]), name
    assert all(tensor.isfinite().all() for tensor in a.values())


def test_a_clip_file_gives_the_encoder_that_it_was_written_from(
    published: Any, qwen3: Path, groups: Path, tmp_path: Path
) -> None:
    file = published.folder / "image_encoder.pt"
    config = init(qwen3, file, groups, tmp_path / "out", **SMALL)
    assert config.vision_config.hidden_act == "quick_gelu" and config.image_size == 12
    assert init(qwen3, file, groups, tmp_path / "gelu", activation="gelu", **SMALL).vision_config.hidden_act == "gelu"
    assert_given_weights_stay(tmp_path / "out", published.model.model.vision_tower, "model.vision_tower.")


def test_pixels_are_normalised_as_the_encoders_folder_says(
    qwen3: Path, clip: Path, groups: Path, tmp_path: Path
) -> None:
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (clip / "preprocessor_config.json").write_text(json.dumps(statistics))
    init(qwen3, clip, groups, tmp_path / "out", **SMALL)
    image_processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True).image_processor
    assert list(image_processor.image_mean) == statistics["image_mean"]
    assert list(image_processor.image_std) == statistics["image_std"]


def test_mask_classes_and_the_seg_token_can_be_had(qwen3: Path, clip: Path, tmp_path: Path) -> None:
    groups, classes = tmp_path / "group.json", tmp_path / "classes.json"
    groups.write_text(json.dumps(["anything"]))
    classes.write_text(json.dumps(["liver", "tumor"]))
    settings = {**SMALL, "codes_per_group": 1, "use_region_codebook": False}
    config = init(qwen3, clip, groups, tmp_path / "out", mask_classes=classes, **settings)
    assert config.mask_class_names == ["liver", "tumor"] and config.num_mask_classes == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer.convert_tokens_to_ids("[SEG]") == config.region_code_start_id
    assert "[C0_0]" not in tokenizer.get_vocab()


def test_wrong_parts_are_named_and_nothing_is_written(qwen3: Path, clip: Path, groups: Path, tmp_path: Path) -> None:
    def refused(*expected: str, **change: Any) -> None:
        arguments = {"llm": qwen3, "image_encoder": clip, "groups": groups, **change}
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises((ValueError, OSError)) as caught:
            init(output=tmp_path / "out", **{**SMALL, **arguments})
        for text in expected:
            assert text in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    refused("qwen3", "clip_vision_model", image_encoder=qwen3)
    refused("absent", llm=tmp_path / "absent")
    refused("absent", image_encoder=tmp_path / "absent")
    refused("absent.txt", groups=tmp_path / "absent.txt")
    refused("image_size=56", "28", image_size=56)
    repeated = tmp_path / "repeated.txt"
    repeated.write_text("CT\nMRI\nCT\n")
    refused("repeated.txt gives the name 'CT' more than once", groups=repeated)
    (qwen3 / "model.safetensors").rename(qwen3 / "pytorch_model.bin")
    refused("pytorch_model.bin")


def test_the_command_line_assembles(
    qwen3: Path, clip: Path, groups: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["init", "--llm", str(qwen3), "--image-encoder", str(clip), "--groups", str(groups)]
    arguments += ["--output", str(tmp_path / "out"), "--codes-per-group", "4", "--num-stages", "1"]
    arguments += ["--vision-feature-layer", "-1", "--num-queries", "6", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "6 region queries, 1 stages, 3 groups of 4 codes" in printed and f"Asked {QUESTION!r}, it says: " in printed
    assert main(arguments) == 1 and "add --overwrite" in capsys.readouterr().err
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True).chat_template == CHAT_TEMPLATE
    assert main([*arguments, "--overwrite", "--json", "--class-queries"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["question"] == QUESTION and isinstance(said["answer"], str)
    assert AutoConfig.from_pretrained(tmp_path / "out").use_class_queries


@pytest.mark.parametrize("scale", [0.02, 1.0], ids=["small embeddings", "large embeddings"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_what_is_new_starts_at_the_scale_of_what_it_stands_among(
    kind: str, scale: float, groups: Path, tmp_path: Path
) -> None:
    """Image rows are as long as words, what decodes codes as long as region queries, and mask logits are small."""
    words = language_model("qwen3", BASE + 18, initializer_range=scale)
    words.save_pretrained(tmp_path / "qwen3")
    byte_tokenizer().save_pretrained(tmp_path / "qwen3")
    image_encoder(kind).save_pretrained(tmp_path / "encoder")
    size = {"image_size": 64} if kind in ("resnet", "convnext") else {}
    config = init(tmp_path / "qwen3", tmp_path / "encoder", groups, tmp_path / "out", **SMALL, **size)
    assert config.mask_logits_scale == 1 / config.vision_hidden_size
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    set_seed(5)
    with torch.no_grad():
        regions = model.get_region_features(torch.randn(3, 3, config.image_size, config.image_size))
        rows = model.model.project_regions(regions)
        states = model.model.language_model(input_ids=torch.arange(100, 164)[None]).last_hidden_state
        queries = model.model.text_to_vision_projector(states)
    embeddings = model.get_input_embeddings().weight[:BASE]
    assert 0.8 < float(length_of(rows) / length_of(embeddings)) < 1.25
    assert 0.6 < float(length_of(queries) / length_of(model.model.region_perceiver.region_queries)) < 1.6
    assert regions.masks_queries_logits.abs().max() < 3
