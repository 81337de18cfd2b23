"""What every stage shares: which parameters train, the optimizer, the schedule and the printed log."""

import math
import time
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn


def train_only(model: nn.Module, prefixes: Iterable[str]) -> list[nn.Parameter]:
    """Freeze all parameters but those whose name starts with one of `prefixes`, and return these.

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
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Optimisation:
    """AdamW with warm-up and cosine decay over a known number of steps, gradient clipping and a log of mean losses.

    Args:
        name: the stage's name in the log.
        parameters: what trains; matrices and kernels decay by `weight_decay`, vectors do not.
        steps: optimizer steps in all.
        learning_rate: the peak, reached after `warmup` steps; the cosine ends at 1% of it.
        log_every: steps between two lines of the log.
    """

    def __init__(
        self,
        name: str,
        parameters: list[nn.Parameter],
        steps: int,
        learning_rate: float,
        weight_decay: float = 0.0,
        warmup: int = 50,
        log_every: int = 100,
    ) -> None:
        self.name, self.parameters, self.steps, self.log_every = name, parameters, steps, log_every
        decayed = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2),
        )
        self.done, self.started = 0, time.monotonic()
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def step(self, loss: torch.Tensor, **parts: torch.Tensor) -> None:
        """One update by `loss`; `parts` are losses to log. Raises FloatingPointError where the loss is not finite."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{self.name}: the loss of step {self.done} is {loss.item()}")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.scheduler.step()
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
