"""Assembles a fresh model from a language model, an image encoder and a list of code groups.

    medsight init --llm Qwen/Qwen3-0.6B --image-encoder unimed_clip.pt --groups groups.txt --output DIR

Language model and encoder keep their weights; region perceiver, codebook, projectors and group classifier are random.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from medsight.checkpoint import read_json, weight_files
from medsight.cli.console import Json, results
from medsight.conversion.convert import (
    Dtype,
    OverwriteCheckpoint,
    Shapes,
    StrPath,
    clip_vision_config,
    describe,
    find_problems,
    refuse_problems,
    sizes,
    write_checkpoint,
)
from medsight.conversion.foreign_files import Source, merge
from medsight.files import check_output, read_names


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from configuration_medsight import MedSightConfig

# What the chat template writes. A tokenizer of another family than Qwen3's gets those that it lacks.
TEMPLATE_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    *("<think>", "</think>"),
)
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# The mean and deviation that a family's encoders were trained with, where a folder does not say.
STATISTICS = {
    "clip_vision_model": CLIP_STATISTICS,
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dinov2": IMAGENET_STATISTICS,
    "resnet": IMAGENET_STATISTICS,
    "convnext": IMAGENET_STATISTICS,
}
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def command(
    llm: Annotated[str, typer.Option(metavar="DIR|NAME", help="A Qwen3, Qwen2 or Llama language model.")],
    image_encoder: Annotated[
        str,
        typer.Option(
            metavar="DIR|NAME|FILE",
            help="A CLIP, SigLIP, DINOv2, ResNet or ConvNeXt model, or an OpenAI- or OpenCLIP-layout CLIP file (.pt).",
        ),
    ],
    groups: Annotated[
        str, typer.Option(metavar="FILE", help="Names of the code groups: a JSON list, or one line per group.")
    ],
    output: Annotated[str, typer.Option(metavar="DIR", help="The folder to write.")],
    codes_per_group: Annotated[int, typer.Option(metavar="M", help="Codes per group.")] = 32,
    code_dim: Annotated[int, typer.Option(metavar="N", help="Width of a code.")] = 64,
    num_queries: Annotated[int, typer.Option(metavar="N", help="Region queries.")] = 20,
    num_stages: Annotated[
        int, typer.Option(metavar="L", help="Perceiver stages, each of which doubles the grid.")
    ] = 3,
    mask_classes: Annotated[
        str | None, typer.Option(metavar="FILE", help="Names of the mask classes, as in --groups.")
    ] = None,
    vision_feature_layer: Annotated[
        int,
        typer.Option(metavar="N", help="Hidden state of the encoder to read; of a convolutional one, the stage."),
    ] = -2,
    image_size: Annotated[
        int | None, typer.Option(metavar="PX", help="Side of the input  [default: the encoder's own].")
    ] = None,
    activation: Annotated[
        Literal["quick_gelu", "gelu"], typer.Option(help="Of an encoder read from a .pt file, which does not tell.")
    ] = "quick_gelu",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random weights.")] = 0,
    overwrite: OverwriteCheckpoint = False,
    as_json: Json = False,
) -> None:
    """Assemble a fresh model from a language model, an image encoder and a groups file.

    Language model and encoder keep their weights; region perceiver, codebook, projectors and group classifier are
    random.
    """
    with results(as_json) as out:
        config = init(
            llm,
            image_encoder,
            groups,
            output,
            mask_classes=mask_classes,
            activation=activation,
            dtype=dtype,
            seed=seed,
            overwrite=overwrite,
            codes_per_group=codes_per_group,
            code_dim=code_dim,
            num_region_queries=num_queries,
            perceiver_num_stages=num_stages,
            vision_feature_layer=vision_feature_layer,
            image_size=image_size,
        )
        out.show({"folder": output, **sizes(config)}, f"{output}: {describe(config)}")


def init(
    llm: StrPath,
    image_encoder: StrPath,
    groups: StrPath,
    output: StrPath,
    *,
    mask_classes: StrPath | None = None,
    activation: str = "quick_gelu",
    dtype: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    **settings: Any,
) -> "MedSightConfig":
    """Writes one folder with a fresh model, its tokenizer, processor and code; returns the configuration.

    The region codes follow the tokenizer's last token. Before them, a tokenizer that is not Qwen3's gets what the chat
    template writes and it lacks (turn markers, image placeholder, think marks). The embedding grows, to a multiple of
    64 rows, only if its spare rows do not suffice. Turns end with `<|im_end|>`, padding is `<|endoftext|>`.

    Args:
        llm: folder or Hub name of a language model with safetensors weights.
        image_encoder: folder or Hub name of an encoder (of a CLIP or SigLIP model, the vision part), or a file in
            OpenAI's or OpenCLIP's layout.
        groups: file with the names of the code groups, a JSON list or one line per group.
        output: folder to write.
        mask_classes: file with the names of the mask classes, 'no object' not among them.
        activation: of an encoder that is read from a file: "quick_gelu" or "gelu".
        dtype: of all weights; "auto" is the language model's.
        seed: of the random weights.
        overwrite: replace the output folder if it holds a checkpoint.
        **settings: further fields of [`MedSightConfig`].

    Raises:
        OSError: a file is missing, or the output folder is taken.
        ValueError: a file is damaged or holds code, a model is of the wrong kind, or settings contradict each other.
            Nothing is written then.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from configuration_medsight import MedSightConfig
    from modeling_medsight import MedSightForConditionalGeneration
    from processing_medsight.chat_medsight import CHAT_TEMPLATE
    from processing_medsight.region_codes_medsight import add_region_codes

    output = Path(output)
    given = (llm, image_encoder, groups, mask_classes)
    inputs = [Path(path) for path in given if path is not None and Path(path).exists()]
    check_output(output, overwrite, inputs=inputs)
    settings = {"codes_per_group": 32, **settings, "group_names": read_names(groups)}
    settings["num_groups"] = len(settings["group_names"])
    if mask_classes is not None:
        settings["mask_class_names"] = read_names(mask_classes)
        settings["num_mask_classes"] = len(settings["mask_class_names"])

    check_model(llm)
    tokenizer = AutoTokenizer.from_pretrained(llm, trust_remote_code=False)
    add_template_tokens(tokenizer)
    first_code = add_region_codes(
        tokenizer, settings["num_groups"], settings["codes_per_group"], settings.get("use_region_codebook", True)
    )
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    language_model = AutoModelForCausalLM.from_pretrained(
        llm, dtype=wanted, use_safetensors=True, trust_remote_code=False
    )
    if language_model.base_model_prefix != "model" or not hasattr(language_model, "lm_head"):
        raise ValueError(f"{llm} is a {language_model.config.model_type} model; use a Qwen3, Qwen2 or Llama one")
    if len(tokenizer) > len(language_model.get_input_embeddings().weight):
        with seeded(seed):
            language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)

    vision_config, vision_weights, statistics = read_image_encoder(image_encoder, activation, language_model.dtype)
    config = MedSightConfig(
        text_config=language_model.config.to_dict(),
        vision_config=vision_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        region_code_start_id=first_code,
        **settings,
    )
    weights = {f"model.vision_tower.{name}": tensor for name, tensor in vision_weights.items()}
    weights |= {f"model.language_model.{name}": t for name, t in language_model.model.state_dict().items()}
    weights["lm_head.weight"] = language_model.lm_head.weight
    with seeded(seed), quiet():
        # Loading makes what is not given anew, as it does for every model of the library.
        model = MedSightForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=weights, dtype=language_model.dtype
        )
    write_checkpoint(model, tokenizer, CHAT_TEMPLATE, output, overwrite, statistics)
    return config


def check_model(name: StrPath) -> None:
    """Makes sure that a model given as a folder is there and whole; a name is the Hub's to check.

    Raises:
        OSError: the folder or one of its files is missing.
        ValueError: a file of it is damaged.
    """
    path = Path(name)
    if path.is_dir():
        read_json(path / "config.json")
        weight_files(path)
    elif path.exists() or path.is_absolute() or str(name).startswith("."):
        raise NotADirectoryError(f"{name} is not a folder; expected a model's folder, or its name on the Hub")


def add_template_tokens(tokenizer: Any) -> None:
    """Appends what the chat template writes and `tokenizer` lacks, and makes it end turns and pad as Qwen3's does."""
    from tokenizers import AddedToken

    from processing_medsight.region_codes_medsight import QWEN3_ADDED_TOKENS

    is_special = dict(QWEN3_ADDED_TOKENS)
    known = tokenizer.get_vocab()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=is_special[token], normalized=False)
            for token in TEMPLATE_TOKENS
            if token not in known
        ]
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = None


def read_image_encoder(
    source: StrPath, activation: str, dtype: "torch.dtype"
) -> "tuple[PreTrainedConfig, dict[str, torch.Tensor], Statistics]":
    """Configuration, weights, and pixel mean and deviation of an encoder in a folder, on the Hub, or in a CLIP file.

    Raises:
        OSError: it is missing.
        ValueError: it is damaged, incomplete, or of a kind that the model does not take.
    """
    if Path(source).is_file():
        return read_clip_file(Path(source), activation, dtype)

    from transformers import AutoConfig, AutoModel

    check_model(source)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    if config.model_type not in STATISTICS:
        raise ValueError(
            f"image encoder {source} is a {config.model_type} model; expected one of {', '.join(sorted(STATISTICS))}"
        )
    with quiet():
        encoder, report = AutoModel.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    if report["missing_keys"]:
        raise ValueError(f"image encoder {source} lacks weights: {', '.join(sorted(report['missing_keys']))}")
    return encoder.config, encoder.state_dict(), read_statistics(source, config.model_type)


def read_clip_file(
    path: Path, activation: str, dtype: "torch.dtype"
) -> "tuple[PreTrainedConfig, dict[str, torch.Tensor], Statistics]":
    """The vision tower of a CLIP file in OpenAI's or OpenCLIP's layout, as `CLIPVisionModel` has it.

    Raises:
        OSError: the file is missing.
        ValueError: it is damaged, holds code, or its tensors are not those of a vision tower.
    """
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    source = Source.read_file("image_encoder", path)
    tensors, problems = merge([source])
    shapes = Shapes(tensors)
    config = CLIPVisionConfig(**clip_vision_config(shapes, activation))
    with torch.device("meta"):
        expected = {f"model.vision_tower.{name}": t for name, t in CLIPVisionModel(config).state_dict().items()}
    refuse_problems(problems | find_problems(tensors, expected, (), [source], compare_shapes=shapes.complete))
    weights = {name.removeprefix("model.vision_tower."): tensor.to(dtype) for name, tensor in tensors.items()}
    return config, weights, CLIP_STATISTICS


def read_statistics(source: StrPath, model_type: str) -> Statistics:
    """Mean and deviation of an encoder's input: what its folder says, or else what its family was trained with."""
    from transformers.utils import cached_file

    for name in ("preprocessor_config.json", "processor_config.json"):
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            content = read_json(Path(path))
            content = content.get("image_processor", content)
            if "image_mean" in content and "image_std" in content:
                return tuple(content["image_mean"]), tuple(content["image_std"])
    return STATISTICS[model_type]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights made inside follow from `seed`; random numbers drawn afterwards are what they would have been."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from reporting that parts are new, or left out, where that is the purpose."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
