"""Assembles a fresh model from a language model, an image encoder and a list of code groups.

Language model and encoder keep their weights; region perceiver, codebook, projectors and group classifier are random.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import cached_file

from configuration_medsight import MedSightConfig
from medsight.checkpoint import read_json, weight_files
from medsight.files import check_output, read_names
from medsight.inference.predictor import Predictor, user_turn
from medsight.text import quiet_transformers
from modeling_medsight import MedSightForConditionalGeneration
from processing_medsight import add_region_codes

from .chat import settle_chat
from .convert import TOWER, StrPath, clip_vision_config, find_problems, refuse_problems, write_checkpoint
from .foreign_files import Source, merge


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
QUESTION = "Which organ pumps the blood?"


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

    The language model keeps its chat template, its end tokens and its tokenizer, which gets what image blocks need and
    it lacks (see `settle_chat`), and then the region codes. The embedding grows, to a multiple of 64 rows, only if its
    spare rows do not suffice. New tokens start as the mean of all words, projectors at the scale of what they stand
    among (`start_projectors`), and mask logits, products over d features, are divided by d.

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
    words = len(tokenizer)
    chat_template, ends = settle_chat(tokenizer, own_ends(llm, tokenizer), str(llm))
    first_code = add_region_codes(
        tokenizer, settings["num_groups"], settings["codes_per_group"], settings.get("use_region_codebook", True)
    )
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    language_model = transformers.AutoModelForCausalLM.from_pretrained(
        llm, dtype=wanted, use_safetensors=True, trust_remote_code=False
    )
    if language_model.base_model_prefix != "model" or not hasattr(language_model, "lm_head"):
        raise ValueError(f"{llm} is a {language_model.config.model_type} model; use a Qwen3, Qwen2 or Llama one")
    add_rows(language_model, words, len(tokenizer))

    vision_config, vision_weights, statistics = read_image_encoder(image_encoder, activation, language_model.dtype)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = MedSightConfig(
        text_config={**language_model.config.to_dict(), **ids},
        vision_config=vision_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        region_code_start_id=first_code,
        **settings,
    )
    if "mask_logits_scale" not in settings:
        config.mask_logits_scale = 1 / config.vision_hidden_size
    weights = {f"model.vision_tower.{name}": tensor for name, tensor in vision_weights.items()}
    weights |= {f"model.language_model.{name}": t for name, t in language_model.model.state_dict().items()}
    weights["lm_head.weight"] = language_model.lm_head.weight
    with seeded(seed), quiet_transformers():
        # Loading makes what is not given anew, as it does for every model of the library.
        model = MedSightForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=weights, dtype=language_model.dtype
        ).eval()
        start_projectors(model, words)
    write_checkpoint(model, tokenizer, chat_template, output, overwrite, statistics, ends)
    return config


def ask(folder: StrPath) -> str:
    """What the model in `folder` answers to `QUESTION`, on the CPU: a language model that was thrown off by its prompt
    shows it here."""
    answer = Predictor(str(folder), device="cpu").answer([[user_turn(QUESTION)]], max_new_tokens=24)[0]
    return answer.text.strip()


def check_model(name: StrPath) -> None:
    """Raises OSError or ValueError where a model's folder is not whole; a name is the Hub's to check."""
    if Path(name).is_dir():
        weight_files(Path(name))


def own_ends(llm: StrPath, tokenizer: Any) -> list[str]:
    """The tokens that end what a language model generates: those of its generation settings, or its tokenizer's."""
    ids = None
    if cached_file(llm, "generation_config.json", _raise_exceptions_for_missing_entries=False) is not None:
        ids = transformers.GenerationConfig.from_pretrained(llm).eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    found = [] if ids is None else tokenizer.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids)
    return [token for token in found if token is not None]


@torch.no_grad()
def add_rows(language_model: Any, words: int, tokens: int) -> None:
    """Grows embedding and head to so many `tokens`; those after the first `words` start as the mean of these: what is
    new is then neither likelier nor louder than a word."""
    before = len(language_model.get_input_embeddings().weight)
    if tokens > before:
        language_model.resize_token_embeddings(tokens, pad_to_multiple_of=64, mean_resizing=False)
    for module in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        mean = module.weight[: min(words, before)].float().mean(dim=0).to(module.weight.dtype)
        module.weight[min(words, before) : tokens] = mean
        module.weight[max(before, tokens) :] = mean


@torch.no_grad()
def start_projectors(model: Any, words: int) -> None:
    """Scales the last layers of both projectors, so that image rows start as long as words' embeddings, and what takes
    the place of region queries as long as these. Measured on noise, which an encoder answers with features nearly as
    long as a picture's, and on the first words."""
    size = model.config.image_size
    pixels = torch.randn(4, 3, size, size, dtype=model.dtype)
    start_at_word_scale(model, [model.get_region_features(pixels, with_masks=False)], words)
    ids = torch.arange(min(words, 64))[None]
    states = model.model.language_model(input_ids=ids).last_hidden_state
    projector, queries = model.model.text_to_vision_projector, model.model.region_perceiver.region_queries
    projector.linear_2.weight *= length_of(queries) / length_of(projector(states))


def start_at_word_scale(model: Any, regions: Iterable[Any], words: int) -> None:
    """Scales the vision-to-text projector's last layer so that the rows of `regions` are as long as the embeddings of
    the first `words` tokens, on average."""
    lengths = torch.stack([length_of(model.model.project_regions(entry)) for entry in regions])
    wanted = length_of(model.get_input_embeddings().weight[:words])
    model.model.vision_to_text_projector.linear_2.weight *= wanted / lengths.mean()


def length_of(rows: torch.Tensor) -> torch.Tensor:
    """The mean length of vectors (..., width)."""
    return rows.float().norm(dim=-1).mean()


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
