"""A tiny random checkpoint in the published file layout, written here by hand, not by the table that reads it."""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen2Tokenizer

from configuration_medsight import MedSightConfig
from configuration_medsight.configuration_medsight import PRESETS
from modeling_medsight import MedSightForConditionalGeneration
from tests.tiny_checkpoint import byte_tokenizer


GROUPS, CODES = 3, 4
LOOSE = ("region_perceiver", "codebook", "image_encoder")
COPIES = "model.vision_tower.vision_tower."
PERCEIVER_NAMES = (
    (r"^stages\.(\d+)\.adapter\.", r"conv_adapters.\1.conv."),
    (r"^stages\.", "bi_blocks."),
    (r"^initial_attention\.attention\.", "init_cross_attn."),
    (r"^initial_attention\.norm\.", "init_cross_norm."),
    (r"^initial_feed_forward\.", "init_ff."),
    (r"^segmentation_head\.mask_projection\.", "segmentation_cls_head.proj."),
    (r"^segmentation_head\.class_predictor\.", "segmentation_cls_head.class_embed."),
    (r"\.attention\.", "."),
    (r"\bnorm_queries\b", "norm_latents"),
    (r"\bnorm_context\b", "norm_media"),
    (r"(region_to_image|image_to_region)\.norm\.", r"\1_norm."),
    (r"(region|image)_feed_forward\.", r"ff_\1."),
    (r"\bnorm_in\b", "0"),
    (r"\blinear_1\b", "1"),
    (r"\blinear_2\b", "3"),
    (r"(init_ff|ff_region|ff_image)\.norm_out\.", r"\1_norm."),
)
CLIP_NAMES = (
    (r"^embeddings\.class_embedding$", "class_embedding"),
    (r"^embeddings\.patch_embedding\.", "conv1."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^pre_layrnorm\.", "ln_pre."),
    (r"^post_layernorm\.", "ln_post."),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


@dataclass
class Published:
    """Where the files are, and the model that they hold."""

    folder: Path
    model: MedSightForConditionalGeneration

    @property
    def llm(self) -> Path:
        return self.folder / "llm"

    def loose(self, *kinds: str) -> dict[str, Path | None]:
        """Arguments of `convert` for these loose files, `None` for the others; all of them by default."""
        return {kind: self.folder / f"{kind}.pt" if kind in (kinds or LOOSE) else None for kind in LOOSE}


def random_model() -> MedSightForConditionalGeneration:
    torch.manual_seed(0)
    text = {
        **PRESETS["tiny"]["text_config"],
        **{"hidden_size": 24, "intermediate_size": 40, "max_position_embeddings": 256},
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
    }
    vision = {
        **PRESETS["tiny"]["vision_config"],
        **{"intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 1},
        **{"image_size": 12, "patch_size": 4},
    }
    sizes = {"code_dim": 6, "perceiver_head_dim": 64, "perceiver_ffn_multiplier": 3}
    config = MedSightConfig.from_preset("tiny", text_config=text, vision_config=vision, **sizes)
    model = MedSightForConditionalGeneration(config).eval()
    with torch.no_grad():
        # No weight may stay at a value, such as a norm's 1, that would hide a mix-up.
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def published_tokenizer() -> Qwen2Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"[M{k}_{m}]" for k in range(GROUPS) for m in range(CODES)])
    return tokenizer


def write_published(folder: Path, model: MedSightForConditionalGeneration) -> None:
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    perceiver = {
        "region_perceiver." + rename(name, PERCEIVER_NAMES): tensor
        for name, tensor in take(state, "model.region_perceiver.").items()
    }
    width = perceiver["region_perceiver.region_queries"].shape[-1]
    perceiver["region_perceiver.region_position_embed.weight"] = torch.randn(5, width)
    visual = clip_layout(take(state, "model.vision_tower."))
    codebook = {}
    for name, tensor in take(state, "model.codebook.").items():
        if name == "codes":
            for k, codes in enumerate(tensor):
                for prefix in ("", "region_perceiver."):
                    codebook[f"{prefix}quantizer.codebooks.{k}.embedding.weight"] = codes.clone()
        else:
            codebook["region_perceiver." + name.replace("from_code.", "code_decoder.from_code.")] = tensor
    for name, tensor in take(state, "model.group_classifier.").items():
        codebook[f"modality_predictor.{name}"] = tensor

    llm = {COPIES + name: tensor.clone() for name, tensor in perceiver.items()}
    llm |= {f"{COPIES}image_encoder.{name}": tensor.clone() for name, tensor in visual.items()}
    for name, tensor in state.items():
        if name.startswith("model.language_model.") or name == "lm_head.weight":
            llm[name.replace("language_model.", "")] = tensor
    for ours, theirs in (
        ("vision_to_text_projector", "mm_projector"),
        ("text_to_vision_projector", "token_projection"),
    ):
        for name, tensor in take(state, f"model.{ours}.").items():
            llm[f"model.{theirs}." + name.replace("linear_1", "0").replace("linear_2", "2")] = tensor

    training = {"optimizer": {"state": {}}, "steps": 7, "args": argparse.Namespace(lr=1e-4, dataset="none")}
    torch.save({"model": perceiver, **training}, folder / "region_perceiver.pt")
    torch.save({"model": codebook, **training}, folder / "codebook.pt")
    text_side = {"module.logit_scale": torch.ones(()), "module.text_encoder.projection": torch.randn(4, 4)}
    clip = {f"module.visual.{name}": tensor for name, tensor in visual.items()}
    torch.save({"epoch": 1, "name": "clip", "state_dict": {**text_side, **clip}}, folder / "image_encoder.pt")
    (folder / "llm").mkdir()
    save_file(llm, folder / "llm" / "model.safetensors")
    write_llm_config(folder / "llm", model)
    published_tokenizer().save_pretrained(folder / "llm")


def write_llm_config(folder: Path, model: MedSightForConditionalGeneration) -> None:
    content = model.config.text_config.to_dict()
    # The vocabulary's size is left at the base model's, and RoPE in the older form: published files have both.
    del content["rope_parameters"]
    content |= {"vocab_size": 151936, "rope_theta": 5000.0, "rope_scaling": None}
    content |= {"model_type": "llava_qwen", "architectures": ["RegSegForCausalLM"], "torch_dtype": "float32"}
    content |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")


def clip_layout(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIPVisionModel's weights under OpenAI's names."""
    visual = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name)
        if match:
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            visual[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            visual[rename(name, CLIP_NAMES)] = tensor
    width = visual["class_embedding"].shape[0]
    return {**visual, "proj": torch.randn(width, width)}


def take(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def rename(name: str, replacements: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in replacements:
        name = re.sub(pattern, replacement, name)
    return name


def read_published(path: Path) -> dict[str, Any]:
    """The content of a `.pt` file, not mapped into memory as the converter's is: a test may write the file again."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)
