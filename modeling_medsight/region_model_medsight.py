"""What sees: image encoder, region perceiver, region codebook, group classifier (paper arXiv 2606.06760, section 3).

[`MedSightRegionModel`] is this part as a model of its own: it finds regions in images and decodes region codes to
masks without a language model, and it is what the perceiver's and the codebook's stages train.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel
from transformers.utils import can_return_tuple

from configuration_medsight.configuration_medsight import MedSightConfig

from .codebook_medsight import RegionCodebook, RegionQuantizerOutput
from .loss_medsight import RegionPerceiverLoss, mask_bce, mask_dice, masks_of_classes, resize_masks, total
from .outputs_medsight import MedSightRegionOutput
from .pretrained_medsight import MedSightPreTrainedModel, has_attention
from .region_codes_in_text_medsight import codes_to_indices
from .region_perceiver_medsight import RegionPerceiver
from .unet_encoder_medsight import MedSightUNetEncoder


# Numbers in the perceiver's last map that are worked on at once where masks are decoded without gradients.
MAP_NUMBERS_AT_ONCE = 2**26


class SteadyBatchNorm2d(nn.BatchNorm2d):
    """Takes statistics of a batch only where its weights learn from it: not in `generate`, nor in a frozen encoder."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.weight.requires_grad and torch.is_grad_enabled():
            return super().forward(features)
        return F.batch_norm(features, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class SeesRegions:
    """What [`MedSightRegionModel`] and [`MedSightModel`] have in common: the modules that see, under the names of the
    published files, and how they are run."""

    config: Any
    device: torch.device
    _is_sharded: Callable[[], bool]
    vision_tower: Any
    region_perceiver: RegionPerceiver
    codebook: RegionCodebook
    group_classifier: nn.Linear

    def add_region_modules(self, config: MedSightConfig) -> None:
        """Make encoder, perceiver, codebook and group classifier."""
        config.refuse_contradictions()  # `from_pretrained(folder, image_size=...)` sets them after the construction
        if not has_attention(config.vision_config):
            config.vision_config._attn_implementation = "eager"
        # By name: a checkpoint folder's own code may know the configuration's class twice, and AutoModel one of them.
        is_unet = config.vision_config.model_type == MedSightUNetEncoder.config_class.model_type
        make_encoder = MedSightUNetEncoder._from_config if is_unet else AutoModel.from_config
        self.vision_tower = make_encoder(config.vision_config)
        for module in self.vision_tower.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SteadyBatchNorm2d
        self.region_perceiver = RegionPerceiver(config)
        self.codebook = RegionCodebook(config)
        self.group_classifier = nn.Linear(config.vision_hidden_size, config.num_groups)

    @can_return_tuple
    def get_region_features(
        self, pixel_values: torch.Tensor, with_masks: bool = True, **kwargs: Any
    ) -> MedSightRegionOutput:
        """Look at images: patches, regions, masks and classes of regions, the group of each image.

        Args:
            pixel_values: (images, 3, image_size, image_size).
            with_masks: false leaves out the masks and classes of regions and the map that they are read from.
        """
        _, grid, summary = self._encode(pixel_values, **kwargs)
        return self._perceive(grid, summary, with_masks)

    def quantize_regions(self, region_embeddings: torch.Tensor, groups: torch.Tensor) -> RegionQuantizerOutput:
        """Nearest code of each region in its image's group: see [`RegionCodebook`]."""
        return self.codebook(region_embeddings, groups)

    def decode_queries(
        self,
        queries: torch.Tensor,
        images: torch.Tensor,
        entries: torch.Tensor,
        max_slots: int,
        regions: MedSightRegionOutput | None,
    ) -> torch.Tensor:
        """Mask logits (n, H, W) of queries (n, d) that take the place of the perceiver's own (paper: text-to-vision).

        All queries of an entry are decoded together: the map attends to each of them. Without gradients, entries go
        through the perceiver a few at a time, so that memory does not grow with their number.

        Args:
            images: (n,) index of each query's image in `regions`.
            entries: (n,) the entry of each query; those of one entry are about one image.
            max_slots: at least as many as the queries of any entry.
            regions: features of the images.
        """
        height, width = self.config.mask_size
        if not len(queries):
            return self._no_masks(queries)
        if regions is None:
            raise ValueError("masks of region codes need pixel_values: none can be drawn from image_embeds")
        perceiver = self.region_perceiver
        queries = queries.to(perceiver.dtype)
        images, entries = images.to(queries.device), entries.to(queries.device)
        at_once = max(1, MAP_NUMBERS_AT_ONCE // (height * width * self.config.vision_hidden_size))
        if self.config.mask_decoder == "head":
            maps, projected = regions.image_features, perceiver.segmentation_head.project(queries)
            projected, images = projected.to(maps.device), images.to(maps.device)
            parts = zip(projected.split(at_once), images.split(at_once), strict=True)
            return torch.cat([torch.einsum("nd,nhwd->nhw", some, maps[seen]) for some, seen in parts])

        compiling = torch.compiler.is_compiling()
        num_entries = len(regions.patch_features) if compiling else int(entries.max()) + 1
        places = (entries, (entries[:, None] == entries[None]).tril(-1).sum(dim=1))
        padded = queries.new_zeros(num_entries, max_slots, queries.shape[-1]).index_put(places, queries)
        known = None
        if len(queries) < num_entries * max_slots:
            known = torch.zeros(padded.shape[:2], dtype=torch.bool, device=queries.device)
            known = known.index_put(places, torch.ones_like(entries, dtype=torch.bool))
        images = entries.new_zeros(num_entries).index_put((entries,), images)

        masks = []
        if torch.is_grad_enabled() or compiling:
            at_once = num_entries
        behind = self._passes_behind(math.ceil(num_entries / at_once))
        patches, upsampled = regions.patch_features, regions.upsampled_features
        for start in range(0, num_entries, at_once):
            part = slice(start, start + at_once)
            output = perceiver(
                patches[images[part].to(patches.device)].unflatten(1, self.config.patch_grid),
                queries=padded[part],
                query_mask=None if known is None else known[part],
                upsampled_features=None if upsampled is None else upsampled[images[part].to(upsampled.device)],
            )
            masks.append(output.masks_queries_logits)
        for _ in range(behind):
            self._blank_pass()
        decoded = torch.cat(masks)
        return decoded[tuple(place.to(decoded.device) for place in places)]

    def _no_masks(self, queries: torch.Tensor) -> torch.Tensor:
        """Masks (0, H, W) of no queries, in the graph all the same: another process may have some, and wait for the
        weights or the gradients of what makes them."""
        height, width = self.config.mask_size
        masks = queries[:, :1, None].expand(-1, height, width)
        for _ in range(self._passes_behind(0) if self.config.mask_decoder == "perceiver" else 0):
            masks = self._blank_pass(queries.sum()).masks_queries_logits[0, :0]
        return masks

    def _passes_behind(self, passes: int) -> int:
        """How many passes of the perceiver this process makes fewer than another that waits for it; with gradients
        each makes one."""
        if torch.compiler.is_compiling() or not self._is_sharded():
            return 0
        if torch.is_grad_enabled():
            return 1 - passes
        most = torch.tensor(passes, device=self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most) - passes

    def _blank_pass(self, nothing: Any = 0.0) -> Any:
        """One pass of the perceiver over an empty map, `nothing` being zero."""
        perceiver, dim = self.region_perceiver, self.config.vision_hidden_size
        features = torch.zeros(1, *self.config.patch_grid, dim, device=self.device, dtype=perceiver.dtype)
        return perceiver(features, queries=features.new_zeros(1, 1, dim) + nothing)

    def blank_image(self) -> torch.Tensor:
        """(1, 3, image_size, image_size), for a process that has to keep up with others that have images."""
        return torch.zeros(1, 3, *[self.config.image_size] * 2, device=self.device, dtype=self.vision_tower.dtype)

    def _perceive(self, grid: torch.Tensor, summary: torch.Tensor, with_masks: bool = True) -> MedSightRegionOutput:
        """What the region queries and the group classifier find in what `_encode` gives."""
        return MedSightRegionOutput(
            patch_features=grid.flatten(1, 2),
            group_logits=self.group_classifier(summary.to(self.group_classifier.weight.dtype)),
            **self.region_perceiver(grid, with_masks=with_masks),
        )

    def _encode(
        self, pixel_values: torch.Tensor, any_size: bool = False, **kwargs: Any
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Run the encoder: its own output, hidden state `config.vision_feature_layer` as a grid (images, h, w, d), and
        a summary (images, d), which is the CLS row, or the mean of the grid where the encoder has none.

        With `any_size` images may be of another size than `config.image_size`, as a convolutional encoder can take.
        """
        config = self.config
        side = pixel_values.shape[-1] if any_size else config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[0] == 0 or tuple(pixel_values.shape[1:]) != (3, side, side):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (images, 3, {side}, {side}), one image "
                "at least"
            )
        height, width = (cells * side // config.image_size for cells in config.patch_grid)
        kwargs = {**kwargs, "output_hidden_states": True, "return_dict": True}
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), **kwargs)
        hidden = outputs.hidden_states[config.vision_feature_layer]
        images, dim = pixel_values.shape[0], config.vision_hidden_size
        if hidden.ndim == 4 and hidden.shape == (images, dim, height, width):
            grid = hidden.permute(0, 2, 3, 1)
            return outputs, grid, grid.mean(dim=(1, 2))
        prefix = hidden.shape[1] - height * width
        if hidden.ndim != 3 or prefix < 0 or (hidden.shape[0], hidden.shape[2]) != (images, dim):
            raise ValueError(
                f"vision_config.model_type={config.vision_config.model_type!r} gives features of shape "
                f"{tuple(hidden.shape)} where a grid ({images}, {dim}, {height}, {width}), or its cells as rows, is "
                "needed: use another encoder"
            )
        grid = hidden[:, prefix:].unflatten(1, (height, width))
        return outputs, grid, hidden[:, 0] if prefix else hidden.mean(dim=1)


class MedSightRegionModel(SeesRegions, MedSightPreTrainedModel):
    """Finds regions in images, names their codes, and decodes region codes to masks, without a language model.

    `from_pretrained` takes the folder of a whole model as well, and reads its own tensors alone:

    ```python
    import torch
    from modeling_medsight import MedSightRegionModel

    model = MedSightRegionModel.from_pretrained("medsight/medsight-nano")
    regions = model.get_region_features(torch.zeros(1, 3, model.config.image_size, model.config.image_size))
    codes = model.quantize_regions(regions.region_embeddings, regions.group_logits.argmax(-1)).code_indices
    (masks,) = model.decode_codes(code_indices=[[(0, 3), (0, 5)]], features=regions)  # of [C0_3] and [C0_5]
    assert masks.shape == (2, *model.config.mask_size)
    ```
    """

    input_modalities: tuple[str, ...] = ("image",)
    # A whole model's folder holds these besides.
    _keys_to_ignore_on_load_unexpected = [r"language_model\.", r"lm_head\.", r"_to_(text|vision)_projector\."]

    def __init__(self, config: MedSightConfig) -> None:
        super().__init__(config)
        self.add_region_modules(config)
        self.perceiver_loss = RegionPerceiverLoss(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_tower.get_input_embeddings()

    @torch.no_grad()
    def decode_codes(
        self,
        region_code_ids: torch.Tensor | Sequence[Any] | None = None,
        pixel_values: torch.Tensor | None = None,
        *,
        code_indices: torch.Tensor | Sequence[Any] | None = None,
        features: MedSightRegionOutput | None = None,
    ) -> list[torch.Tensor]:
        """Masks of region codes from the codebook alone: W_m(code) is the query, in place of the state that a language
        model has where it writes the code.

        These are not quite the masks of [`MedSightForConditionalGeneration.decode_regions`], which knows the words
        around a code.

        Args:
            region_code_ids: for each image the token ids (n_i,) of its codes, as `generate` returns them.
            pixel_values: (images, 3, image_size, image_size).
            code_indices: in place of token ids, for each image pairs (n_i, 2) of group k and index m.
            features: in place of pixel values, what [`get_region_features`] gave for them.

        Returns:
            Mask logits (n_i, H, W) for each image, before the sigmoid.

        Raises:
            ValueError: if not exactly one of each pair is given, a code does not exist, or codes and images are not of
                the same number.
        """
        if (region_code_ids is None) == (code_indices is None):
            raise ValueError("give exactly one of region_code_ids and code_indices")
        if (pixel_values is None) == (features is None):
            raise ValueError("give exactly one of pixel_values and features")
        if features is None:
            features = self.get_region_features(pixel_values, self.config.mask_decoder == "head", return_dict=True)
        as_pairs = region_code_ids is None
        indices = codes_to_indices(code_indices if as_pairs else region_code_ids, self.config, as_pairs)
        if len(indices) != len(features.patch_features):
            raise ValueError(
                f"codes for {len(indices)} images, but {len(features.patch_features)} images: give one entry an image"
            )
        counts = [len(pairs) for pairs in indices]
        codes = self.codebook.code_table()
        groups, places = torch.cat(indices).to(codes.device).unbind(dim=1)
        queries = self.codebook.decode(codes[groups, places])
        images = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return list(self.decode_queries(queries, images, images, max(counts), features).split(counts))

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        mask_labels: list[torch.Tensor] | None = None,
        class_labels: list[torch.LongTensor] | None = None,
        group_labels: torch.LongTensor | None = None,
        asked_classes: list[torch.LongTensor] | None = None,
        matched_images: torch.LongTensor | None = None,
        unlabelled_classes: torch.BoolTensor | None = None,
        loss_counts: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> MedSightRegionOutput:
        """
        What is seen in images; with labels, the losses of the perceiver, and with `group_labels` of the codebook too.

        Every loss is an average over a number of things: masks, images or asked classes. `loss_counts` gives these
        numbers for the whole batch where a call sees a part of it (gradient accumulation, several processes), so that
        the sum over all parts is the loss of the whole, however unevenly they are filled.

        Args:
            pixel_values: (images, 3, H, W), H = W = `config.image_size`; with labels and a convolutional encoder, of
                any size that its stride divides.
            mask_labels: a tensor (n_i, H, W) an image, boolean or in [0, 1], of any size: its regions.
            class_labels: a tensor (n_i,) an image, the class of each region.
            group_labels: (images,), the code group of each image.
            asked_classes: with class queries: the classes that are asked of each image, those of its regions by
                default; one that it has no region of has an empty mask.
            matched_images: indices of the images whose regions are found by region queries; all by default.
            unlabelled_classes: (images, num_mask_classes), classes that nobody looked for in an image: a region query
                that finds such a region is not taught that there is none.
            loss_counts: `masks`, `images` and `asked` classes that the losses are averages over; by default those of
                this call.

        Raises:
            ValueError: if labels do not match the images or each other, or one of `mask_labels`, `class_labels` is
                missing.
        """
        if all(given is None for given in (mask_labels, class_labels, group_labels, asked_classes)):
            return self.get_region_features(pixel_values, return_dict=True, **kwargs)
        if mask_labels is None or class_labels is None:
            raise ValueError("give mask_labels and class_labels together: every loss needs both")
        masks, classes = [len(masks) for masks in mask_labels], [len(classes) for classes in class_labels]
        if masks != classes or len(masks) != len(pixel_values):
            raise ValueError(
                f"{len(pixel_values)} images have {masks} mask_labels and {classes} class_labels: give one entry an "
                "image, and a class for each of its masks"
            )
        counts = loss_counts or {}
        _, grid, summary = self._encode(pixel_values, any_size=True, **kwargs)
        class_query_loss = None
        if self.config.use_class_queries and group_labels is None:
            class_query_loss = self._class_query_loss(grid, mask_labels, class_labels, asked_classes, counts)
        if matched_images is not None:
            chosen = matched_images.tolist()
            grid, summary = grid[matched_images], summary[matched_images]
            mask_labels, class_labels = [mask_labels[i] for i in chosen], [class_labels[i] for i in chosen]
            group_labels = group_labels[matched_images] if group_labels is not None else None
            unlabelled_classes = unlabelled_classes[matched_images] if unlabelled_classes is not None else None
        regions = self._perceive(grid, summary)
        labels: dict[str, Any] = {"mask_labels": mask_labels, "class_labels": class_labels, "loss_counts": counts}
        labels["unlabelled_classes"] = unlabelled_classes
        last, pairs = self.perceiver_loss(regions.masks_queries_logits, regions.class_queries_logits, **labels)
        # Earlier stages keep the pairs of the last: a query has one target.
        earlier = [self.perceiver_loss(**stage, pairs=pairs, **labels)[0] for stage in regions.auxiliary_logits or []]
        regions.perceiver_loss = total((last, *earlier)) / (1 + len(earlier))
        regions.class_query_loss = class_query_loss
        if group_labels is not None:
            group_logits = regions.group_logits.float()
            group_loss = F.cross_entropy(group_logits, group_labels.to(group_logits.device), reduction="sum")
            regions.group_loss = group_loss / counts.get("images", len(group_labels))
            if self.training:
                self._add_codebook_losses(regions, group_labels, pairs=pairs, **labels)
        losses = (regions.perceiver_loss, class_query_loss, regions.codebook_loss, regions.group_loss)
        regions.loss = self._in_graph(total(losses), [self])
        return regions

    def _class_query_loss(
        self,
        grid: torch.Tensor,
        mask_labels: list[torch.Tensor],
        class_labels: list[torch.Tensor],
        asked_classes: list[torch.Tensor] | None,
        loss_counts: dict[str, float],
    ) -> torch.Tensor:
        """BCE + Dice of the masks that the classes' own queries give, averaged over supervised stages."""
        device = grid.device
        asked = [classes.to(device) for classes in (class_labels if asked_classes is None else asked_classes)]
        nothing = asked[0].new_full((1,), -1)  # so that there is a column also where no class is asked of any image
        ids = pad_sequence([*asked, nothing], batch_first=True, padding_value=-1)[:-1]
        known = ids >= 0
        perceiver = self.region_perceiver
        queries = perceiver.class_queries
        output = perceiver(grid, queries=queries[ids.clamp(min=0).to(queries.device)], query_mask=known)
        stages = [stage["masks_queries_logits"] for stage in (*(output.auxiliary_logits or []), output)]
        wanted = [
            masks_of_classes(masks.to(device), classes.to(device), wanted_classes)
            for masks, classes, wanted_classes in zip(mask_labels, class_labels, asked, strict=True)
        ]
        losses = []
        for logits in stages:
            targets = torch.cat([resize_masks(masks, logits.shape[-2:]) for masks in wanted])
            given = logits[known.to(logits.device)]
            targets = targets.to(logits.device)
            summed = (mask_bce(given, targets) + mask_dice(given, targets)).sum() + 0 * logits.float().sum()
            losses.append(summed / max(1, loss_counts.get("asked", len(targets))))
        return total(losses) / len(losses)

    def _add_codebook_losses(
        self,
        regions: MedSightRegionOutput,
        group_labels: torch.Tensor,
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
        loss_counts: dict[str, float],
        **labels: Any,
    ) -> None:
        """Put into `regions` the codes that regions took, the VQ and reconstruction losses, and with the perceiver's
        loss on the reconstructed regions, for the same pairs, the codebook's."""
        embeddings = regions.region_embeddings
        images, num_queries = embeddings.shape[:2]
        group_labels = group_labels.to(embeddings.device)
        if self.config.quantize_unmatched_regions:
            found = [torch.arange(num_queries)] * images
            number = loss_counts.get("images", images) * num_queries
        else:
            found = [queries for queries, _ in pairs]
            number = loss_counts.get("masks", sum(map(len, found)))
        rows = torch.cat([torch.full_like(queries, row) for row, queries in enumerate(found)]).to(embeddings.device)
        queries = torch.cat(found).to(embeddings.device)
        quantized = self.codebook(embeddings[rows, queries][:, None], group_labels[rows])
        regions_of_codes = quantized.reconstructed_regions[:, 0].to(embeddings)  # bf16 under CPU's autocast
        reconstructed = embeddings.index_put((rows, queries), regions_of_codes)
        through_codes, _ = self.perceiver_loss(
            *self.region_perceiver.segmentation_head(reconstructed, regions.image_features),
            pairs=pairs,
            loss_counts=loss_counts,
            **labels,
        )
        share = len(rows) / max(1, number)
        regions.vq_loss, regions.reconstruction_loss = quantized.vq_loss * share, quantized.reconstruction_loss * share
        regions.codebook_loss = total((regions.vq_loss, regions.reconstruction_loss, through_codes))
        taken = quantized.code_indices[:, 0].to(group_labels.device)
        regions.quantized_codes = torch.stack((group_labels[rows], taken), dim=1)
