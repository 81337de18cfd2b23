"""`medsight convert`: every number survives, every key is accounted for, and what is wrong leaves nothing behind."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, GenerationConfig, Qwen2Tokenizer

from medsight.conversion.convert import convert
from medsight.conversion.state_dict_adapter import to_ours, to_theirs
from processing_medsight import PUBLISHED_CHAT_TEMPLATE
from tests.medsight.conversion.published_files import LOOSE, read_published


def run(published: Any, output: Path, *kinds: str, **options: Any) -> Any:
    return convert(published.llm, **published.loose(*kinds), output=output, **options)


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes the tensors in a `.pt` file or a safetensors file."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
        return
    content = read_published(path)
    change(content["model"] if "model" in content else content["state_dict"])
    torch.save(content, path)


def half(tensors: dict[str, torch.Tensor], part: str = "") -> dict[str, torch.Tensor]:
    """Those whose name has `part`, in half the precision."""
    return {name: tensor.bfloat16() for name, tensor in tensors.items() if part in name}


def siblings(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir())


def assert_refused(published: Any, output: Path, *expected: str, kinds: tuple[str, ...] = (), **options: Any) -> None:
    """The error holds all of `expected`, and there is nothing beside what was there before."""
    before = siblings(output)
    with pytest.raises((ValueError, OSError)) as caught:
        run(published, output, *kinds, **options)
    for text in expected:
        assert text in str(caught.value)
    assert siblings(output) == before


def assert_same_weights(published: Any, output: Path) -> None:
    """The converted model has every weight of the original, bit for bit."""
    ours = AutoModelForImageTextToText.from_pretrained(output).state_dict()
    theirs = published.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_sizes_follow_from_the_files(published: Any, tmp_path: Path) -> None:
    ours, theirs = run(published, tmp_path / "out").to_dict(), published.model.config.to_dict()
    text, their_text = ours.pop("text_config"), theirs.pop("text_config")
    for name in ("vocab_size", "hidden_size", "head_dim", "rope_parameters"):
        assert text[name] == their_text[name]
    assert ours == theirs | {name: ours[name] for name in ("architectures", "dtype")}


@pytest.mark.parametrize("kinds", [(), ("region_perceiver",), ("image_encoder",), LOOSE])
def test_every_weight_survives_from_a_loose_file_or_from_the_copy_in_the_llm_folder(
    published: Any, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    paths = {name: path if name in (*kinds, "codebook") else None for name, path in published.loose().items()}
    convert(published.llm, **paths, output=tmp_path / "out")
    assert_same_weights(published, tmp_path / "out")


def test_without_file_or_copy_the_missing_tensors_are_listed(published: Any, tmp_path: Path) -> None:
    expected = ("modality_predictor.weight is missing", "to_code.5.bias is missing", "codebooks.2.embedding")
    assert_refused(published, tmp_path / "out", *expected, kinds=("region_perceiver", "image_encoder"))


def test_a_copy_that_differs_is_named(published_copy: Any, tmp_path: Path) -> None:
    name = "model.vision_tower.vision_tower.image_encoder.ln_pre.bias"
    edit(published_copy.llm / "model.safetensors", lambda tensors: tensors[name].add_(1e-3))
    assert_refused(published_copy, tmp_path / "out", name, "image_encoder.pt", "must be equal")


def test_a_head_that_would_be_tied_away_is_named(published_copy: Any, tmp_path: Path) -> None:
    file = published_copy.llm / "config.json"
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**config, "tie_word_embeddings": True}), encoding="utf-8")
    assert_refused(published_copy, tmp_path / "out", "lm_head.weight differs from the embedding")


def test_a_less_precise_copy_is_no_difference(published_copy: Any, tmp_path: Path) -> None:
    edit(published_copy.llm / "model.safetensors", lambda found: found.update(half(found, "vision_tower")))
    run(published_copy, tmp_path / "out")
    assert_same_weights(published_copy, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("region_perceiver", "region_perceiver.region_queries"),
        ("codebook", "modality_predictor.bias"),
        ("image_encoder", "module.visual.transformer.resblocks.2.attn.in_proj_weight"),
        ("image_encoder", "module.visual.positional_embedding"),
        ("llm", "model.layers.1.self_attn.q_norm.weight"),
        ("llm", "model.embed_tokens.weight"),
    ],
)
def test_a_missing_tensor_is_named_with_its_file(published_copy: Any, tmp_path: Path, kind: str, name: str) -> None:
    path = published_copy.llm / "model.safetensors" if kind == "llm" else published_copy.folder / f"{kind}.pt"
    edit(path, lambda tensors: tensors.pop(name))
    file = published_copy.llm if kind == "llm" else path
    assert_refused(published_copy, tmp_path / "out", f"{file}: {name} is missing")


def test_all_problems_come_in_one_error(published_copy: Any, tmp_path: Path) -> None:
    perceiver, codebook = published_copy.folder / "region_perceiver.pt", published_copy.folder / "codebook.pt"
    weights = published_copy.llm / "model.safetensors"
    edit(perceiver, lambda tensors: tensors.pop("region_perceiver.init_ff.0.bias"))
    edit(perceiver, lambda tensors: tensors.update({"region_perceiver.bi_blocks.0.ff_region.9.bias": torch.ones(2)}))
    edit(codebook, lambda tensors: tensors.update({"modality_predictor.bias": torch.ones(9)}))
    edit(weights, lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}))
    edit(published_copy.folder / "image_encoder.pt", lambda tensors: tensors.update({"surprise": torch.zeros(1)}))
    torch.save({**read_published(codebook), "ema": {"a": torch.ones(1)}}, codebook)
    assert_refused(
        published_copy,
        tmp_path / "out",
        f"{perceiver}: region_perceiver.init_ff.0.bias is missing",
        f"{published_copy.folder / 'image_encoder.pt'}: surprise is unexpected",
        f"{codebook}: entry 'ema' is unexpected",
        f"{perceiver}: region_perceiver.bi_blocks.0.ff_region.9.bias is unexpected",
        f"{codebook}: modality_predictor.bias, our model.group_classifier.bias, has shape (9,); expected (3,)",
        f"{weights}: model.layers.7.mlp.up_proj.weight is unexpected",
    )


class Evil:
    """What an attacker puts into a pickle."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("kind", LOOSE)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(published_copy: Any, tmp_path: Path, kind: str, zipped: bool) -> None:
    path, marker = published_copy.folder / f"{kind}.pt", tmp_path / "executed"
    content = {"model": {"a": torch.zeros(1)}, "args": Evil(marker)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content["args"], protocol=2))
    assert_refused(published_copy, tmp_path / "out", str(path), "posix.system", "not weights")
    assert not marker.exists()


def test_a_damaged_file_is_named(published_copy: Any, tmp_path: Path) -> None:
    path = published_copy.folder / "region_perceiver.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert_refused(published_copy, tmp_path / "out", str(path))
    weights = published_copy.llm / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    path.unlink()
    assert_refused(published_copy, tmp_path / "out", str(weights), kinds=("codebook", "image_encoder"))
    assert_refused(published_copy, tmp_path / "out", f"{path}: no such file")


def shard(folder: Path) -> list[str]:
    """Splits the folder's weights into two files with an index; returns their names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name].clone() for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def test_a_sharded_folder_converts_and_a_missing_shard_is_named(published_copy: Any, tmp_path: Path) -> None:
    files = shard(published_copy.llm)
    run(published_copy, tmp_path / "out")
    assert_same_weights(published_copy, tmp_path / "out")
    (published_copy.llm / files[1]).unlink()
    assert_refused(published_copy, tmp_path / "other", files[1])


def test_a_large_model_is_written_in_shards(published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medsight.conversion.convert.SHARD_SIZE", "100KB")
    run(published, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert_same_weights(published, tmp_path / "out")


def test_codes_are_renamed_and_every_id_stays(published: Any, tmp_path: Path) -> None:
    run(published, tmp_path / "out")
    before = Qwen2Tokenizer.from_pretrained(published.llm).get_vocab()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert tokenizer.get_vocab() == {token.replace("[M", "[C"): index for token, index in before.items()}
    first = tokenizer.convert_tokens_to_ids("[C0_0]")
    text = "liver [C0_1], spleen [C2_3].[M0_0]<|im_end|>"
    ids = tokenizer(text).input_ids
    assert [i for i in ids if i >= first] == [first + 1, first + 11]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<|im_end|>")
    assert not tokenizer.added_tokens_decoder[first].special
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_codes_that_were_saved_as_special_become_ordinary(published_copy: Any, tmp_path: Path) -> None:
    tokenizer = Qwen2Tokenizer.from_pretrained(published_copy.llm)
    codes = [token for token in tokenizer.get_vocab() if token.startswith("[M")]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = published_copy.llm / name
        content = json.loads(path.read_text(encoding="utf-8"))
        for token in (*content.get("added_tokens", ()), *content.get("added_tokens_decoder", {}).values()):
            token["special"] = token["special"] or token["content"] in codes
        if name == "tokenizer_config.json":
            content["additional_special_tokens"] = codes
        path.write_text(json.dumps(content), encoding="utf-8")
    run(published_copy, tmp_path / "out")
    converted = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids = converted("a [C1_2] b").input_ids
    assert converted.decode(ids, skip_special_tokens=True) == "a [C1_2] b"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [("[M1_2]", "[M9_2]", "[M1_2]"), ("[M0_3]", "[M0_5]", "[M0_3]"), ("[M", "[X", "no region")],
)
def test_codes_out_of_order_are_refused(
    published_copy: Any, tmp_path: Path, old: str, new: str, expected: str
) -> None:
    for path in published_copy.llm.glob("*token*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    assert_refused(published_copy, tmp_path / "out", expected)


def test_the_folder_answers_greedily_with_the_published_prompt(published: Any, tmp_path: Path) -> None:
    run(published, tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.return_dict_in_generate and not generation.do_sample
    assert generation.eos_token_id == [258, 256] and generation.pad_token_id == 256
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert processor.chat_template == PUBLISHED_CHAT_TEMPLATE


def test_group_names_come_from_a_file_and_must_fit(published: Any, tmp_path: Path) -> None:
    groups = tmp_path / "groups.txt"
    groups.write_text("CT abdomen\nMRI brain\nbreast ultrasound\n", encoding="utf-8")
    names = ["CT abdomen", "MRI brain", "breast ultrasound"]
    assert run(published, tmp_path / "out", groups=groups).group_names == names
    groups.write_text(json.dumps(names), encoding="utf-8")
    assert run(published, tmp_path / "out", groups=groups, overwrite=True).group_names == names
    groups.write_text("CT\nMRI\n", encoding="utf-8")
    assert_refused(published, tmp_path / "other", str(groups), "2 groups", "form 3", groups=groups)


def test_a_missing_feature_layer_is_asked_for(published_copy: Any, tmp_path: Path) -> None:
    path = published_copy.llm / "config.json"
    content = json.loads(path.read_text())
    del content["mm_vision_select_layer"]
    path.write_text(json.dumps(content))
    assert_refused(published_copy, tmp_path / "out", "mm_vision_select_layer", "--vision-feature-layer")
    assert run(published_copy, tmp_path / "out", vision_feature_layer=-1).vision_feature_layer == -1


def test_dtype_is_that_of_the_language_model_or_as_told(published_copy: Any, tmp_path: Path) -> None:
    edit(published_copy.llm / "model.safetensors", lambda found: found.update(half(found)))
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        run(published_copy, tmp_path / "out", dtype=dtype, overwrite=True)
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {expected}
        assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").dtype == expected
    assert torch.equal(weights["model.codebook.codes"], published_copy.model.model.codebook.codes)


def test_an_output_folder_in_use_is_not_touched(published: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert_refused(published, output, str(output), "not empty")
    assert_refused(published, output, "something else than a checkpoint", overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    assert_refused(published, published.llm, "would replace the input", overwrite=True)
    assert_refused(published, published.folder, "would replace the input", overwrite=True)
    assert (published.llm / "config.json").exists()
    groups = output / "notes.txt"
    assert_refused(published, output, "would replace the input", str(groups), groups=groups, overwrite=True)


def test_overwrite_replaces_a_checkpoint_only_when_the_new_one_is_whole(published_copy: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(published_copy, output)
    (output / "stale.json").write_text("{}")
    assert_refused(published_copy, output, "not empty")
    path = published_copy.folder / "codebook.pt"
    whole = path.read_bytes()
    edit(path, lambda tensors: tensors.pop("modality_predictor.bias"))
    assert_refused(published_copy, output, "is missing", overwrite=True)
    assert (output / "stale.json").exists()
    path.write_bytes(whole)
    run(published_copy, output, overwrite=True)
    assert not (output / "stale.json").exists() and (output / "model.safetensors").exists()


def test_clip_files_are_read_in_either_spelling() -> None:
    ours = ("model.vision_tower.pre_layrnorm.bias",)
    assert (
        to_ours("image_encoder", "visual.ln_pre.bias") == to_ours("image_encoder", "module.visual.ln_pre.bias") == ours
    )
    assert to_theirs("image_encoder", ours[0], ["visual.ln_pre.weight"]) == "visual.ln_pre.bias"
    assert to_ours("image_encoder", "transformer.resblocks.0.ln_1.bias") == ()
    assert to_ours("image_encoder", "visual.trunk.cls_token") is None
