"""Memory that training takes: optimizer states, and a pass over tensors without content, as torch counts it."""

import contextlib
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_medsight.loss_medsight import HungarianMatcher

from .optimisation import muon_with_adamw
from .stage import Stage, frozen_modules, trained_module


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
        groups = muon_with_adamw(model, muon_learning_rate, 1e-3, 0.0).param_groups
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


def activation_bytes(
    stage: Stage,
    model: nn.Module,
    size: int,
    *,
    regions: int,
    autocast: torch.dtype | None,
    checkpointing: bool = False,
    compute_dtypes: dict[int, torch.dtype] | None = None,
) -> int:
    """Most bytes that live besides weights, gradients and optimizer states in one micro-batch of a stage.

    The model's own forward and backward pass run, under torch's memory tracker.

    Args:
        stage: whose settings count.
        model: the model that `stage.prepare` was given: with weights, or on the meta device.
        size: images, or conversations with an image each.
        regions: masks an image, or region codes an answer.
        autocast: dtype of mixed precision.
        checkpointing: gradient checkpointing.
        compute_dtypes: id of a parameter on the meta device -> the dtype that it has in the pass, where it is not its
            own.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True) if model.device.type == "meta" else None
    if fake is not None:
        with fake:
            without_content(model, compute_dtypes or {})
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
    model.train()
    for module in frozen_modules(model):
        module.training = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Gradients go as soon as they are there, since they are counted elsewhere.
    hooks = [parameter.register_post_accumulate_grad_hook(drop_gradient) for parameter in trained]
    batch = stage.batch_of_zeros(size, regions)
    with contextlib.ExitStack() as stack:
        if fake is not None:
            batch = tree_map(lambda value: as_fake(value, fake), batch)
            stack.enter_context(fake)
            stack.enter_context(WithoutContent())
        stack.enter_context(patch.object(HungarianMatcher, "forward", match_in_order))
        stack.enter_context(torch.autocast("cpu", autocast or torch.bfloat16, autocast is not None))
        tracker = Tracker()
        tracker.track_external(model)
        stack.enter_context(tracker)
        trained_module(model, stage)(**batch)["loss"].backward()
    for hook in hooks:
        hook.remove()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    weights = sum(count for kind, count in peak.items() if getattr(kind, "name", "") in ("PARAM", "BUFFER"))
    return peak["Total"] - weights


class Tracker(MemTracker):
    """Of the whole alone: of each module it would take much time, and a gradient of every parameter."""

    def _pre_fw_hook(self, *args: Any) -> None:
        pass

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook


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


def drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def match_in_order(
    matcher: nn.Module, masks: torch.Tensor, classes: torch.Tensor, mask_labels: list[torch.Tensor], labels: Any
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """In place of the Hungarian matcher, which needs numbers: query i takes region i."""
    pairs = (torch.arange(min(masks.shape[1], len(regions))) for regions in mask_labels)
    return [(pair, pair) for pair in pairs]


def as_fake(value: Any, mode: FakeTensorMode) -> Any:
    """A tensor of numbers without its content; ids and all else as they are."""
    is_numbers = isinstance(value, torch.Tensor) and value.is_floating_point()
    return mode.from_tensor(value) if is_numbers else value


class WithoutContent(TorchDispatchMode):
    """Within a `FakeTensorMode`: numbers are its tensors, which have shapes and no content, while ids, counts and
    places, which say where numbers go, are real. A number whose value is asked for is 0, and a condition holds."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        of_numbers = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not tensors:
            of_numbers = kwargs.get("dtype", torch.get_default_dtype()).is_floating_point
        if not of_numbers:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype is torch.bool
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [place for index in args[1] for place in places_of(index)])
        return func(*args, **kwargs)


def places_of(index: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """An index as integers, where it is a real mask: the shape of what a mask picks depends on its content."""
    if index is None or index.dtype is not torch.bool or isinstance(index, FakeTensor):
        return [index]
    with unset_fake_temporarily():
        return index.nonzero(as_tuple=True)
