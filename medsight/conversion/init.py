"""Assembles a fresh model from a language model, an image encoder and a list of code groups.

Language model and encoder keep their weights; region perceiver, codebook, projectors and group classifier are random.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken
from transformers.utils import cached_file

from configuration_medsight import MedSightConfig
from medsight.checkpoint import read_json, weight_files
from medsight.files import check_output, read_names
from medsight.text import quiet_transformers
from modeling_medsight import MedSightForConditionalGeneration
from processing_medsight import CHAT_TEMPLATE, QWEN3_ADDED_TOKENS, add_region_codes

from .convert import TOWER, StrPath, clip_vision_config, find_problems, refuse_problems, write_checkpoint
from .foreign_files import Source, merge


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
) -> MedSightConfig:
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
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm, trust_remote_code=False)
    add_template_tokens(tokenizer)
    first_code = add_region_codes(
        tokenizer, settings["num_groups"], settings["codes_per_group"], settings.get("use_region_codebook", True)
    )
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    language_model = transformers.AutoModelForCausalLM.from_pretrained(
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
    with seeded(seed), quiet_transformers():
        # Loading makes what is not given anew, as it does for every model of the library.
        model = MedSightForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=weights, dtype=language_model.dtype
        )
    write_checkpoint(model, tokenizer, CHAT_TEMPLATE, output, overwrite, statistics)
    return config


def check_model(name: StrPath) -> None:
    """Raises OSError or ValueError where a model's folder is not whole; a name is the Hub's to check."""
    if Path(name).is_dir():
        weight_files(Path(name))


def add_template_tokens(tokenizer: Any) -> None:
    """Appends what the chat template writes and `tokenizer` lacks, and makes it end turns and pad as Qwen3's does."""
    is_special = dict(QWEN3_ADDED_TOKENS)
    known = tokenizer.get_vocab()
    missing = [token for token in TEMPLATE_TOKENS if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=is_special[token], normalized=False) for token in missing])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = None


def read_image_encoder(
    source: StrPath, activation: str, dtype: torch.dtype
) -> tuple[transformers.PreTrainedConfig, dict[str, torch.Tensor], Statistics]:
    """Configuration, weights, and pixel mean and deviation of an encoder in a folder, on the Hub, or in a CLIP file.

    Raises:
        OSError: it is missing.
        ValueError: it is damaged, incomplete, or of a kind that the model does not take.
    """
    if Path(source).is_file():
        return read_clip_file(Path(source), activation, dtype)
    check_model(source)
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    if config.model_type not in STATISTICS:
        raise ValueError(
            f"image encoder {source} is a {config.model_type} model; expected one of {', '.join(sorted(STATISTICS))}"
        )
    with quiet_transformers():
        encoder, report = transformers.AutoModel.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    if report["missing_keys"]:
        raise ValueError(f"image encoder {source} lacks weights: {', '.join(sorted(report['missing_keys']))}")
    return encoder.config, encoder.state_dict(), read_statistics(source, config.model_type)


def read_clip_file(
    path: Path, activation: str, dtype: torch.dtype
) -> tuple[transformers.PreTrainedConfig, dict[str, torch.Tensor], Statistics]:
    """The vision tower of a CLIP file in OpenAI's or OpenCLIP's layout, as `CLIPVisionModel` has it.

    Raises:
        OSError: the file is missing.
        ValueError: it is damaged, holds code, or its tensors are not those of a vision tower.
    """
    source = Source.read_file("image_encoder", path)
    tensors, problems = merge([source])
    config = transformers.CLIPVisionConfig(**clip_vision_config(tensors, activation))
    with torch.device("meta"):
        expected = {
            f"{TOWER}{name}": tensor for name, tensor in transformers.CLIPVisionModel(config).state_dict().items()
        }
    refuse_problems(problems | find_problems(tensors, expected, (), [source]))
    weights = {name.removeprefix(TOWER): tensor.to(dtype) for name, tensor in tensors.items()}
    return config, weights, CLIP_STATISTICS


def read_statistics(source: StrPath, model_type: str) -> Statistics:
    """Mean and deviation of an encoder's input: what its folder says, or else what its family was trained with."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        content = {} if path is None else read_json(Path(path))
        content = content.get("image_processor", content)
        if {"image_mean", "image_std"} <= content.keys():
            return tuple(content["image_mean"]), tuple(content["image_std"])
    return STATISTICS[model_type]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights made inside follow from `seed`; random numbers drawn afterwards are what they would have been."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
