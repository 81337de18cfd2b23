"""The losses of training: of what the model sees, and of the masks and states of cited region codes."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import torch_compilable_check

from .loss_medsight import code_mask_loss, mask_bce, mask_dice, resize_masks
from .outputs_medsight import MedSightCausalLMOutputWithPast, MedSightRegionOutput
from .region_codes_in_text_medsight import is_region_code, locate_codes
from .vision_medsight import encode_image


class TrainingLossMixin:
    """Losses of [`MedSightForConditionalGeneration`].

    Every loss is an average over a number of things: masks, images, asked classes or codes. `loss_counts` gives these
    numbers for the whole batch where a call sees a part of it (gradient accumulation, several processes), so that the
    sum over all parts is the loss of the whole, however unevenly they are filled.
    """

    config: Any
    model: Any
    perceiver_loss: Any
    training: bool

    def _perceive(
        self,
        pixel_values: torch.Tensor | None,
        mask_labels: list[torch.Tensor] | None,
        class_labels: list[torch.Tensor] | None,
        group_labels: torch.Tensor | None,
        asked_classes: list[torch.Tensor] | None,
        matched_images: torch.Tensor | None,
        loss_counts: dict[str, float],
    ) -> MedSightCausalLMOutputWithPast:
        """Losses of the perceiver and of the codebook, from pixel values alone."""
        require(pixel_values=pixel_values, mask_labels=mask_labels, class_labels=class_labels)
        refuse_uneven_labels(pixel_values, mask_labels, class_labels)
        _, grid, summary = encode_image(self.model.vision_tower, pixel_values, self.config, any_size=True)
        class_query_loss = None
        if self.config.use_class_queries and group_labels is None:
            class_query_loss = self._class_query_loss(grid, mask_labels, class_labels, asked_classes, loss_counts)
        if matched_images is not None:
            chosen = matched_images.tolist()
            grid, summary = grid[matched_images], summary[matched_images]
            mask_labels, class_labels = [mask_labels[i] for i in chosen], [class_labels[i] for i in chosen]
            group_labels = group_labels[matched_images] if group_labels is not None else None
        regions = self.model.perceive(grid, summary)
        perceiver_loss, pairs = self._perceiver_loss(regions, mask_labels, class_labels, loss_counts)
        codebook_loss = vq_loss = reconstruction_loss = group_loss = quantized_codes = None
        if group_labels is not None:
            group_loss = F.cross_entropy(regions.group_logits.float(), group_labels, reduction="sum")
            group_loss = group_loss / loss_counts.get("images", len(group_labels))
            if self.training:
                vq_loss, reconstruction_loss, through_codes, quantized_codes = self._codebook_losses(
                    regions, mask_labels, class_labels, group_labels, pairs, loss_counts
                )
                codebook_loss = vq_loss + reconstruction_loss + through_codes
        losses = [loss for loss in (perceiver_loss, class_query_loss, codebook_loss, group_loss) if loss is not None]
        return MedSightCausalLMOutputWithPast(
            loss=sum(losses),
            perceiver_loss=perceiver_loss,
            class_query_loss=class_query_loss,
            codebook_loss=codebook_loss,
            vq_loss=vq_loss,
            reconstruction_loss=reconstruction_loss,
            group_loss=group_loss,
            quantized_codes=quantized_codes,
            region_features=regions,
        )

    def _perceiver_loss(
        self,
        regions: MedSightRegionOutput,
        mask_labels: list[torch.Tensor],
        class_labels: list[torch.Tensor],
        loss_counts: dict[str, float],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """The perceiver's loss, averaged over its supervised stages, and the pairs that the last stage matched.

        Earlier stages keep these pairs: a query has one target.
        """
        counts = {"num_masks": loss_counts.get("masks"), "num_images": loss_counts.get("images")}
        last, pairs = self.perceiver_loss(
            regions.masks_queries_logits, regions.class_queries_logits, mask_labels, class_labels, **counts
        )
        earlier = [
            self.perceiver_loss(
                stage["masks_queries_logits"],
                stage["class_queries_logits"],
                mask_labels,
                class_labels,
                pairs,
                **counts,
            )[0]
            for stage in regions.auxiliary_logits or []
        ]
        return sum(earlier, last) / (1 + len(earlier)), pairs

    def _class_query_loss(
        self,
        grid: torch.Tensor,
        mask_labels: list[torch.Tensor],
        class_labels: list[torch.Tensor],
        asked_classes: list[torch.Tensor] | None,
        loss_counts: dict[str, float],
    ) -> torch.Tensor:
        """BCE + Dice of the masks that the classes' own queries give, averaged over supervised stages."""
        if asked_classes is None:
            asked_classes = class_labels
        device, width = grid.device, max(1, *(len(asked) for asked in asked_classes))
        ids = torch.zeros(len(grid), width, dtype=torch.long, device=device)
        known = torch.zeros(len(grid), width, dtype=torch.bool, device=device)
        for row, asked in enumerate(asked_classes):
            ids[row, : len(asked)] = asked
            known[row, : len(asked)] = True
        perceiver = self.model.region_perceiver
        output = perceiver(grid, queries=perceiver.class_queries[ids], query_mask=known)
        stages = [*(stage["masks_queries_logits"] for stage in output.auxiliary_logits or [])]
        stages.append(output.masks_queries_logits)
        wanted = [
            masks_of_classes(masks.to(device), classes.to(device), asked.to(device))
            for masks, classes, asked in zip(mask_labels, class_labels, asked_classes, strict=True)
        ]
        losses = []
        for logits in stages:
            size = tuple(logits.shape[-2:])
            targets = torch.cat([resize_masks(masks, size) for masks in wanted])
            given = logits[known]
            total = (mask_bce(given, targets) + mask_dice(given, targets)).sum() + 0 * logits.float().sum()
            losses.append(total / max(1, loss_counts.get("asked", len(targets))))
        return sum(losses) / len(losses)

    def _codebook_losses(
        self,
        regions: MedSightRegionOutput,
        mask_labels: list[torch.Tensor],
        class_labels: list[torch.Tensor],
        group_labels: torch.Tensor,
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
        loss_counts: dict[str, float],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """VQ loss, reconstruction loss, the perceiver's loss on the reconstructed regions with the same pairs, and
        the codes that regions took."""
        embeddings = regions.region_embeddings
        if self.config.quantize_unmatched_regions:
            rows = torch.arange(len(embeddings)).repeat_interleave(embeddings.shape[1])
            queries = torch.arange(embeddings.shape[1]).repeat(len(embeddings))
            total = loss_counts.get("images", len(embeddings)) * embeddings.shape[1]
        else:
            rows = torch.cat([torch.full_like(found, row) for row, (found, _) in enumerate(pairs)])
            queries = torch.cat([found for found, _ in pairs])
            total = loss_counts.get("masks", len(queries))
        rows, queries = rows.to(embeddings.device), queries.to(embeddings.device)
        if len(rows):
            quantized = self.model.codebook(embeddings[rows, queries][:, None], group_labels[rows])
            regions_of_codes = quantized.reconstructed_regions[:, 0].to(embeddings.dtype)  # bf16 under CPU's autocast
            reconstructed = embeddings.index_put((rows, queries), regions_of_codes)
            share = len(rows) / max(1, total)
            vq_loss, reconstruction_loss = quantized.vq_loss * share, quantized.reconstruction_loss * share
            indices = quantized.code_indices[:, 0]
        else:
            vq_loss = reconstruction_loss = 0 * sum(p.sum() for p in self.model.codebook.parameters()).float()
            reconstructed, indices = embeddings, queries
        through_codes = self.perceiver_loss(
            *self.model.region_perceiver.segmentation_head(reconstructed, regions.image_features),
            mask_labels,
            class_labels,
            pairs,
            loss_counts.get("masks"),
            loss_counts.get("images"),
        )[0]
        return vq_loss, reconstruction_loss, through_codes, torch.stack((group_labels[rows], indices), dim=1)

    def _grounding_losses(
        self,
        input_ids: torch.Tensor | None,
        hidden: torch.Tensor,
        regions: MedSightRegionOutput | None,
        mask_labels: list[torch.Tensor | None] | None,
        code_class_labels: list[torch.Tensor] | None,
        loss_counts: dict[str, float],
    ) -> tuple[list[torch.Tensor] | None, torch.Tensor | None, torch.Tensor | None]:
        """Masks of the cited codes, a tensor a sample, their loss, and the loss that aligns codes with classes."""
        mask_logits = mask_loss = alignment_loss = None
        if mask_labels is not None:
            mask_logits, mask_loss = self._mask_loss(input_ids, hidden, regions, mask_labels, loss_counts)
        if code_class_labels is not None:
            require(input_ids=input_ids)
            alignment_loss = self._alignment_loss(input_ids, hidden, code_class_labels, loss_counts)
        return mask_logits, mask_loss, alignment_loss

    def _mask_loss(
        self,
        input_ids: torch.Tensor | None,
        hidden: torch.Tensor,
        regions: MedSightRegionOutput | None,
        mask_labels: list[torch.Tensor | None],
        loss_counts: dict[str, float],
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        require(input_ids=input_ids)
        if len(mask_labels) != len(input_ids):
            raise ValueError(
                f"{len(mask_labels)} mask_labels for {len(input_ids)} samples: "
                "give one entry a sample, empty if it cites no code"
            )
        left_out = [masks is None for masks in mask_labels]
        given = [hidden.new_zeros(0, 1, 1) if masks is None else masks for masks in mask_labels]
        if any(left_out):
            rows = torch.tensor(left_out, device=input_ids.device)[:, None]
            input_ids = input_ids.masked_fill(rows & is_region_code(input_ids, self.config), -1)
        counts = [len(masks) for masks in given]
        cited = is_region_code(input_ids, self.config).sum(dim=1)
        torch_compilable_check(
            (cited == torch.tensor(counts, device=cited.device)).all(),
            lambda: next(
                f"sample {row} cites {codes} region codes but has {masks} mask_labels"
                for row, (codes, masks) in enumerate(zip(cited.tolist(), counts, strict=True))
                if codes != masks
            ),
        )
        codes = locate_codes(input_ids, self.config, counts=counts)
        if not sum(counts):
            # Every trained parameter stays in the graph, so that data-parallel training need not search for unused
            # ones.
            empty = hidden.new_zeros(0, *self.config.mask_size)
            return [empty for _ in counts], 0 * self.model.text_to_vision_projector(hidden[:, -1]).float().sum()
        require(pixel_values=regions)
        decoded = list(self.model.decode_codes(hidden, codes, regions).split(counts))
        return decoded, code_mask_loss(decoded, given, loss_counts.get("masks"))

    def _alignment_loss(
        self,
        input_ids: torch.Tensor,
        hidden: torch.Tensor,
        code_class_labels: list[torch.Tensor],
        loss_counts: dict[str, float],
    ) -> torch.Tensor:
        """Squared distance of a code's projected state to the query of its class, in units of these queries'
        variance."""
        codes = locate_codes(input_ids, self.config)
        wanted = torch.cat(code_class_labels).to(hidden.device)
        if len(wanted) != len(codes.rows):
            raise ValueError(f"{len(wanted)} code_class_labels for {len(codes.rows)} cited region codes")
        known = wanted >= 0
        states = hidden[codes.rows, codes.positions + self.config.region_state_offset]
        states = self.model.text_to_vision_projector(torch.cat((states[known], hidden[:1, -1]))).float()
        aims = self.model.region_perceiver.class_queries.detach().float()
        distance = (states[:-1] - aims[wanted[known]]).square().mean(-1).sum() / aims.var() + 0 * states.sum()
        return self.config.alignment_loss_weight * distance / max(1, loss_counts.get("codes", int(known.sum())))


def masks_of_classes(masks: torch.Tensor, classes: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """The masks (a, H, W) of asked classes (a,), from an image's masks (n, H, W) and their classes (n,): all of a
    class together, empty where it is not there."""
    if not len(masks):
        return torch.zeros(len(asked), *masks.shape[1:], device=masks.device)
    of_class = (asked[:, None] == classes)[:, :, None, None]
    return (masks.float() * of_class).amax(dim=1)  # no look at what is on a GPU, which would wait for it


def require(**inputs: Any) -> None:
    """Refuse inputs that are `None`, naming them."""
    missing = [name for name, value in inputs.items() if value is None]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}: this loss needs it")


def refuse_useless(where: str, **inputs: Any) -> None:
    """Refuse inputs that are there and would be passed over."""
    given = [name for name, value in inputs.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: of no use {where}")


def refuse_uneven_labels(
    pixel_values: torch.Tensor, mask_labels: list[torch.Tensor], class_labels: list[torch.Tensor]
) -> None:
    """Refuse labels that are not one entry an image, with a class a mask."""
    if len(mask_labels) != len(pixel_values) or len(class_labels) != len(pixel_values):
        raise ValueError(
            f"{len(mask_labels)} mask_labels and {len(class_labels)} class_labels for {len(pixel_values)} images: "
            "give one entry an image"
        )
    for i, (masks, classes) in enumerate(zip(mask_labels, class_labels, strict=True)):
        if len(masks) != len(classes):
            raise ValueError(f"image {i} has {len(masks)} mask_labels but {len(classes)} class_labels")
