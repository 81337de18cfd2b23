"""Appends mask classes, code groups and their codes to a loaded model, which goes on answering as it did.

What is new cannot win over what was there before it is trained: its scores start as means of known ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from configuration_medsight import MedSightConfig
from medsight.data.additions import Additions, extended_config
from medsight.data.groups import Groups
from medsight.inference.code_assignment import kmeans, match_queries, place
from processing_medsight.region_codes_medsight import append_region_codes

from .init import seeded


KMEANS_ROUNDS = 10
# Settings that additions change, beside the size of the vocabulary.
CHANGED = (
    *("num_mask_classes", "mask_class_names"),
    *("num_groups", "group_names", "group_patterns", "group_orientations"),
)
ALIKE = 0.75  # of two words: "ventricular" and "ventricle", "disc" and "disk"
SAY_LITTLE = {"left", "right", "upper", "lower", "anterior", "posterior", "of", "the", "and"}


@dataclass
class Starts:
    """What new classes and codes start from.

    Attributes:
        classes: new class -> names of the known classes whose mean it starts as; all known ones where it is missing.
        codes: new group -> (M, d_c) codes; random ones where it is missing.

    Example:
        >>> Starts(classes={"left ventricular cavity": ["left ventricle"]}).codes
        {}
    """

    classes: dict[str, list[str]] = field(default_factory=dict)
    codes: dict[str, torch.Tensor] = field(default_factory=dict)


def without_pictures(rows: Any) -> Any:
    """Rows, map-style or a list, without the bytes of their pictures where that saves reading them."""
    return rows.remove_columns(["image", "masks"]) if hasattr(rows, "remove_columns") else rows


@torch.inference_mode()
def find_starts(
    model: Any,
    processor: Any,
    rows: Any,
    groups: Groups | None,
    additions: Additions,
    images: int = 4096,
    seed: int = 0,
    batch_size: int = 8,
) -> Starts:
    """What new classes and codes start from.

    Codes are the centres of k-means of W_q of the regions that the model's queries match with the masks in the images
    of their group. A class starts as the known one whose name shares most with its own ("left ventricular cavity":
    "left ventricle"); where none has half its words, as the known one that the class head finds likeliest in the
    regions matched with its masks.

    Args:
        model, processor: of one checkpoint, not extended yet.
        rows: of `REGION_FEATURES`, map-style.
        groups: the model's groups and the new ones, as `match_groups` gives them; None without a codebook.
        additions: what is new.
        images: at most about so many images with something new, spread evenly.
        seed: of k-means.

    Raises:
        OSError, ValueError: a picture is missing or bad.
    """
    config = model.config
    starts = Starts({name: near for name in additions.classes if (near := nearest_classes(name, config))})
    vectors: dict[str, list[torch.Tensor]] = {name: [] for name in additions.groups}
    likely: dict[str, list[torch.Tensor]] = {
        name: [] for name in additions.classes if name not in starts.classes and config.mask_class_names
    }
    chosen = []
    for number, row in enumerate(without_pictures(rows)):
        group = None if groups is None else groups.names[groups.index(row["modality"], row["site"])]
        if row["targets"] and (group in vectors or likely.keys() & {*row["targets"]}):
            chosen.append((number, group))
    chosen = chosen[:: max(1, len(chosen) // images)]
    for start in range(0, len(chosen), batch_size):
        batch = [(rows[number], group) for number, group in chosen[start : start + batch_size]]
        for (row, group), found in zip(batch, _look(model, processor, [row for row, _ in batch]), strict=True):
            for target, vector, classes in zip(row["targets"], *found, strict=True):
                if group in vectors:
                    vectors[group].append(vector)
                if target in likely:
                    likely[target].append(classes)
    generator = torch.Generator().manual_seed(seed)
    for name, points in vectors.items():
        if points:
            starts.codes[name] = kmeans(torch.stack(points), config.codes_per_group, KMEANS_ROUNDS, generator)
    for name, seen in likely.items():
        if seen:
            starts.classes[name] = [config.mask_class_names[int(torch.stack(seen).mean(0).argmax())]]
    return starts


def _look(model: Any, processor: Any, rows: Sequence[Mapping[str, Any]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each image, of the region matched with each of its masks: W_q (n, d_c), and the probability of each class
    (n, classes), on the CPU."""
    pixels, masks = zip(*(place(row, processor, model.config.image_size) for row in rows), strict=True)
    regions = model.get_region_features(torch.stack(pixels).to(model.device, model.dtype))
    found = []
    for i, queries in enumerate(match_queries(model.config, regions, masks)):
        vectors = model.model.codebook.encode(regions.region_embeddings[i, queries])
        classes = regions.class_queries_logits[i, queries].float().softmax(-1)[:, :-1]
        found.append((vectors.cpu(), classes.cpu()))
    return found


def nearest_classes(name: str, config: MedSightConfig) -> list[str]:
    """The known class whose name shares most words with another name, or several that share as much; none where none
    has half of its words. Words count as shared that are spelled nearly alike, and those of a side count little."""
    weights = {word: 0.1 if word in SAY_LITTLE else 1.0 for word in name.lower().split()}

    def shared(known: str) -> float:
        others = known.lower().split()
        alike = {word: max(SequenceMatcher(None, word, other).ratio() for other in others) for word in weights}
        score = sum(weights[word] * ratio for word, ratio in alike.items() if ratio >= ALIKE)
        return score and score + 0.01 * SequenceMatcher(None, name.lower(), known.lower()).ratio()

    scores = {known: shared(known) for known in config.mask_class_names or [] if known.split()}
    best = max(scores.values(), default=0.0)
    enough = best >= max(ALIKE * sum(weights.values()) / 2, ALIKE)
    return [known for known, score in scores.items() if enough and score == best]


@torch.no_grad()
def extend_model(
    model: Any, processor: Any, additions: Additions, starts: Starts | None = None, seed: int = 0
) -> None:
    """Appends classes and groups to a loaded model and its processor, in place.

    What is new starts so that nothing old is beaten by it: a class' row of the class head as that of its nearest known
    classes, a little less likely; a group's row of the group classifier as the mean of the known ones; a code's row of
    the language modelling head as a mean of the known codes' rows, those of near codes first. A code's embedding is
    P_{v→t}(W_m(code)), but where it is one matrix with the head: rows of the projector's length would win there.

    Args:
        model: a `MedSightForConditionalGeneration` on one device, neither quantised nor wrapped.
        processor: its `MedSightProcessor`.
        additions: what `find_additions` found, or your own.
        starts: what `find_starts` found; by default classes start by their names, and codes at random.
        seed: of what is random.

    Raises:
        ValueError: tokens follow the codes in the tokenizer, or they are not at the place that the configuration says.

    Example:

    ```python
    from medsight.conversion.extend_model import extend_model
    from medsight.data.additions import Additions
    from modeling_medsight import MedSightForConditionalGeneration
    from processing_medsight import MedSightProcessor

    model = MedSightForConditionalGeneration.from_pretrained("medsight/medsight-nano")
    processor = MedSightProcessor.from_pretrained("medsight/medsight-nano")
    extend_model(model, processor, Additions(["optic disc"], {"OCT retina": ["OCT/retina"]}))
    assert model.config.mask_class_names[-1] == "optic disc"
    assert processor.tokenizer.convert_tokens_to_ids("[C16_15]") == model.config.region_code_start_id + 16 * 16 + 15
    ```
    """
    config, starts, more = model.config, starts or Starts(), len(additions.groups)
    changed = extended_config(config, additions)
    if more:
        first = append_region_codes(processor.tokenizer, config.num_groups, config.codes_per_group, more)
        if first != config.region_code_start_id:
            raise ValueError(
                f"the tokenizer's region codes start at id {first}, the model's at {config.region_code_start_id}: "
                "they are not of one checkpoint"
            )
    if additions.classes:
        _append_classes(model.model.region_perceiver, config, additions.classes, starts)
    if more:
        generator = torch.Generator().manual_seed(seed)
        shape = (config.codes_per_group, config.code_dim)
        codes = [
            starts.codes.get(name, F.normalize(torch.randn(shape, generator=generator), dim=-1))
            for name in additions.groups
        ]
        _append_groups(model, torch.stack(codes), changed.text_config.vocab_size)
    for name in CHANGED:
        setattr(config, name, getattr(changed, name))
    config.refuse_contradictions()
    processor.group_names = list(config.group_names)
    if processor.region_codes is not None:
        unused = dict.fromkeys(("purity", "nmi", "perplexity")) | {"citations": 0, "live_codes": 0, "live_share": 0.0}
        groups = {**processor.region_codes.get("groups", {}), **{name: dict(unused) for name in additions.groups}}
        processor.region_codes = {**processor.region_codes, "groups": groups}


def _append_classes(perceiver: Any, config: MedSightConfig, names: Sequence[str], starts: Starts) -> None:
    """Rows of the class head, before 'no object', and class queries."""
    known = {name: index for index, name in enumerate(config.mask_class_names or [])}
    near = [starts.classes.get(name) or nearest_classes(name, config) or [*known] for name in names]
    places = [[known[other] for other in others] or [*range(config.num_mask_classes)] for others in near]

    def means(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([rows[place].mean(0) for place in places])

    head = perceiver.segmentation_head.class_predictor
    weight, bias = head.weight, head.bias
    head.weight = _parameter(weight, torch.cat((weight[:-1], means(weight), weight[-1:])))
    head.bias = _parameter(bias, torch.cat((bias[:-1], means(bias) - 1, bias[-1:])))
    head.out_features = len(head.weight)
    if perceiver.class_queries is not None:
        queries = perceiver.class_queries
        perceiver.class_queries = _parameter(queries, torch.cat((queries, means(queries))))


def _append_groups(model: Any, codes: torch.Tensor, vocab_size: int) -> None:
    """Codes (n, M, d_c) of new groups, their rows of the vocabulary, which has `vocab_size` then, and of the group
    classifier."""
    config, core = model.config, model.model
    known = core.codebook.code_table().flatten(0, 1)
    end = config.region_code_start_id + config.num_region_codes
    codes = codes.to(core.codebook.codes)
    core.codebook.codes = _parameter(core.codebook.codes, torch.cat((core.codebook.codes, codes)))
    classifier = core.group_classifier
    mean = classifier.weight.mean(0, keepdim=True).expand(len(codes), -1)
    lower = (classifier.bias.mean() - 1).expand(len(codes))
    classifier.weight = _parameter(classifier.weight, torch.cat((classifier.weight, mean)))
    classifier.bias = _parameter(classifier.bias, torch.cat((classifier.bias, lower)))
    classifier.out_features = len(classifier.weight)
    size = len(model.get_input_embeddings().weight)
    if vocab_size > size:
        with seeded(0):  # of rows that are all set below
            model.resize_token_embeddings(vocab_size, mean_resizing=False)
    words, head = model.get_input_embeddings().weight, model.lm_head.weight
    flat = codes.flatten(0, 1)
    new = slice(end, end + len(flat))
    closeness = (F.normalize(flat.float(), dim=-1) @ known.T / 0.2).softmax(-1)
    rows = head[config.region_code_start_id : end]
    words[new] = core.vision_to_text_projector(core.codebook.decode(flat)).to(words)
    head[new] = (closeness.to(rows.device) @ rows.float()).to(rows)
    for table in (words, head):
        table[max(new.stop, size) :] = rows.mean(0)


def _parameter(old: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(old), requires_grad=old.requires_grad)
