"""Parameters in shards over processes (FSDP2): what gathers them besides `forward`.

Units are the language model's layers alone (`training/accelerate/fsdp2.yaml`); all else is the root's. With other
units a process without an image or a code passes through them all the same, over a blank one.
"""

from typing import Any

from torch.distributed.fsdp import register_fsdp_forward_method


METHODS = ("get_region_features", "get_image_features", "quantize_regions", "decode_regions", "generate")


def gather_in_methods(model: Any) -> None:
    """Have the methods of a model under `fully_shard` gather its parameters, as `forward` does; else leave it."""
    for name in METHODS:
        if hasattr(model, name) and name not in vars(model):
            register_fsdp_forward_method(model, name)
