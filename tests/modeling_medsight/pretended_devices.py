"""Devices that this machine does not have: tensors that say they are on one, and operations that refuse two of them.

The numbers are computed on the CPU. Run as a program, it spreads models over such devices, by the hooks of a
`device_map`, and compares what they give with what they give whole.
"""

from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.utils import set_module_tensor_to_device
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from modeling_medsight import MedSightRegionModel
from tests.modeling_medsight.configurations import (
    CLOSE,
    ROWS,
    labelled,
    make_batch,
    make_config,
    make_model,
    perceiving,
)


class Elsewhere(_DummyBackendModule):
    """What torch asks of a kind of device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class ElsewhereTensor(torch.Tensor):
    """A tensor that says it is on another device than its content."""

    @staticmethod
    def __new__(cls, content: torch.Tensor, device: torch.device) -> "ElsewhereTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls, content.size(), strides=content.stride(), dtype=content.dtype, device=device
        )

    def __init__(self, content: torch.Tensor, device: torch.device) -> None:
        self.content = content

    def __repr__(self) -> str:
        return f"ElsewhereTensor({tuple(self.shape)}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, *args: Any) -> Any:
        raise AssertionError("needs PretendedDevices")


class PretendedDevices(TorchDispatchMode):
    """Refuses what a GPU refuses: tensors of two devices, but for indices and single numbers on the CPU."""

    indexing = ("aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        inner_args, inner = tree_map_only(ElsewhereTensor, lambda tensor: tensor.content, (args, kwargs))
        if func is torch.ops.aten.copy_.default:
            inner_args[0].copy_(inner_args[1])
            return args[0]
        if func is not torch.ops.aten._to_copy.default:
            may_be_on_cpu = tensors[1:] if str(func) in self.indexing else [t for t in tensors if t.ndim == 0]
            free = {id(tensor) for tensor in may_be_on_cpu if tensor.device.type == "cpu"}
            devices = {str(tensor.device) for tensor in tensors if id(tensor) not in free}
            if len(devices) > 1:
                raise RuntimeError(f"{func}: tensors on {sorted(devices)}")
        device = next(
            (tensor.device for tensor in tensors if isinstance(tensor, ElsewhereTensor)), torch.device("cpu")
        )
        if inner.get("device") is not None:
            device, inner["device"] = torch.device(inner["device"]), torch.device("cpu")
        result = func(*inner_args, **inner)
        if func._schema.is_mutable and isinstance(result, torch.Tensor):
            return args[0]
        if device.type == "cpu":
            return result
        return tree_map_only(torch.Tensor, lambda tensor: ElsewhereTensor(tensor, device), result)


class PretendedContents(TorchFunctionMode):
    """What torch does in C++ alone: tensors made of lists, and lists of tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func in (torch.Tensor.tolist, torch.Tensor.numpy):
            args = tree_map_only(ElsewhereTensor, lambda tensor: tensor.content, args)
        return func(*args, **kwargs)


def outcomes(whole: Any, regions: Any, device: str) -> dict[str, Any]:
    """What a model, and what sees of it, give for inputs on `device`: answers, masks and losses."""
    rows, texts = make_batch(whole.config, ROWS), labelled(whole.config, ROWS[:2])
    images = perceiving(whole.config, (2, 1))
    rows, texts, images = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (rows, texts, images))
    ways = {"greedy": {}, "beams": {"num_beams": 2}, "classified": {"allowed_groups": "predicted"}}
    found: dict[str, Any] = {
        name: dict(whole.generate(**rows, max_new_tokens=6, do_sample=False, **settings))
        for name, settings in ways.items()
    }
    found = {
        name: [answer["sequences"], answer["mask_logits"], answer["region_scores"]] for name, answer in found.items()
    }
    found["decoded"] = whole.decode_regions(**rows).mask_logits
    found["losses"] = whole(**texts).loss
    found["losses of regions"] = regions.train()(**images).loss
    regions.eval()
    pixel_values, pairs = images["pixel_values"], [[(0, 1)], [(1, 0), (1, 2)]]
    found["codes"] = regions.decode_codes(code_indices=pairs, pixel_values=pixel_values)
    group_labels = images["group_labels"]
    found["quantized"] = regions.quantize_regions(regions(pixel_values).region_embeddings, group_labels).code_indices
    return found


SPLIT = ("", "model", "vision_tower", "encoder", "layers", "region_perceiver", "stages", "language_model")


def parts(module: torch.nn.Module, name: str = "") -> list[str]:
    """Names of what goes to a device of its own: layers, the perceiver's stages and queries, the head, ..."""
    if name.split(".")[-1] not in SPLIT:
        return [name]
    inner = [part for child, inside in module.named_children() for part in parts(inside, f"{name}.{child}".strip("."))]
    return inner + [f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)]


def spread(model: Any, devices: int) -> Any:
    """The model over devices in turn."""
    device_map = {name: f"elsewhere:{number % devices}" for number, name in enumerate(parts(model))}
    for name in dict(model.named_parameters()).keys() & device_map.keys():  # no hook moves them: from_pretrained does
        set_module_tensor_to_device(model, name, device_map[name])
    return dispatch_model(model, device_map, main_device="elsewhere:0", force_hooks=True)


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("elsewhere", Elsewhere())
    for name in ("clip-qwen2-head", "resnet-qwen2-auxiliary-loss"):
        model = make_model(make_config(name, use_class_queries=True))
        model.set_attn_implementation("eager")
        regions = MedSightRegionModel(model.config).eval()
        regions.load_state_dict(model.region_model.state_dict())
        with torch.no_grad():
            expected = outcomes(model, regions, "cpu")
            assert sum(map(len, expected["greedy"][1])) > 0
            with PretendedDevices(), PretendedContents():
                found = outcomes(spread(model, 3), spread(regions, 2), "elsewhere:0")
                found = tree_map_only(torch.Tensor, lambda tensor: tensor.to("cpu"), found)
        torch.testing.assert_close(found, expected, **CLOSE)
