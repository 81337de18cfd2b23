"""Appends mask classes, code groups and their codes to a trained model, which goes on answering as it did.

Every old id, name and weight stays. What is new cannot win over what was there before it is trained: its scores start
as means of known ones.
"""

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from configuration_medsight import MedSightConfig
from medsight.checkpoint import check_checkpoint, read_json, weight_files, weights_sha256
from medsight.data.additions import Additions, extended_config, find_additions
from medsight.data.groups import Groups, load_groups, match_groups
from medsight.data.sources import Source, kind_of, load_source
from medsight.files import check_output, staged_folder
from medsight.inference.code_assignment import kmeans, match_queries, place
from medsight.loading import choose_device, load_checkpoint
from processing_medsight.region_codes_medsight import append_region_codes

from .convert import SHARD_SIZE, StrPath
from .init import seeded


KMEANS_ROUNDS = 10
# Settings that additions change, beside the size of the vocabulary.
CHANGED = (
    *("num_mask_classes", "mask_class_names"),
    *("num_groups", "group_names", "group_patterns", "group_orientations"),
)
ALIKE = 0.75  # of two words: "ventricular" and "ventricle", "disc" and "disk", not "liver" and "river"
SAY_LITTLE = {"left", "right", "upper", "lower", "anterior", "posterior", "of", "the", "and"}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


def extend(
    model: StrPath,
    rows: Any,
    output: StrPath,
    *,
    groups: StrPath | Groups | None = None,
    rename: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    images: int = 4096,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> tuple[MedSightConfig, Additions]:
    """Writes a checkpoint folder with what data hold and a model does not know: mask classes, code groups, codes.

    Weights keep the precision that they are stored in. Where the data hold nothing new, the folder is copied.

    Args:
        model: checkpoint folder.
        rows: a `Source` of images with masks, or its rows (`REGION_FEATURES`), map-style.
        output: folder to write.
        groups: where pairs of modality and site belong, known groups or new ones: a YAML file, group -> patterns of
            "MODALITY/SITE", or [`Groups`]. A pair that neither it nor the model has a group for becomes a group.
        rename: name in the data -> name in the model, of structures; for a `Source`.
        classes: the classes that there are to be; by default all targets.
        images: about so many images with something new are looked at.
        seed: of k-means.
        device: to look at them on.
        overwrite: replace the output folder if it holds a checkpoint.

    Returns:
        The new configuration, and what was added.

    Raises:
        OSError: a file is missing, or the output folder is taken.
        ValueError: the model is quantised or an adapter; the data have no masks, or names that are the model's but for
            case and spaces; or tokens follow the model's codes. Nothing is written then.
    """
    folder, output = Path(model), Path(output)
    refuse_unfit(folder)
    given = [Path(groups)] if isinstance(groups, (str, os.PathLike)) else []
    check_output(output, overwrite, inputs=[folder, *given, *([Path(rows.path)] if isinstance(rows, Source) else [])])
    rows = _rows_of(rows, rename)
    config = MedSightConfig.from_pretrained(folder, local_files_only=True)
    chosen = load_groups(groups, None) if isinstance(groups, (str, os.PathLike)) else groups
    additions = find_additions(config, _without_pictures(rows), chosen, classes)
    if not any(row["targets"] for row in _without_pictures(rows)):
        raise ValueError("the data have no masks: a model is extended by what masks show")
    if not additions:
        with staged_folder(output, overwrite) as staged:
            shutil.copytree(folder, staged, dirs_exist_ok=True)
        return config, additions
    matched = match_groups(config, _pairs(rows), chosen, extend=True) if config.use_region_codebook else None
    extended = extend_folder(
        folder, rows, output, matched, additions, images=images, seed=seed, device=device, overwrite=overwrite
    )
    return extended, additions


def extend_folder(
    folder: Path,
    rows: Any,
    output: Path,
    groups: Groups | None,
    additions: Additions,
    *,
    images: int = 4096,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> MedSightConfig:
    """What `extend` does once it is known what is new; `groups` are the model's and the new ones.

    Raises:
        OSError, ValueError: as `extend`.
    """
    model, processor = load_checkpoint(folder, "auto")
    model.eval().to(choose_device(device))
    starts = find_starts(model, processor, rows, groups, additions, images, seed)
    extend_model(model.cpu(), processor, additions, starts, seed)
    save_extended(model, processor, folder, output, overwrite)
    return model.config


def refuse_unfit(folder: Path) -> None:
    """Raises OSError or ValueError where a folder is no whole checkpoint of plain weights."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter: extend the checkpoint that it was trained on, or merge it "
            "(merge_and_unload) and save the whole first"
        )
    check_checkpoint(folder)
    config = read_json(folder / "config.json")
    if config.get("quantization_config") or config.get("text_config", {}).get("quantization_config"):
        raise ValueError(
            f"{folder} is quantised: extend the checkpoint that it was made from, and quantise the result"
        )


def _rows_of(rows: Any, rename: Mapping[str, str] | None) -> Any:
    """The rows of a source, or those that are given, which can be read again."""
    if not isinstance(rows, Source):
        if rename:
            raise ValueError("rename is for a Source: give rows whose targets have the model's names already")
        return rows if hasattr(rows, "__getitem__") else list(rows)
    if kind_of(rows) != "regions":
        raise ValueError(f"{rows.path}: layout {rows.layout} holds conversations; a model is extended by masks")
    if rename:
        rows = dataclasses.replace(rows, rename={**(rows.rename or {}), **rename})
    return load_source(rows)


def _without_pictures(rows: Any) -> Any:
    return rows.remove_columns(["image", "masks"]) if hasattr(rows, "remove_columns") else rows


def _pairs(rows: Any) -> set[tuple[str, str]]:
    return {(row["modality"], row["site"]) for row in _without_pictures(rows)}


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
    config = model.config
    starts = Starts({name: near for name in additions.classes if (near := nearest_classes(name, config))})
    vectors: dict[str, list[torch.Tensor]] = {name: [] for name in additions.groups}
    likely: dict[str, list[torch.Tensor]] = {
        name: [] for name in additions.classes if name not in starts.classes and config.mask_class_names
    }
    chosen = []
    for number, row in enumerate(_without_pictures(rows)):
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
    from medsight.conversion.extend import Additions, extend_model
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


def save_extended(model: Any, processor: Any, before: Path, output: Path, overwrite: bool = False) -> None:
    """Writes an extended model into a folder, whole or not at all, each weight in the precision that it has in the
    folder `before`; what is known of codes stays known of them.

    Raises:
        OSError: the folder is taken or cannot be written.
    """
    stored: dict[str, torch.dtype | None] = {}
    for file in weight_files(before):
        with safe_open(file, framework="pt") as weights:
            stored |= {name: DTYPES.get(weights.get_slice(name).get_dtype()) for name in weights.keys()}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {
        name: tensor.to(stored.get(name) or tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    with staged_folder(output, overwrite) as folder:
        model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD_SIZE)
        if processor.region_codes is not None:
            processor.region_codes = {**processor.region_codes, "weights_sha256": weights_sha256(folder)}
        processor.save_pretrained(folder)
