"""Conversations about images with masks, each mask cited by its region code: streamed from rows to parquet files."""

import hashlib
import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from medsight.data.groups import Groups
from medsight.data.pictures import picture_name, read_mask, read_picture
from medsight.data.schema import IMAGE_MARKER
from medsight.data.shards import SplitWriter
from medsight.data.templates import Wordings
from medsight.data.wording import ConversationMaker, Turn, Vocabulary, position_in_words
from medsight.files import check_empty, staged_folder
from medsight.inference.code_assignment import assign_codes

from .annotation_output import AnnotationCounts, write_card
from .canvas import Canvas


READERS = 4  # threads that decode pictures
logger = logging.getLogger(__name__)


def annotate(
    rows: Iterable[dict[str, Any]],
    model: Any,
    processor: Any,
    groups: Groups,
    output: str | Path,
    *,
    per_image: int = 8,
    plain_share: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    max_regions: int = 5,
    prompt_noise: float = 0.0,
    on_error: str = "stop",
    embed_images: bool = False,
    wordings: Wordings | None = None,
    region_codes: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> AnnotationCounts:
    """Write conversations about images with masks, as parquet with a data card; rows and pictures are streamed.

    The words about row i depend on `seed`, i and the structures of the data and of `region_codes`, not on
    `batch_size`. With a `plain_share` of 1 no code is needed: the model is not run, and its codebook may be
    untrained.

    Args:
        rows: of `REGION_FEATURES`, map-style or streaming; read twice.
        model: with a trained perceiver and codebook; on the device to run on. It is put into evaluation mode.
        processor: the model's.
        groups: the code groups, named and ordered as in `model.config.group_names` (any, without a codebook).
        output: folder that appears whole or not at all; may exist if it is empty.
        per_image: conversations an image.
        plain_share: share of them that need no region.
        batch_size: images decoded and seen at once.
        max_regions: most codes in an answer.
        prompt_noise: share of the words of a prompt that are misspelt or missing, see `ConversationMaker`.
        on_error: "stop" at a picture or mask that cannot be read, or "skip" it: count it, log it, name it in the card.
        embed_images: put the bytes of images and masks into the parquet files, in place of their paths.
        wordings: what is said; `Wordings.load()` by default.
        region_codes: content of a region_codes.json, for the structures that images may show beside those of the data.
        progress: show a progress bar on standard error.

    Raises:
        OSError: the output folder is not empty or cannot be written; a picture is missing.
        ValueError: a picture, mask or setting is bad; a target is no class of the model; a row has no group, or groups
            are not the model's.
    """
    _check_numbers(per_image, batch_size, plain_share)
    config = model.config
    wordings = wordings or Wordings.load()
    vocabulary = Vocabulary.from_rows(rows, groups)
    _check_names(config, groups, vocabulary, plain_share)
    if config.use_region_codebook:
        vocabulary = vocabulary.with_codes(region_codes)
    settings = {
        "seed": seed,
        "per_image": per_image,
        "plain_share": plain_share,
        "max_regions": max_regions,
        "prompt_noise": prompt_noise,
        "embed_images": embed_images,
    }
    annotator = _Annotator(
        model,
        Canvas(processor, config, groups),
        ConversationMaker(wordings, vocabulary, random.Random(), max_regions=max_regions, noise=prompt_noise),
        AnnotationCounts(codes={name: [0] * config.codes_per_group for name in groups.names}),
        settings,
    )
    counts = annotator.counts
    model.eval()
    with staged_folder(Path(output), False, check_empty) as folder:
        _write_conversations(annotator, rows, folder, batch_size, on_error, progress)
        if not counts.images:
            raise ValueError(f"no image to annotate: {len(counts.skipped)} could not be read, none else came")
        name = config._name_or_path
        origin = {
            "templates": Path(wordings.path).name,
            "templates_sha256": wordings.sha256,
            # a Hub id, or the name of the folder that it was loaded from: where that lies is nobody's concern
            "model": Path(name).resolve().name if name and Path(name).exists() else name or type(model).__name__,
            "weights_sha256": weights_sha256(model),
            "torch": version("torch"),
        }
        write_card(folder, counts, {**settings, **origin})
    return counts


def _write_conversations(
    annotator: "_Annotator", rows: Iterable[Any], folder: Path, batch_size: int, on_error: str, progress: bool
) -> None:
    """What `annotate` does with rows, a batch at a time; one writer a split."""
    numbered, writers, skipped = enumerate(rows), dict[str, SplitWriter](), annotator.counts.skipped
    with ExitStack() as stack:
        total = getattr(rows, "num_rows", None)
        bar = tqdm(total=total, desc="annotate", unit="image", disable=not progress, file=sys.stderr)
        stack.enter_context(bar)
        pool = stack.enter_context(ThreadPoolExecutor(READERS))
        while batch := list(islice(numbered, batch_size)):
            readings = []
            for reading in pool.map(annotator.read, batch):
                if isinstance(reading, _Reading):
                    readings.append(reading)
                elif on_error == "stop":
                    raise reading
                else:
                    skipped.append(str(reading))
                    logger.warning("left out (number %d): %s", len(skipped), reading)
            annotator.annotate(readings)
            for conversation in (entry for reading in readings for entry in annotator.conversations(reading)):
                split = conversation["split"]
                if split not in writers:
                    writers[split] = stack.enter_context(closing(SplitWriter(folder, split)))
                writers[split].write(conversation)
            bar.update(len(batch))


def _check_numbers(per_image: int, batch_size: int, plain_share: float) -> None:
    for name, value in (("per_image", per_image), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if not 0 <= plain_share <= 1:
        raise ValueError(f"plain_share={plain_share}: expected at least 0, at most 1")


def _check_names(config: Any, groups: Groups, vocabulary: Vocabulary, plain_share: float) -> None:
    """Refuse groups that are not the model's, and targets of which it has no class."""
    if config.use_region_codebook and groups.names != list(config.group_names):
        raise ValueError(f"groups {groups.names}: expected those of the model, {list(config.group_names)}")
    classes = config.mask_class_names
    unknown = sorted(set().union(*vocabulary.targets) - set(classes or ()))
    if plain_share < 1 and classes is not None and unknown:
        raise ValueError(
            f"target {unknown[0]!r} ({len(unknown)} such) is none of the model's {len(classes)} mask classes "
            f"({', '.join(classes[:5])}, ...): train a perceiver that knows it, or rename it in the data"
        )


@dataclass
class _Reading:
    """A row on its way: what is read of its pictures, what is said about it, its codes."""

    index: int
    row: dict[str, Any]
    generators: list[random.Random]
    plain: list[bool]
    places: Sequence[str] = ()
    pixels: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    turns: Sequence[Turn] = ()
    codes: Sequence[int] = ()


@dataclass
class _Annotator:
    """Takes rows to conversations: reads their pictures, draws the words, gives cited masks their codes."""

    model: Any
    canvas: Canvas
    maker: ConversationMaker
    counts: AnnotationCounts
    settings: dict[str, Any]

    def read(self, numbered: tuple[int, dict[str, Any]]) -> _Reading | Exception:
        """Decode a row's pictures, masks only if they may be cited; a bad one is handed back as its error."""
        index, row = numbered
        seed, count = self.settings["seed"], self.settings["per_image"]
        generators = [random.Random(f"{seed}:{index}:{number}") for number in range(count)]
        plain = [generator.random() < self.settings["plain_share"] for generator in generators]
        reading = _Reading(index, row, generators, plain)
        try:
            picture = read_picture(row["image"])
            if len(row["masks"]) != len(row["targets"]):
                raise ValueError(
                    f"{picture_name(row['image'])}: {len(row['masks'])} masks for {len(row['targets'])} targets"
                )
            if all(plain) or not row["masks"]:
                return reading
            masks = [read_mask(entry, picture.size) for entry in row["masks"]]
            reading.places = [position_in_words(mask) for mask in masks]
            reading.pixels = self.canvas.pixels(picture)
            reading.masks = self.canvas.masks(masks, [picture_name(entry) for entry in row["masks"]])
        except (OSError, ValueError) as error:
            return error
        return reading

    def annotate(self, readings: Sequence[_Reading]) -> None:
        """Draw the words, and let the model see the images whose masks these cite."""
        for reading in readings:
            chances = zip(reading.generators, reading.plain, strict=True)
            reading.turns = [self._turn(reading, generator, plain) for generator, plain in chances]
        seen = [reading for reading in readings if any(turn.regions for turn in reading.turns)]
        if not seen:
            return
        with torch.no_grad():
            pixels = torch.stack([reading.pixels for reading in seen])
            regions = self.model.get_region_features(pixels.to(self.model.device, self.model.dtype))
        named = self.model.config.mask_class_names is not None
        codes = assign_codes(
            self.model,
            regions,
            [reading.masks for reading in seen],
            [self.canvas.classes_of(reading.row) for reading in seen] if named else None,
            torch.tensor([self.canvas.group(reading.row) for reading in seen]),
        )
        queries = regions.masks_queries_logits.shape[1]
        for reading, of_image in zip(seen, codes, strict=True):
            reading.codes = of_image.tolist()
            usage = self.counts.codes[self._group_name(reading.row)]
            for code in reading.codes:
                usage[code] += 1
            self.counts.masks_beyond_queries += max(0, len(reading.codes) - queries)

    def conversations(self, reading: _Reading) -> Iterator[dict[str, Any]]:
        """The rows of `CONVERSATION_FEATURES` to write, counted."""
        row, split = reading.row, reading.row["split"] or "train"
        group, embed = self.canvas.group(row), self.settings["embed_images"]
        tokens = [self.model.config.region_code_token(group, code) for code in reading.codes]
        image = _picture(row["image"], embed)
        masks = {mask: _picture(row["masks"][mask], embed) for turn in reading.turns for mask in turn.regions}
        counts = self.counts
        counts.images += 1
        for target in sorted(set(row["targets"])):
            if row["targets"].count(target) > self.maker.max_regions:
                counts.not_asked[target] += 1
        for number, turn in enumerate(reading.turns):
            counts.conversations += 1
            counts.intents[turn.intent] += 1
            counts.groups[self._group_name(row)] += 1
            counts.splits[split] += 1
            counts.datasets[row["dataset"] or "unnamed"] += 1
            if turn.absent:
                counts.absent[turn.absent] += 1
            answer = turn.text([tokens[mask] for mask in turn.regions])
            yield {
                "id": f"{row['dataset'] or 'row'}-{reading.index}-{number}",
                "images": [image],
                "messages": [
                    {"role": "user", "content": IMAGE_MARKER + turn.prompt},
                    {"role": "assistant", "content": answer},
                ],
                "masks": [masks[mask] for mask in turn.regions],
                "targets": [row["targets"][mask] for mask in turn.regions],
                **{name: row[name] for name in ("dataset", "modality", "site", "patient")},
                "split": split,
            }

    def _turn(self, reading: _Reading, generator: random.Random, plain: bool) -> Turn:
        self.maker.generator = generator
        return self.maker.plain(reading.row) if plain else self.maker.grounded(reading.row, reading.places)

    def _group_name(self, row: dict[str, Any]) -> str:
        groups = self.maker.groups
        return groups.names[groups.index(row["modality"], row["site"])]


def _picture(picture: dict[str, Any], embed: bool) -> dict[str, Any]:
    """How a picture stands in the output: by its path, or with its bytes."""
    path, content = picture["path"], picture["bytes"]
    if content is None and not embed:
        return {"path": str(Path(path).absolute()), "bytes": None}
    content = Path(path).read_bytes() if content is None else content
    return {"path": Path(path).name if path else None, "bytes": content}


def weights_sha256(model: Any) -> str:
    """A hash of all weights: of name, type, shape and bytes of each tensor, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
