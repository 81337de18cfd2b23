"""What every stage shares: which parameters train, the optimizer, the schedule and the printed log."""

import math
import time
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn


# parts of the names of layers that turn a choice into a vector or a vector into a choice
FOR_ADAMW = (
    *("vision_tower.embedder", "region_queries", "class_queries", "class_predictor"),
    *("group_classifier", "codebook.codes", "embed_tokens", "lm_head"),
)


def train_only(model: nn.Module, prefixes: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
    """Freeze all parameters but those whose name starts with one of `prefixes`, and return these with their names.

    Modules without a training parameter go to eval mode, so that a frozen encoder's batch statistics stay too.

    Raises:
        ValueError: a prefix names no parameter.
    """
    prefixes = tuple(prefixes)
    named = list(model.named_parameters(remove_duplicate=False))  # a tied head counts under both its names
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name, _ in named):
            raise ValueError(f"no parameter starts with {prefix!r}")
    for name, parameter in named:
        parameter.requires_grad_(name.startswith(prefixes))
    for module in model.modules():
        module.training = any(parameter.requires_grad for parameter in module.parameters())
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices and convolution kernels (Keller Jordan, 2024).

    With the scale of Moonlight (arXiv 2502.16982), 0.2 * sqrt(longer side), so that learning rates are like AdamW's.
    Parameters of one shape are orthogonalised together: in a small model the calls cost more than the arithmetic.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, torch.Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
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


class Optimisation:
    """Muon for inner matrices and kernels, AdamW for the rest; warm-up, cosine decay, clipping, a log of mean losses.

    Args:
        name: the stage's name in the log.
        named_parameters: what trains. Inner matrices and kernels take Muon; vectors, lookup tables and the first and
            last layers (see `FOR_ADAMW`) AdamW. Vectors do not decay.
        steps: optimizer steps in all.
        learning_rate: AdamW's peak, reached after `warmup` steps; the cosine ends at 1% of it.
        muon_learning_rate: Muon's peak; 0 gives everything to AdamW.
        log_every: steps between two lines of the log.
    """

    def __init__(
        self,
        name: str,
        named_parameters: list[tuple[str, nn.Parameter]],
        steps: int,
        learning_rate: float,
        muon_learning_rate: float = 0.0,
        weight_decay: float = 0.0,
        warmup: int = 50,
        log_every: int = 100,
    ) -> None:
        self.name, self.steps, self.log_every = name, steps, log_every
        self.parameters = [parameter for _, parameter in named_parameters]
        inner = {
            id(parameter)
            for name, parameter in named_parameters
            if muon_learning_rate and parameter.ndim > 1 and not any(part in name for part in FOR_ADAMW)
        }
        matrices = [parameter for parameter in self.parameters if id(parameter) in inner]
        outer = [parameter for parameter in self.parameters if id(parameter) not in inner]
        decayed = [parameter for parameter in outer if parameter.ndim > 1]
        others = [parameter for parameter in outer if parameter.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99))]
        if matrices:
            self.optimizers.append(Muon(matrices, muon_learning_rate, weight_decay))

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)

        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in self.optimizers]
        self.done, self.started = 0, time.monotonic()
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def step(self, loss: torch.Tensor, **parts: torch.Tensor) -> None:
        """One update by `loss`; `parts` are losses to log. Raises FloatingPointError where the loss is not finite."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{self.name}: the loss of step {self.done} is {loss.item()}")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        self.done += 1
        for key, value in {"loss": loss, **parts}.items():
            self.sums[key] += float(value.detach())
            self.counts[key] += 1
        if self.done % self.log_every == 0 or self.done == self.steps:
            means = "  ".join(f"{key} {self.sums[key] / self.counts[key]:.4f}" for key in self.sums)
            seconds = time.monotonic() - self.started
            print(f"{self.name}  step {self.done}/{self.steps}  {means}  {seconds:.0f} s", flush=True)
            self.sums.clear()
            self.counts.clear()
