"""A recipe's data: which files, in which layout, which of their rows; and all layouts' rows as one data set."""

import dataclasses
import glob
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medsight.text import nearest

from . import biomedparse, conversations, packed, questions, records, schema, splits
from .records import Item
from .schema import CONVERSATION_FEATURES, REGION_FEATURES


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)


_NO_DATA = ("annotation.json",)  # what `medsight data annotate` says of the parquet files beside it


class Layout(NamedTuple):
    """How the files of one layout are found and read."""

    kind: str | Callable[[str], str]  # "regions", "conversations", or a function that tells which a shard has
    shards: Callable[["Source"], list[str]]
    items: Callable[[str, "Source"], Iterator[Item]]


LAYOUTS = {
    "biomedparse": Layout("regions", biomedparse.biomedparse_shards, biomedparse.biomedparse_items),
    "llava": Layout("conversations", conversations.llava_shards, conversations.llava_items),
    "grounded": Layout("conversations", conversations.llava_shards, conversations.llava_items),
    "vqa_rad": Layout("conversations", questions.vqa_rad_shards, questions.vqa_rad_items),
    "slake": Layout("conversations", questions.slake_shards, questions.slake_items),
    "pathvqa": Layout("conversations", questions.pathvqa_shards, questions.hub_items),
    "omnimedvqa": Layout("conversations", questions.omnimedvqa_shards, questions.omnimedvqa_items),
    "parquet": Layout(packed.parquet_kind, packed.parquet_shards, packed.parquet_items),
    "webdataset": Layout(packed.webdataset_kind, packed.webdataset_shards, packed.webdataset_items),
}
_READERS = (biomedparse, conversations, packed, questions, records, schema, splits)


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of a recipe's data list.

    Attributes:
        layout: one of `LAYOUTS`.
        path: file, folder, or pattern of files, as the layout says.
        split: which split's rows; None for all. A layout that tells no split has all its rows in this one.
        images: folder that the paths of images and masks are relative to, where it is not the layout's own.
        limit: at most so many rows, the first ones.
        where: only rows with these values, by the names of the layout's own fields, e.g. {"image_in_test": False}.

    Raises:
        ValueError: a value is not of that kind.
    """

    layout: str
    path: str
    split: str | None = "train"
    images: str | None = None
    limit: int | None = None
    where: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"data layout {self.layout!r} is unknown: {nearest(self.layout, LAYOUTS)}")
        for name in ("path", "split", "images"):
            value = getattr(self, name)
            if not (isinstance(value, (str, os.PathLike)) and str(value)) and (value is not None or name == "path"):
                raise ValueError(f"data {name}: expected text, got {value!r}")
            object.__setattr__(self, name, None if value is None else os.path.expanduser(value))
        if self.split is not None:
            object.__setattr__(self, "split", splits.canonical_split(self.split))
        if self.limit is not None and (
            not isinstance(self.limit, int) or isinstance(self.limit, bool) or self.limit < 1
        ):
            raise ValueError(f"data limit: expected a count of at least 1, got {self.limit!r}")
        if self.where is not None and not isinstance(self.where, Mapping):
            raise ValueError(f"data where: expected {{field: value}}, got {self.where!r}")

    @classmethod
    def from_mapping(cls, entry: Mapping[str, Any]) -> "Source":
        """The source that an entry of a recipe describes.

        Raises:
            ValueError: a key is unknown (the nearest known one is named), a key is missing, or a value is bad.
        """
        if not isinstance(entry, Mapping):
            raise ValueError(f"data entry: expected a mapping with layout and path, got {entry!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in entry:
            if key not in known:
                raise ValueError(f"data entry: unknown key {key!r}: {nearest(key, known)}")
        for key in ("layout", "path"):
            if key not in entry:
                raise ValueError(f"data entry {dict(entry)}: expected a key {key!r}")
        return cls(**entry)

    @property
    def name(self) -> str:
        """What the data set is called where its rows do not say: the file's or folder's name, or a VQA's layout."""
        if LAYOUTS[self.layout].items in (questions.vqa_rad_items, questions.slake_items, questions.hub_items):
            return self.layout
        return Path(self.path).absolute().stem

    def takes(self, record: Mapping[str, Any], split: str | None) -> bool:
        """Whether a record of this split (None where the layout does not tell) is wanted."""
        if None not in (self.split, split) and splits.canonical_split(split) != self.split:
            return False
        return all(record.get(key) == value for key, value in (self.where or {}).items())


def kind_of(layout: str | Source) -> str:
    """Which kind of rows a layout, or a source, has: "regions" or "conversations".

    Raises:
        OSError, ValueError: the layout is unknown; or it holds either kind, as parquet does, and no source says which
            file to look into; or that file is missing or damaged.
    """
    name = layout.layout if isinstance(layout, Source) else layout
    if name not in LAYOUTS:
        raise ValueError(f"data layout {name!r} is unknown: {nearest(name, LAYOUTS)}")
    kind = LAYOUTS[name].kind
    if isinstance(kind, str):
        return kind
    if not isinstance(layout, Source):
        raise ValueError(f"data layout {name!r} holds either kind of rows: ask of a source, whose files tell")
    return kind(LAYOUTS[name].shards(layout)[0])


def iterate(source: Source) -> Iterator[Item]:
    """Every wanted row of a source, one after another, and every bad one as an item with its error.

    Raises:
        OSError, ValueError: the source's files are not there, or not in its layout.
    """
    layout = LAYOUTS[source.layout]
    items = (item for shard in layout.shards(source) for item in layout.items(shard, source))
    yield from islice(items, source.limit)


def load_source(source: Source, streaming: bool = False, skip_errors: bool = False) -> "Dataset | IterableDataset":
    """The rows of a source, by `schema.REGION_FEATURES` or `schema.CONVERSATION_FEATURES` as `kind_of` says.

    Map-style rows lie in the cache of `datasets` (never beside the data) and are read again when the source's text
    files, or the readers, have changed; pictures in files of their own stay there. Streamed rows are not stored.

    Args:
        source: what to read.
        streaming: rows one after another, by shards (files), instead of map-style.
        skip_errors: leave bad rows out, each with a warning when it is read, instead of stopping at the first.

    Raises:
        OSError, ValueError: files are missing or not in the source's layout, a row is bad (its file and item are
            named), or there is no row of the split and with the wanted values. Streamed bad rows raise when reached.
    """
    from datasets import Dataset, IterableDataset
    from datasets.exceptions import DatasetGenerationError

    source = dataclasses.replace(
        source,
        path=os.path.abspath(source.path),
        images=None if source.images is None else os.path.abspath(source.images),
    )
    features = REGION_FEATURES if kind_of(source) == "regions" else CONVERSATION_FEATURES
    shards = LAYOUTS[source.layout].shards(source)
    if next(iterate(source), None) is None:
        raise ValueError(nothing_found(source))
    arguments = {"shards": shards, "source": source, "stamp": _stamp(shards), "skip_errors": skip_errors}
    if streaming:
        stream = IterableDataset.from_generator(_rows, features=features, gen_kwargs=arguments)
        return stream if source.limit is None else stream.take(source.limit)
    try:
        rows = Dataset.from_generator(_rows, features=features, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise
    if not len(rows):
        raise ValueError(f"{source.path}: all of its rows are bad, and were left out")
    return rows if source.limit is None else rows.select(range(min(source.limit, len(rows))))


def _rows(shards: list[str], source: Source, stamp: str, skip_errors: bool) -> Iterator[dict[str, Any]]:
    """The generator behind the data sets; `stamp` makes the cache of `datasets` forget rows of changed files."""
    for shard in shards:
        for item in islice(LAYOUTS[source.layout].items(shard, source), source.limit):
            if item.error is None:
                yield item.row
            elif skip_errors:
                logger.warning(f"left out: {item.error}")
            else:
                raise item.error


def _stamp(shards: list[str]) -> str:
    digest = hashlib.sha256()
    for module in _READERS:
        digest.update(Path(module.__file__).read_bytes())
    for shard in map(Path, shards):
        for file in (
            (shard, *sorted(child for child in shard.iterdir() if child.is_dir())) if shard.is_dir() else (shard,)
        ):
            status = file.stat()
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def nothing_found(source: Source) -> str:
    """What to say of a source without a row: what was asked for, and which splits there are."""
    everything = dataclasses.replace(source, split=None, where=None, limit=None)
    found = [item for item in islice(iterate(everything), 1000) if item.row is not None]
    there = ", ".join(sorted({item.row["split"] for item in found})) or "no rows at all"
    wanted = f"of the split {source.split!r}" if source.split is not None else "there"
    if source.where:
        wanted += f" with {', '.join(f'{key} = {value!r}' for key, value in source.where.items())}"
    return f"{source.path}: no row {wanted}; its splits: {there}"


def detect_layout(path: str | Path) -> str:
    """The layout of a file or folder, by what is in it.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it looks like none of the layouts.
    """
    path = Path(path)
    if not path.exists():
        matching = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else []
        if not matching:
            raise FileNotFoundError(f"{path}: no such file or folder")
        return detect_layout(matching[0])
    if path.is_file():
        return _layout_of_file(path)
    if (path / "questions.jsonl").is_file() or (path / "VQA_RAD Dataset Public.json").is_file():
        return "vqa_rad"
    if (path / "QA_information").is_dir():
        return "omnimedvqa"
    if (path / biomedparse.MANIFEST).is_file() or biomedparse.split_folders(path):
        return "biomedparse"
    for pattern in ("*.json", "*.jsonl", "**/*.parquet", "**/*.tar", "**/*.tar.gz", "**/*.tgz", "**/*.pkl"):
        for file in sorted(file for file in path.glob(pattern) if file.name not in _NO_DATA):
            return _layout_of_file(file)
    if any(child.is_dir() and biomedparse.split_folders(child) for child in path.iterdir()):
        return "biomedparse"
    raise ValueError(f"{path}: it looks like none of the layouts {', '.join(LAYOUTS)}; name its layout")


def _layout_of_file(path: Path) -> str:
    if path.name.endswith(packed.TAR_SUFFIXES):
        return "webdataset"
    if path.suffix == ".pkl":
        return "pathvqa"
    if path.suffix == ".parquet":
        _, first = next(records.parquet_records(path), ("", {}))
        if isinstance(first, dict) and {"image", "question", "answer"} <= set(first):
            return "pathvqa"
        return "parquet"
    if path.suffix in records.JSON_SUFFIXES:
        place, first = next(records.json_records(path), (str(path), ValueError(f"{path}: an empty file")))
        if isinstance(first, ValueError):
            raise first
        for keys, layout in (
            ({"mask", "target"}, "biomedparse"),
            ({"mask_files"}, "grounded"),
            ({"conversations"}, "llava"),
            ({"conversatons"}, "llava"),
            ({"img_name", "qid"}, "slake"),
            ({"gt_answer", "image_path"}, "omnimedvqa"),
            ({"question", "answer"}, "vqa_rad"),
        ):
            if keys <= set(first):
                return layout
        raise ValueError(f"{place}: an item of fields {sorted(first)} fits none of the layouts; name its layout")
    raise ValueError(f"{path}: it looks like none of the layouts {', '.join(LAYOUTS)}; name its layout")
