"""Conversations about images with masks, each mask cited by its region code: streamed from rows to parquet files."""

import hashlib
import logging
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
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
from medsight.data.templates import Wordings
from medsight.data.wording import ConversationMaker, Turn, Vocabulary, position_in_words
from medsight.files import check_empty, staged_folder
from medsight.inference.code_assignment import assign_codes

from .annotation_output import AnnotationCounts, ConversationWriter, write_card
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
    root: str | Path | None = None,
    wordings: Wordings | None = None,
    progress: bool = False,
) -> AnnotationCounts:
    """Write conversations about images with masks, as parquet with a data card; rows and pictures are streamed.

    The words about row i depend on `seed`, i and the data's vocabulary alone, not on `batch_size`. With a
    `plain_share` of 1 no code is needed: the model is not run, and its codebook may be untrained.

    Args:
        rows: of `REGION_FEATURES`, map-style or streaming; read twice.
        model: with a trained perceiver and codebook; on the device to run on.
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
        root: write paths relative to this folder, which then is the `images` of the source that reads them; absolute
            paths by default.
        wordings: what is said; `Wordings.load()` by default.
        progress: show a progress bar on standard error.

    Raises:
        OSError: the output folder is not empty or cannot be written; a picture is missing.
        ValueError: a picture, mask or setting is bad; a target is no class of the model; a row has no group, or groups
            are not the model's.
    """

    _check_settings(per_image, plain_share, batch_size, on_error)
    if model.config.use_region_codebook and groups.names != list(model.config.group_names):
        raise ValueError(f"groups {groups.names}: expected those of the model, {list(model.config.group_names)}")
    wordings = Wordings.load() if wordings is None else wordings
    vocabulary = Vocabulary.from_rows(rows, groups)
    if plain_share < 1:
        _check_targets(sorted(set().union(*vocabulary.targets)), model.config.mask_class_names)
    annotator = _Annotator(
        model,
        Canvas(processor, model.config, groups),
        ConversationMaker(wordings, vocabulary, random.Random(), max_regions=max_regions, noise=prompt_noise),
        AnnotationCounts(codes={name: [0] * model.config.codes_per_group for name in groups.names}),
        _Pictures(embed_images, None if root is None else Path(root)),
        per_image,
        plain_share,
        seed,
    )
    settings = {
        "seed": seed,
        "per_image": per_image,
        "plain_share": plain_share,
        "max_regions": max_regions,
        "prompt_noise": prompt_noise,
        "embed_images": embed_images,
    }
    with _evaluating(model), staged_folder(Path(output), False, check_empty) as folder:
        _write_conversations(folder, rows, annotator, batch_size, on_error, progress)
        write_card(folder, annotator.counts, {**settings, **_origin(model, wordings)})
    return annotator.counts


def _write_conversations(
    folder: Path,
    rows: Iterable[dict[str, Any]],
    annotator: "_Annotator",
    batch_size: int,
    on_error: str,
    progress: bool,
) -> None:
    """Write the shards; pictures are decoded in threads, a batch at a time."""

    counts, numbered = annotator.counts, enumerate(rows)
    bar = tqdm(total=_length(rows), desc="annotate", unit="image", disable=not progress, file=sys.stderr)
    with bar, ThreadPoolExecutor(READERS) as pool, closing(ConversationWriter(folder)) as writer:
        while batch := list(islice(numbered, batch_size)):
            for reading in annotator.annotated(_readable(pool.map(annotator.read, batch), on_error, counts)):
                for conversation in annotator.conversations(reading):
                    writer.write(conversation)
            bar.update(len(batch))
        if not counts.images:
            raise ValueError(f"no image to annotate: {len(counts.skipped)} could not be read, none else came")
        writer.finish()


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Puts the model into evaluation mode, and back into the one that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass
class _Reading:
    """A row on its way: what is read of its pictures, what is said about it, its codes."""

    index: int
    row: dict[str, Any]
    generators: list[random.Random]
    plain: list[bool]
    places: list[str]
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
    pictures: "_Pictures"
    per_image: int
    plain_share: float
    seed: int

    def read(self, numbered: tuple[int, dict[str, Any]]) -> _Reading | Exception:
        """Decode a row's pictures, masks only if they may be cited; a bad one is handed back as its error."""

        index, row = numbered
        generators = [random.Random(f"{self.seed}:{index}:{number}") for number in range(self.per_image)]
        plain = [generator.random() < self.plain_share for generator in generators]
        reading = _Reading(index, row, generators, plain, [])
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

    def annotated(self, readings: Sequence[_Reading]) -> Sequence[_Reading]:
        """Draw the words, and let the model see the images whose masks these cite."""

        for reading in readings:
            reading.turns = [self._turn(reading, number) for number in range(self.per_image)]
        seen = [reading for reading in readings if any(turn.regions for turn in reading.turns)]
        if not seen:
            return readings
        named = self.model.config.mask_class_names is not None
        with torch.no_grad():
            pixels = torch.stack([reading.pixels for reading in seen])
            regions = self.model.get_region_features(pixels.to(self.model.device, self.model.dtype))
        codes = assign_codes(
            self.model,
            regions,
            [reading.masks for reading in seen],
            [self._classes(reading.row) for reading in seen] if named else None,
            torch.tensor([self.canvas.group(reading.row) for reading in seen]),
        )
        queries = regions.masks_queries_logits.shape[1]
        for reading, of_image in zip(seen, codes, strict=True):
            reading.codes = of_image.tolist()
            usage = self.counts.codes[self._group_name(reading.row)]
            for code in reading.codes:
                usage[code] += 1
            self.counts.masks_beyond_queries += max(0, len(reading.codes) - queries)
        return readings

    def conversations(self, reading: _Reading) -> Iterator[dict[str, Any]]:
        """The rows of `CONVERSATION_FEATURES` to write, counted."""

        row, split = reading.row, reading.row["split"] or "train"
        group = self.canvas.group(row)
        tokens = [self.model.config.region_code_token(group, code) for code in reading.codes]
        image = self.pictures.entry(row["image"])
        masks = {mask: self.pictures.entry(row["masks"][mask]) for turn in reading.turns for mask in turn.regions}
        self._count(row, split, reading.turns)
        for number, turn in enumerate(reading.turns):
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

    def _turn(self, reading: _Reading, number: int) -> Turn:
        self.maker.generator = reading.generators[number]
        return (
            self.maker.plain(reading.row)
            if reading.plain[number]
            else self.maker.grounded(reading.row, reading.places)
        )

    def _count(self, row: dict[str, Any], split: str, turns: Sequence[Turn]) -> None:
        counts = self.counts
        counts.images += 1
        counts.conversations += len(turns)
        for target in sorted(set(row["targets"])):
            if row["targets"].count(target) > self.maker.max_regions:
                counts.add("not_asked", target)
        for turn in turns:
            counts.add("intents", turn.intent)
            counts.add("groups", self._group_name(row))
            counts.add("splits", split)
            counts.add("datasets", row["dataset"] or "unnamed")
            if turn.absent:
                counts.add("absent", turn.absent)

    def _classes(self, row: dict[str, Any]) -> torch.Tensor:
        """(n,) long, the mask classes of a row's targets."""

        name = picture_name(row["image"])
        return torch.tensor([self.canvas.class_of(target, name) for target in row["targets"]], dtype=torch.long)

    def _group_name(self, row: dict[str, Any]) -> str:
        groups = self.maker.groups
        return groups.names[groups.index(row["modality"], row["site"])]


@dataclass(frozen=True)
class _Pictures:
    """How pictures stand in the output: by path, or with their bytes."""

    embed: bool
    root: Path | None

    def entry(self, picture: dict[str, Any]) -> dict[str, Any]:
        path, content = picture.get("path"), picture.get("bytes")
        if content is not None or self.embed:
            content = Path(path).read_bytes() if content is None else content
            return {"path": Path(path).name if path else None, "bytes": content}
        absolute = Path(path).absolute()
        if self.root is None:
            return {"path": str(absolute), "bytes": None}
        try:
            return {"path": absolute.relative_to(self.root.absolute()).as_posix(), "bytes": None}
        except ValueError as error:
            raise ValueError(f"{path}: not in the folder {self.root} that paths are to be relative to") from error


def weights_sha256(model: Any) -> str:
    """A hash of all weights: of name, type, shape and bytes of each tensor, in the order of their names."""

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _origin(model: Any, wordings: Wordings) -> dict[str, Any]:
    """What wrote the conversations, for the card."""
    return {
        "templates": Path(wordings.path).name,
        "templates_sha256": wordings.sha256,
        "model": _model_name(model),
        "weights_sha256": weights_sha256(model),
        "torch": version("torch"),
    }


def _model_name(model: Any) -> str:
    """A Hub id, or the name of the folder that it was loaded from: where that lies is nobody's concern."""
    name = model.config._name_or_path
    return Path(name).resolve().name if name and Path(name).exists() else name or type(model).__name__


def _check_settings(per_image: int, plain_share: float, batch_size: int, on_error: str) -> None:
    for name, value in (("per_image", per_image), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if not 0 <= plain_share <= 1:
        raise ValueError(f"plain_share={plain_share}: expected a share between 0 and 1")
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error={on_error!r}: expected 'stop' or 'skip'")


def _check_targets(targets: Sequence[str], classes: Sequence[str] | None) -> None:
    unknown = [] if classes is None else sorted(set(targets) - set(classes))
    if unknown:
        raise ValueError(
            f"target {unknown[0]!r} ({len(unknown)} such) is none of the model's {len(classes)} mask classes "
            f"({', '.join(classes[:5])}, ...): train a perceiver that knows it, or rename it in the data"
        )


def _readable(readings: Iterable[Any], on_error: str, counts: AnnotationCounts) -> list[_Reading]:
    readable = []
    for reading in readings:
        if not isinstance(reading, Exception):
            readable.append(reading)
        elif on_error == "stop":
            raise reading
        else:
            counts.skipped.append(str(reading))
            logger.warning("left out (number %d): %s", len(counts.skipped), reading)
    return readable


def _length(rows: Any) -> int | None:
    try:
        return len(rows)
    except TypeError:
        return None
