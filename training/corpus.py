"""The rows that a run trains on: sources read, split, annotated; and what makes two runs' data the same."""

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from configuration_medsight.configuration_medsight import MedSightConfig
from medsight.data.additions import Additions, find_additions
from medsight.data.groups import Groups, match_groups
from medsight.data.pictures import picture_name
from medsight.data.schema import CONVERSATION_FEATURES, REGION_FEATURES
from medsight.data.sources import Source, load_source, warn_of_shared_pictures
from medsight.data.splits import divide, hold_out_rows
from medsight.data.templates import Wordings
from medsight.data.wording import ConversationMaker, Vocabulary, corpus_texts
from medsight.text import nearest
from processing_medsight.region_codes_medsight import find_region_codes, structures_of_groups

from .annotation import annotate
from .recipe import AnnotationSettings, Recipe


ANNOTATIONS = "annotations"
TEXT = "text"  # in a stage's `data`: the corpus' own words


@dataclass
class Corpus:
    """Rows by purpose.

    Attributes:
        training, validation: images with masks.
        groups: code groups.
        classes: names of the mask classes.
        replayed: the data sets of `data.replay`.
    """

    recipe: Recipe
    training: Any
    validation: Any
    groups: Groups
    classes: list[str]
    replayed: frozenset[str] = frozenset()

    @cached_property
    def region_codes(self) -> dict[str, Any] | None:
        """What the codes of the checkpoint that is trained from stand for, where it says so and has a codebook."""
        folder = self.recipe.model.folder
        if folder is None or not MedSightConfig.from_pretrained(folder, local_files_only=True).use_region_codebook:
            return None
        return find_region_codes(folder, local_files_only=True)

    @property
    def known(self) -> list[frozenset[str]]:
        """For each code group the structures that the checkpoint which is trained from has learnt to find."""
        return structures_of_groups(self.region_codes, len(self.groups.names))

    @property
    def elsewhere(self) -> list[list[str]]:
        """For each code group the structures that only images of unrelated groups show."""
        vocabulary = Vocabulary.from_rows(self.training, self.groups).with_codes(self.region_codes)
        wordings = Wordings.load()
        return [sum(vocabulary.unrelated_targets(k, wordings), []) for k in range(len(self.groups.names))]

    @property
    def orientations(self) -> dict[str, str]:
        """How most training images of a code group lie, by the group's name, where the data say it."""
        columns = ("modality", "site", "orientation")
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for modality, site, orientation in zip(*(self.training[name] for name in columns), strict=True):
            if orientation is not None:
                counts[self.groups.names[self.groups.index(modality, site)]][orientation] += 1
        return {name: found.most_common(1)[0][0] for name, found in counts.items()}

    @cached_property
    def additions(self) -> Additions:
        """What the rows hold that the folder of the recipe's model lacks, where it is to be extended.

        Raises:
            ValueError: as `find_additions`.
        """
        config = folder_config(self.recipe) if self.recipe.model.extend else None
        if config is None:
            return Additions()
        rows = concatenate_datasets([self.training, self.validation]).remove_columns(["image", "masks"])
        data = self.recipe.data
        chosen = Groups(data.groups) if data.groups and config.use_region_codebook else None
        return find_additions(config, rows, chosen, data.classes)

    @cached_property
    def conversations(self) -> dict[str, tuple[Any, Any]]:
        """Training and validation rows of each source of conversations that a stage reads.

        They are split together, and beside the images with masks: what one stage validates on no other trains on.

        Raises:
            OSError, ValueError: as `load_source`; or nothing can be held out though it is asked.
        """
        recipe = self.recipe
        named = {name for entry in recipe.stages for name in entry.get("data", [])}
        parts = {
            name: read_source(recipe, entry) for name, entry in recipe.data.conversations.items() if name in named
        }
        if not parts:
            return {}
        rows, beside = concatenate_datasets([*parts.values()]), [(self.training, self.validation)]
        fraction = recipe.data.validation_fraction
        held = hold_out_rows(rows, fraction, split_seed(recipe), beside) if fraction else set()
        split, start = {}, 0
        for name, part in parts.items():
            split[name] = divide(part, {place - start for place in held if start <= place < start + len(part)})
            start += len(part)
        return split

    @cached_property
    def text(self) -> list[tuple[Any, Any]]:
        """Training and validation rows of the words of `data.text`, held out beside all other data.

        Raises:
            OSError, ValueError: as `load_source`.
        """
        recipe = self.recipe
        if not recipe.data.text:
            return []
        rows = concatenate_datasets([read_source(recipe, entry) for entry in recipe.data.text])
        beside = [(self.training, self.validation), *self.conversations.values()]
        return [divide(rows, hold_out_rows(rows, recipe.data.validation_fraction, split_seed(recipe), beside))]


def read_corpus(recipe: Recipe) -> Corpus:
    """Read the region sources of a recipe: rows only, no picture.

    Raises:
        OSError, ValueError: as `load_source`; or nothing can be held out though it is asked.
    """
    parts = [read_source(recipe, entry) for entry in recipe.data.regions]
    replay = [read_source(recipe, entry) for entry in recipe.data.replay]
    replayed = frozenset(name for part in replay for name in part.unique("dataset"))
    both = replayed & {name for part in parts for name in part.unique("dataset")}
    if both:
        raise ValueError(f"data.replay: the data set {min(both)!r} is in data.regions too: leave one out")
    parts += replay
    if not parts:
        parts = [Dataset.from_dict({column: [] for column in REGION_FEATURES}, REGION_FEATURES)]
    rows = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    held = hold_out_rows(rows, recipe.data.validation_fraction, split_seed(recipe))
    training, validation = divide(rows, held)
    groups = groups_of(recipe, zip(rows["modality"], rows["site"], strict=True))
    classes = recipe.data.classes or sorted({target for targets in rows["targets"] for target in targets})
    return Corpus(recipe, training, validation, groups, classes, replayed)


def warn_of_tested_pictures(recipe: Recipe) -> None:
    """Log a warning where a source of the recipe has pictures in another of its splits too."""
    named = {name for stage in recipe.stages for name in stage.get("data", [])}
    spoken = [entry for name, entry in recipe.data.conversations.items() if name in named]
    for entry in (*recipe.data.regions, *recipe.data.replay, *spoken):
        warn_of_shared_pictures(Source.from_mapping(entry))


def read_source(recipe: Recipe, entry: dict[str, Any]) -> Any:
    """The rows of one source of a recipe, map-style; bad ones as `data.on_error` says.

    Raises:
        OSError, ValueError: as `load_source`.
    """
    return load_source(Source.from_mapping(entry), skip_errors=recipe.data.on_error == "skip")


def refuse_unknown_targets(corpus: Corpus, config: MedSightConfig) -> None:
    """Raise ValueError, naming both, where a mask shows none of the model's classes; unless bad rows are skipped."""
    known = config.mask_class_names
    if known is None or corpus.recipe.data.on_error == "skip":
        return
    for rows in (corpus.training, corpus.validation):
        for number, targets in enumerate(rows["targets"]):
            unknown = next((index for index, target in enumerate(targets) if target not in known), None)
            if unknown is not None:
                raise ValueError(
                    f"{picture_name(rows[number]['masks'][unknown])}: {targets[unknown]!r} is none of the model's "
                    f"{len(known)} mask classes: {nearest(targets[unknown], known)}"
                )


def split_seed(recipe: Recipe) -> int:
    """The seed of what is held out for validation."""
    return recipe.seed if recipe.data.validation_seed is None else recipe.data.validation_seed


def groups_of(recipe: Recipe, pairs: Iterable[tuple[str, str]]) -> Groups:
    """The code groups of modalities and sites: those of the checkpoint that the recipe starts from, with the new ones
    where it is extended; or from scratch the recipe's, or one a pair.

    Raises:
        ValueError: as `match_groups`.
    """
    chosen = Groups(recipe.data.groups) if recipe.data.groups else None
    config = folder_config(recipe)
    if config is not None and config.use_region_codebook:
        return match_groups(config, pairs, chosen, recipe.model.extend)
    return chosen or Groups.of_pairs(pairs)


def folder_config(recipe: Recipe) -> MedSightConfig | None:
    """The configuration of the checkpoint that a recipe starts from; None from scratch, or where it is not there."""
    folder = recipe.model.folder
    if folder is None or not Path(folder).is_dir():
        return None
    return MedSightConfig.from_pretrained(folder, local_files_only=True)


def corpus_conversations(corpus: Corpus, split: str = "training") -> Any:
    """The corpus' own text as conversations without images: for stages that read `text`, and a preset's tokenizer.

    Made from the rows of the split, with the words of the training rows and the wordings of the first annotation; and
    the split's part of `data.text`.
    """
    recipe = corpus.recipe
    settings = next(iter(recipe.annotations.values()), AnnotationSettings())
    maker = ConversationMaker(
        Wordings.load(settings.templates),
        Vocabulary.from_rows(corpus.training, corpus.groups),
        random.Random(recipe.seed),
        max_regions=settings.max_regions,
        noise=settings.prompt_noise,
    )
    empty = dict.fromkeys(("modality", "site", "split", "patient"))
    rows, texts = [], corpus_texts(maker, getattr(corpus, split), recipe.data.text_rounds)
    for number, (question, reply, origin) in enumerate(texts):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        rows.append({**empty, "id": f"text-{number}", "images": [], "messages": messages, "masks": [], **origin})
    columns = {name: [row[name] for row in rows] for name in CONVERSATION_FEATURES}
    made = Dataset.from_dict(columns, CONVERSATION_FEATURES)
    return concatenate_datasets([made, *(part[split == "validation"] for part in corpus.text)])


def conversation_rows(corpus: Corpus, names: list[str], folder: Path, split: str) -> Any:
    """The conversations of a stage: the corpus' text, annotated ones from the run's folder, others from their sources.

    Raises:
        OSError, ValueError: as `load_source` and `Corpus.conversations`.
    """
    recipe, parts = corpus.recipe, []
    if TEXT in names:
        parts.append(corpus_conversations(corpus, split))
    for name in names:
        if name in recipe.annotations and len(getattr(corpus, split)):
            parts.append(load_source(Source("parquet", str(folder / ANNOTATIONS / name / split), split=None)))
        elif name in recipe.annotations:
            parts.append(Dataset.from_dict({column: [] for column in CONVERSATION_FEATURES}, CONVERSATION_FEATURES))
    for name in names:
        if name in recipe.data.conversations:
            parts.append(corpus.conversations[name][0 if split == "training" else 1])
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def annotate_regions(corpus: Corpus, name: str, model: Any, processor: Any, folder: Path) -> None:
    """Write the conversations of one annotation, training and validation, where they are not there yet."""
    recipe, settings = corpus.recipe, corpus.recipe.annotations[name]
    for split in ("training", "validation"):
        target = folder / ANNOTATIONS / name / split
        if target.is_dir() or not len(getattr(corpus, split)):
            continue
        annotate(
            getattr(corpus, split),
            model,
            processor,
            corpus.groups,
            target,
            per_image=settings.per_image if split == "training" else 1,
            plain_share=settings.plain_share,
            max_regions=settings.max_regions,
            prompt_noise=settings.prompt_noise if split == "training" else 0.0,
            wordings=Wordings.load(settings.templates),
            region_codes=corpus.region_codes,
            seed=recipe.seed,
            on_error=recipe.data.on_error,
        )


def fingerprint(rows: Any) -> str:
    """A sha256 of which files and words a data set has: its rows without pictures' bytes, and the sizes of files."""
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(1000):
        for row in batch.to_pylist():
            digest.update(json.dumps(_described(row), sort_keys=True).encode())
    return digest.hexdigest()


def _described(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"path", "bytes"}:
        path, content = value["path"], value["bytes"]
        if content is not None:
            return hashlib.sha256(content).hexdigest()
        file = Path(path)
        # the last three parts: the same data under another root is the same
        return ["/".join(file.parts[-3:]), file.stat().st_size if file.is_file() else None]
    if isinstance(value, dict):
        return {key: _described(entry) for key, entry in value.items()}
    return [_described(entry) for entry in value] if isinstance(value, list) else value
