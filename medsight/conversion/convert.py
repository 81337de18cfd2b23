"""Turns published checkpoint files into one folder that `from_pretrained` loads.

    medsight convert --llm DIR --region-perceiver FILE --codebook FILE --image-encoder FILE --output DIR

Nothing in the files is executed, every tensor is accounted for, and the output folder appears whole or not at all.
"""

import math
import os
import re
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
from .state_dict_adapter import to_theirs


StrPath = str | os.PathLike[str]

SHARD_SIZE = "5GB"


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
    layer = vision_feature_layer if vision_feature_layer is not None else llm_config.get("mm_vision_select_layer")
    if layer is None:
        raise ValueError(
            f"{llm / 'config.json'} has no mm_vision_select_layer; say which hidden state the model reads "
            "(--vision-feature-layer)"
        )
    tokenizer, num_groups, codes_per_group, first_code = load_published_tokenizer(llm)
    group_names = read_names(groups) if groups is not None else None
    if group_names is not None and len(group_names) != num_groups:
        raise ValueError(f"{groups} names {len(group_names)} groups, but the codes of {llm} form {num_groups}")

    # Loose files go first: they may be more precise than the copies.
    sources = [Source.read_file(kind, path) for kind, path in given.items()] + [Source.read_llm_folder(llm)]
    tensors, problems = merge(sources)
    shapes = Shapes(tensors)
    vision_config = clip_vision_config(shapes)
    config = MedSightConfig(
        text_config=language_config(llm_config, tensors),
        vision_config=vision_config,
        vision_feature_layer=layer,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        num_groups=num_groups,
        codes_per_group=codes_per_group,
        region_code_start_id=first_code,
        group_names=group_names,
        **region_settings(shapes, vision_config["hidden_size"]),
    )
    with torch.device("meta"):
        model = MedSightForConditionalGeneration(config)
    expected = split_codes(model.state_dict(), num_groups)
    tied = set(model.all_tied_weights_keys)
    problems |= find_problems(tensors, expected, tied, sources, compare_shapes=shapes.complete)
    head, words = (tensors.get(name) for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"))
    if "lm_head.weight" in tied and head is not None and words is not None and not same(head, words):
        problems.add("lm_head.weight differs from the embedding that config.json ties it to (tie_word_embeddings)")
    refuse_problems(problems)
    model.load_state_dict(assemble(tensors, dtype, num_groups), strict=not tied, assign=True)
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
) -> None:
    """Writes model, tokenizer, processor, generation settings and code into one folder, whole or not at all.

    By default, `generate()` with the result is greedy, gives masks, and ends with a turn or a document.

    Args:
        statistics: mean and standard deviation of the pixels; CLIP's by default.
    """
    config = model.config
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
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
    size = sizes(config)
    text, vision = size["language_model"], size["image_encoder"]
    return (
        f"{text['type']} language model (width {text['width']}, {text['layers']} layers), "
        f"{vision['type']} image encoder (width {vision['width']}, {vision['pixels']} px), "
        f"{size['region_queries']} region queries, {size['perceiver_stages']} stages, "
        f"{size['groups']} groups of {size['codes_per_group']} codes"
    )


class Shapes:
    """Reads sizes off tensors under our names.

    Where the tensor that has a size is missing, a stand-in is given, and the shapes are no longer `complete`.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.complete = True

    def size(self, name: str, axis: int, stand_in: int) -> int:
        """Length of a tensor along `axis`."""
        shape = self.tensors[name].shape if name in self.tensors else ()
        if axis >= len(shape):
            self.complete = False
            return stand_in
        return shape[axis]

    def multiple(self, name: str, axis: int, unit: int, stand_in: int) -> int:
        """Length of a tensor along `axis` in units of `unit`.

        Raises:
            ValueError: it is no whole number of them.
        """
        size = self.size(name, axis, stand_in * unit)
        if size % unit:
            raise ValueError(f"{name} has shape {tuple(self.tensors[name].shape)}: {size} is not a multiple of {unit}")
        return size // unit

    def count(self, prefix: str) -> int:
        """One more than the highest number that follows `prefix` in names."""
        numbers = [int(m[1]) for name in self.tensors if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))]
        return max(numbers, default=0) + 1


def clip_vision_config(shapes: Shapes, activation: str = "quick_gelu") -> dict[str, Any]:
    """Settings of a CLIP vision tower. Heads are 64 wide, as in OpenAI's: the weights do not tell.

    Raises:
        ValueError: its position rows are not one class row and a square grid.
    """
    tower = "model.vision_tower."
    width = shapes.size(f"{tower}embeddings.class_embedding", 0, 64)
    patch_size = shapes.size(f"{tower}embeddings.patch_embedding.weight", 3, 14)
    rows = shapes.size(f"{tower}embeddings.position_embedding.weight", 0, 2)
    grid = math.isqrt(max(rows - 1, 0))
    if not grid or grid**2 != rows - 1:
        raise ValueError(f"the image encoder has {rows} position rows: no class row and square grid of patches")
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": shapes.size(f"{tower}encoder.layers.0.mlp.fc1.weight", 0, 4 * width),
        "num_hidden_layers": shapes.count(f"{tower}encoder.layers."),
        "num_attention_heads": max(1, width // 64),
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "hidden_act": activation,
    }


def region_settings(shapes: Shapes, width: int) -> dict[str, Any]:
    """Settings of the region perceiver and the codebook that follow from shapes; perceiver heads are 64 wide.

    Args:
        width: d, of the image encoder.
    """
    perceiver = "model.region_perceiver."
    return {
        "num_region_queries": shapes.size(f"{perceiver}region_queries", 1, 1),
        "perceiver_num_stages": shapes.count(f"{perceiver}stages."),
        "perceiver_num_heads": shapes.multiple(f"{perceiver}initial_attention.attention.to_q.weight", 0, 64, 8),
        "perceiver_head_dim": 64,
        "perceiver_ffn_multiplier": shapes.multiple(f"{perceiver}initial_feed_forward.linear_1.weight", 0, width, 4),
        "num_mask_classes": shapes.size(f"{perceiver}segmentation_head.class_predictor.weight", 0, 2) - 1,
        "code_dim": shapes.size("model.codebook.codes[0]", 1, 4),
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
    embedding = tensors.get("model.language_model.embed_tokens.weight")
    if embedding is not None:
        settings["vocab_size"] = len(embedding)
    return config_class(**settings).to_dict()


def split_codes(state_dict: dict[str, torch.Tensor], num_groups: int) -> dict[str, torch.Tensor]:
    """`state_dict` with the stacked codes as one tensor a group, the way files hold them."""
    codes = state_dict.pop("model.codebook.codes")
    return {**state_dict, **{f"model.codebook.codes[{k}]": codes[k] for k in range(num_groups)}}


def find_problems(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    tied: Collection[str],
    sources: Collection[Source],
    compare_shapes: bool,
) -> set[str]:
    """A line for each tensor that is missing, too many or of a wrong shape, with its file and its name there."""
    # A loose file that is given must be complete: no copy stands in for a part of it.
    in_file = {source.kind: source.our_names() for source in sources}
    problems = set()
    for name in {**expected, **tensors}:
        homes = [(source, to_theirs(source.kind, name, source.tensors)) for source in sources]
        source, their_name = next((home for home in homes if home[1]), (None, None))
        where = f"{source.file_of(their_name)}: {their_name}" if source and their_name else f"no file: {name}"
        if name not in tensors or (source and name not in in_file[source.kind]):
            if name not in tied:
                problems.add(f"{where} is missing")
        elif name not in expected:
            problems.add(f"{where} is unexpected")
        elif compare_shapes and tensors[name].shape != expected[name].shape:
            shape, wanted = tuple(tensors[name].shape), tuple(expected[name].shape)
            problems.add(f"{where}, our {name}, has shape {shape}; expected {wanted}")
    return problems


def refuse_problems(problems: Collection[str]) -> None:
    """Raises one ValueError that lists all of `problems`, if there are any."""
    if problems:
        raise ValueError("the files do not add up to a model:\n" + "\n".join(f"  {line}" for line in sorted(problems)))


def assemble(tensors: dict[str, torch.Tensor], dtype: str, num_groups: int) -> dict[str, torch.Tensor]:
    """A state dict of one dtype, codes stacked; tensors that have it already are not copied."""
    embedding = tensors["model.language_model.embed_tokens.weight"]
    wanted = embedding.dtype if dtype == "auto" else getattr(torch, dtype)
    codes = torch.stack([tensors[f"model.codebook.codes[{k}]"] for k in range(num_groups)])
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.codebook.codes[")}
    return {name: tensor.to(wanted) for name, tensor in {**rest, "model.codebook.codes": codes}.items()}
