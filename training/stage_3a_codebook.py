"""Stage 3a: the region codebook and the group classifier, on the frozen perceiver's region embeddings."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from modeling_medsight.loss_medsight import mask_bce, mask_dice
from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration

from .optimisation import Optimisation, train_only
from .views import View


@dataclass(frozen=True)
class CodebookStage:
    """Settings of stage 3a; codes that `revive_every` steps left unused are moved onto regions of their group."""

    steps: int
    batch_size: int = 8
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.0
    weight_decay: float = 0.0
    warmup: int = 20
    revive_every: int = 50
    kmeans_rounds: int = 10


def train_codebook(
    model: MedSightForConditionalGeneration, views: list[View], settings: CodebookStage, generator: torch.Generator
) -> None:
    """Train codes, W_q, W_m and the group classifier in place, then start the code rows as P_vt(W_m(code)).

    Only regions that a mask was matched with are quantised: a code is to stand for a region, not for a query that
    found nothing. The perceiver's loss on the reconstruction uses the pairs that the continuous embeddings got.
    """
    config, core = model.config, model.model
    codebook, perceiver = core.codebook, core.region_perceiver
    class_ids = {name: index for index, name in enumerate(config.mask_class_names)}
    parameters = train_only(model, ("model.codebook.", "model.group_classifier."))
    with_regions = [view for view in views if (view.queries >= 0).any()]
    _start_codes_by_kmeans(model, with_regions, settings.kmeans_rounds, generator)
    optimisation = Optimisation(
        "stage 3a codebook",
        parameters,
        settings.steps,
        settings.learning_rate,
        settings.muon_learning_rate,
        settings.weight_decay,
        settings.warmup,
    )
    used = torch.zeros(config.num_groups, config.codes_per_group, dtype=torch.long)
    for step in range(1, settings.steps + 1):
        drawn = torch.randint(len(with_regions), (settings.batch_size,), generator=generator).tolist()
        batch = [with_regions[index] for index in drawn]
        patches = torch.stack([view.patch_features for view in batch])
        groups = torch.tensor([view.record.group for view in batch])
        with torch.no_grad():
            image_features = perceiver(patches.unflatten(1, config.patch_grid)).image_features
        rows, queries, targets, classes = [], [], [], []
        for row, view in enumerate(batch):
            for index, (target, query) in enumerate(zip(view.record.targets, view.queries.tolist(), strict=True)):
                if query >= 0:
                    rows.append(row)
                    queries.append(query)
                    targets.append(view.masks[index].float() / 255)
                    classes.append(class_ids[target])
        regions = torch.stack([batch[row].region_embeddings[query] for row, query in zip(rows, queries, strict=True)])
        region_groups = groups[rows]
        quantized = codebook(regions[:, None], region_groups)
        used.index_put_((region_groups, quantized.code_indices[:, 0]), torch.ones_like(region_groups), accumulate=True)

        reconstructed, head = quantized.reconstructed_regions[:, 0], perceiver.segmentation_head
        logits = torch.einsum("nd,nhwd->nhw", head.mask_projection(reconstructed), image_features[rows])
        masks = torch.stack(targets)
        through_codes = (mask_bce(logits, masks) + mask_dice(logits, masks)).mean()
        through_codes = through_codes + F.cross_entropy(head.class_predictor(reconstructed), torch.tensor(classes))
        group_loss = F.cross_entropy(core.group_classifier(patches.mean(1)), groups)
        loss = quantized.vq_loss + quantized.reconstruction_loss + through_codes + group_loss
        optimisation.step(
            loss,
            vq=quantized.vq_loss,
            reconstruction=quantized.reconstruction_loss,
            through_codes=through_codes,
            group=group_loss,
        )
        if step % settings.revive_every == 0 and step <= settings.steps // 2:
            _revive_dead_codes(model, with_regions, used, generator)
            used.zero_()
    start_code_rows(model)
    report_usage(model, with_regions)


@torch.no_grad()
def start_code_rows(model: MedSightForConditionalGeneration) -> None:
    """Set every code's row of the vocabulary to P_vt(W_m(code))."""
    config, core = model.config, model.model
    rows = core.vision_to_text_projector(core.codebook.decode(core.codebook.code_table())).flatten(0, 1)
    where = slice(config.region_code_start_id, config.region_code_start_id + config.num_region_codes)
    core.get_input_embeddings().weight[where] = rows
    if not config.tie_word_embeddings:
        model.lm_head.weight[where] = rows


@torch.no_grad()
def report_usage(model: MedSightForConditionalGeneration, views: list[View]) -> dict[str, tuple[float, float]]:
    """Share of live codes and perplexity a group, over the regions that have a mask; printed and returned."""
    vectors, groups = _encoded_regions(model, views)
    table, usage = model.model.codebook.code_table(), {}
    for group in groups.unique().tolist():
        nearest = torch.cdist(vectors[groups == group], table[group]).argmin(1)
        share = torch.bincount(nearest, minlength=len(table[group])).float()
        share = share / share.sum()
        perplexity = torch.exp(-(share * share.clamp(min=1e-9).log()).sum()).item()
        usage[model.config.group_names[group]] = ((share > 0).float().mean().item(), perplexity)
    text = ", ".join(f"{name} {100 * live:.0f}%/{perplexity:.1f}" for name, (live, perplexity) in usage.items())
    print(f"codes in use / perplexity: {text}", flush=True)
    return usage


@torch.no_grad()
def _encoded_regions(model: MedSightForConditionalGeneration, views: list[View]) -> tuple[torch.Tensor, torch.Tensor]:
    """W_q of every matched region, (n, d_c), and the group of each, (n,)."""
    regions = [view.region_embeddings[view.queries[view.queries >= 0]] for view in views]
    groups = [torch.full((len(region),), view.record.group) for region, view in zip(regions, views, strict=True)]
    return model.model.codebook.encode(torch.cat(regions)), torch.cat(groups)


@torch.no_grad()
def _start_codes_by_kmeans(
    model: MedSightForConditionalGeneration, views: list[View], rounds: int, generator: torch.Generator
) -> None:
    vectors, groups = _encoded_regions(model, views)
    codes = model.model.codebook.codes
    for group in groups.unique().tolist():
        points = vectors[groups == group]
        start = torch.randint(len(points), (codes.shape[1],), generator=generator)
        centres = points[start] + 1e-3 * torch.randn(codes.shape[1:], generator=generator)
        for _ in range(rounds):
            nearest = torch.cdist(points, centres).argmin(1)
            for index in nearest.unique().tolist():
                centres[index] = F.normalize(points[nearest == index].mean(0), dim=0)
        codes[group] = centres


@torch.no_grad()
def _revive_dead_codes(
    model: MedSightForConditionalGeneration, views: list[View], used: torch.Tensor, generator: torch.Generator
) -> None:
    vectors, groups = _encoded_regions(model, views)
    for group in groups.unique().tolist():
        points = vectors[groups == group]
        dead = (used[group] == 0).nonzero()[:, 0]
        drawn = torch.randint(len(points), (len(dead),), generator=generator)
        model.model.codebook.codes[group, dead] = points[drawn]
