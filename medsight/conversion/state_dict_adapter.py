"""The names of foreign checkpoints and ours: one table, read in both directions.

A row is (their name, our name). What a placeholder such as `{i}` matches stands in both names. Our side is a tuple
where one of their tensors is several of ours, split evenly along its rows, and None where their tensor is known and of
no use to us. `codes[{i}]` is plane i of our stacked tensor `codes`.
"""

import re
from collections.abc import Collection
from functools import cache
from operator import itemgetter


PLACEHOLDERS = {
    "i": r"\d+",
    "p": r"weight|bias",
    "to": r"to_q|to_kv|to_out",
    "way": r"region_to_image|image_to_region",
    "side": r"region|image",
    "rest": r".+",
}

OurSide = str | tuple[str, ...] | None
Rows = tuple[tuple[str, OurSide], ...]

PERCEIVER: Rows = (
    ("region_queries", "region_queries"),
    ("init_cross_attn.norm_latents.{p}", "initial_attention.attention.norm_queries.{p}"),
    ("init_cross_attn.norm_media.{p}", "initial_attention.attention.norm_context.{p}"),
    ("init_cross_attn.{to}.weight", "initial_attention.attention.{to}.weight"),
    ("init_cross_norm.{p}", "initial_attention.norm.{p}"),
    ("init_ff.0.{p}", "initial_feed_forward.norm_in.{p}"),
    ("init_ff.1.weight", "initial_feed_forward.linear_1.weight"),
    ("init_ff.3.weight", "initial_feed_forward.linear_2.weight"),
    ("init_ff_norm.{p}", "initial_feed_forward.norm_out.{p}"),
    ("conv_adapters.{i}.conv.{p}", "stages.{i}.adapter.{p}"),
    ("bi_blocks.{i}.{way}.norm_latents.{p}", "stages.{i}.{way}.attention.norm_queries.{p}"),
    ("bi_blocks.{i}.{way}.norm_media.{p}", "stages.{i}.{way}.attention.norm_context.{p}"),
    ("bi_blocks.{i}.{way}.{to}.weight", "stages.{i}.{way}.attention.{to}.weight"),
    ("bi_blocks.{i}.{way}_norm.{p}", "stages.{i}.{way}.norm.{p}"),
    ("bi_blocks.{i}.ff_{side}.0.{p}", "stages.{i}.{side}_feed_forward.norm_in.{p}"),
    ("bi_blocks.{i}.ff_{side}.1.weight", "stages.{i}.{side}_feed_forward.linear_1.weight"),
    ("bi_blocks.{i}.ff_{side}.3.weight", "stages.{i}.{side}_feed_forward.linear_2.weight"),
    ("bi_blocks.{i}.ff_{side}_norm.{p}", "stages.{i}.{side}_feed_forward.norm_out.{p}"),
    ("segmentation_cls_head.proj.{p}", "segmentation_head.mask_projection.{p}"),
    ("segmentation_cls_head.class_embed.{p}", "segmentation_head.class_predictor.{p}"),
    ("region_position_embed.weight", None),  # the published computation never reads it
)

CODEBOOK: Rows = (
    ("to_code.{i}.{p}", "to_code.{i}.{p}"),
    ("code_decoder.from_code.{i}.{p}", "from_code.{i}.{p}"),
    ("quantizer.codebooks.{i}.embedding.weight", "codes[{i}]"),
)

GROUP_CLASSIFIER: Rows = (("modality_predictor.{p}", "group_classifier.{p}"),)

CLIP_VISION: Rows = (
    ("class_embedding", "embeddings.class_embedding"),
    ("conv1.weight", "embeddings.patch_embedding.weight"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_pre.{p}", "pre_layrnorm.{p}"),
    ("transformer.resblocks.{i}.ln_1.{p}", "encoder.layers.{i}.layer_norm1.{p}"),
    (
        "transformer.resblocks.{i}.attn.in_proj_{p}",
        tuple(f"encoder.layers.{{i}}.self_attn.{part}_proj.{{p}}" for part in "qkv"),
    ),
    ("transformer.resblocks.{i}.attn.out_proj.{p}", "encoder.layers.{i}.self_attn.out_proj.{p}"),
    ("transformer.resblocks.{i}.ln_2.{p}", "encoder.layers.{i}.layer_norm2.{p}"),
    ("transformer.resblocks.{i}.mlp.c_fc.{p}", "encoder.layers.{i}.mlp.fc1.{p}"),
    ("transformer.resblocks.{i}.mlp.c_proj.{p}", "encoder.layers.{i}.mlp.fc2.{p}"),
    ("ln_post.{p}", "post_layernorm.{p}"),
    ("proj", None),  # into the space shared with text
)

CLIP_TEXT: Rows = tuple(
    (name, None)
    for name in (
        *("logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size"),
        *("positional_embedding", "text_projection", "token_embedding.weight", "ln_final.{p}", "transformer.{rest}"),
        *("text_encoder.{rest}", "text.{rest}"),
    )
)

LANGUAGE_MODEL: Rows = (
    ("lm_head.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
    ("model.layers.{i}.self_attn.rotary_emb.inv_freq", None),
    ("model.layers.{i}.{rest}", "model.language_model.layers.{i}.{rest}"),
    ("model.norm.weight", "model.language_model.norm.weight"),
    ("model.mm_projector.0.{p}", "model.vision_to_text_projector.linear_1.{p}"),
    ("model.mm_projector.2.{p}", "model.vision_to_text_projector.linear_2.{p}"),
    ("model.token_projection.0.{p}", "model.text_to_vision_projector.linear_1.{p}"),
    ("model.token_projection.2.{p}", "model.text_to_vision_projector.linear_2.{p}"),
)


def _layout(their_prefix: str, our_prefix: str, rows: Rows) -> list[tuple[str, str, tuple[str, ...]]]:
    """Rows of names behind `their_prefix` in a file and `our_prefix` in our state dict: that prefix, whole names."""
    layout = []
    for theirs, ours in rows:
        names = (ours,) if isinstance(ours, str) else ours or ()
        layout.append((their_prefix, their_prefix + theirs, tuple(our_prefix + name for name in names)))
    return layout


_COPIES = "model.vision_tower.vision_tower."
LAYOUTS = {
    "region_perceiver": _layout("region_perceiver.", "model.region_perceiver.", PERCEIVER),
    "codebook": [
        *_layout("", "model.codebook.", CODEBOOK[-1:]),
        *_layout("region_perceiver.", "model.codebook.", CODEBOOK),  # the quantizer stands in the file twice
        *_layout("", "model.", GROUP_CLASSIFIER),
    ],
    "image_encoder": [
        *_layout("module.visual.", "model.vision_tower.", CLIP_VISION),
        *_layout("visual.", "model.vision_tower.", CLIP_VISION),
        *_layout("module.", "", CLIP_TEXT),
        *_layout("", "", CLIP_TEXT),
    ],
    "llm": [
        *_layout(f"{_COPIES}image_encoder.", "model.vision_tower.", CLIP_VISION),
        *_layout(f"{_COPIES}region_perceiver.", "model.region_perceiver.", PERCEIVER),
        *_layout(f"{_COPIES}region_perceiver.", "model.codebook.", CODEBOOK),
        *_layout(_COPIES, "model.", GROUP_CLASSIFIER),
        *_layout("", "", LANGUAGE_MODEL),
    ],
}

# Entries beside the weights in a training checkpoint.
WEIGHTS_ENTRIES = ("model", "state_dict")
DROPPED_ENTRIES = ("args", "epoch", "lr_scheduler", "name", "optimizer", "scaler", "scheduler", "step", "steps")


def to_ours(file_kind: str, their_name: str) -> tuple[str, ...] | None:
    """Our names for a tensor of a foreign file: several if it is split, none if it is dropped, `None` if unknown.

    Args:
        file_kind: a key of `LAYOUTS`.
    """
    for _, theirs, ours in LAYOUTS[file_kind]:
        if match := _pattern(theirs).fullmatch(their_name):
            return tuple(name.format(**match.groupdict()) for name in ours)
    return None


def to_theirs(file_kind: str, our_name: str, present: Collection[str] = ()) -> str | None:
    """The name in a foreign file of the tensor that holds `our_name`; None if files of this kind do not hold it.

    Args:
        present: names that the file has. Of several spellings (`visual.`, `module.visual.`) its own one is given.
    """
    found = [
        (sum(other.startswith(prefix) for other in present), theirs.format(**match.groupdict()))
        for prefix, theirs, ours in LAYOUTS[file_kind]
        for name in ours
        if (match := _pattern(name).fullmatch(our_name))
    ]
    # max keeps the first of equals: the table's order decides.
    return max(found, key=itemgetter(0))[1] if found else None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """A row's name as a pattern: `{p}` becomes a group of what it may stand for."""
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(pattern.format(**{name: f"(?P<{name}>{values})" for name, values in PLACEHOLDERS.items()}))
