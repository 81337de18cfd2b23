"""Where data lies and how it is read: `Source`, an entry of a recipe's data list, and `Layout`, found by its name.

A module in `medsight/data/layouts` registers its layouts. Another package brings one by an entry point of the group
"medsight.layouts", whose name is the layout's and whose value is the `Layout`.
"""

import dataclasses
import glob
import importlib
import os
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

from medsight.text import nearest

from .splits import canonical_split, split_in_name


if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ENTRY_POINTS = "medsight.layouts"


class Entry(NamedTuple):
    """One row of a source, or why there is none: the caller raises the error, or reports it.

    Attributes:
        place: file and record that it came from.
        row: the row, by `medsight.data.schema`.
        error: what is wrong with it; the row is None then.
        known_leak: whether the source itself says that this patient or image is also in another split.
        warnings: what is to be known of the source, once, and is no error.

    Example:
        >>> Entry("a.json, item 1", error=ValueError("a.json, item 1: expected a field 'image'")).row is None
        True
    """

    place: str
    row: dict[str, Any] | None = None
    error: ValueError | None = None
    known_leak: bool = False
    warnings: tuple[str, ...] = ()

    def checked(self) -> dict[str, Any]:
        """The row; raises the error where there is one."""
        if self.row is None:
            raise self.error or ValueError(f"{self.place}: expected a row")
        return self.row


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is no file or folder but the address of a data set on the Hub, hf://OWNER/NAME."""
    return str(path).startswith("hf://")


_TEXTS = ("split", "modality", "site")  # fields of a `Source` that are text or None


def _is_texts(value: Any, kind: Any) -> bool:
    """Whether a value is None, or a collection of that kind in which all is text."""
    if value is None:
        return True
    texts = [*value, *value.values()] if isinstance(value, Mapping) else value
    return isinstance(value, kind) and all(isinstance(text, str) for text in texts)


def _has_a_group(pattern: Any) -> bool:
    try:
        return re.compile(pattern).groups > 0
    except (re.error, TypeError):
        return False


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of a recipe's data list.

    Attributes:
        layout: name of a `Layout`.
        path: file, folder, or pattern of files, as the layout says.
        split: which split's rows; None for all. A layout that tells no split has all its rows in this one.
        images: folder that the paths of images and masks are relative to, where it is not the layout's own.
        limit: at most so many rows, the first ones.
        where: only rows with these values, by the names of the layout's own fields, e.g. {"image_in_test": False}.
        modality, site: of all images, where the layout does not tell.
        patient: regular expression whose first group, found in an image's file name, is its patient; where the layout
            does not tell, each image is a patient of its own.
        rename: structure, as the data call it -> what it is called here.
        covers: structures that were looked for in every image: one without a mask is known to be absent.
        complete: whether every structure that has a mask anywhere in a data set was looked for in all of its images
            of that modality and site. By default a structure that an image has no mask of is neither present nor
            absent: nobody looked.
        test_share: share of the patients that make the split test, whatever the layout says; the others train.
        options: settings of the layout's own, an instance of `Layout.Options`; in a recipe they stand beside the rest.

    Raises:
        ValueError: a value is not of that kind.

    Example:
        >>> Source("llava", "answers.json", split="val").split
        'validation'
    """

    layout: str
    path: str
    split: str | None = "train"
    images: str | None = None
    limit: int | None = None
    where: Mapping[str, Any] | None = None
    modality: str | None = None
    site: str | None = None
    patient: str | None = None
    rename: Mapping[str, str] | None = None
    covers: Sequence[str] | None = None
    complete: bool = False
    test_share: float | None = None
    options: Any = None

    def __post_init__(self) -> None:
        layout, share = find_layout(self.layout), self.test_share
        for name, is_good, expected in (
            ("path", isinstance(self.path, (str, os.PathLike)), "text"),
            ("images", isinstance(self.images, (str, os.PathLike, NoneType)), "text"),
            *((name, isinstance(getattr(self, name), (str, NoneType)), "text") for name in _TEXTS),
            ("limit", self.limit is None or isinstance(self.limit, int) and self.limit > 0, "a count of at least 1"),
            ("where", isinstance(self.where, (Mapping, NoneType)), "{field: value}"),
            ("rename", _is_texts(self.rename, Mapping), "{name: new name}"),
            ("covers", _is_texts(self.covers, (list, tuple)), "a list of structures"),
            ("complete", isinstance(self.complete, bool), "true or false"),
            ("test_share", share is None or isinstance(share, float) and 0 < share < 1, "a share between 0 and 1"),
            ("patient", self.patient is None or _has_a_group(self.patient), "a regular expression with a group"),
        ):
            if not is_good:
                raise ValueError(f"data {name}: expected {expected}, got {getattr(self, name)!r}")
        if layout.Options is not None and self.options is None:
            object.__setattr__(self, "options", layout.Options())
        object.__setattr__(self, "path", os.path.expanduser(self.path))
        object.__setattr__(self, "images", self.images and os.path.expanduser(self.images))
        object.__setattr__(self, "split", self.split and canonical_split(self.split))

    @classmethod
    def from_mapping(cls, entry: Mapping[str, Any]) -> "Source":
        """The source that an entry of a recipe describes; settings of the layout's own stand among the others.

        Raises:
            ValueError: a key is unknown (the nearest known one is named), a key is missing, or a value is bad.
        """
        if not isinstance(entry, Mapping):
            raise ValueError(f"data entry: expected a mapping with layout and path, got {entry!r}")
        for key in ("layout", "path"):
            if key not in entry:
                raise ValueError(f"data entry {dict(entry)}: expected a key {key!r}")
        kind = find_layout(entry["layout"]).Options
        known = {field.name for field in dataclasses.fields(cls)} - {"options"}
        own = {field.name for field in dataclasses.fields(kind)} if kind is not None else set[str]()
        for key in entry:
            if key not in known | own:
                raise ValueError(f"data entry: unknown key {key!r}: {nearest(key, known | own)}")
        common = {key: value for key, value in entry.items() if key in known}
        if kind is not None:
            common["options"] = kind(**{key: value for key, value in entry.items() if key in own})
        return cls(**common)

    def to_mapping(self) -> dict[str, Any]:
        """The entry of a recipe that describes it, without what is as it is by default."""
        fields = [(self, field) for field in dataclasses.fields(self) if field.name != "options"]
        fields += [(self.options, field) for field in dataclasses.fields(self.options)] if self.options else []
        values = {field.name: getattr(owner, field.name) for owner, field in fields}
        defaults = {
            field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            for _, field in fields
        }
        return {name: value for name, value in values.items() if name in ("layout", "path") or value != defaults[name]}

    @property
    def name(self) -> str:
        """What the data set is called where neither its rows nor its layout say: the file's or folder's name."""
        return Path(self.path).absolute().stem

    def patient_of(self, file: str | Path) -> str | None:
        """The patient that a file's name tells by the pattern `patient`; None without a pattern.

        Raises:
            ValueError: the pattern is not found in the name.
        """
        if self.patient is None:
            return None
        match = re.search(self.patient, Path(file).name)
        if match is None:
            raise ValueError(f"{file}: the pattern of the patient, {self.patient!r}, is not found in its name")
        return match[1]

    def takes(self, record: Mapping[str, Any], split: str | None) -> bool:
        """Whether a record of this split (None where the layout does not tell) is wanted."""
        if self.split is not None and split is not None and canonical_split(split) != self.split:
            return False
        return all(record.get(key) == value for key, value in (self.where or {}).items())

    def files(
        self, suffixes: tuple[str, ...], recursive: bool = False, accepts: Callable[[str], bool] | None = None
    ) -> list[str]:
        """The files at a path that is a file, a folder or a pattern of files, in order.

        In a folder, and of those that match a pattern, files named after a split (`train.json`,
        `data/test-00000.parquet`, `val/x.tar`) are of that split. A file that is named itself is read whatever it is
        called.

        Args:
            accepts: whether a file of a folder or pattern, which may hold others of its suffix, is one of the layout.

        Raises:
            FileNotFoundError: there is no such file or folder, or no file has one of the suffixes.
            ValueError: no file is of the split, or just some are named after a split.
        """
        path = Path(self.path)
        if path.is_file():
            return [str(path)]
        inside = map(str, path.glob("**/*" if recursive else "*")) if path.is_dir() else None
        found = sorted(inside or glob.glob(self.path, recursive=True))
        found = [file for file in found if file.lower().endswith(suffixes) and (accepts is None or accepts(file))]
        splits = {file: self.split_of(file) for file in found}
        if not splits:
            raise FileNotFoundError(f"{path}: no such file, and no {' or '.join(suffixes)} file in or matching it")
        unnamed = [file for file, split in splits.items() if split is None]
        if len(unnamed) == len(splits):
            return unnamed
        if unnamed:
            raise ValueError(
                f"{unnamed[0]}: its name tells no split, while other files of {path} are named after one; name a file "
                "as the path, or a pattern that leaves the one or the other out"
            )
        chosen = [file for file, split in splits.items() if self.split in (None, split)]
        if not chosen:
            raise ValueError(
                f"{path}: no file of the split {self.split!r}, only of {sorted(map(str, {*splits.values()}))}"
            )
        return chosen

    def split_of(self, file: str) -> str | None:
        """The split that a file of the folder or pattern is named after, in what the path leaves open."""
        if os.path.isfile(self.path):
            return None
        fixed = takewhile(lambda part: os.path.isdir(self.path) or not glob.has_magic(part), Path(self.path).parts)
        return split_in_name(Path(file).relative_to(Path(*fixed)))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the files of one layout are found and read.

    Attributes:
        name: what recipes, benchmarks and `--layout` call it.
        kind: "regions" or "conversations", the rows that it has; or a function that tells which a shard has.
        shards: the files, or folders, of a source, each read by itself; raises OSError or ValueError, naming it, where
            there are none.
        rows: the entries of a shard, in order, each row by `medsight.data.schema`.
        looks_like: whether a folder, or a file with this first record (empty where it holds no records), has this
            layout; for those who name none.
        Options: a dataclass of settings of its own, which checks them; its defaults must do without any.
        embeds: whether rows hold the bytes of pictures that were made from files, such as slices of volumes, so that
            rows are read again when any of these files has changed.
        general: whether files of other layouts may look like this one: those are asked first.

    Example:
        >>> from medsight.data.schema import conversation_row
        >>> def rows(shard, source):
        ...     for number, line in enumerate(open(shard), 1):
        ...         messages = [{"role": "user", "content": line}, {"role": "assistant", "content": "Yes."}]
        ...         yield Entry(f"{shard}, line {number}", conversation_row(str(number), [], messages, "train"))
        >>> Layout("mine", "conversations", lambda source: source.files((".mine",)), rows).name
        'mine'
    """

    name: str
    kind: str | Callable[[str], str]
    shards: Callable[[Source], list[str]]
    rows: Callable[[str, Source], Iterator[Entry]]
    looks_like: Callable[[Path, Mapping[str, Any]], bool] | None = None
    Options: "type[DataclassInstance] | None" = None
    embeds: bool = False
    general: bool = False


LAYOUTS: dict[str, Layout] = {}  # those registered so far; `find_layout` looks further


def register(layout: Layout) -> Layout:
    """Make a layout known by its name.

    Raises:
        ValueError: another one has the name.
    """
    if LAYOUTS.setdefault(layout.name, layout) is not layout:
        raise ValueError(f"data layout {layout.name!r} is registered already")
    return layout


@cache
def _register_shipped() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).with_name("layouts"))]):
        importlib.import_module(f"{__package__}.layouts.{module.name}")


def find_layout(name: str) -> Layout:
    """The layout of a name: a shipped one, or one that an installed package brings.

    Raises:
        ValueError: there is none (the nearest name is named), or an entry point leads to no `Layout`.
    """
    _register_shipped()
    if name in LAYOUTS:
        return LAYOUTS[name]
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == name:
            try:
                return register(entry.load())
            except (ImportError, AttributeError) as error:
                raise ValueError(f"entry point {name} = {entry.value}: expected a Layout ({error})") from error
    raise ValueError(f"data layout {name!r} is unknown: {nearest(name, layout_names())}")


def layout_names() -> list[str]:
    """The names of all layouts, those of installed packages too."""
    _register_shipped()
    return sorted({*LAYOUTS, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})
