"""Turns published checkpoint files into one folder that `from_pretrained` loads.

Nothing in the files is executed, every tensor is accounted for, and the output folder appears whole or not at all.
"""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, Qwen2Config, Qwen3Config

from configuration_medsight import MedSightConfig
from medsight.checkpoint import read_json
from medsight.files import check_output, read_names, staged_folder
from modeling_medsight import MedSightForConditionalGeneration
from processing_medsight import PUBLISHED_CHAT_TEMPLATE, MedSightImageProcessor, MedSightProcessor

from .foreign_files import Source, merge, same
from .published_tokenizer import load_published_tokenizer
from .state_dict_adapter import to_ours, to_theirs


StrPath = str | os.PathLike[str]

SHARD_SIZE = "5GB"
TOWER, PERCEIVER = "model.vision_tower.", "model.region_perceiver."
EMBEDDING = "model.language_model.embed_tokens.weight"
# The tensors that tell a model's sizes; this shape stands in for one that is missing, until all of those are listed.
STAND_INS = {
    f"{TOWER}embeddings.class_embedding": (64,),
    f"{TOWER}embeddings.patch_embedding.weight": (64, 3, 14, 14),
    f"{TOWER}embeddings.position_embedding.weight": (2, 64),
    f"{TOWER}encoder.layers.0.mlp.fc1.weight": (256, 64),
    f"{PERCEIVER}region_queries": (1, 1, 64),
    f"{PERCEIVER}initial_attention.attention.to_q.weight": (512, 64),
    f"{PERCEIVER}initial_feed_forward.linear_1.weight": (256, 64),
    f"{PERCEIVER}segmentation_head.class_predictor.weight": (2, 64),
    "model.codebook.codes[0]": (1, 4),
}


def convert(
    llm: StrPath,
    region_perceiver: StrPath | None,
    codebook: StrPath | None,
    image_encoder: StrPath | None,
    output: StrPath,
    *,
    groups: StrPath | None = None,
    vision_feature_layer: int | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> MedSightConfig:
    """Writes one folder with model, tokenizer, processor and code from published files; returns the configuration.

    All sizes follow from the files: attention heads of the image encoder are its width // 64 (at least 1), groups and
    codes are counted in the tokenizer. The image encoder's activation is QuickGELU. Region codes are renamed `[M…]` to
    `[C…]` and keep their ids.

    Args:
        llm: folder with safetensors weights, config.json and tokenizer of the language model.
        region_perceiver, codebook, image_encoder: `.pt` or `.safetensors` files. `None` takes the copy in the language
            model's folder; where both are given they must be equal (in the less precise dtype of the two).
        output: folder to write.
        groups: file with the names of the code groups, a JSON list or one line per group; "group 0", ... by default.
        vision_feature_layer: index into the image encoder's hidden states; `mm_vision_select_layer` by default.
        dtype: of all weights; "auto" is the language model's.
        overwrite: replace the output folder if it holds a checkpoint.

    Raises:
        OSError: a file or a shard is missing, or the output folder is taken.
        ValueError: a file is damaged or holds code; tensors are missing, unexpected, of a wrong shape, or differ from
            their copies; the tokenizer's region codes are not complete and in order. Nothing is written then.
    """
    llm, output = Path(llm), Path(output)
    loose = {"region_perceiver": region_perceiver, "codebook": codebook, "image_encoder": image_encoder}
    given = {kind: Path(path) for kind, path in loose.items() if path is not None}
    check_output(output, overwrite, inputs=[llm, *given.values(), *([] if groups is None else [Path(groups)])])

    llm_config = read_json(llm / "config.json")
    if llm_config.get("model_type") == MedSightConfig.model_type:
        raise ValueError(f"{llm} is a MedSIGHT checkpoint already")
    layer = llm_config.get("mm_vision_select_layer") if vision_feature_layer is None else vision_feature_layer
    if layer is None:
        raise ValueError(f"{llm / 'config.json'} has no mm_vision_select_layer; give --vision-feature-layer")
    tokenizer, num_groups, codes_per_group, first_code = load_published_tokenizer(llm)
    group_names = read_names(groups) if groups is not None else None
    if group_names is not None and len(group_names) != num_groups:
        raise ValueError(f"{groups} names {len(group_names)} groups, but the codes of {llm} form {num_groups}")

    # Loose files go first: they may be more precise than the copies.
    sources = [Source.read_file(kind, path) for kind, path in given.items()] + [Source.read_llm_folder(llm)]
    tensors, problems = merge(sources)
    config = MedSightConfig(
        text_config=language_config(llm_config, tensors),
        vision_config=clip_vision_config(tensors),
        vision_feature_layer=layer,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        num_groups=num_groups,
        codes_per_group=codes_per_group,
        region_code_start_id=first_code,
        group_names=group_names,
        **region_settings(tensors),
    )
    with torch.device("meta"):
        model = MedSightForConditionalGeneration(config)
    # In files, the codes are one tensor a group.
    codes = [f"model.codebook.codes[{k}]" for k in range(num_groups)]
    expected = {**model.state_dict(), **dict(zip(codes, model.model.codebook.codes, strict=True))}
    del expected["model.codebook.codes"]
    tied = set(model.all_tied_weights_keys)
    problems |= find_problems(tensors, expected, tied, sources)
    head, words = tensors.get("lm_head.weight"), tensors.get(EMBEDDING)
    if "lm_head.weight" in tied and head is not None and words is not None and not same(head, words):
        problems.add("lm_head.weight differs from the embedding that config.json ties it to (tie_word_embeddings)")
    refuse_problems(problems)
    tensors["model.codebook.codes"] = torch.stack([tensors.pop(name) for name in codes])
    wanted = tensors[EMBEDDING].dtype if dtype == "auto" else getattr(torch, dtype)
    model.load_state_dict({name: t.to(wanted) for name, t in tensors.items()}, strict=not tied, assign=True)
    model.tie_weights()
    write_checkpoint(model, tokenizer, PUBLISHED_CHAT_TEMPLATE, output, overwrite)
    return config


def write_checkpoint(
    model: Any,
    tokenizer: Any,
    chat_template: str,
    output: Path,
    overwrite: bool,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
    ends: Sequence[str] = (),
) -> None:
    """Writes model, tokenizer, processor, generation settings and code into one folder, whole or not at all.

    By default, `generate()` with the result is greedy, gives masks, and ends with a turn or a document.

    Args:
        statistics: mean and standard deviation of the pixels; CLIP's by default.
        ends: tokens that end an answer; those of a turn and of a document by default, which the tokenizer names.
    """
    config = model.config
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(list(ends) or [tokenizer.eos_token, tokenizer.pad_token]),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        return_dict_in_generate=True,
    )
    pixels = {} if statistics is None else {"image_mean": list(statistics[0]), "image_std": list(statistics[1])}
    processor = MedSightProcessor(
        image_processor=MedSightImageProcessor(size=config.image_size, **pixels),
        tokenizer=tokenizer,
        chat_template=chat_template,
        image_seq_length=config.image_seq_length,
        group_names=config.group_names,
    )
    with staged_folder(output, overwrite) as folder:
        try:
            model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
            processor.save_pretrained(folder)
        except (SafetensorError, OSError) as error:
            raise OSError(f"{output} could not be written ({error})") from error


def sizes(config: MedSightConfig) -> dict[str, Any]:
    """The sizes that tell models apart."""
    text, vision = config.text_config, config.vision_config
    return {
        "language_model": {"type": text.model_type, "width": text.hidden_size, "layers": text.num_hidden_layers},
        "image_encoder": {"type": vision.model_type, "width": config.vision_hidden_size, "pixels": config.image_size},
        "region_queries": config.num_region_queries,
        "perceiver_stages": config.perceiver_num_stages,
        "groups": config.num_groups,
        "codes_per_group": config.codes_per_group,
    }


def describe(config: MedSightConfig) -> str:
    """One line about a model's sizes."""
    text, vision = config.text_config, config.vision_config
    return (
        f"{text.model_type} language model (width {text.hidden_size}, {text.num_hidden_layers} layers), "
        f"{vision.model_type} image encoder (width {config.vision_hidden_size}, {config.image_size} px), "
        f"{config.num_region_queries} region queries, {config.perceiver_num_stages} stages, "
        f"{config.num_groups} groups of {config.codes_per_group} codes"
    )


def shape_of(tensors: Mapping[str, torch.Tensor], name: str) -> Sequence[int]:
    """The shape of a tensor that tells sizes, or the one that stands in for it."""
    tensor, stand_in = tensors.get(name), STAND_INS[name]
    return stand_in if tensor is None or tensor.ndim != len(stand_in) else tensor.shape


def layer_count(tensors: Mapping[str, torch.Tensor], prefix: str) -> int:
    """One more than the highest number that follows `prefix` in names."""
    numbers = [name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)]
    return max(map(int, numbers), default=0) + 1


def clip_vision_config(tensors: Mapping[str, torch.Tensor], activation: str = "quick_gelu") -> dict[str, Any]:
    """Settings of a CLIP vision tower. Heads are 64 wide, as in OpenAI's: the weights do not tell.

    Raises:
        ValueError: its position rows are not one class row and a square grid.
    """
    (width,) = shape_of(tensors, f"{TOWER}embeddings.class_embedding")
    patch_size = shape_of(tensors, f"{TOWER}embeddings.patch_embedding.weight")[3]
    rows = shape_of(tensors, f"{TOWER}embeddings.position_embedding.weight")[0]
    grid = math.isqrt(max(rows - 1, 0))
    if not grid or grid**2 != rows - 1:
        raise ValueError(f"the image encoder has {rows} position rows: no class row and square grid of patches")
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": shape_of(tensors, f"{TOWER}encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": layer_count(tensors, f"{TOWER}encoder.layers."),
        "num_attention_heads": max(1, width // 64),
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "hidden_act": activation,
    }


def region_settings(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Settings of the region perceiver and the codebook that follow from shapes; perceiver heads are 64 wide."""
    inner, width = shape_of(tensors, f"{PERCEIVER}initial_feed_forward.linear_1.weight")
    return {
        "num_region_queries": shape_of(tensors, f"{PERCEIVER}region_queries")[1],
        "perceiver_num_stages": layer_count(tensors, f"{PERCEIVER}stages."),
        "perceiver_num_heads": shape_of(tensors, f"{PERCEIVER}initial_attention.attention.to_q.weight")[0] // 64,
        "perceiver_head_dim": 64,
        "perceiver_ffn_multiplier": inner // width,
        "num_mask_classes": shape_of(tensors, f"{PERCEIVER}segmentation_head.class_predictor.weight")[0] - 1,
        "code_dim": shape_of(tensors, "model.codebook.codes[0]")[1],
    }


def language_config(published: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The plain Qwen configuration inside a published `llava_qwen` one; the embedding tells the vocabulary's size."""
    layers = "model.language_model.layers."
    has_query_norm = any(name.startswith(layers) and name.endswith(".q_norm.weight") for name in tensors)
    config_class = Qwen3Config if has_query_norm else Qwen2Config
    # Older files say rope_theta and rope_scaling where newer ones have rope_parameters.
    fields = {*config_class().to_dict(), "rope_theta", "rope_scaling"}
    fields -= {"_name_or_path", "architectures", "dtype", "model_type", "transformers_version"}
    settings = {name: value for name, value in published.items() if name in fields}
    if EMBEDDING in tensors:
        settings["vocab_size"] = len(tensors[EMBEDDING])
    return config_class(**settings).to_dict()


def find_problems(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    tied: Collection[str],
    sources: Collection[Source],
) -> set[str]:
    """A line for each tensor that is missing, too many or of a wrong shape, with its file and its name there."""
    held = {
        source.kind: {ours for name in source.tensors for ours in to_ours(source.kind, name) or ()}
        for source in sources
    }
    # Where a tensor that tells sizes is missing, no other shape is known.
    compare_shapes = all(name in tensors for name in STAND_INS if name in expected)
    problems = set()
    for name in {**expected, **tensors}:
        homes = ((source, to_theirs(source.kind, name, source.tensors)) for source in sources)
        source, place = next((source, source.place(their_name)) for source, their_name in homes if their_name)
        # A loose file that is given must be complete: no copy stands in for a part of it.
        if name not in tensors or name not in held[source.kind]:
            if name not in tied:
                problems.add(f"{place} is missing")
        elif name not in expected:
            problems.add(f"{place} is unexpected")
        elif compare_shapes and tensors[name].shape != expected[name].shape:
            shape, wanted = tuple(tensors[name].shape), tuple(expected[name].shape)
            problems.add(f"{place}, our {name}, has shape {shape}; expected {wanted}")
    return problems


def refuse_problems(problems: Collection[str]) -> None:
    """Raises one ValueError that lists all of `problems`, if there are any."""
    if problems:
        raise ValueError("the files do not add up to a model:\n" + "\n".join(f"  {line}" for line in sorted(problems)))
