"""Memory that training takes: optimizer states, and a forward and backward pass on tensors without content."""

import math
import weakref
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_medsight.region_codes_in_text_medsight import CodeLocations
from modeling_medsight.vision_medsight import encode_image

from .optimisation import muon_with_adamw
from .stage import Stage, frozen_modules


WORDS = 128  # tokens beside the image, in a conversation without a limit of its length

# numbers that an optimizer keeps for a parameter, each as many bytes as the parameter's own or as given here
STATES = {"adamw_torch": (2, None), "adamw_torch_fused": (2, None), "adamw_8bit": (2, 1), "adamw_bnb_8bit": (2, 1)}
STATES |= {"paged_adamw_8bit": (2, 1), "sgd": (0, None)}
FOUR_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # a number, its block's scale, and the scales' own


def optimizer_bytes(model: nn.Module, muon_learning_rate: float, name: str) -> int | None:
    """Bytes of an optimizer's states; None for one that is not in `STATES`.

    Args:
        model: whose trainable parameters count.
        muon_learning_rate: above 0, inner matrices take Muon and the rest AdamW, whatever `name` says.
        name: `TrainingArguments.optim`.
    """
    if muon_learning_rate:
        groups = muon_with_adamw(model, muon_learning_rate, 1e-3, 0.0, (0.9, 0.999)).param_groups
        return sum(p.nbytes * (1 if group["muon"] else 2) for group in groups for p in group["params"])
    if name not in STATES:
        return None
    count, size = STATES[name]
    return sum(p.numel() * count * (size or p.itemsize) for p in model.parameters() if p.requires_grad)


def gathered_numbers(model: Any) -> int:
    """Parameters outside of the language model's layers, which sharding wraps, and twice those of the largest."""
    modules = model.model.language_model.modules()
    layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    return sum(parameter.numel() for parameter in model.parameters()) - sum(sizes) + 2 * max(sizes, default=0)


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of tensors that are made inside, as long as each lives.

    Args:
        model: whose parameters' casts to another dtype are counted apart.

    Attributes:
        peak: most bytes alive at once.
        peak_without_casts: the same, casts of parameters left out.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters = {storage_of(parameter) for parameter in model.parameters()}
        self.known: set[int] = set()
        self.alive = self.casts = self.peak = self.peak_without_casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default and storage_of(args[0]) in self.parameters
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor, is_cast)
        return result

    def _count(self, tensor: torch.Tensor, is_cast: bool) -> None:
        storage, key = tensor.untyped_storage(), storage_of(tensor)
        if key in self.known or key in self.parameters:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.alive += size
        self.casts += size * is_cast
        self.peak = max(self.peak, self.alive)
        self.peak_without_casts = max(self.peak_without_casts, self.alive - self.casts)
        weakref.finalize(storage, self._gone, key, size, is_cast)

    def _gone(self, key: int, size: int, is_cast: bool) -> None:
        self.known.discard(key)
        self.alive -= size
        self.casts -= size * is_cast


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def activation_bytes(
    stage: Stage,
    model: nn.Module,
    batch: int,
    *,
    codes: int,
    autocast: torch.dtype | None,
    checkpointing: bool,
    compute_dtypes: dict[int, torch.dtype] | None = None,
) -> tuple[int, int]:
    """Most bytes that live besides weights, gradients and optimizer states in one micro-batch of a stage.

    Args:
        stage: whose settings count.
        model: the MedSight model that `stage.prepare` was given, on the meta device.
        batch: images, or conversations with an image each.
        codes: region codes that an answer cites.
        autocast: dtype of mixed precision.
        checkpointing: gradient checkpointing.
        compute_dtypes: id of a parameter -> the dtype that it has in the pass, where it is not its own.

    Returns:
        The bytes, and without those of parameters cast for mixed precision.
    """
    with FakeTensorMode():
        without_content(model, compute_dtypes or {})
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False, "preserve_rng_state": False})
        return run_counted(stage, model, batch, codes, autocast)


def run_counted(
    stage: Stage, model: nn.Module, batch: int, codes: int, autocast: torch.dtype | None
) -> tuple[int, int]:
    """The two peaks of a pass over zeros; gradients go as soon as they are there, since they are counted elsewhere."""
    model.train()
    for module in frozen_modules(model):
        module.training = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(drop_gradient) for parameter in trained]
    with LiveBytes(model) as counted, torch.autocast("cpu", autocast or torch.bfloat16, autocast is not None):
        outputs = see(stage, model, batch) if stage.reads == "regions" else speak(stage, model, batch, codes)
        sum(output.float().sum() for output in outputs if output.requires_grad).backward()
    for hook in hooks:
        hook.remove()
    return counted.peak, counted.peak_without_casts


def drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def without_content(model: nn.Module, dtypes: dict[int, torch.dtype]) -> None:
    """Put tensors of the active FakeTensorMode in place of a model's parameters and buffers; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}

    def made_of(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=dtypes.get(id(tensor), tensor.dtype), device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return made[id(tensor)]

    held = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    replaced = [(table, name, tensor) for table in held for name, tensor in table.items() if tensor is not None]
    for table, name, tensor in replaced:
        table[name] = made_of(tensor)


def see(stage: Any, model: Any, images: int) -> list[torch.Tensor]:
    """What the losses of a stage on regions are of: masks and classes of the queries that are asked."""
    config, perceiver = stage.config, model.model.region_perceiver
    _, grid, summary = encode_image(model.model.vision_tower, pixels(config, images), config)
    if stage.key == "codebook":
        regions = model.model.perceive(grid, summary)
        codebook = model.model.codebook
        vectors = codebook.encode(regions.region_embeddings)
        through_codes = perceiver.segmentation_head(codebook.decode(vectors), regions.image_features)
        return [regions.group_logits, *through_codes]
    outputs = []
    if config.use_class_queries:
        asked = min(stage.settings.most_asked, config.num_mask_classes)
        queries = perceiver.class_queries[torch.zeros(images, asked, dtype=torch.long)]
        outputs.append(perceiver(grid, queries, torch.ones(images, asked, dtype=torch.bool)))
    matched = max(1, math.ceil(images * stage.settings.matched_share)) if config.use_class_queries else images
    outputs.append(perceiver(grid[:matched]))
    stages = [{"masks": output.masks_queries_logits, "classes": output.class_queries_logits} for output in outputs]
    stages += [logits for output in outputs for logits in output.auxiliary_logits or []]
    return [logits for some in stages for logits in some.values()]


def speak(stage: Any, model: Any, conversations: int, codes: int) -> list[torch.Tensor]:
    """What the losses of a stage on conversations are of: the words' loss, and the masks of cited codes."""
    config, settings, core = stage.config, stage.settings, model.model
    with_image = not stage.text_only
    length = settings.max_length or WORDS + config.image_seq_length * with_image
    ids = torch.zeros(conversations, length, dtype=torch.long)
    rows, regions = model.get_input_embeddings()(ids), None
    if with_image:
        regions = model.get_region_features(pixels(config, conversations))
        seen = core.project_regions(regions).to(rows.dtype)
        rows = torch.cat((seen, rows[:, seen.shape[1] :]), dim=1)
    known = torch.ones_like(ids)
    known[:, -1] = 0  # a padded batch: without padding attention needs no mask, and less memory
    hidden = core.language_model(inputs_embeds=rows, attention_mask=known, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)
    outputs = [model.loss_function(logits=logits, labels=ids, vocab_size=config.text_config.vocab_size)]
    decoded = math.ceil(conversations * settings.mask_share) if stage.decodes_masks else 0
    if decoded:
        places = torch.arange(decoded).repeat_interleave(codes)
        slots = torch.arange(codes).repeat(decoded)
        counts = [codes] * decoded + [0] * (conversations - decoded)
        where = CodeLocations(places, slots + length - codes, places, places, slots, counts, decoded)
        outputs.append(core.decode_codes(hidden, where, regions))
    return outputs


def pixels(config: Any, images: int) -> torch.Tensor:
    return torch.zeros(images, 3, config.image_size, config.image_size)
