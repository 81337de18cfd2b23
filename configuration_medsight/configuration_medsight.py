"""Configuration of MedSIGHT: an image encoder, a region perceiver, a modality-grouped region codebook and a language
model."""

import copy
import re
from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .remote_code_medsight import AUTO_MAP, RemoteCodeMixin


def _layers(count: int, *, width: int, inner: int, heads: int) -> dict[str, int]:
    """The sizes that a language model and a vision transformer both have."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads}
    return {**sizes, "num_hidden_layers": count}


QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 152256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
}
CLIP = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
# What `MedSightConfig.from_preset` reads.
PRESETS: dict[str, dict[str, Any]] = {
    "8b": {
        "text_config": {**QWEN3, **_layers(36, width=4096, inner=12288, heads=32)},
        "vision_config": {
            **CLIP,
            **_layers(24, width=1024, inner=4096, heads=16),
            "image_size": 336,
            "patch_size": 14,
        },
    },
    "small": {
        "text_config": {**QWEN3, **_layers(28, width=1024, inner=3072, heads=16), "tie_word_embeddings": True},
        "vision_config": {**CLIP, **_layers(12, width=768, inner=3072, heads=12), "image_size": 224, "patch_size": 16},
    },
    "laptop": {
        "text_config": {
            "model_type": "llama",
            "vocab_size": 49472,
            **_layers(30, width=576, inner=1536, heads=9),
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
        "vision_config": {
            "model_type": "dinov2",
            **_layers(12, width=384, inner=1536, heads=6),
            "image_size": 518,
            "patch_size": 14,
        },
        "image_size": 224,
        "image_token_id": 49153,
        "num_region_queries": 16,
        "perceiver_num_stages": 2,
        "mask_logits_scale": 1 / 384,
        "use_class_queries": True,
        "num_mask_classes": 55,
        "num_groups": 16,
        "codes_per_group": 16,
        "code_dim": 32,
        "region_code_start_id": 49155,
    },
    "tiny": {
        "text_config": {
            "model_type": "qwen3",
            "vocab_size": 320,
            **_layers(2, width=32, inner=64, heads=4),
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "pad_token_id": 256,
            "eos_token_id": 258,
        },
        "vision_config": {**CLIP, **_layers(2, width=16, inner=32, heads=2), "image_size": 28, "patch_size": 7},
        "image_token_id": 268,
        "num_region_queries": 5,
        "perceiver_num_stages": 2,
        "perceiver_num_heads": 2,
        "perceiver_head_dim": 8,
        "num_mask_classes": 7,
        "num_groups": 3,
        "codes_per_group": 4,
        "code_dim": 8,
        "region_code_start_id": 282,
    },
    "nano": {
        "text_config": {
            "model_type": "qwen3",
            "vocab_size": 1792,
            **_layers(4, width=192, inner=512, heads=4),
            "num_key_value_heads": 2,
            "head_dim": 48,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "pad_token_id": 1510,
            "eos_token_id": 1512,
        },
        "vision_config": {
            "model_type": "medsight_unet",
            "hidden_size": 48,
            "patch_size": 4,
            "hidden_sizes": [24, 48, 96, 144, 192],
            "depths": [1, 1, 2, 2],
        },
        "image_size": 224,
        "image_token_id": 1522,
        "vision_feature_layer": -1,
        "patch_pooling": 8,
        "num_region_queries": 16,
        "perceiver_num_stages": 1,
        "perceiver_num_heads": 1,
        "perceiver_head_dim": 48,
        "perceiver_ffn_multiplier": 1,
        "mask_projection_init_std": 0.02,
        "num_mask_classes": 55,
        "class_loss_weight": 0.5,
        "num_groups": 16,
        "codes_per_group": 16,
        "code_dim": 32,
        "region_code_start_id": 1536,
    },
}


MASK_DECODERS = ("perceiver", "head")
SEG_TOKEN = "[SEG]"
ORIENTATION = re.compile("[LR][APSI]|[AP][LRSI]|[SI][LRAP]")
COUNTS = (
    *("patch_pooling", "num_region_queries", "perceiver_num_stages", "perceiver_num_heads", "perceiver_head_dim"),
    *("perceiver_ffn_multiplier", "num_mask_classes", "num_groups", "codes_per_group", "code_dim"),
)


class MedSightUNetConfig(PreTrainedConfig):
    """Configuration of [`MedSightUNetEncoder`], a residual U-Net for where no pretrained encoder is at hand.

    Example:

        >>> MedSightUNetConfig(patch_size=4, hidden_sizes=[16, 32, 64], depths=[1, 1]).deepest_stride
        8

    Args:
        num_channels (`int`): of the image.
        hidden_size (`int`): channels of the grid of features that it yields.
        patch_size (`int`): pixels a cell of that grid, a power of 2 from 2 to the deepest stride.
        hidden_sizes (`list[int]`): channels at strides 2, 4, 8, ... on the way down.
        depths (`list[int]`): residual blocks at each of these strides but the first, which has the stem alone.
        norm_groups (`int`, *optional*): groups of a group norm, which sees one image alone, in place of batch norms.

    Raises:
        ValueError: for lists that do not fit each other, a `patch_size` that no stride has, or `norm_groups` that do
            not divide all sizes.
    """

    model_type = "medsight_unet"

    num_channels: int = 3
    hidden_size: int = 48
    patch_size: int = 4
    hidden_sizes: list[int] = field(default_factory=lambda: [16, 32, 64, 96, 128])
    depths: list[int] = field(default_factory=lambda: [1, 1, 2, 2])
    norm_groups: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        sizes = self.hidden_sizes
        if len(self.depths) != len(sizes) - 1 or min(*sizes, *self.depths) < 1:
            raise ValueError(
                f"hidden_sizes={sizes}, depths={self.depths}: expected a depth a size but the first, all > 0"
            )
        if self.norm_groups is not None and (self.norm_groups < 1 or any(size % self.norm_groups for size in sizes)):
            raise ValueError(f"norm_groups={self.norm_groups} does not divide all of hidden_sizes={sizes}")
        strides = [2 ** (i + 1) for i in range(len(sizes))]
        if self.patch_size not in strides:
            raise ValueError(f"patch_size={self.patch_size}: hidden_sizes={sizes} gives strides {strides}")

    @property
    def level(self) -> int:
        """Index into `hidden_sizes` of the stride that the features have."""
        return self.patch_size.bit_length() - 2

    @property
    def deepest_stride(self) -> int:
        """What the sides of an image must be multiples of."""
        return int(2 ** len(self.hidden_sizes))


AutoConfig.register("medsight_unet", MedSightUNetConfig, exist_ok=True)


class MedSightConfig(RemoteCodeMixin, PreTrainedConfig):
    r"""Configuration of [`MedSightModel`] and [`MedSightForConditionalGeneration`] (paper arXiv 2606.06760).

    Defaults are the published 8B model. Contradictory settings are refused here, at construction.

    Example:

        >>> from configuration_medsight import MedSightConfig
        >>> config = MedSightConfig.from_preset("tiny", perceiver_num_stages=1)
        >>> config.patch_grid, config.mask_size, config.image_seq_length
        ((4, 4), (8, 8), 21)
        >>> config.region_code_token(group=2, index=3)
        '[C2_3]'

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*): language model; Qwen3 by default, any causal decoder
            that `AutoModel` knows (Qwen2, Llama, ...).
        vision_config (`dict` or `PreTrainedConfig`, *optional*): image encoder; CLIP by default, or SigLIP, DINOv2,
            ResNet, ConvNeXt, anything that yields a grid of features; or [`MedSightUNetConfig`], to train from
            scratch.
        image_size (`int`, *optional*): side in pixels of the square input. Taken from `vision_config.image_size` if it
            has one.
        image_token_id (`int`): id of the image placeholder in the vocabulary.
        vision_feature_layer (`int`): index into the encoder's `hidden_states`. For a convolutional encoder, the stage.
        use_region_embeddings (`bool`): whether the language model sees the region rows after the patch rows
            (ablation).
        patch_pooling (`int`): side of the squares of patches whose mean is one row for the language model. A fine grid
            makes masks sharp, but the prompt long. With 1, as published, every patch is a row.
        num_region_queries (`int`): N, learnable region queries.
        perceiver_num_stages (`int`): L, stages of the region perceiver; each doubles the side of the feature map.
        perceiver_num_heads, perceiver_head_dim (`int`): attention heads of the perceiver and the width of one.
        perceiver_ffn_multiplier (`int`): inner width of its feed-forward blocks, in multiples of the vision width.
        mask_projection_init_std (`float`, *optional*): standard deviation that the segmentation head's projection
            starts with; Xavier-uniform, as published, when `None`.
        mask_logits_scale (`float`): factor of mask logits, which are products over d features. With 1, as published, a
            step of Adam at rate r can move them by r·d²; `medsight init` takes 1/d.
        num_mask_classes (`int`), mask_class_names (`list[str]`, *optional*): classes of the class head, 'no object'
            not counted.
        num_groups (`int`), group_names (`list[str]`, *optional*): K code groups (modality and body site).
        group_patterns (`dict[str, list[str]]`, *optional*): group name -> shell patterns of "MODALITY/SITE", as the
            data spell them; a group without patterns takes the images whose modality and site its name says.
        group_orientations (`dict[str, str]`, *optional*): group name -> how most of its training images lie that were
            cut from volumes: what is at their right and at their bottom, two letters of L, R, A, P, S, I ("LP": axial,
            the patient's left at the right, the back at the bottom). Groups of which it is not known are left out.
        codes_per_group (`int`): M, codes a group.
        code_dim (`int`): d_c, width of a code.
        region_code_start_id (`int`): vocabulary id of `[C0_0]`; the other K*M - 1 follow in row-major order.
        use_region_codebook (`bool`): `False` for the ablation with one `[SEG]` token (K = M = 1).
        mask_decoder (`"perceiver"` or `"head"`): run the whole perceiver on a code's state, or only the segmentation
            head.
        region_state_offset (`0` or `-1`): which state stands for a code: its own, or the one that predicted it.
        bce_loss_weight, dice_loss_weight, class_loss_weight (`float`): weights in the perceiver's loss and matching
            cost.
        no_object_weight (`float`): weight of the 'no object' class in the class loss.
        commitment_loss_weight (`float`): weight of the commitment term of the codebook's loss.
        auxiliary_loss (`bool`): supervise every perceiver stage, not only the last.
        use_class_queries (`bool`): learn a query for each mask class, beside the region queries. The target of such a
            query is known from the first step, without matching, as a code's will be: small models learn to segment
            many times faster. A loss then draws the states of codes to these queries.
        alignment_loss_weight (`float`): weight of that loss.
        quantize_unmatched_regions (`bool`): whether region queries that found nothing take part in learning codes.
        initializer_range (`float`): standard deviation of newly made language-side weights.

    Raises:
        ValueError: if two settings contradict each other; the message names both values.
    """

    model_type = "medsight"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    # What Trainer's evaluation leaves where it is: it would gather it from all batches and processes.
    keys_to_ignore_at_inference = [
        *(
            "cache",
            "past_key_values",
            "hidden_states",
            "attentions",
            "last_hidden_state",
            "image_outputs",
            "mask_logits",
        ),
        *("region_embeddings", "image_features", "masks_queries_logits", "class_queries_logits", "auxiliary_logits"),
        *("upsampled_features", "patch_features", "quantized_codes"),
    ]

    text_config: Any = None
    vision_config: Any = None
    image_size: Any = None
    image_token_id: int = 151655
    vision_feature_layer: int = -2
    use_region_embeddings: bool = True
    patch_pooling: int = 1
    num_region_queries: int = 20
    perceiver_num_stages: int = 3
    perceiver_num_heads: int = 8
    perceiver_head_dim: int = 64
    perceiver_ffn_multiplier: int = 4
    mask_projection_init_std: float | None = None
    mask_logits_scale: float = 1.0
    num_mask_classes: int = 17
    mask_class_names: list[str] | None = None
    num_groups: int = 18
    group_names: Any = None
    group_patterns: dict[str, list[str]] | None = None
    group_orientations: dict[str, str] | None = None
    codes_per_group: int = 32
    code_dim: int = 64
    region_code_start_id: int = 151669
    use_region_codebook: bool = True
    mask_decoder: str = "perceiver"
    region_state_offset: int = 0
    bce_loss_weight: float = 1.0
    dice_loss_weight: float = 1.0
    class_loss_weight: float = 1.0
    no_object_weight: float = 0.1
    commitment_loss_weight: float = 0.25
    auxiliary_loss: bool = False
    use_class_queries: bool = False
    alignment_loss_weight: float = 1.0
    quantize_unmatched_regions: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _sub_config(self.text_config, PRESETS["8b"]["text_config"])
        self.vision_config = _sub_config(self.vision_config, PRESETS["8b"]["vision_config"])
        if self.image_size is None:
            self.image_size = getattr(self.vision_config, "image_size", 224)
        if self.group_names is None:
            self.group_names = [f"group {k}" for k in range(self.num_groups)]
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**{**kwargs, "auto_map": dict(AUTO_MAP)})
        self.refuse_contradictions()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MedSightConfig":
        """A configuration by name: `tiny` (tests), `nano` (trained from scratch on a laptop), `laptop` (SmolLM2-135M,
        DINOv2 ViT-S), `small` (Qwen3-0.6B, CLIP ViT-B/16), `8b` (the published model).

        Raises:
            ValueError: for an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(sorted(PRESETS))}")
        return cls(**{**copy.deepcopy(PRESETS[name]), **overrides})

    @property
    def vision_hidden_size(self) -> int:
        """d, channels of the chosen feature map."""
        return _feature_map(self)[0]

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(h, w) of the chosen feature map."""
        side = self.image_size // _feature_map(self)[1]
        return side, side

    @property
    def mask_size(self) -> tuple[int, int]:
        """(height, width) of mask logits: the patch grid, doubled by every perceiver stage."""
        h, w = self.patch_grid
        return h * 2**self.perceiver_num_stages, w * 2**self.perceiver_num_stages

    @property
    def image_seq_length(self) -> int:
        """Rows that one image takes in the language model: (h / pooling) * (w / pooling) patch rows, then N region
        rows."""
        h, w = (side // self.patch_pooling for side in self.patch_grid)
        return h * w + (self.num_region_queries if self.use_region_embeddings else 0)

    @property
    def num_region_codes(self) -> int:
        """K*M, region codes in the vocabulary."""
        return self.num_groups * self.codes_per_group

    def region_code_token(self, group: int, index: int) -> str:
        """The token's spelling for code `index` (m) of group `group` (k), both counted from 0."""
        if not (0 <= group < self.num_groups and 0 <= index < self.codes_per_group):
            raise ValueError(
                f"no code {index} of group {group}: there are {self.num_groups} groups of {self.codes_per_group} codes"
            )
        return f"[C{group}_{index}]" if self.use_region_codebook else SEG_TOKEN

    def to_dict(self) -> dict[str, Any]:
        # A folder loaded from the Hub carries "repo--module.Class" entries; the files beside a save are plain again.
        values = {**super().to_dict(), "auto_map": dict(AUTO_MAP)}
        values.pop("use_cache", None)  # which Trainer leaves behind; the language model has its own
        return values

    def refuse_contradictions(self) -> None:
        """Raise ValueError, naming both values, where two settings contradict each other; construction calls it."""
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self._refuse_unfit_encoder()
        self._refuse_unfit_language_model()
        self._refuse_unfit_codes()
        if self.mask_decoder not in MASK_DECODERS:
            raise ValueError(f"mask_decoder={self.mask_decoder!r}: choose one of {MASK_DECODERS}")
        if self.region_state_offset not in (0, -1):
            raise ValueError(f"region_state_offset={self.region_state_offset}: choose 0 (the code's own state) or -1")

    def _refuse_unfit_encoder(self) -> None:
        vision, size, layer = self.vision_config, self.image_size, self.vision_feature_layer
        width, stride, layers = _feature_map(self)
        stride = getattr(vision, "deepest_stride", stride)
        fixed = vision.image_size if vision.model_type in ("clip_vision_model", "siglip_vision_model") else size
        if size != fixed:
            raise ValueError(f"image_size={size} contradicts vision_config.image_size={fixed}, the encoder's one size")
        if not -layers <= layer < layers:
            raise ValueError(
                f"vision_feature_layer={layer}: the encoder has {layers} hidden states, from -{layers} on"
            )
        if size % stride:
            raise ValueError(
                f"image_size={size} is not a multiple of the encoder's stride of {stride} pixels: masks would be "
                f"shifted. Nearest: {size // stride * stride}"
            )
        if any(side % self.patch_pooling for side in self.patch_grid):
            raise ValueError(f"patch_pooling={self.patch_pooling} does not divide the patch grid {self.patch_grid}")
        if width % 4:
            raise ValueError(f"vision width {width}: the 2-D sine position encoding needs a multiple of 4")

    def _refuse_unfit_language_model(self) -> None:
        kind = f"text_config.model_type={self.text_config.model_type!r}"
        if not hasattr(self.text_config, "num_attention_heads"):
            raise ValueError(f"{kind} is no decoder with attention: use Qwen3, Qwen2 or Llama")
        for name in ("logits_scaling", "logit_scale", "final_logit_softcapping"):
            if (value := getattr(self.text_config, name, None)) not in (None, 1):
                raise ValueError(f"text_config.{name}={value}: {kind} scales its logits; use Qwen3, Qwen2 or Llama")

    def _refuse_unfit_codes(self) -> None:
        groups, codes, vocab = self.num_groups, self.codes_per_group, self.text_config.vocab_size
        first, last = self.region_code_start_id, self.region_code_start_id + self.num_region_codes - 1
        if not self.use_region_codebook and (groups, codes) != (1, 1):
            raise ValueError(
                f"use_region_codebook=False: num_groups={groups} and codes_per_group={codes} must both be 1"
            )
        if len(self.group_names) != groups:
            raise ValueError(f"group_names has {len(self.group_names)} entries but num_groups={groups}")
        for by_group in ("group_patterns", "group_orientations"):
            for name in getattr(self, by_group) or {}:
                if name not in self.group_names:
                    raise ValueError(f"{by_group} has {name!r}, which is none of group_names: {self.group_names}")
        for name, orientation in (self.group_orientations or {}).items():
            if not ORIENTATION.fullmatch(orientation):
                raise ValueError(
                    f"group_orientations has {orientation!r} for {name!r}: expected what is at the right and at the "
                    "bottom, two letters of L, R, A, P, S and I, such as LP"
                )
        classes = self.num_mask_classes if self.mask_class_names is None else len(self.mask_class_names)
        if classes != self.num_mask_classes:
            raise ValueError(f"mask_class_names has {classes} entries but num_mask_classes={self.num_mask_classes}")
        if first < 0 or last >= vocab:
            raise ValueError(
                f"region codes take ids {first} to {last} (region_code_start_id={first}, {groups} groups of {codes}) "
                f"but text_config.vocab_size={vocab}"
            )
        if first <= self.image_token_id <= last or not 0 <= self.image_token_id < vocab:
            raise ValueError(
                f"image_token_id={self.image_token_id} must be in the vocabulary (text_config.vocab_size={vocab}) "
                f"and outside the region codes ({first} to {last})"
            )


def _sub_config(value: dict | PreTrainedConfig | None, default: dict) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    settings = copy.deepcopy(default if value is None else value)
    return AutoConfig.for_model(settings.pop("model_type", default["model_type"]), **settings)


def _feature_map(config: MedSightConfig) -> tuple[int, int, int]:
    """(channels, pixels a cell, number of hidden states) of the encoder's chosen hidden state."""
    vision, layer = config.vision_config, config.vision_feature_layer
    if vision.model_type == MedSightUNetConfig.model_type:
        return vision.hidden_size, vision.patch_size, 1
    # No grid are patches that are dropped at random, windows that merge, rows after the patches, and patches of any
    # size and number.
    gridless = any(hasattr(vision, name) for name in ("mask_ratio", "depths", "num_detection_tokens"))
    gridless = gridless or vision.model_type in ("siglip2_vision_model", "pixtral")
    patch_size = getattr(vision, "patch_size", None)
    if not gridless and hasattr(vision, "hidden_size") and isinstance(patch_size, int):
        return vision.hidden_size, patch_size, vision.num_hidden_layers + 1
    if vision.model_type == "resnet":
        widths = [vision.embedding_size, *vision.hidden_sizes]
        strides = [4] + [4 * 2 ** (stage + vision.downsample_in_first_stage) for stage in range(len(widths) - 1)]
    elif hasattr(vision, "hidden_sizes") and isinstance(patch_size, int):
        widths = [vision.hidden_sizes[0], *vision.hidden_sizes]
        strides = [patch_size] + [patch_size * 2**stage for stage in range(len(widths) - 1)]
    else:
        raise ValueError(
            f"vision_config.model_type={vision.model_type!r} is not an encoder that yields a feature grid: "
            "use CLIP, SigLIP, DINOv2, ResNet, ConvNeXt or medsight_unet"
        )
    inside = layer if -len(widths) <= layer < len(widths) else -1  # any other is refused with the number of them
    return widths[inside], strides[inside], len(widths)
