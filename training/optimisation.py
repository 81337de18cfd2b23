"""The optimizer of small models trained from scratch: Muon for inner matrices and kernels, AdamW for the rest.

Other runs take AdamW, or any other that `TrainingArguments.optim` names.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


# parts of the names of layers that turn a choice into a vector or a vector into a choice
FOR_ADAMW = (
    *("vision_tower.embedder", "region_queries", "class_queries", "class_predictor"),
    *("group_classifier", "codebook.codes", "embed_tokens", "lm_head"),
)


class MuonWithAdamW(torch.optim.AdamW):
    """Momentum whose update is made orthogonal (Keller Jordan, 2024) in groups with `muon=True`, AdamW in the others.

    With the scale of Moonlight (arXiv 2502.16982), 0.2 * sqrt(longer side), so that learning rates are like AdamW's.
    Parameters of one shape are orthogonalised together: in a small model the calls cost more than the arithmetic.

    Example:

    ```python
    >>> import torch
    >>> from medsight.training.optimisation import muon_with_adamw
    >>> optimizer = muon_with_adamw(torch.nn.Linear(3, 3), 1e-2, 1e-3, 0.0)
    >>> [group["muon"] for group in optimizer.param_groups]
    [True, False]

    ```
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float = 0.95, **kwargs: Any) -> None:
        super().__init__([{"muon": False, "momentum": momentum, **group} for group in groups], **kwargs)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                self._muon_step(group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _muon_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, torch.Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            average = state.setdefault("average", torch.zeros_like(parameter))
            state.setdefault("step", torch.zeros(()))  # AdamW looks for it in what is loaded
            average.lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(average, group["momentum"]).flatten(1)
            by_shape[tuple(update.shape)].append((parameter, update))
        for shape, members in by_shape.items():
            updates = orthogonalise(torch.stack([update for _, update in members]))
            for (parameter, _), update in zip(members, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of (n, rows, columns) matrices near 1 by five Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def muon_with_adamw(
    model: nn.Module, muon_learning_rate: float, learning_rate: float, weight_decay: float, **options: Any
) -> MuonWithAdamW:
    """The optimizer of a model's trainable parameters; vectors, lookup tables and the first and last layers (see
    `FOR_ADAMW`) go to AdamW, and vectors do not decay.

    Args:
        options: `betas` and `eps` of AdamW.
    """
    matrices, tables, vectors = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            outer = any(part in name for part in FOR_ADAMW)
            (vectors if parameter.ndim < 2 else tables if outer else matrices).append(parameter)
    groups = [
        {"params": matrices, "lr": muon_learning_rate, "weight_decay": weight_decay, "muon": True},
        {"params": tables, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return MuonWithAdamW([group for group in groups if group["params"]], lr=learning_rate, **options)
