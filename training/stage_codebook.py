"""Stages of the kind `codebook`: the region codebook and the group classifier, on the frozen perceiver's region
embeddings. Stage 3a of the paper.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from medsight.inference.code_assignment import kmeans
from medsight.processes import on_main

from .collators import RegionCollator
from .dataset import RegionDataset
from .stage import Stage, StageSettings, batch_to, dice, evenly, group_places, in_batches, keep_rows, ratio, train_only
from .stage_regions import region_batch_of_zeros


@dataclass
class CodebookSettings(StageSettings):
    """Settings of stages of the codebook.

    Attributes:
        trains: `codebook`: codes, W_q, W_m and the group classifier.
        groups: code groups to start and train alone: their codes and their rows of the group classifier; the codes of
            the others keep their values and W_q and W_m theirs, so that known codes mean what they meant. All by
            default.
        kmeans_images: training images whose regions the codes start from, as centres of k-means; 0 leaves them random.
        kmeans_rounds: rounds of k-means.
        revive_every: steps after which codes that no region took are moved onto regions of their group; 0 is never.
        revive_until: share of the steps after which no code is moved any more.
        revive_groups: code groups whose codes may be moved so, `groups` by default. In a group of an extended model
            that has new structures, codes that the data do not use go to these; have the old structures in the data.
        revive_images: training images that dead codes are moved onto regions of.
    """

    trains: list[str] = field(default_factory=lambda: ["codebook"])
    groups: list[str] | None = None
    kmeans_images: int = 4096
    kmeans_rounds: int = 10
    revive_every: int = 50
    revive_until: float = 0.5
    revive_groups: list[str] | None = None
    revive_images: int = 256


class CodebookStage(Stage):
    """Trains codes, W_q, W_m and the group classifier; scored by usage, reconstruction and masks through the codes.

    Example:

    ```python
    >>> from medsight.training.stage_codebook import CodebookSettings
    >>> CodebookSettings(revive_every=0).trains
    ['codebook']

    ```
    """

    kind, reads, Settings = "codebook", "regions", CodebookSettings
    parts = ("codebook",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.used = torch.zeros(self.config.num_groups, self.config.codes_per_group, dtype=torch.long)
        self.used_here = torch.zeros_like(self.used)  # by this process, in the step that runs
        self.groups, self.revived_groups = (
            group_places(self.config, names, f"stages.{self.name}: {key}")
            for key, names in (
                ("groups", self.settings.groups),
                ("revive_groups", self.settings.revive_groups or self.settings.groups),
            )
        )
        self.changed = torch.zeros_like(self.used, dtype=torch.bool)  # codes that train, or were moved
        self.changed[self.groups] = True
        self.hooks: list[RemovableHandle] = []
        self.train_dataset: RegionDataset  # codes start from, and are moved onto, regions of pictures as they are

    @classmethod
    def check(cls, settings: Any, arguments: dict[str, Any]) -> None:
        super().check(settings, arguments)
        if settings.groups is not None and arguments.get("weight_decay"):
            raise ValueError(
                f"weight_decay={arguments['weight_decay']} would shrink the codes of all groups, where this stage "
                "trains those of some: set it to 0"
            )

    @property
    def shardable(self) -> bool:
        return False

    def idle(self, model: nn.Module) -> int:
        rows = self.config.num_groups - len(self.groups)
        return rows * sum(weight[0].numel() for weight in rows_by_group(model))

    def prepare(self, model: nn.Module) -> nn.Module:
        model = super().prepare(model)
        if self.settings.groups is None:
            return model
        train_only(model, ["model.codebook.codes", "model.group_classifier."])
        trained = torch.zeros(self.config.num_groups, dtype=torch.bool)
        trained[self.groups] = True
        self.hooks = [keep_rows(weight, trained) for weight in rows_by_group(model)]
        return model

    def dataset(self, rows: Any, training: bool, **common: Any) -> RegionDataset:
        if training:
            unmoved = {**common, "augmenter": None}
            self.train_dataset = RegionDataset(rows, self.canvas, **unmoved)
        return RegionDataset(rows, self.canvas, **common)

    def batch_of_zeros(self, size: int, regions: int) -> dict[str, Any]:
        batch = region_batch_of_zeros(self.config, size, regions)
        return {**batch, "group_labels": torch.zeros(size, dtype=torch.long)}

    def collator(self) -> RegionCollator:
        return RegionCollator(groups=True)

    @torch.no_grad()
    def start(self, model: nn.Module, dataset: RegionDataset) -> None:
        """Codes start as centres of k-means over the regions of their group."""

        def centres() -> torch.Tensor:
            found = codes.cpu().clone()
            vectors, groups = self._regions_of(model, evenly(len(self.train_dataset), self.settings.kmeans_images))
            generator = torch.Generator().manual_seed(self.seed)
            for group in sorted({*groups.tolist()} & {*self.groups}):
                found[group] = kmeans(vectors[groups == group], codes.shape[1], self.settings.kmeans_rounds, generator)
            return found

        codes = model.codebook.codes
        if self.settings.kmeans_images:
            codes.copy_(on_main(centres))

    def after_forward(self, outputs: Any) -> None:
        taken = outputs.quantized_codes.cpu()
        self.used_here.index_put_(tuple(taken.T), torch.ones(len(taken), dtype=torch.long), accumulate=True)

    @torch.no_grad()
    def after_step(self, trainer: Any) -> None:
        """Revive dead codes: move each onto a region of its group."""
        self.used += trainer.accelerator.reduce(self.used_here.to(trainer.args.device), reduction="sum").cpu()
        self.used_here.zero_()
        step, every = trainer.state.global_step, self.settings.revive_every
        if not every or step % every or step > self.settings.revive_until * trainer.state.max_steps:
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        codes = model.codebook.codes

        def revived() -> torch.Tensor:
            found = codes.cpu().clone()
            generator = torch.Generator().manual_seed(self.seed + step)
            count = self.settings.revive_images
            chosen = torch.randint(len(self.train_dataset), (count,), generator=generator).tolist()
            vectors, groups = self._regions_of(model, chosen)
            for group in sorted({*groups.tolist()} & {*self.revived_groups}):
                points = vectors[groups == group]
                dead = (self.used[group] == 0).nonzero()[:, 0]
                drawn = torch.randint(len(points), (len(dead),), generator=generator)
                found[group, dead] = points[drawn].to(found)
            return found

        before = codes.clone()
        codes.copy_(on_main(revived))
        self.changed |= (codes != before).any(-1).cpu()
        self.used.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        return {"used": self.used, "changed": self.changed}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.used, self.changed = state["used"], state.get("changed", self.changed)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> nn.Module:
        for hook in self.hooks:
            hook.remove()
        start_code_rows(super().finish(model), self.changed)
        return model

    def score(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        regions, pairs = matched_regions(model, batch)
        groups = batch["group_labels"]
        quantized = model.quantize_regions(regions.region_embeddings, groups)
        logits = model.region_perceiver.segmentation_head(quantized.reconstructed_regions, regions.image_features)[0]
        used = torch.zeros_like(self.used, dtype=torch.float32, device=model.device)
        result = {"used": used, "regions": 0, "error": 0.0, "dice": 0.0, "images": len(groups)}
        for row, (queries, targets) in enumerate(pairs):
            taken = quantized.code_indices[row][queries]
            used[groups[row]] += taken.bincount(minlength=used.shape[1])
            wanted, given = regions.region_embeddings[row][queries], quantized.reconstructed_regions[row][queries]
            result["error"] += float((wanted.float() - given.float()).square().mean(-1).sum())
            result["dice"] += float(dice(logits[row][queries] > 0, batch["mask_labels"][row][targets] >= 0.5).sum())
            result["regions"] += len(queries)
        result["right_groups"] = (regions.group_logits.argmax(-1) == groups).sum()
        return result

    def summarise(self, totals: dict[str, torch.Tensor]) -> dict[str, float]:
        by_group = {
            name: (float((row > 0).float().mean()), float(torch.special.entr(row / row.sum()).sum().exp()))
            for name, row in zip(self.config.group_names, totals["used"], strict=True)
            if row.sum()
        }
        live, perplexity = zip(*by_group.values(), strict=True) if by_group else ((math.nan,), (math.nan,))
        return {
            "live_codes": statistics.fmean(live),
            "code_perplexity": statistics.fmean(perplexity),
            "reconstruction": ratio(totals, "error", "regions"),
            "dice_through_codes": ratio(totals, "dice", "regions"),
            "group_accuracy": ratio(totals, "right_groups", "images"),
            **{f"live_codes/{name}": value for name, (value, _) in by_group.items()},
            **{f"code_perplexity/{name}": value for name, (_, value) in by_group.items()},
        }

    def example(self, model: nn.Module, sample: dict[str, Any]) -> tuple[list[torch.Tensor], list[str]]:
        batch = batch_to(self.collator()([sample]), model.device)
        regions, ((queries, _),) = matched_regions(model, batch)
        quantized = model.quantize_regions(regions.region_embeddings, batch["group_labels"])
        logits = model.region_perceiver.segmentation_head(quantized.reconstructed_regions, regions.image_features)[0]
        codes = quantized.code_indices[0][queries].tolist()
        labels = [self.config.region_code_token(sample["group"], code) for code in codes]
        return [logits[0][i] > 0 for i in queries], labels

    def _regions_of(self, model: nn.Module, chosen: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """W_q of the matched regions of training images, (n, d_c), and the group of each, (n,), on the CPU."""
        training = model.training
        model.eval()
        vectors, groups = [], []
        for batch in in_batches(self.train_dataset, chosen, self.collator(), 16, model.device):
            regions, pairs = matched_regions(model, batch)
            for row, (queries, _) in enumerate(pairs):
                vectors.append(model.codebook.encode(regions.region_embeddings[row][queries]).cpu())
                groups.append(batch["group_labels"][row].cpu().expand(len(queries)))
        model.train(training)
        return torch.cat(vectors), torch.cat(groups)


def matched_regions(model: nn.Module, batch: dict[str, Any]) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What the model sees in images, and which of their queries show which of their masks."""
    regions = model.get_region_features(batch["pixel_values"])
    masks, classes = regions.masks_queries_logits, regions.class_queries_logits
    return regions, model.perceiver_loss.matcher(masks, classes, batch["mask_labels"], batch["class_labels"])


def rows_by_group(model: nn.Module) -> list[nn.Parameter]:
    """The parameters with a row a code group."""
    return [model.model.codebook.codes, model.model.group_classifier.weight, model.model.group_classifier.bias]


@torch.no_grad()
def start_code_rows(model: nn.Module, chosen: torch.Tensor) -> None:
    """Set the rows of the vocabulary of the chosen codes, a boolean (K, M), to P_vt(W_m(code))."""
    config, core = model.config, model.model
    rows = core.vision_to_text_projector(core.codebook.decode(core.codebook.code_table()[chosen.to(model.device)]))
    where = chosen.flatten().nonzero()[:, 0].to(model.device) + config.region_code_start_id
    words = core.get_input_embeddings().weight
    words[where] = rows.to(words.dtype)
    if model.lm_head.weight is not words:
        model.lm_head.weight[where] = rows.to(words.dtype)
